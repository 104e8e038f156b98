"""A request in the queue, and the places at which clients wait for it."""

from __future__ import annotations

import asyncio
import queue
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from tink_rl import errors
from tink_rl.types import Completion
from tink_rl.worker.backends import Admitted, Delta
from tink_rl.worker.ledger import State

GRACE_S = 2.0
"""A backend has this long to let go of a request whose deadline is over."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is to be sampled, checked already."""

    request_id: str
    request: Admitted
    timeout_s: float
    fingerprint: str | None = None
    """Set if the client gave the `request_id`: a retry with the same fingerprint joins."""
    stream: bool = False


@dataclass(eq=False, kw_only=True)
class Job:
    """One admitted request; guarded by the queue's lock."""

    number: int
    work: Work
    deadline: float
    state: State = State.QUEUED
    tickets: list[Ticket] = field(default_factory=list)
    deltas: list[Delta] = field(default_factory=list)
    task: asyncio.Task[list[Completion]] | None = None
    completions: list[Completion] | None = None
    error: Exception | None = None
    started: float = 0.0
    ended: float = 0.0
    cancel_error: errors.TinkError | None = None

    @property
    def is_over(self) -> bool:
        """Whether it reached its end."""
        return self.state not in (State.QUEUED, State.RUNNING)

    @property
    def key(self) -> str:
        """Whose share it takes."""
        return self.work.request.model_id or ""


class _Signal:
    """What a ticket's inbox holds beside deltas."""


OVER, GONE = _Signal(), _Signal()


class Ticket:
    """One client's place at a job. Used by one thread; `leave` it in any case."""

    def __init__(
        self,
        job: Job,
        *,
        is_joined: bool,
        is_gone: Callable[[], bool],
        on_leave: Callable[[Ticket], None],
    ) -> None:
        self.job = job
        self.is_joined = is_joined
        """Whether the job was there already: a retry."""
        self.is_gone = is_gone
        """Whether the client went away; called by the queue now and then."""
        self.inbox: queue.SimpleQueue[Delta | _Signal] = queue.SimpleQueue()
        self._on_leave = on_leave

    def __enter__(self) -> Ticket:
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()

    def result(self) -> list[Completion]:
        """Wait for all completions.

        Raises:
            RequestCancelled: the client went away, or nobody was left.
            DeadlineExceeded, RequestCancelled: what the queue says.
            TinkError: what the backend raised.
        """
        for _ in self.deltas():
            pass
        assert self.job.completions is not None
        return self.job.completions

    def deltas(self) -> Iterator[Delta]:
        """The pieces as they come, from the first on; ends when `result` is there. Raises as `result`."""
        while True:
            try:
                item = self.inbox.get(timeout=self._patience_s())
            except queue.Empty:
                raise too_late(self.job) from None
            if isinstance(item, Delta):
                yield item
            elif item is GONE:
                raise errors.RequestCancelled("the client went away")
            else:
                self.inbox.put(OVER)  # for whoever asks again
                break
        if self.job.error is not None:
            raise self.job.error

    def leave(self) -> None:
        """Give up the place; a job that nobody waits for is cancelled, unless a retry may join it."""
        self._on_leave(self)

    def _patience_s(self) -> float:
        return max(0.0, self.job.deadline - time.monotonic()) + 2 * GRACE_S


def too_late(job: Job) -> errors.DeadlineExceeded:
    """What the clients of a job are told whose deadline is over."""
    return errors.DeadlineExceeded(
        f"the request was not finished within its {job.work.timeout_s:g} s; ask for less, or give "
        "a larger timeout_s"
    )
