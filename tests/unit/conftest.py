"""An adapter store and adapters to put into it; a backend over a fake server."""

from __future__ import annotations

import inspect
import subprocess
from types import SimpleNamespace

import pytest

from tests import forked
from tests.adapters import write_adapter
from tink_rl.adapters import convert
from tink_rl.adapters.store import AdapterStore
from tink_rl.publish.vllm_client import VLLMClient
from tink_rl.vllm_backend import VLLMBackend


@pytest.fixture
def store(tmp_path):
    return AdapterStore(tmp_path / "store")


@pytest.fixture
def source(tmp_path):
    return write_adapter(tmp_path / "adapter")


@pytest.fixture
def forked_conversions(monkeypatch):
    """The child that loads a pickle for `tink-rl convert` is forked."""
    named = SimpleNamespace(run=forked.run, TimeoutExpired=subprocess.TimeoutExpired)
    monkeypatch.setattr(convert, "subprocess", named)


@pytest.fixture
def stock_vllm(monkeypatch):
    """What the plugin replaces in vLLM is vLLM's own during the test, and afterwards what it was before.

    vLLM loads its plugins in every process that makes engine arguments, so another test of this process
    may have registered ours.
    """
    names = pytest.importorskip("tink_rl.server.vllm_names", reason="needs vLLM")
    from vllm.distributed.utils import sched_yield
    from vllm.model_executor.model_loader.weight_utils import filter_duplicate_safetensors_files

    process = inspect.unwrap(names.InputProcessor.process_inputs)
    manager = names.LRUCacheWorkerLoRAManager
    monkeypatch.setattr(names.InputProcessor, "process_inputs", process)
    monkeypatch.setattr(names.lora_model_runner_mixin, "LRUCacheWorkerLoRAManager", manager)
    monkeypatch.setattr(
        names.default_loader,
        "filter_duplicate_safetensors_files",
        filter_duplicate_safetensors_files,
    )
    monkeypatch.setattr(names.shm_broadcast, "sched_yield", sched_yield)


@pytest.fixture(scope="session")
def adapters(model_dir, tmp_path_factory):
    """Three PEFT directories of the tiny base."""
    from tests.policies import PeftTwin  # loads PEFT, which few of these tests need

    twin, root = PeftTwin(model_dir("qwen3")), tmp_path_factory.mktemp("adapters")
    for seed in range(3):
        twin.randomise(seed)
        twin.model.save_pretrained(root / str(seed))
    return [root / str(seed) for seed in range(3)]


@pytest.fixture
def make_backend(model_dir, tmp_path):
    """`make_backend(fake, **settings)`: a backend of the fake server; all of them share one store."""
    opened = []

    def make_backend(fake, **settings):
        backend = VLLMBackend(
            {"tink_store_dir": str(tmp_path / "store"), **settings},
            client=VLLMClient("http://fake:1", token="t" * 20, transport=fake.transport()),
        )
        opened.append(backend)
        return backend

    yield make_backend
    for backend in opened:
        backend.close()
