"""A worker over a fake backend: in process through its WSGI app, or behind a real socket."""

from __future__ import annotations

import asyncio
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
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
    server: HttpServer | None = None
    """Both with a socket."""

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
        rig.url, rig.server = server.url, server
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


def admin_header(token: str = ADMIN) -> dict[str, str]:
    """With the admin token, or another one."""
    return {"Authorization": f"Bearer {token}"}


def assert_problem(response: Any, status: int, code: str | None = None) -> dict[str, Any]:
    """The error that `response` must be, in the one form of all errors."""
    assert response.status_code == status, response.text
    assert response.mimetype == "application/json"
    error = response.json["error"]
    assert set(response.json) == {"error"} and set(error) == {"code", "message", "request_id"}
    assert error["request_id"] and "Traceback" not in error["message"]
    if code is not None:
        assert error["code"] == code, error
    return error


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


class WorkerCommand:
    """A running `tink-rl worker`; a context manager that leaves nothing running."""

    def __init__(
        self,
        directory: Path,
        *arguments: str,
        vllm: str = "http://127.0.0.1:9",
        limit: tuple[int, tuple[int, int]] | None = None,
        **env: str,
    ) -> None:
        """Start it with its store and its admin token under `directory`.

        Args:
            directory: The worker's own.
            arguments: More flags.
            vllm: URL of its server; by default one where nobody answers.
            limit: A resource and its limits (`resource.setrlimit`).
            env: Settings of the environment; none of ours is inherited.
        """
        self.token_file = directory / "tokens" / "admin"
        self.argv = [sys.executable, "-m", "tink_rl.cli", "worker", "--port", "0"]
        self.argv += ["--vllm-url", vllm, "--token-file", str(self.token_file), *arguments]
        ours = ("TINK_", "VLLM_", "USE_")
        clean = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
        self.process = subprocess.Popen(
            self.argv,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            preexec_fn=None if limit is None else lambda: resource.setrlimit(*limit),
            env={**clean, "TINK_STORE_DIR": str(directory / "store"), **env},
        )
        self._lines: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._lines.append(line)

    @property
    def text(self) -> str:
        """What it has said so far."""
        return "".join(self._lines)

    def __enter__(self) -> WorkerCommand:
        wait_until(lambda: "sampling needs" in self.text or self.process.poll() is not None, 60)
        assert self.process.poll() is None, self.text
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)

    @property
    def url(self) -> str:
        found = re.search(r"worker at (\S+) ", self.text)
        assert found is not None, self.text
        return found[1]

    @property
    def admin(self) -> dict[str, str]:
        """Headers with the admin token."""
        return {"Authorization": f"Bearer {self.token_file.read_text().strip()}"}

    def http(self, **settings: Any) -> httpx.Client:
        """A client; without TLS, whose setup takes longer than most requests here."""
        return httpx.Client(base_url=self.url, verify=False, **{"timeout": 120, **settings})

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(40)
