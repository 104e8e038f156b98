"""Every admitted request ends once: the states, who counts them, and the ledger on disk."""

from __future__ import annotations

import json
import logging
import threading
import time
import uuid
from collections import Counter
from enum import StrEnum
from pathlib import Path
from typing import IO

from tink_rl.errors import ConfigError

_LOG = logging.getLogger(__name__)


class State(StrEnum):
    """Where an admitted request is; the last five are ends, and it reaches exactly one of them."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    """Every completion was sampled."""
    REJECTED = "rejected"
    """The backend found the request at fault."""
    FAILED = "failed"
    """The backend, or this worker, was at fault."""
    CANCELLED = "cancelled"
    """Its client went away, or the worker stopped."""
    EXPIRED = "expired"
    """It was not finished by its deadline."""


ENDS = (State.DONE, State.REJECTED, State.FAILED, State.CANCELLED, State.EXPIRED)


class RequestLedger:
    """Counts admissions and ends, and writes both to the ledger. Thread-safe."""

    def __init__(self, ledger: str | Path | None = None) -> None:
        """Open the ledger for appending.

        Raises:
            ConfigError: it cannot be written.
        """
        self._lock = threading.Lock()
        self._life = uuid.uuid4().hex[:12]  # job numbers begin at 1 again in the same file
        self.num_admitted = 0
        self.ends: Counter[State] = Counter()
        self._stream: IO[str] | None = None
        if ledger is not None:
            try:
                self._stream = Path(ledger).expanduser().open("a", buffering=1)
            except OSError as error:
                raise ConfigError(
                    f"--ledger {str(ledger)!r} cannot be written: {error.strerror}"
                ) from error

    def admitted(self, job: int, request_id: str) -> None:
        """A request was taken into the queue."""
        with self._lock:
            self.num_admitted += 1
            self._write("admitted", job, request_id)

    def ended(self, job: int, request_id: str, state: State) -> None:
        """An admitted request reached its end."""
        assert state in ENDS, state
        with self._lock:
            self.ends[state] += 1
            self._write(state, job, request_id)

    def close(self) -> None:
        """Close the ledger; idempotent."""
        with self._lock:
            if self._stream is not None:
                self._stream.close()
            self._stream = None

    def _write(self, event: str, job: int, request_id: str) -> None:
        if self._stream is None:
            return
        try:
            line = {"time": time.time(), "life": self._life, "event": event, "job": job}
            line["request_id"] = request_id
            self._stream.write(json.dumps(line) + "\n")
        except OSError:  # a full disk must not stop the answers
            _LOG.exception("the ledger cannot be written any more; it ends here")
            self._stream = None
