"""Reading and writing DTensor parameters; training on several ranks is in tests/multi."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests import forked
from tests.invariant.running import largest_difference
from tests.policies import PeftTwin
from tests.unit import gathering
from tink_rl import errors
from tink_rl.policy.live_check import check_live_base
from tink_rl.policy.sharded import Sharding, read_whole, sharding_of, write_whole
from tink_rl.training.probe import Prober


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_whole_parameters_are_read_without_a_copy_and_written_in_place():
    parameter = torch.nn.Parameter(torch.zeros(2, 3))
    assert sharding_of(parameter) is Sharding.WHOLE
    (read,) = read_whole([parameter])
    assert read.data_ptr() == parameter.data_ptr()
    write_whole([parameter], [torch.ones(2, 3)])
    assert torch.equal(parameter.detach(), torch.ones(2, 3))


def test_fully_sharded_adapter_is_collected_swapped_and_given_back_bit_exactly(model_dir, mesh):
    twin = PeftTwin(model_dir("qwen3"))
    twin.randomise(1)
    before = twin.collector.collect()
    plain = Prober(twin.model, vocab_size=64).logprobs()
    for layer in twin.model.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(twin.model, mesh=mesh)
    assert twin.collector.sharding() is Sharding.DTENSOR

    other = twin.collector.random_like(seed=3, std=0.1)
    with twin.collector.swapped(other):
        swapped = twin.collector.collect()
        moved = Prober(twin.model, vocab_size=64).logprobs()
    for name, tensor in other.tensors.items():
        assert torch.allclose(swapped.tensors[name], tensor, atol=1e-7)
    assert max(abs(a - b) for a, b in zip(moved, plain, strict=True)) > 0.01

    prober = Prober(twin.model, vocab_size=64)
    noisy = prober.measure([prober.prompt_ids], "bfloat16").logprobs_BT
    assert len(noisy) == 4 and 1e-4 < largest_difference(noisy[0], prober.logprobs()) < 1.0

    after = twin.collector.collect()
    assert all(torch.equal(before.tensors[name], after.tensors[name]) for name in before.tensors)
    assert Prober(twin.model, vocab_size=64).logprobs() == pytest.approx(plain, abs=1e-5)


@pytest.mark.parametrize("shape", ["qwen3", "qwen2", "qwen3_moe"])
def test_fully_sharded_base_is_compared_by_parts(model_dir, mesh, shape):
    twin = PeftTwin(model_dir(shape))
    for layer in twin.model.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(twin.model, mesh=mesh)
    check_live_base(twin.model, str(model_dir(shape)))
    with torch.no_grad():
        layer = twin.model.get_base_model().model.layers[1]
        name = "gate_up_proj" if shape == "qwen3_moe" else "up_proj.base_layer.weight"
        planted = next(p for n, p in layer.named_parameters() if n.endswith(name))
        planted.to_local().view(-1)[-1] += 0.01
    with pytest.raises(errors.BaseMismatch, match=r"layers\.1\.mlp.*up_proj.*0\.01 in 1 of"):
        check_live_base(twin.model, str(model_dir(shape)))


def test_root_that_keeps_whole_tensors_after_a_forward_is_seen_as_sharded(model_dir, mesh):
    twin = PeftTwin(model_dir("qwen3"))
    fully_shard(twin.model, mesh=mesh)
    with torch.no_grad():
        twin.model(input_ids=torch.tensor([[3, 4, 5]]))
    parameter = next(p for n, p in twin.model.named_parameters() if "lora_A" in n)
    assert sharding_of(parameter) is Sharding.WHOLE
    assert twin.collector.sharding() is Sharding.DTENSOR
    with twin.collector.swapped(twin.collector.random_like(seed=3)) as _:
        twin.model(input_ids=torch.tensor([[3, 4, 5]]))
    assert twin.collector.sharding() is Sharding.DTENSOR


def test_what_four_ranks_hold_is_read_whole_on_each_however_it_is_cut(tmp_path):
    arguments = (4, str(tmp_path / "store"))
    torch.multiprocessing.start_processes(
        gathering.read_on, arguments, nprocs=4, start_method=forked.METHOD
    )


def test_rows_of_one_dtype_are_gathered_at_once(mesh, monkeypatch):
    calls = []
    gather = dist.all_gather_into_tensor
    monkeypatch.setattr(
        dist, "all_gather_into_tensor", lambda *a, **k: (calls.append(a), gather(*a, **k))
    )
    layers = torch.nn.Sequential(*(torch.nn.Linear(3, 5) for _ in range(4)))
    wanted = [p.detach().clone() for p in layers.parameters()]
    fully_shard(layers, mesh=mesh)
    found = read_whole(list(layers.parameters()))
    assert len(calls) == 1
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
