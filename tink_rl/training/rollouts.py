"""Rollouts of one generation batch: the version they are pinned to, their seeds, and their log.

Letters in names: B rows of a rank's batch, T tokens, G completions of one prompt.

A rollout is one completion; with tools it has several turns, of which each continues the one before:
its prompt is the former prompt, what was sampled then, and the tool's answer.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tink_rl.errors import TinkError
from tink_rl.training.trl_names import Tokenizer
from tink_rl.types import ROLLOUT_FILE, PolicyVersion

LANES = 8
"""Requests of one turn: prompts are dealt to so many, and a request has one seed.

Prompts of one lane share the stream of random numbers (each of a group's completions has its own). A
prompt that stands in several groups has a lane in each.
One request per prompt would share none, but costs 70 ms of a 106 ms rollout of 16 x 8 short
completions on two cores; eight requests cost less than 10."""


def derive_seed(*parts: int | str) -> int:
    """A seed of 48 bits (exact in every JSON reader) that depends on all `parts`."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "big")


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One prompt and the rows that are sampled from it: `len(rows)` completions, the k-th from `seed + k`."""

    prompt_ids: list[int]
    rows: list[int]
    seed: int | None
    max_tokens: int | None = None
    """Instead of the settings', where a history has grown so long that those would not fit any more."""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """What one request sampled for one rollout. `prompt_ids` [T] holds all that came before."""

    prompt_ids: list[int]
    completion_ids: list[int]
    logprobs: list[float] | None
    seed: int | None
    max_tokens: int | None = None
    """See `Ask.max_tokens`."""


@dataclass(kw_only=True)
class RolloutBatch:
    """The rollouts that this rank samples in one generation batch, all from the version `model`.

    Example: `RolloutBatch(run_seed=0, phase="train", step=17, draw=0, rank=0, num_generations=8)`
    """

    run_seed: int | None = None
    """None: requests carry no seed, and vLLM draws one."""
    phase: str = "train"
    """"train" or "eval"."""
    step: int = 0
    """Optimizer steps before this batch."""
    draw: int = 0
    """How many batches of this phase and step came before."""
    rank: int = 0
    num_generations: int = 1
    """G; group and index of a row follow from its place in the batch over all ranks, so that one
    process and two draw the same seeds."""
    model: str = ""
    """`policy@N`, set by the first turn; later turns are sampled from it whatever is published."""
    gather: Callable[[list[int]], list[int]] = list
    """Numbers of this rank and of all others, in order of the ranks; the first turn is planned on all."""
    turns: list[list[Turn]] = field(default_factory=list)
    """By row, then by turn."""
    num_turns: int = 0
    _is_repeated: list[bool] = field(default_factory=list)
    """By row: its prompt stands in another group of the batch too."""

    def place(self, row: int) -> tuple[int, int]:
        """`(group, index in it)` of a local row, counted over all ranks."""
        return divmod(self.rank * len(self.turns) + row, self.num_generations)

    def plan(self, prompts: Sequence[list[int]]) -> list[Ask]:
        """What to ask for the next turn of the rollouts that `prompts` begin or continue.

        Raises:
            TinkError: a later prompt continues no rollout of this batch.
        """
        if self.num_turns == 0:
            self.turns = [[] for _ in prompts]
            if self.run_seed is not None:
                self._is_repeated = self._find_repeated(prompts)
            return self._first_turn(prompts)
        num_lanes = max(1, LANES // self.num_generations)
        return [
            Ask(prompt_ids=prompt, rows=[row], seed=self._seed(row, num_lanes))
            for row, prompt in zip(self._continued(prompts), prompts, strict=True)
        ]

    def _find_repeated(self, prompts: Sequence[list[int]]) -> list[bool]:
        keys = [hash(tuple(prompt)) for prompt in prompts]  # of numbers: alike in every process
        groups: dict[int, set[int]] = {}
        for place, key in enumerate(self.gather(keys)):
            groups.setdefault(key, set()).add(place // self.num_generations)
        return [len(groups[key]) > 1 for key in keys]

    def _first_turn(self, prompts: Sequence[list[int]]) -> list[Ask]:
        asks: list[Ask] = []
        last_group = -1
        for row, prompt in enumerate(prompts):
            group, _ = self.place(row)
            if group == last_group and asks[-1].prompt_ids == prompt:
                asks[-1].rows.append(row)
            else:
                asks.append(Ask(prompt_ids=prompt, rows=[row], seed=self._seed(row, LANES)))
            last_group = group
        return asks

    def _seed(self, row: int, num_lanes: int) -> int | None:
        if self.run_seed is None:
            return None
        group, index = self.place(row)
        # One prompt under one seed is one completion: groups of the same prompt must not share a lane.
        lane = LANES + group if self._is_repeated[row] else group % num_lanes
        parts = (self.run_seed, self.phase, self.step, self.draw, self.num_turns, lane)
        return derive_seed(*parts) + index

    def _continued(self, prompts: Sequence[list[int]]) -> list[int]:
        """The row that each prompt continues: the longest history that begins it, in TRL's order."""
        open_rows = [r for r, turns in enumerate(self.turns) if len(turns) == self.num_turns]
        rows: list[int] = []
        for prompt in prompts:
            found = [r for r in open_rows if _continues(prompt, self.turns[r][-1])]
            if not found:
                raise TinkError(
                    f"turn {self.num_turns + 1}: a prompt of {len(prompt)} tokens continues no rollout "
                    "of this batch; turns must extend what was sampled, token by token"
                )
            row = max(found, key=lambda r: (_length(self.turns[r][-1]), -r))
            open_rows = [r for r in open_rows if r != row]
            rows.append(row)
        return rows

    def add(self, asks: Sequence[Ask], answers: Sequence[Sequence[dict[str, Any]]]) -> None:
        """Keep what a turn sampled: for each ask one answer per row."""
        for ask, rows in zip(asks, answers, strict=True):
            for k, (row, answer) in enumerate(zip(ask.rows, rows, strict=True)):
                self.turns[row].append(
                    Turn(
                        prompt_ids=ask.prompt_ids,
                        completion_ids=list(answer["completion_ids"]),
                        logprobs=_sampled(answer["logprobs"]),
                        seed=None if ask.seed is None else ask.seed + k,
                        max_tokens=ask.max_tokens,
                    )
                )
        self.num_turns += 1


def _length(turn: Turn) -> int:
    return len(turn.prompt_ids) + len(turn.completion_ids)


def _continues(prompt: list[int], turn: Turn) -> bool:
    head = len(turn.prompt_ids)
    # The short part first: rows of a group differ there.
    return prompt[head : _length(turn)] == turn.completion_ids and prompt[:head] == turn.prompt_ids


def _sampled(logprobs: list[list[float]] | None) -> list[float] | None:
    """Of each token's logprobs the first, as TRL takes them."""
    return None if logprobs is None else [values[0] for values in logprobs]


# -- the log ---------------------------------------------------------------------------------------


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
        rows = [self._row(batch, row, digest, score) for row, score in enumerate(scores)]
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
        self, batch: RolloutBatch, row: int, digest: str, score: dict[str, Any]
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
            "prompt": self._tokenizer.decode(first.prompt_ids),
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
    known = 0 if former is None else _length(former)
    return {
        "inserted_ids": [] if former is None else turn.prompt_ids[known:],
        "completion_ids": turn.completion_ids,
        "logprobs": None if turn.logprobs is None else [_number(x) for x in turn.logprobs],
        "seed": turn.seed,
        **({} if turn.max_tokens is None else {"max_tokens": turn.max_tokens}),
    }


def _number(value: float) -> float | None:
    """Rounded to what float32 holds; None (JSON's null) for a token that vLLM could not score."""
    return None if math.isnan(value) else round(value, 7)


def _worth_logging(sampling: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in sampling.items() if value is not None}


def read_rollouts(*paths: str | Path) -> Iterator[dict[str, Any]]:
    """The rows of rollout logs, in order; a line that a killed run left half written ends its file."""
    for path in paths:
        with Path(path).open() as file:
            for line in file:
                if not line.endswith("\n"):
                    break
                yield json.loads(line)


def requests_of(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Keyword arguments of `VLLMClient.generate` that sample each turn of a logged rollout again.

    They name the version that sampled it. Where that is not served any more, publish a checkpoint of
    the same digest and give its name as `model`: `client.generate(**{**request, "model": name})`.
    """
    requests = []
    known = list(row["prompt_ids"])
    for turn in row["turns"]:
        known += turn["inserted_ids"]
        options = dict(row["sampling"].get("generation_kwargs") or {})
        if turn["seed"] is not None:
            options["seed"] = turn["seed"]
        if "max_tokens" in turn:
            options["max_tokens"] = turn["max_tokens"]
        requests.append(
            {
                **row["sampling"],
                "prompts": [list(known)],
                "n": 1,
                "model": f"{row['policy']}@{row['version']}",
                "generation_kwargs": options,
            }
        )
        known += turn["completion_ids"]
    return requests


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
