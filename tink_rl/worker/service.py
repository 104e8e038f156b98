"""The worker as one object: backend, adapters, queue, tokens, readiness and figures."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from tink_rl import errors
from tink_rl.errors import Blame
from tink_rl.sampling.completions import check_fits
from tink_rl.worker.auth import Tokens
from tink_rl.worker.backends import Admitted, Backend, ModelInfo
from tink_rl.worker.faults import translated
from tink_rl.worker.jobs import JobQueue
from tink_rl.worker.ledger import RequestLedger
from tink_rl.worker.metrics import Metrics
from tink_rl.worker.options import WorkerOptions, load_options
from tink_rl.worker.readiness import Readiness
from tink_rl.worker.schemas import SampleRequest
from tink_rl.worker.work import Ticket, Work

_MODELS_TIMEOUT_S = 10.0
_MAX_REGISTRATIONS = 4
"""Registrations at once; each reads and writes up to half a GiB."""
_MAX_LISTINGS = 4


class Adapters(Protocol):
    """Who keeps the registered adapters; called from many threads. `VLLMBackend` is one."""

    def register(self, adapter_id: str, lora_path: str) -> Any:
        """Register the directory under the id."""
        ...

    def unregister(self, adapter_id: str) -> Any:
        """Forget the id."""
        ...

    def list(self, details: bool = False) -> Sequence[dict[str, Any]]:
        """All of them: `adapter_id`, `lora_path`, and with `details` also `version` and `digest`."""
        ...


class WorkerService:
    """Everything behind the routes. `start` it, then use it from any thread, then `stop` it."""

    def __init__(
        self,
        backend: Backend,
        adapters: Adapters | None,
        *,
        options: WorkerOptions | None = None,
        tokens: Tokens | None = None,
        readiness: Readiness | None = None,
        on_stop: Callable[[], None] = lambda: None,
    ) -> None:
        """Put the parts together; starts nothing.

        Args:
            backend: Samples.
            adapters: Keeps adapters; None where the backend has none.
            options: Limits; from the environment if None.
            tokens: Who may do what; from the options' files if None.
            readiness: For tests.
            on_stop: Called once by the `stop` that ends a started worker: closes what `backend` leaves
                to its owner.

        Raises:
            ConfigError: an option, a token file or the ledger is not usable.
        """
        self.options = options or load_options()
        self.tokens = tokens or Tokens.from_options(self.options)
        self.admin_token_file = self.tokens.admin_file
        self.backend, self._adapters = backend, adapters
        self.ledger = RequestLedger(self.options.ledger)
        self.queue = JobQueue(
            backend,
            self.ledger,
            max_running=self.options.max_running,
            max_queued=self.options.max_queued,
            max_waiting=self.options.max_waiting,
            replay_s=self.options.replay_s,
        )
        self.readiness = readiness or Readiness(backend)
        self.queue.on_success = self.readiness.note_success
        self.queue.on_delta = self.readiness.note_delta
        self.metrics = Metrics(self.ledger, self.queue.depth, lambda: self.readiness.reason is None)
        self._registering = threading.BoundedSemaphore(_MAX_REGISTRATIONS)
        self._listing = threading.BoundedSemaphore(_MAX_LISTINGS)
        self._start_lock = threading.Lock()
        self._on_stop: Callable[[], None] | None = on_stop
        self._process: int | None = None
        """The process that it was started in."""

    def start(self) -> WorkerService:
        """Start the queue's thread and the canary; once, however often it is called.

        Raises:
            RuntimeError: it was started before this process was forked.
        """
        if self._process == os.getpid():
            return self
        if (
            self._process is not None
        ):  # not under the lock: another thread may have held it at the fork
            raise RuntimeError(
                f"the worker was started in process {self._process} and this one, {os.getpid()}, was "
                "forked from it: its thread stayed there; send no request before the fork, or make the "
                "app after it"
            )
        with self._start_lock:
            if self._process is None:
                self.queue.start(self.readiness.run())
                self._process = os.getpid()
        return self

    def stop(self) -> int:
        """Refuse new requests, let those under way finish, end; how many were cut off. Idempotent."""
        if self._process != os.getpid():
            return 0
        num_cut = self.queue.drain(self.options.drain_s)
        try:
            self.queue.close()
        finally:  # also if the backend's own end took too long
            self._close_owned()
        self.ledger.close()
        return num_cut

    def _close_owned(self) -> None:
        with self._start_lock:
            on_stop, self._on_stop = self._on_stop, None
        if on_stop is not None:
            on_stop()

    def not_ready_reason(self) -> str | None:
        """Why requests should go elsewhere, or None."""
        return "the worker is stopping" if self.queue.is_closing else self.readiness.reason

    # -- sampling ---------------------------------------------------------------------------------

    def sample(
        self,
        request: SampleRequest,
        request_id: str,
        is_gone: Callable[[], bool] = lambda: False,
    ) -> Ticket:
        """Admit a request under `request_id` (the client's, if it gave one); leave the ticket when done.

        Raises:
            BadRequest, NotSupportedByBackend, UnknownAdapter: refused before it was queued.
            QueueFull, BadRequest, RequestCancelled: as `JobQueue.submit`.
        """
        prompts, params = request.prompts, request.sampling_params
        limits = self.backend.limits()
        try:
            check_fits(prompts, params, limits)
        except errors.SamplingRefused as error:
            raise errors.BadRequest(error.message) from error
        fingerprint = request.fingerprint() if request.request_id else None
        try:
            admitted = self.backend.admit(prompts, request.model_id, params, limits)
        except errors.UnknownAdapter:
            if not self.queue.knows(request_id, fingerprint):
                raise
            # a retry, which joins: its adapter may have gone since it was admitted
            admitted = Admitted(prompts=prompts, model_id=request.model_id, params=params)
        work = Work(
            request_id=request_id,
            request=admitted,
            timeout_s=request.timeout_s or self.options.timeout_s,
            fingerprint=fingerprint,
            stream=request.stream,
        )
        return self.queue.submit(work, is_gone)

    def models(self) -> list[ModelInfo]:
        """Every name that can be sampled now."""
        with _one_of_few(self._listing, "lists of models are being made"), translated(Blame.SERVER):
            found: list[ModelInfo] = self.queue.run(self.backend.models(), _MODELS_TIMEOUT_S)
        return found

    # -- adapters ---------------------------------------------------------------------------------

    def list_adapters(self) -> list[dict[str, Any]]:
        """All registered adapters; none where the backend has none."""
        return [] if self._adapters is None else list(self._adapters.list(details=True))

    def register(self, adapter_id: str, lora_path: str) -> dict[str, Any]:
        """Register an adapter; its entry in the list.

        Raises:
            NotSupportedByBackend: this backend has no adapters.
            TinkError: what is wrong with the id, the path or the files.
        """
        with self._turn() as adapters:
            adapters.register(adapter_id, lora_path)
            found = [a for a in adapters.list(details=True) if a["adapter_id"] == adapter_id]
        if not found:
            raise errors.AdapterConflict(
                f"{adapter_id!r} was unregistered again while it was being registered"
            )
        return found[0]

    def unregister(self, adapter_id: str) -> None:
        """Forget an adapter; requests under way finish on it.

        Raises:
            UnknownAdapter: nothing is registered under this id.
            NotSupportedByBackend: this backend has no adapters.
        """
        with self._turn() as adapters:
            adapters.unregister(adapter_id)

    @contextmanager
    def _turn(self) -> Iterator[Adapters]:
        if self._adapters is None:
            raise errors.NotSupportedByBackend(
                f"the {self.backend.name} backend has no adapters; merge the adapter into the served "
                "weights, or use vLLM (USE_VLLM=true)"
            )
        with (
            _one_of_few(self._registering, "adapters are being registered"),
            translated(Blame.REGISTERING),
        ):
            yield self._adapters


@contextmanager
def _one_of_few(places: threading.Semaphore, what: str) -> Iterator[None]:
    """A place, or `QueueFull` at once: who waited here would hold a thread that others need."""
    if not places.acquire(blocking=False):
        raise errors.QueueFull(f"too many {what}; try again in 1 s", retry_after_s=1)
    try:
        yield
    finally:
        places.release()
