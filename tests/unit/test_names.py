"""What a packet's names mean on the served model: fused, renamed, and twice."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tink_rl.errors import UnknownModules, UnsupportedAdapter
from tink_rl.policy.packet import TensorSpec
from tink_rl.server.headers import check_header
from tink_rl.server.modules import Layer, Shard
from tink_rl.server.names import Names
from tink_rl.types import SyncMode

MLP, QKV = "language_model.model.layers.0.mlp.gate_up_proj", "model.layers.0.qkv_proj"


def _layer(name: str, parts: list[str], ids: list, *, comes_fused: bool = False) -> Layer:
    shards = tuple(
        Shard(name=part, layer=name, shard_id=i, shape=(2 + n, 5), rows=slice(0, 2 + n),
              columns=slice(0, 5))
        for n, (part, i) in enumerate(zip(parts, ids, strict=True))
    )  # fmt: skip
    return Layer(name=name, module=nn.Module(), shards=shards, comes_fused=comes_fused)


class Mapper:
    """As vLLM's: text of a multimodal model lies one level deeper there."""

    def get_rename_mapper(self) -> Mapper:
        return self

    def map_name(self, name: str) -> str | None:
        return name.replace("model.language_model.", "language_model.model.", 1)


@pytest.fixture
def names() -> Names:
    stem = MLP.removesuffix("gate_up_proj")
    layers = [
        _layer(MLP, [f"{stem}gate_proj", f"{stem}up_proj"], [0, 1]),
        _layer(QKV, [f"{QKV}.q", f"{QKV}.k", f"{QKV}.v"], ["q", "k", "v"], comes_fused=True),
    ]
    placed = {"backbone.mixer.in": (QKV, None), "backbone.mixer.k": (QKV, "k"), "gone": ("x", None)}
    model = SimpleNamespace(hf_to_vllm_mapper=Mapper())
    return Names(model, {layer.name: layer for layer in layers}, placed)


def packet(module: str, rows: int) -> dict[str, torch.Tensor]:
    a, b = torch.randn(3, 5), torch.randn(rows, 3)
    return {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}


@pytest.mark.parametrize(
    "module",
    [
        "language_model.model.layers.0.mlp.up_proj",
        "model.language_model.layers.0.mlp.up_proj",  # trained with its images
        "model.layers.0.mlp.up_proj",  # trained as a text model
    ],
)
def test_every_name_that_transformers_has_for_a_projection_is_found(names, module):
    assert [shard.name for shard in names.find(module)] == [MLP.replace("gate_up", "up")]


def test_where_the_loader_puts_a_tensor_says_what_it_is(names):
    assert [shard.shard_id for shard in names.find("backbone.mixer.in")] == ["q", "k", "v"]
    assert [shard.shard_id for shard in names.find("backbone.mixer.k")] == ["k"]
    assert names.find("gone") == names.find("model.layers.0.other") == ()


def test_adapter_on_a_fused_name_is_the_same_a_with_the_rows_of_b(names):
    tensors = packet(MLP, 5)
    a, b = tensors.values()
    for found in (names.cut(tensors), names.cut(tensors, for_slots=True)):
        assert len(found) == 4
        for part, rows in (("gate_proj", b[:2]), ("up_proj", b[2:])):
            name = MLP.replace("gate_up_proj", part)
            assert found[f"{name}.lora_A.weight"] is a
            assert torch.equal(found[f"{name}.lora_B.weight"], rows)


def test_slots_take_as_one_what_only_comes_fused(names):
    tensors = packet(QKV, 9)
    assert names.cut(tensors, for_slots=True) == tensors
    assert sorted(names.cut(tensors)) == sorted(
        f"{QKV}.{i}.lora_{part}.weight" for i in "qkv" for part in "AB"
    )


def check(names: Names, tensors: dict[str, torch.Tensor], **refused: str) -> None:
    specs = tuple(
        TensorSpec(name=name, shape=tuple(tensor.shape), dtype="float32", offset=0)
        for name, tensor in tensors.items()
    )
    header = SimpleNamespace(mode=SyncMode.MERGED, rank=3, tensors=specs)
    check_header(header, names, max_lora_rank=8, refused=refused)  # type: ignore[arg-type]


def test_fused_name_beside_one_of_its_parts_is_refused(names):
    check(names, packet(MLP, 5))
    with pytest.raises(UnknownModules, match="are the same in the served model"):
        check(names, packet(MLP, 5) | packet("model.layers.0.mlp.up_proj", 3))


def test_fused_name_is_refused_with_the_reason_of_a_part(names):
    with pytest.raises(
        UnsupportedAdapter, match=r"1 of 1 modules .*gate_up_proj.*: no such weight"
    ):
        check(names, packet(MLP, 5), **{MLP.replace("gate_up", "up"): "no such weight"})
