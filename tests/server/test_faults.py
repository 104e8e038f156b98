"""Servers that fail: midway in a commit, in silence, by dying, by restarting behind our back."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from tests.policies import (
    PeftTwin,
    WholeTwin,
    assert_served,
    random_adapter,
    served_greedy,
    sync_to,
)
from tests.refusals import refused
from tests.server.faulty import faulty_options
from tests.trainers import make_trainer, reward_noise, rows, settings
from tests.warm_server import make_server
from tink_rl import errors
from tink_rl.config import SyncConfig
from tink_rl.launch import group_members
from tink_rl.publish.publisher import WeightSync
from tink_rl.publish.vllm_client import VLLMClient
from tink_rl.training.generation import PolicyGeneration, SamplingSettings
from tink_rl.training.probe import Prober
from tink_rl.training.rollouts import read_rollouts
from tink_rl.types import ROLLOUT_FILE

pytestmark = [pytest.mark.server, pytest.mark.chaos]


@pytest.fixture(scope="module")
def twin(model_dir):
    return PeftTwin(model_dir("qwen3"))


@pytest.fixture
def faulty(servers, switch):
    return servers.get("qwen3", mode="both", **faulty_options(switch))


def test_commit_that_fails_midway_leaves_not_ready_and_the_next_publish_heals(faulty, twin, switch):
    with sync_to(faulty, twin.directory, "merged") as sync:
        name = sync.publish(random_adapter(twin, 1)).name
        switch.write_text("fold")
        with pytest.raises(errors.PublishFailed) as caught:
            sync.publish(random_adapter(twin, 2))
        assert caught.value.details["phase"] == "commit"
        assert caught.value.details["cause"] == "commit_failed"
        status = faulty.client().status()
        assert status.state == "not_ready" and "midway" in (status.reason or "")
        with pytest.raises(errors.NotReady, match="publish again"):
            served_greedy(faulty, name, [[5, 6]])
        switch.unlink()
        twin.randomise(3)
        assert_served(faulty, sync.publish(twin.model).name, twin.clear_cases())


def test_commit_that_fails_once_is_healed_by_the_second_try(faulty, twin, switch):
    with sync_to(faulty, twin.directory, "merged") as sync:
        sync.publish(random_adapter(twin, 1))
        switch.write_text("fold")
        replica = sync.fleet.replicas[0]
        commit = replica.commit

        def heal_after_first(*arguments):
            try:
                return commit(*arguments)
            finally:
                switch.unlink(missing_ok=True)

        replica.commit = heal_after_first
        twin.randomise(2)
        assert_served(faulty, sync.publish(twin.model).name, twin.clear_cases())


def test_full_write_that_fails_midway_leaves_not_ready_and_is_healed_by_either_mode(
    faulty, model_dir, switch
):
    twin = WholeTwin(model_dir("qwen3"))
    with sync_to(faulty, twin.directory, "merged", bucket_mib=0.05) as sync:
        name = sync.publish_full(twin.tensors()).name
        plain = PeftTwin(twin.directory)
        plain.randomise(3)
        for heal in (lambda: sync.publish_full(twin.tensors()), lambda: sync.publish(plain.model)):
            twin.shake_base(1)
            switch.write_text("write")
            with pytest.raises(errors.TinkError, match="injected"):
                sync.publish_full(twin.tensors())
            status = faulty.client().status()
            assert status.state == "not_ready" and "midway" in (status.reason or "")
            with pytest.raises(errors.NotReady):
                served_greedy(faulty, name, [[5, 6]])
            switch.unlink()
            twin.randomise(3)
            record = heal()
            if record.mode == "full":
                assert_served(faulty, record.name, twin.base_cases())
            else:  # the checkpoint's base with the adapter, not what the failure left
                assert_served(faulty, record.name, plain.clear_cases())
            name = record.name


def test_damaged_bucket_is_tried_again_then_named_and_nothing_was_written(
    faulty, model_dir, switch
):
    twin = WholeTwin(model_dir("qwen3"))
    with sync_to(faulty, twin.directory, "full", transport="http", bucket_mib=0.05) as sync:
        twin.shake_base(1)
        name, cases = sync.publish_full(twin.tensors()).name, twin.base_cases()
        switch.write_text("damage")
        with pytest.raises(errors.PublishFailed, match="hash to") as caught:
            sync.publish_full(twin.tensors())
        assert caught.value.details["cause"] == "digest_mismatch"
        assert faulty.client().status().state == "ready"
        assert_served(faulty, name, cases)


def test_probe_stops_a_run_whose_server_drops_every_adapter(faulty, twin, switch):
    # A fresh LoRA equals its base, so only the synthetic adapter can tell.
    switch.write_text("drop-adapters")
    fresh = PeftTwin(twin.directory)
    prober = Prober(fresh.model, vocab_size=64)
    with sync_to(faulty, twin.directory, "adapter") as sync:
        with pytest.raises(errors.ProbeFailed, match="does not serve the policy"):
            prober.self_test(sync, fresh.collector)
        assert faulty.client().status().served == {}
        switch.unlink()
        prober.self_test(sync, fresh.collector)
        record = prober.publish(sync, fresh.model)
        assert record.version >= 1 and record.probe_gap is not None and record.probe_gap < 1e-3


@pytest.mark.parametrize("mode", ["adapter", "merged"])
def test_damage_on_the_way_is_tried_again_then_named(faulty, twin, switch, mode):
    with sync_to(faulty, twin.directory, mode, transport="http") as sync:
        twin.randomise(1)
        name, cases = sync.publish(twin.model).name, twin.clear_cases()
        switch.write_text("damage")
        with pytest.raises(errors.PublishFailed, match="hash to") as caught:
            sync.publish(random_adapter(twin, 2))
        assert caught.value.details["cause"] == "digest_mismatch"
        assert_served(faulty, name, cases)


@pytest.fixture(scope="module")
def mortal(model_dir, tmp_path_factory):
    """A server that the tests of this module may kill; always on the same port."""
    server = make_server(
        model_dir("qwen3"),
        mode="merged",
        dtype="float32",
        max_model_len=256,
        token_file=str(tmp_path_factory.mktemp("mortal") / "token"),
    )
    server.start()
    yield server
    server.stop()


def _sync(server, twin, **settings):
    config = SyncConfig(
        mode="merged", token=server.token, stage_timeout_s=3.0, join_timeout_s=5.0, **settings
    )
    return WeightSync(server.url, base_model=twin.directory, config=config)


def test_peer_that_dies_is_an_exception_within_the_deadline_and_the_next_publish_works(
    mortal, twin
):
    sync = _sync(mortal, twin, transport="gloo")
    sync.publish(random_adapter(twin, 1))
    replica = sync.fleet.replicas[0]
    replica._channel.close()  # the trainer's end of the wire is gone
    twin.randomise(2)
    assert_served(mortal, sync.publish(twin.model).name, twin.clear_cases())
    sync.close()


def test_server_restarted_behind_our_back_is_published_to_before_it_is_used(mortal, twin):
    sync = _sync(mortal, twin)
    twin.randomise(3)
    record, cases = sync.publish(twin.model), twin.clear_cases()
    generation = PolicyGeneration(
        [mortal.client()],
        SamplingSettings(
            max_completion_length=8, temperature=0.0, generation_kwargs={"ignore_eos": True}
        ),
        current=lambda: record.name,
        sync=lambda: None,
        recover=sync.recover,
    )
    before = sync.fleet.replicas[0].incarnation
    mortal.stop()
    mortal.start()
    assert mortal.client().status().incarnation != before
    _, tokens, _, _ = generation.generate([list(p) for p in cases], None, 1)
    assert tokens == list(cases.values())
    assert generation.last_model == record.name
    sync.close()


def test_server_killed_while_rows_are_sampled_ahead_costs_their_time_alone(
    mortal, model_dir, tmp_path, caplog, monkeypatch
):
    calls = []

    def kills(completions, **_):
        calls.append(len(completions))
        if len(calls) == 2:  # the third step's rows are being sampled
            os.killpg(mortal.pid, signal.SIGKILL)
            mortal.stop()
            mortal.start()
        return reward_noise(completions)

    trainer = make_trainer(
        mortal,
        model_dir,
        tmp_path,
        sync=settings(mortal, max_staleness=1),
        extra={"reward_funcs": kills},
        max_completion_length=200,
        vllm_importance_sampling_mode="token_truncate",  # whole rows so long would weigh too little
        generation_kwargs={"ignore_eos": True},
    )
    ahead = trainer.vllm_generation.ahead
    start = ahead._start

    def freezes(batch, *asked):
        if batch.step == 2:  # or its rows might be there before the server is killed
            ahead.wait_for_rows()
            os.killpg(mortal.pid, signal.SIGSTOP)
        start(batch, *asked)

    monkeypatch.setattr(ahead, "_start", freezes)
    trainer.train()
    assert "sampling ahead failed" in caplog.text
    assert [row["overlap/hit_share"] for row in rows(trainer)] == [0.0, 1.0, 0.0, 1.0]
    first = trainer.policy_link.records[0].version
    sampled = {(r["step"], r["version"] - first) for r in read_rollouts(tmp_path / ROLLOUT_FILE)}
    assert sampled == {(0, 0), (1, 0), (2, 2), (3, 2)}


def _publish_while_it_dies(sync, server, twin, monkeypatch, phase):
    """A publish to a server that ends before it sees the request of `phase`; what was current."""
    name = sync.publish(random_adapter(twin, 1)).name
    replica = sync.fleet.replicas[0]
    control = replica._control

    def dies_before(route, *rest):
        if route.action == phase:
            os.killpg(server.pid, signal.SIGKILL)
        return control(route, *rest)

    with monkeypatch.context() as patch, pytest.raises(errors.PublishFailed) as caught:
        patch.setattr(replica, "_control", dies_before)
        sync.publish(random_adapter(twin, 2))
    assert "can't be reached" in caught.value.message and sync.current.name == name
    assert caught.value.details["replica"] == server.url
    assert caught.value.details["cause"] == "server_unreachable"


def test_server_that_dies_as_it_is_published_to_is_served_again_after_its_restart(
    mortal, twin, monkeypatch, caplog
):
    sync = _sync(mortal, twin)
    _publish_while_it_dies(sync, mortal, twin, monkeypatch, "stage")
    assert "failed in stage" in caplog.text
    mortal.stop()
    mortal.start()
    twin.randomise(2)
    assert_served(mortal, sync.publish(twin.model).name, twin.clear_cases())
    sync.close()


def test_server_gone_is_named_with_phase_and_replica_and_nothing_hangs(
    mortal, twin, monkeypatch, caplog
):
    sync = _sync(mortal, twin)
    _publish_while_it_dies(sync, mortal, twin, monkeypatch, "commit")
    assert "failed in commit" in caplog.text
    with pytest.raises(errors.ServerUnreachable, match="can't be reached") as caught:
        sync.publish(random_adapter(twin, 3))
    assert (caught.value.details["phase"], caught.value.details["replica"]) == ("join", mortal.url)
    with pytest.raises(errors.ServerUnreachable, match="The vLLM server can't be reached at"):
        VLLMClient(mortal.url, token="x" * 20).status()
    pid = mortal.pid
    mortal.stop()
    assert group_members(pid) == []
    sync.close()


def test_golden_weights_that_do_not_fit_are_refused_at_start(model_dir, tmp_path):
    server = make_server(
        model_dir("qwen3"),
        mode="merged",
        golden_budget_gib=0.0001,
        token_file=str(tmp_path / "token"),
        max_model_len=256,
    )
    with refused("golden_does_not_fit", match="--golden-budget-gib"):
        server.start()
    assert server.pid is None and threading.active_count() < 50


def test_server_without_the_plugin_is_named(model_dir, tmp_path, twin):
    server = make_server(
        model_dir("qwen3"),
        mode="merged",
        token_file=str(tmp_path / "token"),
        max_model_len=256,
        env={"VLLM_PLUGINS": ""},
        startup_timeout_s=280.0,
    )
    with pytest.raises(errors.PluginMissing, match="tink-rl serve"):
        server.start()
