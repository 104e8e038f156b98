"""Names, caches, running requests and leases around a commit, on a real server."""

from __future__ import annotations

import dataclasses
import itertools
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch

from tests.policies import (
    PeftTwin,
    assert_served,
    long_greedy,
    long_request_under_way,
    random_adapter,
    served_greedy,
    sync_to,
)
from tests.tiny_models import VOCAB
from tink_rl import errors
from tink_rl.config import SyncConfig
from tink_rl.policy import packet
from tink_rl.protocol import COMMIT
from tink_rl.publish.publisher import WeightSync
from tink_rl.training.probe import Prober
from tink_rl.transport import shared_memory
from tink_rl.transport.replica import Replica
from tink_rl.types import Transport

pytestmark = [pytest.mark.server, pytest.mark.home]
MODES = pytest.mark.parametrize("mode", ["adapter", "merged"])


@pytest.fixture
def server(servers):
    return servers.get("qwen3", mode="both")


@pytest.fixture(scope="module")
def twin(model_dir):
    return PeftTwin(model_dir("qwen3"))


@MODES
def test_same_digest_is_not_sent_again(server, twin, mode):
    with sync_to(server, twin.directory, mode) as sync:
        first = sync.publish(random_adapter(twin, 1))
        again = sync.publish(random_adapter(twin, 1))
        assert (again.published, again.num_bytes, again.name) == (False, 0, first.name)


@MODES
def test_long_shared_prompt_is_never_answered_from_the_old_versions_cache(server, twin, mode):
    seeds = range(3)
    prompt, answers = telling_prompt(twin, seeds)
    with sync_to(server, twin.directory, mode) as sync:
        for seed, expected in zip(seeds, answers, strict=True):
            twin.randomise(seed)
            name = sync.publish(twin.model).name
            assert_served(server, name, {tuple(prompt): expected})
            hits = cache_hits(server)
            assert_served(server, name, {tuple(prompt): expected})
            assert cache_hits(server) > hits  # the second one comes from this version's own cache
            assert_served(server, name, twin.clear_cases())


def test_server_gone_in_verify_is_named_with_its_phase_and_its_number_is_not_used_again(
    server, twin, monkeypatch
):
    with sync_to(server, twin.directory, "merged") as sync:
        first = sync.publish(random_adapter(twin, 1))
        gone = errors.ServerUnreachable("gone", replica=server.url)

        def lost(*_):
            raise gone

        monkeypatch.setattr(sync.probes, "ask", lost)
        prober = Prober(twin.model, vocab_size=VOCAB)
        with pytest.raises(errors.ServerUnreachable) as caught:
            prober.publish(sync, random_adapter(twin, 2))
        assert caught.value.details == {"replica": server.url, "phase": "verify"}
        assert sync.current.name == first.name
        third = sync.publish(random_adapter(twin, 3))
        assert third.version == first.version + 2
        assert_served(server, third.name, twin.clear_cases())


def telling_prompt(twin, seeds):
    """200 tokens that each version answers clearly and otherwise than the one before; the answers."""
    generator = torch.Generator().manual_seed(3)
    prompts = torch.randint(3, VOCAB, (128, 200), generator=generator).tolist()
    found = []
    for seed in seeds:
        twin.randomise(seed)
        found.append(twin.greedy(prompts))
    for prompt, answers in zip(prompts, zip(*found, strict=True), strict=True):
        tokens = [answer for answer, _ in answers]
        differ = all(old != new for old, new in itertools.pairwise(tokens))
        if differ and all(clear for _, clear in answers):
            return prompt, tokens
    raise AssertionError("no prompt tells the versions apart")


def cache_hits(server):
    """Tokens that vLLM took from its prefix cache so far."""
    text = httpx.get(f"{server.url}/metrics").text
    lines = [line for line in text.splitlines() if line.startswith("vllm:prefix_cache_hits_total")]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def test_merged_answers_under_the_new_name_only(server, twin):
    base = server.client().status().base_model
    with sync_to(server, twin.directory, "merged") as sync:
        old = sync.publish(random_adapter(twin, 1)).name
        new = sync.publish(random_adapter(twin, 2)).name
        assert server.client().models() == [new]
        for stale in (old, base):
            with pytest.raises(errors.UnknownVersion, match="does not serve"):
                served_greedy(server, stale, [[5, 6]])


def test_adapter_versions_stay_side_by_side_until_they_retire(server, twin):
    with sync_to(server, twin.directory, "adapter", keep_versions=2) as sync:
        cases = {}
        for seed in range(3):
            twin.randomise(seed)
            cases[sync.publish(twin.model).name] = twin.clear_cases()
        first, second, third = cases
        assert_served(server, second, cases[second])
        assert_served(server, third, cases[third])
        with pytest.raises(errors.UnknownVersion):
            served_greedy(server, first, [[5, 6]])


@pytest.mark.parametrize("keep", [1, 3])
def test_only_as_many_versions_stay_as_asked_for(server, twin, keep):
    with sync_to(server, twin.directory, "adapter", keep_versions=keep) as sync:
        names = []
        for seed in range(5):
            twin.randomise(seed)
            names.append(sync.publish(twin.model).name)
        served = {n for n in server.client().status().served if n.startswith("policy@")}
        assert served == set(names[-keep:])


def test_commit_drops_versions_of_its_own_policy_only(server, twin):
    with (
        sync_to(server, twin.directory, "adapter", policy="other") as other,
        sync_to(server, twin.directory, "adapter") as sync,
    ):
        name = other.publish(random_adapter(twin, 1)).name
        sync.versions.kept = [name, "policy@998", "policy@999"]
        with pytest.raises(errors.BadRequest, match="whose lease this is"):
            sync.publish(random_adapter(twin, 2))
        assert set(server.client().status().served) == {name}


@MODES
def test_requests_that_run_during_a_commit_end_whole_on_one_version(server, twin, mode):
    with sync_to(server, twin.directory, mode) as sync:
        name = sync.publish(random_adapter(twin, 1)).name
        expected = long_greedy(server, name).completions
        with long_request_under_way(server, name) as request:
            record = sync.publish(random_adapter(twin, 2))
        assert request.completions == expected * len(request.completions) != []
        assert record.name != name and (record.held_seconds > 0) == (mode == "merged")


def test_prompt_logprobs_beside_requests_on_other_adapters_are_right_and_end_nothing(server, twin):
    """vLLM's own LoRA of the head would end the engine here."""
    with (
        sync_to(server, twin.directory, "adapter", policy="other") as other,
        sync_to(server, twin.directory, "adapter") as sync,
        server.client() as client,
    ):
        busy = other.publish(random_adapter(twin, 2)).name
        name = sync.publish(random_adapter(twin, 1)).name
        prober = Prober(twin.model, vocab_size=VOCAB)
        with long_request_under_way(server, busy) as request:
            gaps = [prober.compare(sync, name).gap for _ in range(5)]
            assert client.status().served.keys() == {busy, name}
        assert max(gaps) <= 1e-3
        assert set(request.finish_reasons) == {"length"}


def test_abort_ends_running_requests_early(server, twin):
    with sync_to(server, twin.directory, "merged", on_running="abort") as sync:
        name = sync.publish(random_adapter(twin, 1)).name
        with long_request_under_way(server, name) as request:
            record = sync.publish(random_adapter(twin, 2))
        assert set(request.finish_reasons) == {"abort"}
        assert_served(server, record.name, twin.clear_cases())


def test_drain_timeout_writes_nothing(server, twin):
    with sync_to(server, twin.directory, "merged", drain_timeout_s=0.05) as sync:
        while sync.fleet.replicas[0].status().running:
            pass  # what an earlier test asked has its answer, and ends in a moment
        name, cases = sync.publish(random_adapter(twin, 1)).name, twin.clear_cases()
        refused = pytest.raises(errors.DrainTimeout, match="nothing was written")
        with long_request_under_way(server, name), refused:
            sync.publish(random_adapter(twin, 2))
        assert_served(server, name, cases)


@pytest.mark.parametrize("transport", ["shm", "gloo", "http"])
def test_every_transport_carries_both_modes(server, twin, transport):
    for mode in ("adapter", "merged"):
        with sync_to(server, twin.directory, mode, transport=transport) as sync:
            for seed in (3, 4, 5):  # the third is packed where the first was
                twin.randomise(seed)
                name = sync.publish(twin.model).name
                assert_served(server, name, twin.clear_cases())


def test_packet_that_cannot_be_packed_is_not_sent(server, twin, monkeypatch):
    with sync_to(server, twin.directory, "adapter", transport="shm") as sync:
        [replica] = sync.fleet.replicas
        stages, send = [], replica.send
        replica.send = lambda *args: stages.append(send(*args)) or stages[-1]
        twin.randomise(6)
        name, cases = sync.publish(twin.model).name, twin.clear_cases()
        assert not sync.publish(twin.model).published  # what is served already is not sent
        monkeypatch.setattr(packet, "fill", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            sync.publish(random_adapter(twin, 7))
        assert len(stages) == 1
        for stage_id in stages:
            with pytest.raises(errors.UnknownVersion, match="nothing is staged"):
                replica.commit(stage_id)
        assert_served(server, name, cases)


def test_auto_takes_gloo_where_shared_memory_does_not_reach(server, twin, monkeypatch, caplog):
    caplog.set_level("INFO", logger="tink_rl")
    create = shared_memory.Segment.create

    def elsewhere(num_bytes):  # in the server's container there is no such segment
        made = create(num_bytes)
        made.spec = dataclasses.replace(made.spec, pid=1)
        return made

    monkeypatch.setattr(shared_memory.Segment, "create", elsewhere)
    with sync_to(server, twin.directory, "merged", transport="auto") as sync:
        twin.randomise(5)
        assert_served(server, sync.publish(twin.model).name, twin.clear_cases())
    assert "gloo" in caplog.text
    with (
        pytest.raises(errors.SegmentUnreachable),
        sync_to(server, twin.directory, "merged", transport="shm"),
    ):
        pass


def test_client_answers_in_trls_shapes_for_completions_and_chat(server, twin):
    client = server.client()
    ask = {"n": 2, "temperature": 0.0001, "max_tokens": 4, "logprobs": 1}
    plain = client.generate(["12=", "345="], generation_kwargs={"ignore_eos": True}, **ask)
    conversations = [[{"role": "user", "content": text}] for text in ("12", "345")]
    chat = client.chat(conversations, generation_kwargs={"ignore_eos": True}, **ask)
    for output in (plain, chat):
        assert [len(ids) for ids in output["prompt_ids"]] == [3, 4]
        assert [len(ids) for ids in output["completion_ids"]] == [4] * 4
        for rows, ids in zip(output["logprobs"], output["logprob_token_ids"], strict=True):
            assert len(rows) == len(ids) == 4
            assert all(
                1 <= len(r) == len(i) <= 2 and r == sorted(r)[::-1]
                for r, i in zip(rows, ids, strict=True)
            )
    assert chat["prompt_ids"] == plain["prompt_ids"]
    assert chat["completion_ids"] == plain["completion_ids"]
    with pytest.raises(errors.SamplingRefused, match=r"temperature=-1\.0: expected"):
        client.generate(["1"], temperature=-1.0)
    with pytest.raises(errors.SamplingRefused, match="vLLM refused"):
        client.generate(["1"], generation_kwargs={"structured_outputs": {"regex": "("}})


def test_second_writer_is_refused_and_the_name_is_free_after_close(server, twin):
    with sync_to(server, twin.directory, "adapter", policy="mine") as sync:
        sync.publish(random_adapter(twin, 1))
        config = SyncConfig(mode="adapter", policy="mine", token=server.token, lease_wait_s=0.0)
        other = WeightSync(server.url, base_model=twin.directory, config=config)
        with pytest.raises(errors.LeaseHeld, match="another name"):
            other.open()
        with sync_to(server, twin.directory, "adapter", policy="yours") as free:
            free.publish(random_adapter(twin, 2))
        sync.drop_current()
        sync.close()
        assert other.open() is not None
        other.close()


def test_newer_channel_of_the_same_writer_makes_the_older_one_stale(server, twin):
    config = SyncConfig(mode="adapter", policy="epochs", token=server.token, lease_wait_s=0.0)
    old, new = (Replica(server.client(), config, writer="same") for _ in range(2))
    old.ensure_channel()
    new.ensure_channel()
    with pytest.raises(errors.StaleEpoch, match="join again"):
        old.drop("epochs@1")
    old.forget_channel()
    new.close()


def test_commit_that_is_fenced_off_while_requests_drain_writes_nothing_and_is_tried_again(
    server, twin, monkeypatch
):
    with sync_to(server, twin.directory, "merged", policy="fenced") as sync:
        twin.randomise(1)
        name, cases = sync.publish(twin.model).name, twin.clear_cases()
        replica, fenced = sync.fleet.replicas[0], []
        control = replica._control

        def commit_while_the_writer_joins_again(route, *rest):
            if route is not COMMIT or fenced:
                return control(route, *rest)
            with ThreadPoolExecutor(1) as pool:
                commit = pool.submit(control, route, *rest)
                while not replica.status().holding:
                    assert not commit.done()
                assert replica.status().running == 1  # and so it drains
                replica._take_lease(Transport.HTTP)
                fenced.append((type(commit.exception()), replica.status()))
                assert_served(server, name, cases)
                return commit.result()

        monkeypatch.setattr(replica, "_control", commit_while_the_writer_joins_again)
        with long_request_under_way(server, name) as request:
            record = sync.publish(random_adapter(twin, 2))
        ((error, status),) = fenced
        assert error is errors.StaleEpoch
        assert (status.state, status.merged) == ("ready", name)
        assert set(request.finish_reasons) == {"length"}
        assert_served(server, record.name, twin.clear_cases())
        assert served_greedy(server, record.name, cases) != list(cases.values())


def test_next_version_is_above_checkpoint_and_server(server, twin):
    with sync_to(server, twin.directory, "adapter", policy="resumed") as sync:
        sync.start_after(41)
        assert sync.publish(random_adapter(twin, 1)).version == 42
    with sync_to(server, twin.directory, "adapter", policy="resumed") as sync:
        sync.start_after(7)
        assert sync.publish(random_adapter(twin, 2)).version == 43


def test_merged_policy_and_slot_policies_exclude_each_other(server, twin):
    with sync_to(server, twin.directory, "merged", policy="a") as sync:
        name = sync.publish(random_adapter(twin, 1)).name
        for mode in ("adapter", "merged"):
            with (
                pytest.raises(errors.ModeUnavailable, match="second server"),
                sync_to(server, twin.directory, mode, policy="b") as other,
            ):
                other.publish(random_adapter(twin, 2))
        assert server.client().models() == [name]
