"""Full updates beside everything else: refusals, failures midway, slots, merged versions, TRL's client.

That the tokens are the updated model's, shape by shape, is in `test_shapes_publish.py`; tensor parallel in
`test_parallel_and_bf16.py`; a write that fails in `test_faults.py`.
"""

from __future__ import annotations

import threading

import pytest
import torch

from tests.policies import (
    PeftTwin,
    WholeTwin,
    assert_served,
    long_greedy,
    long_request_under_way,
    random_adapter,
    served_greedy,
    sync_to,
)
from tink_rl import errors
from tink_rl.publish.full_update import FullUpdate
from tink_rl.publish.vllm_client import VLLMClient

pytestmark = [pytest.mark.server, pytest.mark.home]
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
SMALL = 0.05
"""MiB of a bucket: the tiny model takes about twenty."""


@pytest.fixture
def server(servers):
    return servers.get("qwen3", mode="both")


@pytest.fixture
def twin(model_dir):
    return WholeTwin(model_dir("qwen3"))


@pytest.fixture
def sync(server, twin):
    with sync_to(server, twin.directory, "full", bucket_mib=SMALL) as sync:
        yield sync


def base_of(server):
    return server.client().status().base_model


def _without(tensors, name):
    return {k: v for k, v in tensors.items() if k != name}


def _with(tensors, name, tensor):
    return {**tensors, name: tensor}


BAD_PLANS = {
    "unknown name": (
        lambda t: _with(t, "model.layers.9.mlp.up_proj.weight", torch.ones(2, 2)),
        errors.UnknownModules,
    ),
    "wrong shape": (lambda t: _with(t, Q_PROJ, t[Q_PROJ][:, :-1]), errors.ShapeMismatch),
    "incomplete group": (lambda t: _without(t, Q_PROJ), errors.IncompleteGroup),
}


@pytest.mark.parametrize("case", BAD_PLANS)
def test_bad_plan_is_refused_before_the_first_byte(server, twin, sync, case):
    change, expected = BAD_PLANS[case]
    twin.shake_base(1)
    name, cases = sync.publish_full(twin.tensors()).name, twin.base_cases()
    twin.shake_base(2)
    with pytest.raises(expected) as caught:
        sync.publish_full(change(twin.tensors()))
    assert len(caught.value.message) > 60
    status = server.client().status()
    assert status.state == "ready" and list(status.served) == [name]
    assert_served(server, name, cases)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e19])
@pytest.mark.parametrize("place", ["first", "last"])
def test_bad_values_are_refused_and_never_written(server, twin, sync, value, place):
    twin.shake_base(1)
    name, cases = sync.publish_full(twin.tensors()).name, twin.base_cases()
    tensors = dict(twin.tensors())
    victim = list(tensors)[0 if place == "first" else -1]
    tensors[victim] = tensors[victim].detach().clone()
    tensors[victim].view(-1)[3] = value
    with pytest.raises(errors.NonFiniteWeights, match="diverged"):
        sync.publish_full(tensors)
    if place == "first":  # its bucket is refused whole, so nothing was written
        assert server.client().status().state == "ready"
        assert_served(server, name, cases)
    else:
        assert_not_ready_until(server, name, lambda: sync.publish_full(twin.tensors()), cases)


def assert_not_ready_until(server, name, heal, cases):
    status = server.client().status()
    assert status.state == "not_ready" and "midway" in (status.reason or "")
    with pytest.raises(errors.NotReady, match="publish again"):
        served_greedy(server, name, [[5, 6]])
    assert_served(server, heal().name, cases)


def _broken_stream(twin):
    yield from list(twin.tensors().items())[:15]
    yield "no.such.weight", torch.ones(4, 4)


@pytest.mark.parametrize("healer", ["full", "merged", "drop"])
def test_stream_that_is_found_wrong_midway_leaves_not_ready_and_is_healed(
    server, twin, sync, healer
):
    name = sync.publish_full(twin.tensors()).name
    adapted = PeftTwin(twin.directory)
    twin.shake_base(2)
    with pytest.raises(errors.UnknownModules, match="not in the served checkpoint"):
        sync.publish_full(_broken_stream(twin))
    assert server.client().status().state == "not_ready"
    if healer == "full":
        cases = twin.base_cases()
        assert_not_ready_until(server, name, lambda: sync.publish_full(twin.tensors()), cases)
    elif healer == "merged":
        sync.close()
        with sync_to(server, twin.directory, "merged") as merged:
            adapted.randomise(4)
            record = merged.publish(adapted.model)
            assert_served(server, record.name, adapted.clear_cases())
    else:
        sync.drop_current()
        assert_served(server, base_of(server), adapted.clear_cases(adapter=False))
    assert server.client().status().state == "ready"


def forget_writer(server, sync):
    """The server knows of no channel of `sync` any more, as after a restart."""
    [replica] = sync.fleet.replicas
    known = {"policy": sync.config.policy, "epoch": replica.epoch}
    server.client().control("leave", known, timeout_s=5.0)


def test_stream_begins_again_on_a_server_that_forgot_its_writer(server, twin, sync):
    sync.publish_full(twin.tensors())
    forget_writer(server, sync)
    twin.shake_base(2)
    record = sync.publish_full(iter(twin.tensors().items()))
    assert_served(server, record.name, twin.base_cases())


def test_stream_that_loses_its_server_midway_fails_and_the_next_one_joins_again(server, twin, sync):
    def stream():
        for number, pair in enumerate(twin.tensors().items()):
            if number == 4:
                forget_writer(server, sync)
            yield pair

    twin.shake_base(3)
    with pytest.raises(errors.PublishFailed):
        sync.publish_full(stream())
    assert_served(server, sync.publish_full(iter(twin.tensors().items())).name, twin.base_cases())


def test_stream_with_an_incomplete_group_is_refused_before_that_group_is_touched(
    server, twin, sync
):
    twin.shake_base(1)
    with pytest.raises(errors.IncompleteGroup, match="send all of them"):
        sync.publish_full(iter(_without(twin.tensors(), Q_PROJ).items()))
    assert server.client().status().state == "not_ready"
    assert_served(server, sync.publish_full(twin.tensors()).name, twin.base_cases())


def test_stream_of_one_incomplete_group_writes_nothing(server, twin, sync):
    name = sync.publish_full(twin.tensors()).name
    cases = twin.clear_cases(adapter=False)
    twin.shake_base(1)
    with pytest.raises(errors.IncompleteGroup, match="qkv_proj"):
        sync.publish_full(iter([(Q_PROJ, twin.tensors()[Q_PROJ])]))
    assert server.client().status().state == "ready"
    assert_served(server, name, cases)


def test_sender_that_goes_away_midway_leaves_not_ready_and_another_heals(server, twin, sync):
    status = sync.open()
    update = FullUpdate(
        sync.fleet,
        policy="policy",
        version=7,
        base_fingerprint=status.base_fingerprint,
        dtype=status.dtype,
        bucket_bytes=1000,
    )
    twin.shake_base(1)
    update.begin(None)
    for name, tensor in list(twin.tensors().items())[:4]:
        update.add(name, tensor)
    assert server.client().status().state == "not_ready"
    held = threading.Thread(target=lambda: _ask_quietly(server))
    held.start()
    sync.fleet.replicas[0].close()  # the lease ends with its sender
    held.join(30)
    assert not held.is_alive(), "a held request was never answered"
    assert "lease ended" in (server.client().status().reason or "")
    record = sync.publish_full(twin.tensors())
    assert server.client().status().state == "ready"
    assert_served(server, record.name, twin.base_cases())


def _ask_quietly(server):
    with pytest.raises(errors.NotReady):
        served_greedy(server, "anything", [[5, 6]])


def test_running_requests_end_whole_on_the_old_version(server, twin, sync):
    name = sync.publish_full(twin.tensors()).name
    expected = long_greedy(server, name).completions
    with long_request_under_way(server, name) as request:
        twin.shake_base(1)
        record = sync.publish_full(twin.tensors())
    assert request.completions == expected * len(request.completions) != []
    assert record.held_seconds > 0
    assert_served(server, record.name, twin.base_cases())


def test_adapters_in_slots_are_still_there_and_right_on_the_new_base(server, twin, sync):
    slots = {}
    with (
        sync_to(server, twin.directory, "adapter", policy="math") as math,
        sync_to(server, twin.directory, "adapter", policy="code") as code,
    ):
        for slot, seed in ((math, 1), (code, 2)):
            adapter = random_adapter(twin, seed)
            slots[slot.publish(adapter).name] = adapter
        for seed in (3, 4):  # twice: the second one finds slots that were loaded again
            twin.shake_base(seed)
            name = sync.publish_full(twin.tensors()).name
            assert server.client().models()[0] == name
            assert_slots(server, twin, slots)
            assert_served(server, name, twin.base_cases())
        late = random_adapter(twin, 5)
        slots[math.publish(late).name] = late  # adds to what is served now
        assert_slots(server, twin, slots)
        with pytest.raises(errors.ModeUnavailable, match="one kind at a time"):
            sync.close()
            with sync_to(server, twin.directory, "adapter") as same:
                same.publish(late)
        sync.open()
        sync.drop_current()
        fresh = WholeTwin(twin.directory)
        assert_slots(server, fresh, slots)
        assert_served(server, base_of(server), fresh.clear_cases(adapter=False))


def assert_slots(server, twin, slots):
    for name, adapter in slots.items():
        with twin.collector.swapped(adapter):
            assert_served(server, name, twin.clear_cases())


def test_full_version_ends_the_slots_of_its_own_policy(server, twin, sync):
    with sync_to(server, twin.directory, "adapter", policy="own") as own:
        slot = own.publish(random_adapter(twin, 1)).name
        twin.shake_base(1)
        name = own.publish_full(twin.tensors()).name
        assert server.client().models() == [name]
        with pytest.raises(errors.UnknownVersion):
            served_greedy(server, slot, [[5, 6]])
        assert_served(server, name, twin.base_cases())


def test_full_and_merged_versions_of_one_policy_follow_each_other(server, twin):
    adapted = PeftTwin(twin.directory)
    with sync_to(server, twin.directory, "merged") as sync:
        for seed in (1, 2):
            twin.shake_base(seed)
            assert_served(server, sync.publish_full(twin.tensors()).name, twin.base_cases())
            adapted.randomise(seed)  # folded into the checkpoint's base, not into what full left
            assert_served(server, sync.publish(adapted.model).name, adapted.clear_cases())
        part = {"model.norm.weight": twin.tensors()["model.norm.weight"] * 3}
        changed = WholeTwin(twin.directory)
        with torch.no_grad():
            changed.tensors()["model.norm.weight"].copy_(part["model.norm.weight"])
        name = sync.publish_full(part).name  # what it does not send is the checkpoint's
        assert_served(server, name, changed.clear_cases(adapter=False))
    assert_served(server, base_of(server), PeftTwin(twin.directory).clear_cases(adapter=False))


def test_weights_hold_one_policy_at_a_time(server, twin, sync):
    name = sync.publish_full(twin.tensors()).name
    for mode in ("full", "merged"):
        with (
            pytest.raises(errors.ModeUnavailable, match="second server"),
            sync_to(server, twin.directory, mode, policy="b") as other,
        ):
            other.publish(random_adapter(twin, 2))
    assert server.client().models() == [name]


def test_full_mode_over_http(server, twin):
    with sync_to(server, twin.directory, "full", transport="http", bucket_mib=SMALL) as sync:
        twin.shake_base(1)
        assert_served(server, sync.publish_full(twin.tensors()).name, twin.base_cases())


def test_lost_version_is_sent_again_if_its_source_can_be_read_again(server, twin, sync):
    twin.shake_base(1)
    record = sync.publish_full(twin.tensors())
    sync.fleet.replicas[0].drop(record.name)
    assert sync.recover() and sync.current.name == record.name
    assert_served(server, record.name, twin.base_cases())
    sync.publish_full(iter(twin.tensors().items()))
    sync.fleet.replicas[0].drop(sync.current.name)
    assert not sync.recover()


def test_trls_weight_interface_serves_whole_tensors(server, twin):
    twin.shake_base(1)
    with VLLMClient(server.url, token=server.token, policy="trl") as client:
        client.init_communicator("cpu")
        for name, tensor in twin.tensors().items():
            client.update_named_param(name, tensor)
        assert client.status().state == "not_ready"  # nothing half is ever served
        client.reset_prefix_cache()
        cases = twin.base_cases()
        output = client.generate(
            [list(p) for p in cases],
            temperature=0.0,
            max_tokens=8,
            generation_kwargs={"ignore_eos": True},
        )
        assert output["model"] == "trl@1" and output["completion_ids"] == list(cases.values())
        twin.randomise(3)
        known = {"policy": "trl", "epoch": client._replica().epoch}
        client.control("leave", known, timeout_s=5.0)  # the server forgets, as after a restart
        client.update_model_params(twin.model)  # merged on the fly
        fresh = PeftTwin(twin.directory)
        assert client.models() == ["trl@2"]
        client.update_named_param(*next(iter(fresh.model.get_base_model().named_parameters())))
        client.close_communicator()  # too early: nothing was complete, nothing was written
        assert client.status().full == "trl@2"
        client._replica().drop("trl@2")
    assert_served(server, base_of(server), fresh.clear_cases(adapter=False))
