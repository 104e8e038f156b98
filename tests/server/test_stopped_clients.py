"""Clients that stop in the middle of a request, on a real server: whom a publish waits for."""

from __future__ import annotations

import json
import socket
import time
from contextlib import ExitStack, contextmanager, suppress

import pytest

from tests.policies import LONG_PROMPT, PeftTwin, assert_served, random_adapter, sync_to
from tests.worker_rig import wait_until

pytestmark = [pytest.mark.server, pytest.mark.home]
HALF = [
    ("/v1/completions", "content-length: 500\r\n\r\n{"),
    ("/v1/chat/completions", 'content-length: 500\r\n\r\n{"model": "'),
    ("/tokenize", "content-length: 2\r\n\r\n"),
    ("/v1/completions", "transfer-encoding: chunked\r\n\r\n1\r\n{\r\n"),
]
"""Routes, and a request's bytes from the end of its headers to where its client stops."""


@pytest.fixture(scope="module")
def twin(model_dir):
    return PeftTwin(model_dir("qwen3"))


@contextmanager
def stopped(server, path, rest, buffer_bytes=2048):
    """A client that has sent so much, and does nothing more."""
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
        client.connect((server.options.host, server.options.port))
        head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        client.sendall((head + rest).encode())
        yield client


def never_reads(model):
    """A whole request, whose answer of megabytes fits into no socket."""
    ask = {"model": model, "prompt": [LONG_PROMPT] * 8, "n": 4, "max_tokens": 200, "logprobs": 20}
    body = json.dumps({**ask, "stream": True, "ignore_eos": True})
    return f"connection: close\r\ncontent-length: {len(body)}\r\n\r\n{body}"


def is_answered(client):
    with suppress(BlockingIOError):
        return bool(client.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
    return False


def read_all(client):
    client.settimeout(60)
    parts = []
    while part := client.recv(2**20):
        parts.append(part)
    return b"".join(parts)


@pytest.mark.parametrize(
    ("mode", "on_running"), [("adapter", "drain"), ("merged", "drain"), ("merged", "abort")]
)
def test_client_that_stops_holds_no_publish(server, twin, mode, on_running):
    with (
        sync_to(server, twin.directory, mode, on_running=on_running) as sync,
        server.client() as client,
        ExitStack() as clients,
    ):
        name = sync.publish(random_adapter(twin, 1)).name
        for path, rest in HALF:
            clients.enter_context(stopped(server, path, rest))
        unread = clients.enter_context(stopped(server, "/v1/completions", never_reads(name)))
        # A status may come after all of it where the API server has more to write than time.
        wait_until(lambda: client.status().running or is_answered(unread), 60)
        for seed in (2, 3):
            twin.randomise(seed)
            record, cases = sync.publish(twin.model), twin.clear_cases()
        assert_served(server, record.name, cases)
        deadline = time.monotonic() + 60
        while (status := client.status()).draining or status.running:
            assert time.monotonic() < deadline, status
        assert [(p.state, p.what) for p in status.pending] == [
            ("receiving", f"POST {path}") for path, _ in HALF
        ]
        answer = read_all(unread)
        assert b"data: [DONE]" in answer
        assert {part.partition(b'"')[0] for part in answer.split(b'"model":"')[1:]} == {
            name.encode()
        }
        ended = {part.partition(b'"')[0] for part in answer.split(b'"finish_reason":"')[1:]}
        assert ended == {b"length"} or (on_running == "abort" and ended <= {b"length", b"abort"})
        # More than uvicorn and the socket that is not read buffer, where it was let end by itself.
        assert len(answer) > 2**20 or on_running == "abort"
