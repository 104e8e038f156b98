"""Folds into vLLM's own linear layers, as they lie on a GPU and as they are packed on a CPU."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="the server extra is not installed")
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests import gpu_layout
from tests.gpu_layout import GATE_UP, OUT, QKV, WIDTH
from tink_rl.server import direct, folding, modules


@pytest.fixture(scope="module")
def config():
    with gpu_layout.one_rank() as found:
        found.model_config = SimpleNamespace(dtype=torch.float32)
        yield found


def rig(config, kind: str, dtype: torch.dtype = torch.float32):
    """Layers with loaded weights, and a folder for them."""
    with gpu_layout.as_on_gpu() if kind == "plain" else contextlib.nullcontext():
        model = gpu_layout.Block(dtype)
        layers = modules.linear_layers(model)
        weights = gpu_layout.load(model, layers)
    golden = gpu_layout.DictGolden(weights)
    folder = folding.Folder(layers, golden, vllm_config=config, device=torch.device("cpu"))
    return SimpleNamespace(
        model=model, layers=layers, weights=weights, golden=golden, folder=folder
    )


def served(rig, layer: str, x: torch.Tensor) -> torch.Tensor:
    module = rig.layers[layer].module
    if module.weight.numel():  # as a GPU's kernel reads it
        return x @ module.weight.T
    return module.quant_method.apply(module, x, None)


def check(rig, tensors) -> None:
    for name, layer in rig.layers.items():
        x = torch.randn(3, layer.shards[0].shape[1], generator=torch.Generator().manual_seed(5))
        expected = x @ gpu_layout.expected(layer, rig.weights, tensors).T
        torch.testing.assert_close(served(rig, name, x), expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(params=["plain", "packed"])
def kind(request):
    return request.param


def test_fold_serves_golden_plus_ba_and_the_base_again(config, kind):
    found = rig(config, kind)
    with gpu_layout.as_on_gpu() if kind == "plain" else contextlib.nullcontext():
        tensors = gpu_layout.adapter(found.layers, "q_proj", "v_proj", "o_proj")
        found.folder.fold(tensors)
        assert found.folder.touched == {QKV, OUT}
        check(found, tensors)
        found.folder.fold({})
        check(found, {})


def test_fold_in_the_layout_of_a_gpu_keeps_every_address(config):
    found = rig(config, "plain")
    held = [layer.module._parameters for layer in found.layers.values()]
    before = [(id(p), p.data_ptr()) for each in held for p in each.values() if p is not None]
    with gpu_layout.as_on_gpu():
        found.folder.fold(gpu_layout.adapter(found.layers, "q_proj", "up_proj", "o_proj"))
    after = [(id(p), p.data_ptr()) for each in held for p in each.values() if p is not None]
    assert before == after and len(before) == 4  # three weights and a bias


@pytest.mark.parametrize("which", range(6))
def test_fold_that_fails_inside_a_fused_layer_heals_with_the_next(config, kind, monkeypatch, which):
    found = rig(config, kind)
    tensors = gpu_layout.adapter(found.layers, "q_proj", "v_proj", "up_proj", "o_proj")
    whole, calls = folding.Folder._whole, []

    def fail(self, shard, given):
        calls.append(shard.name)
        if len(calls) == which + 1:
            raise torch.OutOfMemoryError("injected")
        return whole(self, shard, given)

    with gpu_layout.as_on_gpu() if kind == "plain" else contextlib.nullcontext():
        addresses = {n: id(layer.module.weight) for n, layer in found.layers.items()}
        monkeypatch.setattr(folding.Folder, "_whole", fail)
        with pytest.raises(torch.OutOfMemoryError, match="injected"):
            found.folder.fold(tensors)
        monkeypatch.setattr(folding.Folder, "_whole", whole)
        found.folder.fold(tensors)
        check(found, tensors)
        assert {n: id(layer.module.weight) for n, layer in found.layers.items()} == addresses
    assert set(addresses) == {QKV, GATE_UP, OUT}


# -- in place, as on a GPU ------------------------------------------------------------------------


class Traffic(TorchDispatchMode):
    """Counts the bytes that operations read and write, and what lived at once beside `known` tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = self.peak = 0
        self.ops: list[str] = []
        self._live: dict[int, int] = {}

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = op(*args, **kwargs)
        self.ops.append(op.overloadpacket.__name__)
        if not op.is_view and op is not torch.ops.aten.empty.memory_format:
            given = tree_leaves((args, kwargs)) + ([] if "out" in kwargs else tree_leaves(found))
            self.num_bytes += sum(
                t.numel() * t.itemsize for t in given if isinstance(t, torch.Tensor)
            )
            if "out" not in kwargs and not op._schema.is_mutable:
                self.peak += sum(
                    t.numel() * t.itemsize
                    for t in tree_leaves(found)
                    if isinstance(t, torch.Tensor)
                )
        return found


@pytest.fixture
def in_place(monkeypatch):
    """Where a GPU would be: this CPU."""
    monkeypatch.setattr(direct, "_DEVICES", ("cpu",))
    with gpu_layout.as_on_gpu():
        yield


def placed(config, dtype: torch.dtype, **changes):
    """A rig whose layers are all folded in place."""
    found = rig(config, "plain", dtype)
    names = [n for n, layer in found.layers.items() if direct.same_as_golden(layer, found.golden)]
    assert names == list(found.layers)
    found.folder = folding.Folder(
        found.layers,
        found.golden,
        vllm_config=config,
        device=torch.device("cpu"),
        in_place=names,
    )
    return found


def ulp(exact: torch.Tensor) -> torch.Tensor:
    """The distance to the next bf16 of `exact`."""
    return torch.exp2(torch.floor(torch.log2(exact.abs().clamp(min=1e-30))) - 7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fold_in_place_rounds_once_and_keeps_addresses(config, in_place, dtype):
    found = placed(config, dtype)
    before = {n: layer.module.weight.data_ptr() for n, layer in found.layers.items()}
    tensors = gpu_layout.adapter(found.layers, "q_proj", "v_proj", "up_proj", "o_proj")
    found.folder.fold(tensors)
    differ = total = 0
    for name, layer in found.layers.items():
        exact = gpu_layout.exact(layer, found.weights, tensors)
        served, rounded = layer.module.weight.double(), exact.to(dtype).double()
        split = 2**-16 * gpu_layout.magnitude(layer, tensors)  # where golden and B·A cancel
        limit = ulp(exact) + split if dtype == torch.bfloat16 else 1e-6
        assert bool(((served - rounded).abs() <= limit).all()), name
        differ += int((served != rounded).sum())
        total += served.numel()
    if dtype == torch.bfloat16:
        assert differ < 0.002 * total  # products of A and B rounded to bf16: 0.1
    assert before == {n: layer.module.weight.data_ptr() for n, layer in found.layers.items()}
    found.folder.fold({})
    for layer in found.layers.values():
        assert torch.equal(layer.module.weight, gpu_layout.expected(layer, found.weights, {}))


def test_fold_in_place_moves_at_most_three_bytes_per_byte_of_weight(config, in_place):
    found = placed(config, torch.bfloat16)
    tensors = gpu_layout.adapter(found.layers, "_proj", rank=1)
    with Traffic() as traffic:
        found.folder.fold(tensors)
    weights = sum(layer.module.weight.numel() * 2 for layer in found.layers.values())
    factors = 3 * sum(t.numel() * 2 for t in tensors.values())
    small = 12 * sum(t.numel() * 4 for t in tensors.values())  # splitting A and B
    assert traffic.num_bytes <= 3 * weights + factors + small
    assert traffic.ops.count("addmm") == 6
    assert not {"item", "_local_scalar_dense", "nonzero"} & set(traffic.ops)
    assert traffic.peak <= small + factors  # no temporary has the size of a weight


def test_layer_of_another_kind_shape_or_content_is_reloaded_instead(config, in_place):
    found = placed(config, torch.bfloat16)
    module: Any = found.layers[OUT].module
    assert direct.served_rows(found.layers[OUT]) is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "quant_method", object())
        assert direct.served_rows(found.layers[OUT]) is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.weight, "data", module.weight.data.t())
        assert direct.served_rows(found.layers[OUT]) is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.weight, "data", torch.zeros(WIDTH + 8, WIDTH, dtype=torch.bfloat16))
        assert direct.served_rows(found.layers[OUT]) is None
    module.weight.data = module.weight.data.flip(0)  # a loader that permutes
    assert not direct.same_as_golden(found.layers[OUT], found.golden)


def test_golden_of_the_host_goes_through_the_served_weight_itself(config, in_place, monkeypatch):
    """The copy to the GPU lands where the product is added: no temporary of its size."""
    found = placed(config, torch.bfloat16)
    tensors = gpu_layout.adapter(found.layers, "o_proj")
    far = SimpleNamespace(weight=lambda shard: _Elsewhere(found.golden.weight(shard)))
    direct.fold_in_place(found.layers[OUT], direct.served_rows(found.layers[OUT]), far, tensors)
    there = found.layers[OUT].module.weight.clone()
    found.folder.fold(tensors)
    assert torch.equal(there, found.layers[OUT].module.weight)


class _Elsewhere(torch.Tensor):
    """A tensor that says it lies on another device."""

    @property
    def device(self):
        return torch.device("meta")


def test_layers_keep_the_reload_path_on_a_cpu(config):
    found = rig(config, "packed")
    assert all(direct.served_rows(layer) is None for layer in found.layers.values())
