"""A worker over a fake backend: in process through its WSGI app, or behind a real socket."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from flask.testing import FlaskClient

from tests.fakes import FakeAdapters, FakeBackend
from tink_rl.worker.app import create_app
from tink_rl.worker.auth import Tokens
from tink_rl.worker.http_server import HttpServer, bind
from tink_rl.worker.options import WorkerOptions
from tink_rl.worker.readiness import Readiness
from tink_rl.worker.service import WorkerService

ADMIN = "admin-token-of-the-tests"
SAMPLE = "sample-token-of-the-tests"


@dataclass(kw_only=True)
class Rig:
    """What a test needs of one worker."""

    backend: FakeBackend
    adapters: FakeAdapters
    service: WorkerService
    http: FlaskClient
    """In process."""
    url: str | None = None
    """With a socket."""

    def sample(self, prompts: Any = ("hi",), **fields: Any) -> Any:
        """POST /api/v1/sample in process."""
        return self.http.post("/api/v1/sample", json={"prompts": list(prompts), **fields})

    def hold(self) -> None:
        """Let the backend hold every request until `release`."""
        self.backend.hold = asyncio.Event()

    def release(self) -> None:
        hold, self.backend.hold = self.backend.hold, None
        assert hold is not None
        self.service.queue._loop.call_soon_threadsafe(hold.set)


@contextmanager
def worker(
    *,
    backend: FakeBackend | None = None,
    sample_token: str | None = None,
    readiness: Callable[[FakeBackend], Readiness] | None = None,
    socket: bool = False,
    **options: Any,
) -> Iterator[Rig]:
    """A started worker; everything that it started has ended afterwards."""
    backend = backend or FakeBackend(["a", "b"])
    adapters = FakeAdapters(backend)
    settings = WorkerOptions(**{"max_running": 8, "max_queued": 32, "drain_s": 5.0, **options})
    service = WorkerService(
        backend,
        adapters,
        options=settings,
        tokens=Tokens(admin=ADMIN, sample=sample_token),
        readiness=None if readiness is None else readiness(backend),
    ).start()
    app = create_app(service)
    rig = Rig(backend=backend, adapters=adapters, service=service, http=app.test_client())
    server, thread = None, None
    if socket:
        server = HttpServer(app, bind("127.0.0.1", 0), num_threads=settings.num_threads)
        rig.url = server.url
        thread = threading.Thread(target=server.run)
        thread.start()
    try:
        yield rig
    finally:
        if backend.hold is not None:
            rig.release()
        service.stop()
        if server is not None and thread is not None:
            server.stop()
            thread.join(10)


def wait_until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Return once `condition()` holds; fails the test if it does not within `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s"
        time.sleep(0.005)


def in_threads(count: int, call: Callable[[int], Any]) -> list[Any]:
    """`call(i)` in `count` threads at once; results in order, the first exception re-raised."""
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(call, range(count)))
