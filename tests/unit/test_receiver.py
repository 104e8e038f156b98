"""A worker from its start to a served version, without an engine: vLLM's layers, our receiver."""

from __future__ import annotations

import contextlib
import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("vllm", reason="the server extra is not installed")
from tests import gpu_layout
from tests.gpu_layout import GATE_UP
from tink_rl.policy import packet
from tink_rl.server import direct
from tink_rl.server.receiver import TinkWorkerExtension
from tink_rl.types import SyncMode


class Worker(TinkWorkerExtension):
    """What the receiver needs of vLLM's worker."""

    def __init__(self, config: Any, model: Any) -> None:
        self.rank, self.device = 0, torch.device("cpu")
        self.model_config = SimpleNamespace(dtype=torch.float32)
        self.vllm_config = config
        # As of a pipeline's first rank, which samples nothing.
        self.model_runner = SimpleNamespace(
            get_model=lambda: model, speculative_config=None, sampler=None
        )

    def ask(self, method: str, *args: Any) -> Any:
        """The value of `method`, or the error that a trainer would see."""
        answer = getattr(self, method)(*args)
        return answer["value"] if answer["ok"] else answer["error"]


@pytest.fixture(scope="module")
def config():
    with gpu_layout.one_rank() as found:
        found.model_config = SimpleNamespace(dtype=torch.float32)
        yield found


@pytest.fixture(params=["in place", "reloaded", "packed"])
def rig(request, config, tmp_path, monkeypatch):
    """A prepared worker of a model whose `gate_up_proj` the checkpoint does not hold as it is served."""
    if request.param == "in place":
        monkeypatch.setattr(direct, "_DEVICES", ("cpu",))
    packed = request.param == "packed"
    with contextlib.nullcontext() if packed else gpu_layout.as_on_gpu():
        from tink_rl.server import modules

        model = gpu_layout.Block(torch.float32)
        layers = modules.linear_layers(model)
        weights = gpu_layout.load(model, layers)
        stored = {f"{n}.weight": w for n, w in weights.items() if "gate" not in n and "up" not in n}
        save_file(stored, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "block"}))
        worker = Worker(config, model)
        options = {
            "modes": ["merged"],
            "model_dir": str(tmp_path),
            "golden_tier": "auto",
            "golden_budget_gib": None,
            "shared_with_trainer": True,
        }
        prepared = worker.ask("tink_prepare", options)
        assert prepared["golden"]["tier"] == "host", prepared
        assert prepared["num_modules"] == 6
        yield SimpleNamespace(worker=worker, layers=layers, weights=weights, kind=request.param)


def publish(rig, tensors: dict[str, torch.Tensor]) -> Any:
    """Send `tensors` as a merged version by HTTP chunks; what the fold answers."""
    header, buffer = packet.pack(tensors, mode=SyncMode.MERGED, base_fingerprint="f" * 32, rank=4)
    header = packet.seal(header, buffer).named("p", 1, 1)
    options = {"transport": "http", "timeout_s": 5.0}
    refused = rig.worker.ask("tink_stage", "s", header.to_json(), options)
    if refused is not None:
        return refused
    rig.worker.ask("tink_chunk", "s", 0, bytes(buffer.numpy()))
    assert rig.worker.ask("tink_sent", "s", header.digest, 5.0) == "done"
    return rig.worker.ask("tink_fold", "s")


def test_worker_folds_what_was_sent_and_leaves_out_what_it_cannot(rig):
    in_place = rig.worker.tink_state_.folder._in_place
    assert len(in_place) == (2 if rig.kind == "in place" else 0)
    tensors = gpu_layout.adapter(rig.layers, "q_proj", "o_proj")
    assert isinstance(publish(rig, tensors), str)
    x = torch.randn(3, gpu_layout.WIDTH)
    for layer in rig.layers.values():
        module: Any = layer.module
        plain = module.weight.numel() > 0
        served = x @ module.weight.T if plain else module.quant_method.apply(module, x, None)
        expected = x @ gpu_layout.expected(layer, rig.weights, tensors).T
        torch.testing.assert_close(served, expected, rtol=1e-5, atol=1e-5)


def test_adapter_for_a_layer_that_cannot_be_folded_is_refused_with_the_reason(rig):
    error = publish(rig, gpu_layout.adapter(rig.layers, "q_proj", "up_proj"))
    assert error["code"] == "unsupported_adapter"
    assert "1 of 2 modules" in error["message"] and "the checkpoint has no" in error["message"]
    assert GATE_UP not in rig.worker.tink_state_.folder.touched
