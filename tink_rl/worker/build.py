"""From settings to a worker: which backend samples, and who keeps its adapters."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from tink_rl.settings import Settings
from tink_rl.worker.auth import Tokens
from tink_rl.worker.backends import Backend
from tink_rl.worker.options import WorkerOptions, load_options
from tink_rl.worker.service import Adapters, WorkerService

if TYPE_CHECKING:
    from tink_rl.vllm_backend import VLLMBackend


def build_service(settings: Settings, options: WorkerOptions) -> WorkerService:
    """A worker over the backend that the settings name; asks no server yet.

    Raises:
        ConfigError: a setting, an option or a token file is not usable.
    """
    tokens = Tokens.from_options(options)  # first: the backend may read the file that this makes
    backend, adapters, close = _backend(settings)
    return WorkerService(backend, adapters, options=options, tokens=tokens, on_stop=close)


def service_from_environment() -> WorkerService:
    """As `build_service`, with everything from the environment; stopped when the process ends."""
    service = build_service(Settings.load(), load_options())
    atexit.register(service.stop)
    return service


def join_roots(roots: Sequence[str]) -> str | None:
    """TINK_ADAPTER_ROOTS for these directories; None for none."""
    return os.pathsep.join(roots) or None


def _backend(settings: Settings) -> tuple[Backend, Adapters | None, Callable[[], None]]:
    """What samples, who keeps its adapters, and what closes that which the backend only borrows."""
    if settings.samples_with == "megatron":
        from tink_rl.worker.backends.megatron.backend import MegatronBackend

        megatron = MegatronBackend(settings.megatron_server_url, ca_file=settings.tink_ca_file)
        return megatron, None, lambda: None
    from tink_rl.vllm_backend import VLLMBackend
    from tink_rl.worker.backends.vllm import VLLMSampler

    vllm = VLLMBackend(settings)
    return VLLMSampler(vllm), _FromStrangers(vllm), vllm.close


class _FromStrangers:
    """The registrations of a `VLLMBackend`, for callers who may name only paths below its roots."""

    def __init__(self, vllm: VLLMBackend) -> None:
        self._vllm = vllm

    def register(self, adapter_id: str, lora_path: str) -> None:
        self._vllm.register(adapter_id, lora_path, roots=self._vllm.settings.adapter_roots)

    def unregister(self, adapter_id: str) -> None:
        self._vllm.unregister(adapter_id)

    def list(self, details: bool = False) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self._vllm.list(details=details)
        return found
