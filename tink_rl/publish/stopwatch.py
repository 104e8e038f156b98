"""Seconds of a publish, by phase."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from tink_rl.errors import TinkError
from tink_rl.types import Phase


class Stopwatch:
    """Seconds per phase, and which phase is under way."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self.seconds: dict[str, float] = {}
        self.phase = ""

    @property
    def total(self) -> float:
        return time.perf_counter() - self._start

    @contextmanager
    def naming_phase(self) -> Iterator[None]:
        """What fails in this block says in its details in which phase."""
        try:
            yield
        except TinkError as error:
            error.details.setdefault("phase", self.phase)
            raise

    @contextmanager
    def __call__(self, phase: Phase) -> Iterator[None]:
        self.phase = phase.value
        begin = time.perf_counter()
        try:
            yield
        finally:
            took = time.perf_counter() - begin
            self.seconds[phase.value] = self.seconds.get(phase.value, 0.0) + took
