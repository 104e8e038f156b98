"""The queue between HTTP threads and the backend: bounded, fair between models, with deadlines.

HTTP threads call `submit` and wait on the `Ticket` that it gives back; the backend's coroutines run in
one event loop in a thread of its own. All bookkeeping is done under one lock, by whichever side has
news, so that a request is admitted or refused at once and starts without a detour.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any

from tink_rl import errors
from tink_rl.types import Completion
from tink_rl.worker.backends import Backend, Delta
from tink_rl.worker.fair_queue import FairQueue
from tink_rl.worker.faults import for_client
from tink_rl.worker.ledger import RequestLedger, State
from tink_rl.worker.replay import KeptAnswers
from tink_rl.worker.work import GONE, GRACE_S, OVER, Job, Ticket, Work, too_late

_LOG = logging.getLogger(__name__)
_SWEEP_S = 0.2


class JobQueue:
    """Admits, orders, runs and ends jobs. Thread-safe."""

    def __init__(
        self,
        backend: Backend,
        ledger: RequestLedger,
        *,
        max_running: int,
        max_queued: int,
        max_waiting: int,
        replay_s: float,
    ) -> None:
        """Store; `start` starts the thread.

        Args:
            backend: Samples.
            ledger: Writes down every admission and end.
            max_running: Sequences at the backend at once; a larger request runs alone.
            max_queued: Requests that wait for their turn.
            max_waiting: Tickets out at once (each holds a thread of the HTTP server).
            replay_s: How long the answer of a request with a client's id is kept.
        """
        self._backend, self._ledger = backend, ledger
        self._max_running, self._max_queued = max_running, max_queued
        self._max_waiting = max_waiting
        self._lock = threading.Lock()
        self._quiet = threading.Condition(self._lock)
        self._queue: FairQueue[Job] = FairQueue()
        self._running: set[Job] = set()
        self._running_sequences = 0
        self._num_tickets = 0
        self._by_id: dict[str, Job] = {}
        self._kept = KeptAnswers(replay_s)
        self._numbers = itertools.count(1)
        self._seconds_each = 1.0
        self._closing = False
        self._loop: asyncio.AbstractEventLoop
        self._thread: threading.Thread | None = None
        self._background: set[asyncio.Task[None]] = set()
        self.on_success: Callable[[], None] = lambda: None
        """Called in the loop after every job that is done."""
        self.on_delta: Callable[[], None] = lambda: None
        """Called in the loop for every piece of a streamed answer."""

    # -- life -------------------------------------------------------------------------------------

    def start(self, *background: Coroutine[Any, Any, None]) -> None:
        """Start the loop's thread, and `background` coroutines in it that end with it."""
        self._loop = asyncio.new_event_loop()  # not before: processes of a fork would share it
        self._thread = threading.Thread(target=self._run_loop, name="tink-jobs", daemon=True)
        self._thread.start()
        for coroutine in (self._sweep(), *background):
            self._loop.call_soon_threadsafe(self._add_background, coroutine)

    def _run_loop(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    def _add_background(self, coroutine: Coroutine[Any, Any, None]) -> None:
        self._background.add(self._loop.create_task(coroutine))

    def run(self, coroutine: Coroutine[Any, Any, Any], timeout_s: float) -> Any:
        """Run a coroutine of the backend in the loop; its result.

        Raises:
            DeadlineExceeded: it did not end within `timeout_s`.
        """
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result(timeout_s)
        except TimeoutError as error:
            future.cancel()
            if isinstance(error, errors.TinkError):
                raise
            raise errors.DeadlineExceeded(
                f"the {self._backend.name} backend did not answer within {timeout_s:g} s"
            ) from error

    def begin_shutdown(self) -> None:
        """From now on every new request is refused with `RequestCancelled`."""
        with self._lock:
            self._closing = True

    @property
    def is_closing(self) -> bool:
        """Whether nothing new is taken."""
        return self._closing

    def drain(self, timeout_s: float) -> int:
        """Wait until all admitted requests ended, cancel the rest; how many were cancelled."""
        self.begin_shutdown()
        with self._lock:
            self._quiet.wait_for(self._is_quiet, timeout_s)
            rest = [*self._queue.items(), *self._running]
            for job in rest:
                self._cancel(
                    job,
                    errors.RequestCancelled(
                        "the worker stopped before the request was finished", code="shutting_down"
                    ),
                )
            self._quiet.wait_for(self._is_quiet, GRACE_S)
        return len(rest)

    def close(self) -> None:
        """End background work, backend and thread; call `drain` first. Idempotent."""
        if self._thread is None:
            return
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(10.0)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10.0)
        self._loop.close()
        self._thread = None

    async def _end(self) -> None:
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        await self._backend.close()

    def _is_quiet(self) -> bool:
        return not self._running and not len(self._queue)

    def depth(self) -> dict[str, int]:
        """How much waits and runs now."""
        with self._lock:
            return {
                "queued": len(self._queue),
                "running": len(self._running),
                "running_sequences": self._running_sequences,
                "connections": self._num_tickets,
            }

    # -- in ---------------------------------------------------------------------------------------

    def submit(self, work: Work, is_gone: Callable[[], bool] = lambda: False) -> Ticket:
        """Admit `work`, or join the job of the same `request_id`; a place to wait at.

        Raises:
            QueueFull: too much waits; `details["retry_after_s"]` says when to come back.
            BadRequest: the id was used for another request.
            RequestCancelled: nothing new is taken.
        """
        with self._lock:
            if self._closing:
                raise errors.RequestCancelled(
                    "the worker is stopping; send the request to another one", code="shutting_down"
                )
            known = self._find(work)
            if known is not None and known.completions is not None:
                return self._issue(known, True, is_gone)
            if self._num_tickets >= self._max_waiting:
                raise self._full(f"{self._num_tickets} requests wait for answers")
            if known is not None:
                return self._issue(known, True, is_gone)
            if len(self._queue) >= self._max_queued:
                raise self._full(f"{len(self._queue)} requests are queued")
            job = self._admit(work)
            ticket = self._issue(job, False, is_gone)
            self._start_next()
            return ticket

    def knows(self, request_id: str, fingerprint: str | None) -> bool:
        """Whether a request with this id and fingerprint would join an earlier one."""
        with self._lock:
            job = self._by_id.get(request_id) or self._kept.get(request_id)
            return job is not None and job.work.fingerprint == fingerprint

    def _find(self, work: Work) -> Job | None:
        if work.fingerprint is None:
            return None
        job = self._by_id.get(work.request_id) or self._kept.get(work.request_id)
        if job is not None and job.work.fingerprint != work.fingerprint:
            raise errors.BadRequest(
                f"request_id {work.request_id!r} was used for another request; a retry repeats the "
                "body, a new request takes a new id",
                code="request_id_reused",
            )
        return job

    def _admit(self, work: Work) -> Job:
        job = Job(number=next(self._numbers), work=work, deadline=time.monotonic() + work.timeout_s)
        job.started = time.monotonic()
        self._ledger.admitted(job.number, work.request_id)
        if work.fingerprint is not None:
            self._by_id[work.request_id] = job
        self._queue.push(job.key, job, work.request.num_sequences * work.request.params.max_tokens)
        return job

    def _issue(self, job: Job, is_joined: bool, is_gone: Callable[[], bool]) -> Ticket:
        ticket = Ticket(job, is_joined=is_joined, is_gone=is_gone, on_leave=self._leave)
        for delta in job.deltas:
            ticket.inbox.put(delta)
        if job.is_over:
            ticket.inbox.put(OVER)
        job.tickets.append(ticket)
        self._num_tickets += 1
        return ticket

    def _full(self, what: str) -> errors.QueueFull:
        rounds = (len(self._queue) + 1) / max(1, len(self._running))
        retry_after_s = min(30, max(1, math.ceil(rounds * self._seconds_each)))
        return errors.QueueFull(
            f"{what}; try again in {retry_after_s} s", retry_after_s=retry_after_s
        )

    def _leave(self, ticket: Ticket) -> None:
        with self._lock:
            job = ticket.job
            if ticket not in job.tickets:
                return
            job.tickets.remove(ticket)
            self._num_tickets -= 1
            if not job.tickets and not job.is_over and job.work.fingerprint is None:
                self._cancel(job, errors.RequestCancelled("the client went away"))
                self._start_next()  # it may have been the one that the others were too large beside

    # -- run --------------------------------------------------------------------------------------

    def _start_next(self) -> None:
        """Move what fits from the queue to the backend. Under the lock."""
        while (job := self._queue.peek()) is not None:
            size = job.work.request.num_sequences
            if self._running and self._running_sequences + size > self._max_running:
                return
            self._queue.pop()
            job.state = State.RUNNING
            self._running.add(job)
            self._running_sequences += size
            self._loop.call_soon_threadsafe(self._begin, job)

    def _begin(self, job: Job) -> None:
        job.task = self._loop.create_task(self._sample(job))
        job.task.add_done_callback(lambda task: self._settle(job, task))
        if job.cancel_error is not None:  # cancelled between the queue and here
            job.task.cancel()

    async def _sample(self, job: Job) -> list[Completion]:
        work = job.work
        async with asyncio.timeout(job.deadline - time.monotonic()):
            completions = await self._backend.sample(
                work.request,
                timeout_s=max(0.001, job.deadline - time.monotonic()),
                on_delta=(lambda delta: self._pass_on(job, delta)) if work.stream else None,
            )
        _check_complete(completions, work)
        return completions

    def _settle(self, job: Job, task: asyncio.Task[list[Completion]]) -> None:
        """The end of a job at the backend. Not in `_sample`: a task cancelled early never enters it."""
        error: BaseException | None
        if task.cancelled():
            error = job.cancel_error or errors.RequestCancelled("the request was cancelled")
        else:
            error = task.exception()
        state, error = _judge(job, error)
        with self._lock:
            self._running.discard(job)
            self._running_sequences -= job.work.request.num_sequences
            job.completions = task.result() if state is State.DONE else None
            self._finish(job, state, error)
            self._start_next()
        if state is State.DONE:
            self.on_success()

    def _pass_on(self, job: Job, delta: Delta) -> None:
        self.on_delta()
        with self._lock:
            job.deltas.append(delta)
            for ticket in job.tickets:
                ticket.inbox.put(delta)

    def _finish(self, job: Job, state: State, error: Exception | None) -> None:
        """Write down the end of a job that neither waits nor runs any more. Under the lock."""
        job.state, job.error, job.ended = state, error, time.monotonic()
        job.task = None
        self._ledger.ended(job.number, job.work.request_id, state)
        if job.work.fingerprint is not None:
            self._by_id.pop(job.work.request_id, None)
            if state is State.DONE:
                self._kept.put(job)
        if state is State.DONE:
            self._seconds_each += 0.1 * (job.ended - job.started - self._seconds_each)
        for ticket in job.tickets:
            ticket.inbox.put(OVER)
        self._quiet.notify_all()

    def _cancel(self, job: Job, error: errors.TinkError) -> None:
        """End a job early. Under the lock."""
        if job.is_over or job.cancel_error is not None:
            return
        if self._queue.remove(job.key, job):
            self._finish(job, State.CANCELLED, error)
            return
        job.cancel_error = error
        self._loop.call_soon_threadsafe(lambda: job.task and job.task.cancel())

    # -- now and then -----------------------------------------------------------------------------

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_S)
            with self._lock:
                self._sweep_once(time.monotonic())

    def _sweep_once(self, now: float) -> None:
        for job in self._queue.items():
            if now > job.deadline:
                self._queue.remove(job.key, job)
                self._finish(job, State.EXPIRED, too_late(job))
        self._start_next()  # what is behind an expired one may fit
        for job in [*self._queue.items(), *self._running]:
            for ticket in job.tickets:
                if ticket.is_gone():
                    ticket.inbox.put(GONE)
        self._kept.discard_old(now)


def _judge(job: Job, error: BaseException | None) -> tuple[State, Exception | None]:
    """The end that `error` means, and what the client is told."""
    if error is None:
        return State.DONE, None
    if isinstance(error, errors.RequestCancelled):
        return State.CANCELLED, error
    if isinstance(error, TimeoutError):
        return State.EXPIRED, error if isinstance(error, errors.TinkError) else too_late(job)
    if isinstance(error, errors.TinkError):
        told = for_client(error, errors.Blame.SAMPLING)
        return State.REJECTED if told.status < 500 else State.FAILED, told
    _LOG.error("request %s: the backend raised", job.work.request_id, exc_info=error)
    return State.FAILED, errors.TinkError(
        f"internal error ({type(error).__name__}); the worker's log has more"
    )


def _check_complete(completions: list[Completion], work: Work) -> None:
    found = [(c.prompt_index, c.index) for c in completions]
    num_prompts, n = len(work.request.prompts), work.request.params.n
    expected = [(p, i) for p in range(num_prompts) for i in range(n)]
    if found != expected:
        raise errors.BackendError(
            f"{len(found)} completions came back, or in another order; expected {num_prompts} x {n}"
        )
