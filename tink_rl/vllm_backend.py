"""Sampling from a vLLM server with any number of LoRA adapters: ten functions, and a class.

    import vllm_backend

    vllm_backend.register_lora_adapter("math", "runs/digits/adapter")
    vllm_backend.generate_with_vllm(["12+34="], adapter_id="math", max_tokens=5)

The functions are a thin face over one default `VLLMBackend`, made on first use from the environment
(`tink_rl/settings.py`). Adapters are copied into a private store and registered on disk, so that every
process of this user, the worker among them, sees the same ones. Everything here is thread-safe; vLLM
need not be installed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tink_rl.sampling.backend import VLLMBackend
from tink_rl.sampling.default import default_backend, initialize_vllm_client, lent
from tink_rl.types import PublishRecord

__all__ = [
    "VLLMBackend",
    "close_communicator",
    "default_backend",
    "generate_with_vllm",
    "get_client_info",
    "init_communicator",
    "initialize_vllm_client",
    "list_lora_adapters",
    "register_lora_adapter",
    "reset_prefix_cache",
    "unregister_lora_adapter",
    "update_model_weights",
]


def generate_with_vllm(
    prompts: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]],
    adapter_id: str | None = None,
    max_tokens: int = 16,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    n: int = 1,
    stop: str | Sequence[str] | None = None,
    seed: int | None = None,
    repetition_penalty: float = 1.0,
    logprobs: int | None = None,
    timeout: float | None = None,
    **more: Any,
) -> list[list[dict[str, Any]]]:
    """`n` completions of each prompt, `[P][n]`, each a dict with the fields of `Completion`.

    `answer[0][0]["text"]`, `["token_ids"]`, `["logprobs"]`, `["finish_reason"]`, `["version"]`,
    `["digest"]`. Arguments and errors are those of `VLLMBackend.generate`.
    """
    with lent() as backend:
        found = backend.generate(
            prompts,
            adapter_id,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            n=n,
            stop=stop,
            seed=seed,
            repetition_penalty=repetition_penalty,
            logprobs=logprobs,
            timeout=timeout,
            **more,
        )
    return [[asdict(completion) for completion in row] for row in found]


def register_lora_adapter(adapter_id: str, lora_path: str | Path) -> dict[str, Any]:
    """See `VLLMBackend.register`; `{"adapter_id", "lora_path", "version", "digest"}`."""
    with lent() as backend:
        found = backend.register(adapter_id, lora_path)
    return {
        "adapter_id": found.adapter_id,
        "lora_path": found.lora_path,
        "version": found.version,
        "digest": found.digest,
    }


def unregister_lora_adapter(adapter_id: str) -> None:
    """See `VLLMBackend.unregister`."""
    with lent() as backend:
        backend.unregister(adapter_id)


def list_lora_adapters(details: bool = False) -> list[dict[str, Any]]:
    """See `VLLMBackend.list`."""
    with lent() as backend:
        return backend.list(details=details)


def init_communicator(device: Any = "cuda") -> None:
    """See `VLLMBackend.init_communicator`."""
    with lent() as backend:
        backend.init_communicator(device)


def update_model_weights(model: object) -> PublishRecord:
    """See `VLLMBackend.update_model_weights`."""
    with lent() as backend:
        return backend.update_model_weights(model)


def close_communicator() -> None:
    """See `VLLMBackend.close_communicator`."""
    with lent() as backend:
        backend.close_communicator()


def reset_prefix_cache() -> None:
    """See `VLLMBackend.reset_prefix_cache`."""
    with lent() as backend:
        backend.reset_prefix_cache()


def get_client_info() -> dict[str, Any]:
    """See `VLLMBackend.info`."""
    with lent() as backend:
        return backend.info()
