"""A sampler that computes elsewhere, simulated: a proxy before a server here; tokens take a fixed time.

`python -m benchmarks.slow_sampler '{"target": "http://127.0.0.1:8000", "token_s": 0.02}'` prints its URL
and serves until its standard input is closed. What the server computes meanwhile costs this machine as
much as ever; an answer is held back until its tokens would have been sampled.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from tink_rl import placement

_SAMPLE = "/v1/completions"
_PAUSE_S = 0.05
"""Requests that come closer together belong to one batch."""
_NOT_PASSED_ON = {"host", "content-length", "transfer-encoding", "connection", "date", "server"}


@dataclass(frozen=True, kw_only=True)
class SlowSampler:
    """What to simulate. Example: `SlowSampler(target="http://127.0.0.1:8000", token_s=0.02)`"""

    target: str
    """URL of the server that samples."""
    token_s: float
    """Seconds of a token, for all sequences of a batch together."""
    spread: float = 0.0
    """Every other batch takes `1 - spread` of that, those between `1 + spread`."""


@contextmanager
def running(settings: SlowSampler) -> Iterator[str]:
    """URL of a proxy in a process of its own, which ends with the block."""
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.slow_sampler", json.dumps(asdict(settings))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, placement.CORES),
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.stdin.close()
        process.wait(30)


class _Proxy:
    """An ASGI application that passes everything on."""

    def __init__(self, settings: SlowSampler) -> None:
        import httpx

        self._settings = settings
        self._client = httpx.AsyncClient(base_url=settings.target, timeout=None, trust_env=False)
        self._last_arrival = 0.0
        self._num_batches = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        from starlette.requests import Request
        from starlette.responses import Response

        request = Request(scope, receive)
        body = await request.body()
        path = scope["path"]
        end = time.monotonic()
        if path == _SAMPLE:
            end += self._sampling_s(json.loads(body)["max_tokens"])
        answer = await self._client.request(
            request.method,
            f"{path}?{request.url.query}" if request.url.query else path,
            content=body,
            headers={k: v for k, v in request.headers.items() if k not in _NOT_PASSED_ON},
        )
        await asyncio.sleep(max(0.0, end - time.monotonic()))
        headers = {
            k: v
            for k, v in answer.headers.items()
            if k not in _NOT_PASSED_ON and k != "content-encoding"
        }
        await Response(answer.content, answer.status_code, headers)(scope, receive, send)

    def _sampling_s(self, num_tokens: int) -> float:
        now = time.monotonic()
        self._num_batches += now - self._last_arrival > _PAUSE_S
        self._last_arrival = now
        share = 1 + self._settings.spread * (1 if self._num_batches % 2 else -1)
        return num_tokens * self._settings.token_s * share


def _end_with_stdin() -> None:
    sys.stdin.read()
    os._exit(0)


def main() -> None:
    """Serve what the argument says."""
    import uvicorn

    settings = SlowSampler(**json.loads(sys.argv[1]))
    taken = socket.create_server(("127.0.0.1", 0))
    print(f"http://127.0.0.1:{taken.getsockname()[1]}", flush=True)
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    config = uvicorn.Config(_Proxy(settings), log_level="warning", timeout_keep_alive=60)
    uvicorn.Server(config).run(sockets=[taken])


if __name__ == "__main__":
    main()
