"""Tensor parallel in both modes, two replicas, and the gap on a bf16 server."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from tests.policies import (
    PeftTwin,
    WholeTwin,
    assert_served,
    random_adapter,
    served_greedy,
    sync_to,
)
from tests.server.faulty import faulty_options
from tests.warm_server import make_server
from tink_rl import errors
from tink_rl.config import SyncConfig
from tink_rl.gpus import exact_dtype
from tink_rl.launch import group_members
from tink_rl.publish.publisher import WeightSync
from tink_rl.training.probe import Prober

pytestmark = pytest.mark.server


AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}


@pytest.fixture(
    params=[pytest.param({}, id="as it is"), pytest.param(AVX2, id="AVX2", marks=pytest.mark.long)]
)
def tensor_parallel(request, servers, switch):
    """Two workers, also computing as on a CPU with AVX2 and nothing newer; the switch lets them fail."""
    options = faulty_options(switch)
    options["env"] |= request.param
    return servers.get("qwen3", mode="both", tensor_parallel_size=2, **options)


@pytest.mark.long
@pytest.mark.parametrize("tensor_parallel", [AVX2], ids=["AVX2"], indirect=True)
def test_workers_compute_with_the_instructions_that_they_are_held_to(tensor_parallel):
    # The tests below compare their tokens with those of this process, which computes as the CPU can.
    environments = [
        Path(f"/proc/{pid}/environ").read_bytes() for pid in group_members(tensor_parallel.pid)
    ]
    assert len(environments) >= 4  # API server, engine, two workers
    for name in (b"ONEDNN_MAX_CPU_ISA=AVX2", b"ATEN_CPU_CAPABILITY=avx2"):
        assert all(name in environment for environment in environments)


@pytest.mark.parametrize("mode", ["adapter", "merged", "full"])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"], ["up_proj"]])
def test_every_worker_of_a_tensor_parallel_server_joins_and_slices(
    tensor_parallel, model_dir, mode, targets
):
    server = tensor_parallel
    twin = PeftTwin(model_dir("qwen3"), target_modules=targets)
    assert server.client().status().world_size == 2
    with sync_to(server, twin.directory, mode) as sync:
        for seed in range(3):  # the third is packed where the first was
            twin.randomise(seed)
            assert_served(server, sync.publish(twin.model).name, twin.clear_cases())
        sync.drop_current()
    base = server.client().status().base_model
    assert_served(server, base, twin.clear_cases(adapter=False))


def test_whole_model_is_sliced_for_every_worker(tensor_parallel, model_dir):
    server = tensor_parallel
    twin = WholeTwin(model_dir("qwen3"))
    with sync_to(server, twin.directory, "full", bucket_mib=0.1) as sync:
        for seed in range(2):
            twin.shake_base(seed)
            record = sync.publish_full(iter(twin.tensors().items()))
            assert_served(server, record.name, twin.base_cases())
        sync.drop_current()
    base = server.client().status().base_model
    assert_served(server, base, PeftTwin(twin.directory).clear_cases(adapter=False))


def test_adapter_that_one_worker_refuses_is_served_by_none(tensor_parallel, switch, model_dir):
    server, twin = tensor_parallel, PeftTwin(model_dir("qwen3"))
    with sync_to(server, twin.directory, "adapter") as sync:
        name, cases = sync.publish(random_adapter(twin, 1)).name, twin.clear_cases()
        switch.write_text("serve")
        with pytest.raises(errors.TinkError, match="injected: no slot on rank 1"):
            sync.publish(random_adapter(twin, 2))
        switch.unlink()
        assert set(server.client().status().served) == {name} and sync.current.name == name
        assert_served(server, name, cases)
        twin.randomise(3)
        assert_served(server, sync.publish(twin.model).name, twin.clear_cases())


def test_bf16_server_shows_its_gap_and_auto_says_what_it_took(servers, model_dir, caplog):
    server = servers.get("qwen3", mode="both", dtype="bfloat16")
    twin = PeftTwin(model_dir("qwen3"))
    caplog.set_level(logging.INFO, logger="tink_rl")
    config = SyncConfig(mode="auto", token=server.token, policy="bf16")
    with WeightSync(server.url, base_model=twin.directory, config=config) as sync:
        Prober(twin.model, vocab_size=64).self_test(sync, twin.collector)
        assert f"mode auto took {sync.mode.value} on a bfloat16 server" in caplog.text
        assert "logprob gap merged" in caplog.text and "slot" in caplog.text
        record = sync.publish(random_adapter(twin, 1))
        assert record.mode is sync.mode
        sync.drop_current()


@pytest.fixture(scope="module")
def second(model_dir, tmp_path_factory, servers):
    first = servers.get("qwen3", mode="both")
    server = make_server(
        model_dir("qwen3"),
        mode="both",
        dtype=exact_dtype("both"),
        max_model_len=256,
        max_lora_rank=16,
        token_file=str(first.token_file),
    )
    with server:
        yield server


@pytest.mark.home
@pytest.mark.parametrize("mode", ["adapter", "merged"])
def test_version_is_current_only_after_every_replica_holds_it(servers, second, model_dir, mode):
    first = servers.get("qwen3", mode="both")
    twin = PeftTwin(model_dir("qwen3"))
    config = SyncConfig(mode=mode, token=first.token, stage_timeout_s=5.0)
    with WeightSync([first.url, second.url], base_model=twin.directory, config=config) as sync:
        twin.randomise(1)
        name = sync.publish(twin.model).name
        cases = twin.clear_cases()
        for server in (first, second):
            assert_served(server, name, cases)
        stage = sync.fleet.replicas[1].stage

        def refuse(outgoing):
            raise errors.RankExceeded("refused by the second replica")

        sync.fleet.replicas[1].stage = refuse
        with pytest.raises(errors.RankExceeded) as caught:
            sync.publish(random_adapter(twin, 2))
        assert caught.value.details["replica"] == second.url
        assert sync.current.name == name
        sync.fleet.replicas[1].stage = stage
        for server in (first, second):
            assert served_greedy(server, name, cases) == list(cases.values())
        sync.drop_current()
