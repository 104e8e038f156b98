"""Where golden weights go, by the memory that a machine has; and which layers have any."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from tests.refusals import refused
from tink_rl.errors import ConfigError
from tink_rl.policy.fingerprint import checkpoint_index
from tink_rl.server import golden as golden_module
from tink_rl.server import golden_plan
from tink_rl.server.golden import GoldenWeights, foldable
from tink_rl.server.golden_plan import GIB, GoldenNeed, Memory, plan
from tink_rl.server.modules import Layer, Shard
from tink_rl.server.names import Names

BASES = {
    # layers, width, kv width, intermediate, tensor parallel: GB of golden weights and of a fold's peak
    "Qwen2.5-1.5B": ((28, 1536, 256, 8960, 1), 2.6, 0.25),
    "Qwen2.5-7B": ((28, 3584, 512, 18944, 1), 13.1, 1.2),
    "Llama-3.1-8B": ((32, 4096, 1024, 14336, 1), 14.0, 1.1),
    "Qwen2.5-32B": ((64, 5120, 1024, 27648, 1), 62.4, 2.6),
    "Llama-3-70B, TP 8": ((80, 8192, 1024, 28672, 8), 17.1, 1.35),
}
SHARED, ALONE = 0.45, 0.92
"""What vLLM takes of the GPU beside a trainer, and alone."""


def layer(name: str, *shapes: tuple[int, int], ranks: int = 1) -> Layer:
    shards = tuple(
        Shard(
            name=f"{name}.{i}",
            layer=name,
            shard_id=i,
            shape=shape,
            rows=slice(0, shape[0] // ranks),
            columns=slice(0, shape[1]),
        )
        for i, shape in enumerate(shapes)
    )
    return Layer(name=name, module=torch.nn.Module(), shards=shards)


def needed(base: str) -> GoldenNeed:
    layers, width, kv, middle, ranks = BASES[base][0]
    block = [
        layer("qkv", (width, width), (kv, width), (kv, width), ranks=ranks),
        layer("o", (width, width), ranks=ranks),
        layer("gate_up", (middle, width), (middle, width), ranks=ranks),
        layer("down", (width, middle), ranks=ranks),
    ]
    return golden_plan.need(block * layers, torch.bfloat16)


def gpu(card_gib: float, share: float, *, host_gib: float = 256) -> Memory:
    return Memory(
        device="cuda",
        device_free=int(card_gib * (1 - share) * GIB),
        host_available=int(host_gib * GIB),
        shared_with_trainer=share == SHARED,
    )


@pytest.mark.parametrize("base", BASES)
def test_golden_weights_of_known_bases_take_what_was_computed_by_hand(base):
    _, golden_gb, fold_gb = BASES[base]
    found = needed(base)
    assert found.num_bytes / 1e9 == pytest.approx(golden_gb, rel=0.02)
    assert found.fold_bytes / 1e9 == pytest.approx(fold_gb, rel=0.08)


@pytest.mark.parametrize("card", [24, 48, 80, 141])
@pytest.mark.parametrize("base", BASES)
def test_beside_a_trainer_no_byte_of_the_gpu_goes_to_golden_weights(base, card):
    found = plan("auto", needed(base), gpu(card, SHARED), None)
    assert found.tier == "host" and "the trainer's" in found.reason


@pytest.mark.parametrize(
    ("base", "card", "tier"),
    [
        ("Qwen2.5-1.5B", 48, "host"),  # 3.8 GiB are free, 2 stay so
        ("Qwen2.5-1.5B", 80, "device"),
        ("Qwen2.5-7B", 80, "host"),
        ("Qwen2.5-7B", 141, "host"),  # 11.3 GiB
        ("Llama-3-70B, TP 8", 80, "host"),
    ],
)
def test_on_a_gpu_of_its_own_vllm_keeps_its_reserve(base, card, tier):
    assert plan("auto", needed(base), gpu(card, ALONE), None).tier == tier


def test_room_for_golden_weights_is_made_with_a_smaller_share_for_vllm():
    found = plan("auto", needed("Qwen2.5-7B"), gpu(80, 0.75), None)
    assert found.tier == "device" and found.budget_bytes > needed("Qwen2.5-7B").num_bytes


def test_given_budget_never_exceeds_what_is_there():
    small = gpu(24, ALONE, host_gib=64)  # 1.9 GiB free
    assert plan("auto", needed("Qwen2.5-7B"), small, 16.0).tier == "host"
    with refused("golden_does_not_fit", match=r"need 12.*budget is 0.000 GiB .device."):
        plan("device", needed("Qwen2.5-7B"), small, 16.0)
    with refused("golden_does_not_fit", match=r"budget is 7.000 GiB .host."):
        plan("auto", needed("Qwen2.5-7B"), gpu(24, SHARED, host_gib=8), 16.0)


def test_given_budget_may_exceed_half_of_the_hosts_memory():
    sixteen = gpu(80, SHARED, host_gib=16)
    with refused("golden_does_not_fit", match="raise --golden-budget-gib if the memory is there"):
        plan("auto", needed("Qwen2.5-7B"), sixteen, None)
    assert plan("auto", needed("Qwen2.5-7B"), sixteen, 14.0).tier == "host"


def test_layers_that_are_folded_in_place_need_no_room_for_copies():
    big, small = layer("a", (4096, 4096), (4096, 4096)), layer("b", (64, 64))
    whole = golden_plan.need([big, small], torch.bfloat16)
    found = golden_plan.need([big, small], torch.bfloat16, without_copy=["a"])
    assert found.num_bytes == whole.num_bytes
    assert found.fold_bytes < 100_000 < whole.fold_bytes


def test_memory_is_measured_per_worker(monkeypatch):
    import psutil

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5 * GIB, 80 * GIB))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=80 * GIB))
    found = golden_plan.measure(torch.device("cuda", 3), shared_with_trainer=True, num_workers=8)
    assert (found.device_free, found.host_available) == (5 * GIB, 10 * GIB)
    on_cpu = golden_plan.measure(torch.device("cpu"), shared_with_trainer=False, num_workers=1)
    assert (on_cpu.device, on_cpu.device_free) == ("cpu", 0)


# -- the weights themselves -----------------------------------------------------------------------


@pytest.fixture
def stored(tmp_path: Path):
    """Two layers in a checkpoint: one fused of two projections, one that is a convolution there."""
    tensors = {
        "qkv.0.weight": torch.randn(6, 5),
        "qkv.1.weight": torch.randn(3, 5),
        "conv1d.0.weight": torch.randn(6, 1, 4),
        "visual.qkv.weight": torch.randn(6, 5),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    layers = [layer("qkv", (6, 5), (3, 5)), layer("conv1d", (6, 4)), layer("vision.qkv", (6, 5))]
    return SimpleNamespace(
        index=checkpoint_index(_with_config(tmp_path)),
        tensors=tensors,
        layers={found.name: found for found in layers},
    )


def _with_config(directory: Path) -> Path:
    (directory / "config.json").write_text("{}")
    return directory


def load(stored, tier: str = "auto", *, device: str = "cpu") -> GoldenWeights:
    index, layers, _ = foldable(stored.index, stored.layers, Names(None, stored.layers))
    wanted = golden_plan.need(layers.values(), torch.float32)
    memory = Memory(
        device=device, device_free=40 * GIB, host_available=8 * GIB, shared_with_trainer=False
    )
    found = GoldenWeights(
        index,
        layers,
        dtype=torch.float32,
        device=torch.device(device),
        memory=memory,
        wanted=wanted,
        tier=tier,
    )
    found.load()
    return found


def test_layers_of_another_name_or_shape_are_left_out_with_one_line(stored, caplog):
    _, layers, reasons = foldable(stored.index, stored.layers, Names(None, stored.layers))
    assert set(layers) == {"qkv"} and set(reasons) == {"conv1d.0", "vision.qkv.0"}
    assert "as [6, 1, 4], the served layer wants [6, 4]" in reasons["conv1d.0"]
    assert reasons["vision.qkv.0"] == "the checkpoint has no vision.qkv.0.weight"
    assert [r.message.split(" cannot")[0] for r in caplog.records] == [
        "tink_rl: 2 of 4 projections"
    ]


def test_merged_mode_is_refused_only_if_nothing_can_be_folded(stored):
    del stored.layers["qkv"]
    with pytest.raises(ConfigError, match=r"in the shape that vLLM serves .*1, 4.*--mode adapter"):
        foldable(stored.index, stored.layers, Names(None, stored.layers))


def test_weights_lie_in_one_piece_and_are_the_checkpoints(stored):
    found = load(stored)
    for shard in stored.layers["qkv"].shards:
        assert torch.equal(found.weight(shard), stored.tensors[f"{shard.name}.weight"])
        assert found.weight(shard).data_ptr() % 64 == 0
    storages = {found.weight(s).untyped_storage().data_ptr() for s in stored.layers["qkv"].shards}
    assert len(storages) == 1 and found.describe()["tier"] == "host"


def test_gpu_that_is_full_after_all_gives_way_to_the_host_and_says_so(stored, monkeypatch, caplog):
    room = GoldenWeights._slab

    def slab(self, device):
        if device.type == "cuda":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return room(self, device)

    monkeypatch.setattr(GoldenWeights, "_slab", slab)
    monkeypatch.setattr(golden_module, "_pin", lambda slab: True)
    found = load(stored, device="cuda")
    assert found.describe() | {"bytes": 0} == {
        "tier": "host",
        "bytes": 0,
        "budget_bytes": 4 * GIB,
        "reason": "asked for",
        "pinned": True,
    }
    assert "go to the host, not the GPU" in caplog.text
    with refused("golden_does_not_fit", match="device"):
        load(stored, "device", device="cuda")
