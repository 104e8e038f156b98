"""Rollouts of one generation batch: the version they are pinned to, and their seeds; the log, read.

Letters in names: B rows of a rank's batch, T tokens, G completions of one prompt.

A rollout is one completion; with tools it has several turns, of which each continues the one before:
its prompt is the former prompt, what was sampled then, and the tool's answer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tink_rl.errors import TinkError

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
    gather: Callable[[list[Any]], list[Any]] = list
    """What this rank gives and all others do, in order of the ranks; the first turn is planned on all."""
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

    @staticmethod
    def keys_of(prompts: Sequence[list[int]]) -> list[int]:
        """A number for each prompt, by which equal ones are found over all ranks."""
        return [hash(tuple(prompt)) for prompt in prompts]  # of numbers: alike in every process

    def _find_repeated(self, prompts: Sequence[list[int]]) -> list[bool]:
        keys = self.keys_of(prompts)
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


# -- the log, read ----------------------------------------------------------------------------------


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
