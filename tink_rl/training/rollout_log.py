"""The log of rollouts, written: a line per completion, with everything that samples it again."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tink_rl.training.rollouts import RolloutBatch, Turn, read_rollouts
from tink_rl.training.trl_names import Tokenizer
from tink_rl.types import ROLLOUT_FILE, PolicyVersion


class RolloutLog:
    """Appends rollouts to `rollouts.jsonl` of a run (`rollouts-rank1.jsonl` on rank 1, ...)."""

    def __init__(
        self, directory: str | Path, tokenizer: Tokenizer, *, rank: int, sampling: dict[str, Any]
    ):
        """Store; nothing is written.

        Args:
            directory: The run's output_dir.
            tokenizer: Turns ids into the texts of the log.
            rank: Each rank writes its own file: nothing is gathered for the log's sake.
            sampling: Keyword arguments of `VLLMClient.generate` that the rollouts are sampled with.
        """
        name = ROLLOUT_FILE if rank == 0 else f"rollouts-rank{rank}.jsonl"
        self.path = Path(directory) / name
        self._tokenizer, self._sampling = tokenizer, _worth_logging(sampling)
        self._num_others: int | None = None
        """How many rows of the file this object did not write; None: it wrote none."""

    def write(
        self, batch: RolloutBatch, digest: str, scores: Sequence[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """Append one line per rollout and give the rows back.

        Args:
            batch: What was sampled.
            digest: Of the version that sampled it.
            scores: Per row what the trainer made of it: `reward`, `rewards`, `advantage`.
        """
        keys = [tuple(turns[0].prompt_ids) for turns in batch.turns]
        prompts = {key: self._tokenizer.decode(list(key)) for key in set(keys)}  # once a group
        rows = [
            self._row(batch, row, digest, prompts[key], score)
            for row, (key, score) in enumerate(zip(keys, scores, strict=True))
        ]
        if self._num_others is None:
            self._keep(lambda row, is_own: True)
        with self.path.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        return rows

    def begin(self, step: int) -> None:
        """Training begins: from step 0 with a new log, resumed after the rows before its step.

        What was written here before (an evaluation of the base) belongs to a run from step 0.
        """
        self._keep(lambda row, is_own: _is_before(row, step) if step else is_own)

    def _keep(self, is_kept: Callable[[dict[str, Any], bool], bool]) -> None:
        """Drop the other rows, and a line that was left half written; told which rows are our own."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".tmp")
        num_others = 0
        with partial.open("w") as file:
            for i, row in enumerate(read_rollouts(self.path) if self.path.is_file() else ()):
                is_own = self._num_others is not None and i >= self._num_others
                if is_kept(row, is_own):
                    file.write(json.dumps(row) + "\n")
                    num_others += not is_own
        partial.replace(self.path)
        self._num_others = num_others

    def _row(
        self, batch: RolloutBatch, row: int, digest: str, prompt: str, score: dict[str, Any]
    ) -> dict[str, Any]:
        turns = batch.turns[row]
        sampled = PolicyVersion.parse(batch.model)
        group, index = batch.place(row)
        first, last = turns[0], turns[-1]
        everything = [*last.prompt_ids, *last.completion_ids][len(first.prompt_ids) :]
        return {
            "step": batch.step,
            "phase": batch.phase,
            "draw": batch.draw,
            "group": group,
            "index": index,
            "policy": sampled.policy,
            "version": sampled.version,
            "digest": digest,
            "prompt": prompt,
            "completion": self._tokenizer.decode(everything, skip_special_tokens=True),
            **score,
            "prompt_ids": first.prompt_ids,
            "turns": [_turn_json(before, turn) for before, turn in _with_former(turns)],
            "sampling": self._sampling,
        }


def _is_before(row: dict[str, Any], step: int) -> bool:
    """Whether `row` was sampled before the checkpoint of `step`, which is saved after its evaluation."""
    return bool(row["step"] < step or (row["step"] == step and row["phase"] == "eval"))


def _with_former(turns: Sequence[Turn]) -> Iterator[tuple[Turn | None, Turn]]:
    yield from zip([None, *turns], turns, strict=False)


def _turn_json(former: Turn | None, turn: Turn) -> dict[str, Any]:
    """`inserted_ids`: what came between the former turn and this one (a tool's answer)."""
    known = 0 if former is None else len(former.prompt_ids) + len(former.completion_ids)
    return {
        "inserted_ids": [] if former is None else turn.prompt_ids[known:],
        "completion_ids": turn.completion_ids,
        "logprobs": None if turn.logprobs is None else _numbers(turn.logprobs),
        "seed": turn.seed,
        **({} if turn.max_tokens is None else {"max_tokens": turn.max_tokens}),
    }


def _numbers(values: Sequence[float]) -> list[float | None]:
    """Rounded to what float32 holds; None (JSON's null) for a token that vLLM could not score."""
    return [None if x != x else round(x, 7) for x in values]  # no call each: thousands in a step


def _worth_logging(sampling: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in sampling.items() if value is not None}


def scores_of(
    names: Sequence[str], weights: Sequence[float], rewards_BF: Iterable[Sequence[float]]
) -> list[dict[str, Any]]:
    """`reward` (the weighted sum) and `rewards` by name of each row; None where nothing scored it."""
    scores = []
    for values in rewards_BF:
        named = {n: None if math.isnan(v) else v for n, v in zip(names, values, strict=True)}
        weighted = [w * v for w, v in zip(weights, values, strict=True) if not math.isnan(v)]
        scores.append({"reward": sum(weighted) if weighted else None, "rewards": named})
    return scores
