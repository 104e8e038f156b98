"""Whether a trainer's tokenizer and the checkpoint's mean the same tokens by the same ids."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from tink_rl.errors import BaseMismatch

logger = logging.getLogger("tink_rl")


def check_vocabulary(tokenizer: Any, directory: Path, num_rows: int) -> None:
    """Raise unless `tokenizer` agrees with the one of the checkpoint in `directory`.

    Args:
        tokenizer: The trainer's; one without `get_vocab` is not looked at.
        directory: Of the checkpoint that is served.
        num_rows: Of its embedding; more rows than tokens are usual.

    Raises:
        BaseMismatch: a token has another id there, or an id for which the base has no row.
    """
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a processor holds one
    if not hasattr(tokenizer, "get_vocab"):
        return
    served = _vocabulary_of(directory)
    if served is None:
        logger.info("no tokenizer lies in %s: the trainer's is not compared with it", directory)
        return
    ours: dict[str, int] = tokenizer.get_vocab()
    new = {token: number for token, number in ours.items() if token not in served}
    moved = {t: n for t, n in ours.items() if served.get(t, n) != n}
    if moved:
        token = min(moved, key=lambda t: moved[t])
        raise _mismatch(
            f"token {token!r} is id {moved[token]} in the trainer and {served[token]} there "
            f"({len(moved)} of {len(ours)} tokens have another id); load the tokenizer of {directory}",
            directory,
        )
    beyond = {token: number for token, number in new.items() if number >= num_rows}
    if beyond:
        token = min(beyond, key=lambda t: beyond[t])
        raise _mismatch(
            f"the trainer's has {token!r} as id {beyond[token]} ({len(beyond)} such tokens), and the served "
            f"base has {num_rows} rows; use tokens that it has (tokenizer.pad_token = tokenizer.eos_token), "
            "or resize the model, save model and tokenizer, serve that directory and load it in the trainer",
            directory,
        )
    if new:
        token = min(new, key=lambda t: new[t])
        logger.warning(
            "the trainer's tokenizer has %d tokens that the served checkpoint's has not, first %r (id %d): "
            "they can be sampled, but the server cannot read or write them as text; save the tokenizer "
            "beside the model that is served",
            *(len(new), token, new[token]),
        )


def _vocabulary_of(directory: Path) -> dict[str, int] | None:
    from transformers import AutoTokenizer

    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")
    if not any((directory / name).is_file() for name in names):
        return None
    try:
        found: dict[str, int] = AutoTokenizer.from_pretrained(directory).get_vocab()
    except (OSError, ValueError, ImportError, NotImplementedError) as error:
        logger.warning("the tokenizer in %s cannot be read (%s); not compared", directory, error)
        return None
    return found


def _mismatch(text: str, directory: Path) -> BaseMismatch:
    return BaseMismatch(
        f"the tokenizers of trainer and served checkpoint differ: {text}", served=str(directory)
    )
