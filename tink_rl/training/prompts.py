"""One look at a trainer's data before its first step: whether every prompt can be sampled at all."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from typing import Any

from tink_rl.errors import ConfigError
from tink_rl.training.trl_names import RolloutTrainer
from tink_rl.types import ServerStatus

logger = logging.getLogger("tink_rl")
_BATCH = 256
_STREAM_ROWS = 1024
"""Rows of a stream that are looked at: it may have no end."""
_LOOK_S = 60.0
"""Longest look at one data set; what was not seen is refused when it is sampled, with a checkpoint."""
_SAY_EVERY_S = 10.0


def check_prompts(trainer: RolloutTrainer, status: ServerStatus, max_tokens: int) -> None:
    """Tokenize the prompts of `trainer`'s data sets as it does itself, and see whether they fit.

    A data set is looked at whole, for a minute at most; of a stream the first rows. One whose prompts
    come from an environment's `reset()` is not looked at.

    Raises:
        ConfigError: names the first row that cannot be sampled, its length, and what fits.
    """
    if getattr(trainer, "environment_factories", None) is not None:
        return
    for name, dataset in _datasets(trainer):
        _check_dataset(trainer, name, dataset, status, max_tokens)


def _datasets(trainer: RolloutTrainer) -> Iterator[tuple[str, Any]]:
    """The data of training, and of evaluation if training evaluates."""
    yield "train_dataset", trainer.train_dataset
    args, found = trainer.args, trainer.eval_dataset
    evaluates = getattr(args.eval_strategy, "value", args.eval_strategy) != "no"
    if found is None or not (evaluates or args.eval_on_start):
        return
    if isinstance(found, dict):
        yield from ((f"eval_dataset[{key!r}]", dataset) for key, dataset in found.items())
    else:
        yield "eval_dataset", found


def _check_dataset(
    trainer: RolloutTrainer, name: str, dataset: Any, status: ServerStatus, max_tokens: int
) -> None:
    start = said = time.monotonic()
    num_rows = len(dataset) if hasattr(dataset, "__len__") else None
    columns = getattr(dataset, "column_names", None)  # a stream may not know them
    if columns and "prompt" not in columns:
        raise ConfigError(
            f"{name} has the columns {', '.join(columns)} and no 'prompt', which the trainer reads; rename "
            f"one: dataset.rename_column({columns[0]!r}, 'prompt')"
        )
    seen = 0
    for prompts in _batches(dataset, num_rows):
        for i, ids in enumerate(trainer._tokenize_prompts(prompts)[0]):
            _check_row(f"{name}[{seen + i}]", ids, status, max_tokens)
        seen += len(prompts)
        now = time.monotonic()
        if now - said >= _SAY_EVERY_S:
            said = now
            logger.info("%s: %d of %s prompts fit so far", name, seen, num_rows or "a stream's")
        if now - start >= _LOOK_S and seen != num_rows:
            break
    if seen != num_rows:
        logger.info(
            "%s: looked at the first %d of %s prompts, all fit; one that does not ends the run when it is "
            "sampled, with a checkpoint",
            name,
            seen,
            "a stream's" if num_rows is None else num_rows,
        )


def _batches(dataset: Any, num_rows: int | None) -> Iterator[list[Any]]:
    """The prompts, a few hundred at a time."""
    if num_rows is None:
        batch = []
        for _, row in zip(range(_STREAM_ROWS), dataset, strict=False):
            batch.append(row["prompt"])
            if len(batch) == _BATCH:
                yield batch
                batch = []
        if batch:
            yield batch
        return
    for first in range(0, num_rows, _BATCH):
        last = min(first + _BATCH, num_rows)
        rows = dataset[first:last] if hasattr(dataset, "column_names") else None
        if isinstance(rows, Mapping):
            yield list(rows["prompt"])
        else:
            yield [dataset[i]["prompt"] for i in range(first, last)]


def _check_row(where: str, ids: list[int], status: ServerStatus, max_tokens: int) -> None:
    longest = status.max_model_len - max_tokens
    if not ids:
        raise ConfigError(f"{where}: its prompt has no tokens; leave that row out")
    if len(ids) > longest:
        raise ConfigError(
            f"{where}: its prompt has {len(ids)} tokens, and {longest} fit: the server takes "
            f"{status.max_model_len}, of which max_completion_length={max_tokens} are the completion's; "
            "shorten or leave out such rows, lower max_completion_length, or restart the server with a "
            "larger --max-model-len"
        )
    if status.vocab_size is not None and max(ids) >= status.vocab_size:
        raise ConfigError(
            f"{where}: its prompt holds token id {max(ids)}, and the served vocabulary has ids from 0 to "
            f"{status.vocab_size - 1}; give the trainer the tokenizer that the served model was saved "
            "with, or save the model with its resized embedding and serve that"
        )
