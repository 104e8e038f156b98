"""Batches of the data loader ahead of their turn: what will be generated next, and in which optimizer step.

transformers' `Trainer` draws the batches of one optimizer step in `get_batch_samples`, each rank for
itself. Here it draws them from a queue, which may be filled further than the step under way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tink_rl.training.trl_names import RolloutTrainer, generate_every


@dataclass(frozen=True, kw_only=True)
class Upcoming:
    """One generation batch of this rank, named as `RolloutBatch` names it."""

    step: int
    """Optimizer steps before it."""
    draw: int
    """Generation batches of the same step before it."""
    inputs: list[dict[str, Any]]
    """Rows of the data set, as the trainer will see them."""


class BatchFeed:
    """Stands between one trainer and the iterator of its data loader."""

    def __init__(self, trainer: RolloutTrainer) -> None:
        """Put itself in place; draws nothing before the trainer does."""
        self._trainer = trainer
        self._source: Iterator[Any] = iter(())
        self._drawn: deque[Any] = deque()
        """Drawn and not yet handed out: of steps after the one under way."""
        self._window: list[Any] = []
        """What was handed out for the optimizer step under way."""
        self._first = self._step = 0
        """The window's first micro-batch, and its step, counted as the trainer does."""
        draw = trainer.get_batch_samples
        trainer.get_batch_samples = lambda source, *rest: draw(self._fed_by(source), *rest)

    def _fed_by(self, source: Iterator[Any]) -> Iterator[Any]:
        if source is not self._source:  # an epoch begins
            self._source = source
            self._drawn.clear()
        self._window = []
        self._first, self._step = self._trainer._step, self._trainer.state.global_step
        return self._hand_out()

    def _hand_out(self) -> Iterator[Any]:
        while self._draw(1):
            self._window.append(self._drawn.popleft())
            yield self._window[-1]

    def _draw(self, count: int) -> bool:
        """Draw until `count` batches wait; whether so many are left in this epoch."""
        while len(self._drawn) < count:
            try:
                self._drawn.append(next(self._source))
            except StopIteration:
                return False
        return True

    def upcoming(self, last_step: int) -> Iterator[Upcoming]:
        """The generation batches from the step under way to `last_step`, as far as this epoch has them.

        Every rank must ask for the same `last_step`: some data loaders draw for all ranks together.
        """
        per_step = self._trainer.args.gradient_accumulation_steps
        every = generate_every(self._trainer)
        self._draw((last_step - self._step) * per_step)
        draws: dict[int, int] = {}
        for place, inputs in enumerate((*self._window, *self._drawn)):
            ahead = place - len(self._window)
            step = self._step if ahead < 0 else self._step + 1 + ahead // per_step
            if (self._first + place) % every or step > last_step:
                continue
            draws[step] = draws.get(step, -1) + 1
            yield Upcoming(step=step, draw=draws[step], inputs=inputs)
