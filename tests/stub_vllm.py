"""A vLLM server without vLLM: the routes that a worker needs, with a latency that can be set."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

BASE = "stub-base"


class StubVLLM:
    """Answers `/v1/models`, `/v1/completions` and `/v1/load_lora_adapter`; a context manager."""

    def __init__(self, latency_s: float = 0.0, base: str = BASE, load_s: float = 0.0) -> None:
        self.latency_s = latency_s
        self.load_s = load_s
        self.num_begun = 0
        self.num_loads = 0
        self.num_completions = 0
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                """Say nothing."""

            def do_GET(self) -> None:
                if self.path == "/v1/models":
                    self._answer(200, {"data": [{"id": base, "root": base, "max_model_len": 256}]})
                else:
                    self._answer(404 if self.path != "/health" else 200, {})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if self.path == "/v1/load_lora_adapter":
                    stub.num_loads += 1
                    time.sleep(stub.load_s)
                    return self._answer(200, {})
                if body.get("max_tokens", 1) > 1:  # not for canaries
                    stub.num_begun += 1
                    time.sleep(stub.latency_s)
                stub.num_completions += 1
                choices = [_choice(i) for i in range(len(body["prompt"]) * body["n"])]
                self._answer(200, {"model": body["model"], "choices": choices})

            def _answer(self, status: int, data: Any) -> None:
                content = json.dumps(data).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> StubVLLM:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def _choice(index: int) -> dict[str, Any]:
    return {
        "index": index,
        "text": "ab",
        "token_ids": [1, 2],
        "prompt_token_ids": [3],
        "logprobs": None,
        "finish_reason": "length",
    }
