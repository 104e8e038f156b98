"""What the worker's server tests share: a `tink-rl worker` process over a real vLLM server."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.policies import NUM_TOKENS
from tests.worker_rig import WorkerCommand, wait_until
from tink_rl.launch import VLLMServer

GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": NUM_TOKENS, "ignore_eos": True}
_FIGURES = {
    "vllm:num_requests_running": "running",
    "vllm:num_requests_waiting": "waiting",
    "vllm:request_success_total": "finished",
}


@contextmanager
def worker_over(
    server: VLLMServer, root: Path, directory: Path, *arguments: str, **env: str
) -> Iterator[WorkerCommand]:
    """A worker that may register adapters below `root`; it leaves none on the server."""
    flags = ("--adapter-root", str(root), "--ledger", str(directory / "ledger"), *arguments)
    settings = {"TINK_TOKEN_FILE": str(server.token_file), **env}
    with WorkerCommand(directory, *flags, vllm=server.url, **settings) as command:
        wait_until(lambda: httpx.get(f"{command.url}/readyz").status_code == 200, 60)
        yield command
        if command.process.poll() is None:
            drop_adapters(command)


def register(command: WorkerCommand, path: Path, name: str) -> Any:
    """Register over HTTP; the entry."""
    body = {"adapter_id": name, "lora_path": str(path)}
    with command.http() as http:
        answer = http.post("/api/v1/adapters", json=body, headers=command.admin)
    assert answer.status_code == 200, answer.text
    return answer.json()


def drop_adapters(command: WorkerCommand) -> None:
    """Unregister all."""
    with command.http() as http:
        for entry in http.get("/api/v1/adapters").json()["adapters"]:
            path = f"/api/v1/adapters/{entry['adapter_id']}"
            assert http.delete(path, headers=command.admin).status_code == 200


def body_for(
    prompts: Sequence[Any],
    model_id: str | None = None,
    params: Mapping[str, Any] = GREEDY,
    **fields: Any,
) -> dict[str, Any]:
    """A sampling request."""
    return {
        "prompts": [p if isinstance(p, str) else list(p) for p in prompts],
        "model_id": model_id,
        "sampling_params": dict(params),
        **fields,
    }


def figures(server: VLLMServer) -> dict[str, float]:
    """vLLM's own counts: requests running and waiting now, and completions finished."""
    found = dict.fromkeys(_FIGURES.values(), 0.0)
    for line in httpx.get(f"{server.url}/metrics").text.splitlines():
        name, _, value = line.rpartition(" ")
        if (key := _FIGURES.get(name.partition("{")[0])) is not None:
            found[key] += float(value)
    return found
