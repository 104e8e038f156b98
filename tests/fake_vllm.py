"""A vLLM server without vLLM: its routes, with and without our plugin, behind an httpx transport.

It answers a completion with the name that served it as text, counts what it generated, and can lose
replies: the request is handled, the answer never comes.
"""

from __future__ import annotations

import json
import threading
import uuid
from pathlib import Path
from typing import Any

import httpx

from tink_rl.policy.content import ContentDigest, files_identity
from tink_rl.policy.fingerprint import base_fingerprint, checkpoint_index
from tink_rl.server.leases import Leases
from tink_rl.server.numbers import Numbers
from tink_rl.types import PROTOCOL_VERSION


class FakeVLLM:
    """One server; `transport()` goes into `VLLMClient(transport=...)`."""

    def __init__(self, root: str, *, plugin: bool = True, runtime_loading: bool = True) -> None:
        self.root, self.plugin, self.runtime_loading = root, plugin, runtime_loading
        self.base = "base"
        self.max_model_len = 256
        self.fingerprint = base_fingerprint(root) if Path(root).is_dir() else "f" * 32
        index = checkpoint_index(root) if Path(root).is_dir() else {}
        self.base_files = files_identity(index) if index else None
        self.content = ContentDigest(index)
        self.lock = threading.Lock()
        self.calls: list[str] = []
        self.generated: list[str] = []
        self.lose: list[tuple[str, bool]] = []
        """(path, whether it is handled before the reply is lost), each used once."""
        self.merged: str | None = None
        self.full: str | None = None
        self.lora_error: str | None = None
        self.hooks: dict[str, Any] = {}
        """path -> function that is called before the request is handled."""
        self.after: dict[str, Any] = {}
        """path -> function that is called before the answer leaves."""
        self.away = False
        """Nobody listens."""
        self.restart()

    def restart(self) -> None:
        """A new life: nothing is served but the base."""
        self.served: dict[str, str] = {}
        self.stages: dict[str, dict[str, Any]] = {}
        self.leases, self.numbers = Leases(), Numbers()
        self.incarnation = uuid.uuid4().hex

    def transport(self) -> httpx.MockTransport:
        """What a client needs."""
        return httpx.MockTransport(self._handle)

    def count(self, path: str) -> int:
        """How often `path` was asked."""
        return self.calls.count(path)

    def _handle(self, request: httpx.Request) -> httpx.Response:
        path = request.url.path
        if self.away:
            raise httpx.ConnectError("away", request=request)
        response = self._handle_here(path, request)
        self.after.get(path, lambda: None)()
        return response

    def _handle_here(self, path: str, request: httpx.Request) -> httpx.Response:
        hook = self.hooks.get(path)
        if hook is not None:
            hook()
        with self.lock:
            self.calls.append(path)
            lost = next((item for item in self.lose if item[0] == path), None)
            if lost is not None:
                self.lose.remove(lost)
                if lost[1]:
                    self._answer(path, request)
                raise httpx.ReadTimeout("lost", request=request)
            return self._answer(path, request)

    def _answer(self, path: str, request: httpx.Request) -> httpx.Response:
        body = request.content
        if path.startswith("/tink/v1/"):
            if not self.plugin:
                return httpx.Response(404, json={"detail": "Not Found"})
            return self._control(path.removeprefix("/tink/v1/"), body)
        data = json.loads(body) if body else {}
        if path == "/health":
            return httpx.Response(200)
        if path == "/v1/models":
            return httpx.Response(200, json={"data": self._cards()})
        if path == "/v1/completions":
            return self._complete(data)
        if path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter") and self.runtime_loading:
            return self._lora(path, data)
        return httpx.Response(404, json={"detail": "Not Found"})

    # -- sampling -----------------------------------------------------------------------------------

    def _cards(self) -> list[dict[str, Any]]:
        name = self.merged or self.full or self.base
        cards = [{"id": name, "root": self.root, "max_model_len": self.max_model_len}]
        slots = {n: path for n, path in self.served.items() if n not in (self.merged, self.full)}
        return cards + [{"id": n, "root": path, "parent": name} for n, path in slots.items()]

    def _complete(self, data: dict[str, Any]) -> httpx.Response:
        model = data["model"]
        if model not in {card["id"] for card in self._cards()}:
            return httpx.Response(404, json={"error": {"message": "no such model"}})
        self.generated.append(model)
        choices = [
            {
                "index": i,
                "text": model,
                "token_ids": [7],
                "prompt_token_ids": [5],
                "finish_reason": "length",
                "logprobs": None,
            }
            for i in range(len(data["prompt"]) * data.get("n", 1))
        ]
        return httpx.Response(200, json={"model": model, "choices": choices})

    def _lora(self, path: str, data: dict[str, Any]) -> httpx.Response:
        name = data["lora_name"]
        if path == "/v1/unload_lora_adapter":
            known = self.served.pop(name, None) is not None
            return httpx.Response(200 if known else 404, text="ok")
        if self.lora_error is not None:
            return httpx.Response(500, json={"error": {"message": self.lora_error}})
        if name in self.served:
            return httpx.Response(400, json={"error": {"message": "has already been loaded"}})
        self.served[name] = data["lora_path"]
        return httpx.Response(200, text="Success")

    # -- the plugin ---------------------------------------------------------------------------------

    def _control(self, action: str, body: bytes) -> httpx.Response:
        from tink_rl.errors import TinkError

        try:
            if action.startswith("stage/"):
                self.stages[action.split("/")[1]]["bytes"] += len(body)
                return httpx.Response(200, json={})
            method = getattr(self, f"_{action}")
            return httpx.Response(200, json=method(json.loads(body) if body else {}))
        except TinkError as error:
            return httpx.Response(error.status, json=error.to_wire())

    def _status(self, body: dict[str, Any]) -> dict[str, Any]:
        return {
            "protocol": PROTOCOL_VERSION,
            "incarnation": self.incarnation,
            "state": "ready",
            "modes": ["adapter"],
            "world_size": 1,
            "base_model": self.base,
            "base_fingerprint": self.fingerprint,
            "dtype": "float32",
            "adapter_dtype": "float32",
            "max_lora_rank": 16,
            "max_loras": 2,
            "max_model_len": self.max_model_len,
            "logprobs_mode": "processed_logprobs",
            "no_full_logprobs": None,
            "device": "cpu",
            "served": dict(self.served),
            "merged": self.merged,
            "full": self.full,
            "base_files": self.base_files,
        }

    def _base(self, body: dict[str, Any]) -> dict[str, Any]:
        num_bytes = self.content.num_bytes
        tensors = self.content.wait()
        return {"num_bytes": num_bytes, "num_done": num_bytes, "tensors": tensors}

    def _join(self, body: dict[str, Any]) -> dict[str, Any]:
        lease, _ = self.leases.take(body["policy"], body["writer"])
        return {
            "epoch": lease.epoch,
            "incarnation": self.incarnation,
            "lease_s": 15.0,
            "last_version": self.numbers.last(body["policy"]),
            "transport": "http",
        }

    def _leave(self, body: dict[str, Any]) -> dict[str, Any]:
        self.leases.release(body["policy"], body["epoch"])
        return {}

    def _heartbeat(self, body: dict[str, Any]) -> dict[str, Any]:
        return {}

    def _stage(self, body: dict[str, Any]) -> dict[str, Any]:
        stage_id = uuid.uuid4().hex
        self.stages[stage_id] = {"header": body["header"], "bytes": 0}
        return {"stage_id": stage_id}

    def _staged(self, body: dict[str, Any]) -> dict[str, Any]:
        stage = self.stages[body["stage_id"]]
        assert stage["bytes"] == stage["header"]["num_bytes"]
        stage["digest"] = body["digest"]
        return {"stage_id": body["stage_id"]}

    def _commit(self, body: dict[str, Any]) -> dict[str, Any]:
        stage = self.stages.pop(body["stage_id"])
        header, digest = stage["header"], stage.get("digest") or body["digest"]
        name = f"{header['policy']}@{header['version']}"
        self.numbers.take(name, digest)
        self.served[name] = digest
        for old in body["retire"]:
            self.served.pop(old, None)
        return {"held_seconds": 0.0, "digest": digest, "full": self.full}

    def _discard(self, body: dict[str, Any]) -> dict[str, Any]:
        self.stages.pop(body["stage_id"], None)
        return {}

    def _drop(self, body: dict[str, Any]) -> dict[str, Any]:
        from tink_rl.errors import UnknownVersion

        if self.served.pop(body["name"], None) is None:
            raise UnknownVersion("not served")
        return {}
