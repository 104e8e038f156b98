"""A vLLM server without vLLM: the routes that a worker needs, with a latency that can be set."""

from __future__ import annotations

import json
import ssl
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

BASE = "stub-base"


class StubVLLM:
    """Answers `/v1/models`, `/v1/completions` and `/v1/load_lora_adapter`; a context manager."""

    def __init__(
        self,
        latency_s: float = 0.0,
        base: str = BASE,
        load_s: float = 0.0,
        *,
        prefix: str = "",
        certificate: tuple[Path, Path] | None = None,
        answers: dict[str, tuple[int, dict[str, str], bytes]] | None = None,
    ) -> None:
        """Store.

        Args:
            latency_s: Of a completion.
            base: Name of the base.
            load_s: Of loading an adapter.
            prefix: Path below which the routes lie; elsewhere all is 404.
            certificate: Certificate and key: speak TLS.
            answers: By path, what is answered instead: status, headers, body.
        """
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

            def parse_request(self) -> bool:
                if not super().parse_request():
                    return False
                below = self.path.startswith(prefix)
                self.path = self.path.removeprefix(prefix) if below else "/nowhere"
                return True

            def do_GET(self) -> None:
                if self.path in (answers or {}):
                    return self._answer_so(*(answers or {})[self.path])
                if self.path == "/v1/models":
                    self._answer(200, {"data": [{"id": base, "root": base, "max_model_len": 256}]})
                else:
                    self._answer(404 if self.path != "/health" else 200, {})

            def do_POST(self) -> None:
                if self.path in (answers or {}):
                    return self._answer_so(*(answers or {})[self.path])
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

            def _answer_so(self, status: int, headers: dict[str, str], content: bytes) -> None:
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(content))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        scheme = "http"
        if certificate is not None:
            context, scheme = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), "https"
            context.load_cert_chain(*certificate)
            # In the thread of the connection: a handshake that hangs must not hang the others.
            self._server.socket = context.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )
        self.url = f"{scheme}://127.0.0.1:{self._server.server_port}{prefix}"

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
