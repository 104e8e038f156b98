"""An adapter store, and an adapter to put into it."""

from __future__ import annotations

import pytest

from tests.adapters import write_adapter
from tink_rl.adapters.store import AdapterStore


@pytest.fixture
def store(tmp_path):
    return AdapterStore(tmp_path / "store")


@pytest.fixture
def source(tmp_path):
    return write_adapter(tmp_path / "adapter")


@pytest.fixture
def stock_vllm(monkeypatch):
    """What the plugin replaces in vLLM is vLLM's own again after the test."""
    names = pytest.importorskip("tink_rl.server.vllm_names", reason="needs vLLM")
    for owner, name in (
        (names.InputProcessor, "process_inputs"),
        (names.lora_model_runner_mixin, "LRUCacheWorkerLoRAManager"),
        (names.default_loader, "filter_duplicate_safetensors_files"),
        (names.shm_broadcast, "sched_yield"),
    ):
        monkeypatch.setattr(owner, name, getattr(owner, name))
