"""A server closes connections that idle: a client that writes to one at that moment loses its request."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tink_rl.publish.vllm_client import VLLMClient
from tink_rl.sampling.async_sampler import AsyncSampler
from tink_rl.transport import payloads

IDLE_S = 0.2
LOGPROBS = {
    "tokens": ["token_id:1"],
    "token_logprobs": [-0.1],
    "top_logprobs": [{"token_id:1": -0.1}],
}
CHOICE = {
    **{"index": 0, "text": "", "finish_reason": "length", "token_ids": [1]},
    **{"prompt_token_ids": [1], "logprobs": LOGPROBS},
}
ANSWER = {"model": "m", "choices": [CHOICE]}


class Closing(BaseHTTPRequestHandler):
    """Answers a request on a connection that idled for IDLE_S by closing it, as a late FIN would."""

    protocol_version = "HTTP/1.1"
    connections = 0

    def setup(self):
        super().setup()
        type(self).connections += 1
        self.last = None

    def do_POST(self):
        idle = self.last is not None and time.monotonic() - self.last >= IDLE_S
        self.rfile.read(int(self.headers["content-length"]))
        if idle:
            self.close_connection = True
            return
        self.answer(200, ANSWER)

    def do_GET(self):
        self.answer(404, {"detail": "Not Found"})

    def answer(self, status, data):
        body = json.dumps(data).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        self.last = time.monotonic()

    def log_message(self, *_):
        pass


@pytest.fixture
def url(monkeypatch):
    monkeypatch.setattr(payloads, "IDLE_CONNECTION_S", IDLE_S / 4)
    Closing.connections = 0
    server = ThreadingHTTPServer(("127.0.0.1", 0), Closing)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_no_request_of_the_trainers_client_is_lost_on_an_idle_connection(url):
    with VLLMClient(url) as client:
        for pause_s in (0.0, 1.5 * IDLE_S, 1.5 * IDLE_S):
            time.sleep(pause_s)
            assert client.generate([[1]], model="m", max_tokens=1)["completion_ids"] == [[1]]
    assert Closing.connections == 3


def test_no_request_of_the_workers_client_is_lost_on_an_idle_connection(url):
    async def run():
        sampler = AsyncSampler(url)
        try:
            for pause_s in (0.0, 1.5 * IDLE_S, 1.5 * IDLE_S):
                await asyncio.sleep(pause_s)
                payload = {"model": "m", "prompt": [[1]], "max_tokens": 1}
                assert (await sampler.complete(payload, timeout_s=5.0))["model"] == "m"
        finally:
            await sampler.close()

    asyncio.run(run())
    assert Closing.connections == 3
