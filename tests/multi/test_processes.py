"""Two processes under `accelerate launch`: DDP, FSDP2 and ZeRO-3 publish what one process would."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from tests.invariant.running import STEPS, assert_alike, job, outcome, train
from tests.multi.launching import launch
from tests.policies import PeftTwin, assert_served, drop_all, sync_to
from tink_rl.policy.adapter import Adapter

pytestmark = [pytest.mark.server, pytest.mark.home, pytest.mark.timeout(420)]
KINDS = {
    "ddp": "accelerate_configs/cpu_2proc.yaml",
    "fsdp2": "tests/multi/cpu_fsdp2.yaml",
    "zero3": "accelerate_configs/cpu_zero3.yaml",
}
# A run of two processes takes a minute or two of both cores.
_BY_KIND = [pytest.param(k, marks=() if k == "ddp" else pytest.mark.long) for k in KINDS]


class Runs:
    """Each run is made once, then asked by several tests."""

    def __init__(self, servers, model_dir, root):
        self.servers, self.model, self.root = servers, model_dir("qwen3"), root
        self.moe = model_dir("qwen3_moe")
        self._done = {}

    def _job(self, name, **changes):
        return job(self.server(), self.model, self.root / name, name, **changes)

    def alone(self):
        """Outcome and folder of the run in one process."""
        if "alone" not in self._done:
            self._done["alone"] = train(self._job("alone"))
        return self._done["alone"], self.root / "alone"

    def get(self, kind, fail=None):
        """Exit code, facts by rank, output and folder of the run under one of KINDS."""
        if (kind, fail) not in self._done:
            name = f"{kind}-{(fail or 'fine').replace(' ', '-')}"
            given = self._job(name, fail=fail, args={"per_device_train_batch_size": 8})
            if fail is None:
                given |= {"kind": kind, "moe": str(self.moe)}
            out = self.root / name
            self._done[kind, fail] = (*launch(KINDS[kind], given, out), out)
        return self._done[kind, fail]

    def ahead(self, kind=None):
        """Outcome of a run that samples ahead: in one process, or under one of KINDS with a slow rank."""
        name = f"{kind or 'alone'}-ahead"
        sync = {"sync": {"max_staleness": 1}}
        if kind is None:
            return train(self._job(name, **sync))
        sizes = {"args": {"per_device_train_batch_size": 8}}
        given = self._job(name, fail="slow rank 1", **sizes, **sync)
        out = self.root / name
        code, ranks, output = launch(KINDS[kind], given, out)
        assert code == 0, output[-4000:]
        return outcome(ranks[0]["history"], out, self.model)

    def fine(self, kind):
        """Facts by rank and folder of a run that must have ended well."""
        code, ranks, output, out = self.get(kind)
        assert code == 0, output[-4000:]
        return ranks, out

    def server(self):
        return self.servers.get("qwen3", mode="both")


@pytest.fixture(scope="module")
def runs(servers, model_dir, tmp_path_factory):
    found = Runs(servers, model_dir, tmp_path_factory.mktemp("runs"))
    yield found
    server = found.server()
    with server.client() as client:
        policies = {name.rpartition("@")[0] for name in client.status().served}
    for policy in policies:
        with sync_to(server, server.options.model, "adapter", policy=policy) as sync:
            drop_all(server, sync)


@pytest.mark.parametrize("kind", _BY_KIND)
def test_collected_adapter_is_bit_for_bit_the_single_process_one(runs, kind):
    _, alone = runs.alone()
    ranks, out = runs.fine(kind)
    whole, collected = (load_file(f / "first.safetensors") for f in (alone, out))
    assert whole.keys() == collected.keys()
    assert all(torch.equal(whole[name], collected[name]) for name in whole)
    assert {facts["sharding"] for facts in ranks.values()} == {
        {"ddp": "whole", "fsdp2": "dtensor", "zero3": "zero3"}[kind]
    }


PLANTED = {
    "a thousandth of one tensor": "model.layers.1.mlp.up_proj.weight",
    "one norm": "model.layers.1.input_layernorm.weight",
    "one row of the embedding": "model.embed_tokens.weight",
    "one expert": "model.layers.1.mlp.experts.3.up_proj.weight",
}


@pytest.mark.parametrize("kind", _BY_KIND)
def test_change_in_the_base_of_the_last_rank_is_refused_by_name_on_all(runs, kind):
    ranks, _ = runs.fine(kind)
    for case, tensor in PLANTED.items():
        found = [facts["planted"][case] for facts in ranks.values()]
        assert [(name, error) for name, _, error in found] == [(tensor, "BaseMismatch")] * 2, case
        assert found[0][1] == found[1][1] and "differs by up to" in found[0][1]
    for honest in ("an honest one with experts", "none any more"):
        assert {facts["planted"][honest] for facts in ranks.values()} == {None}


@pytest.mark.parametrize("kind", _BY_KIND)
def test_only_rank_0_publishes_and_every_rank_samples_what_it_published(runs, kind):
    ranks, _ = runs.fine(kind)
    assert sorted(ranks) == [0, 1]
    assert [ranks[r]["published_here"] for r in (0, 1)] == [True, False]
    assert ranks[0]["records"] == ranks[1]["records"]
    assert len(ranks[0]["records"]) == STEPS + 1
    for facts in ranks.values():
        assert facts["sampled_tokens"] > 0
        assert facts["current"] == f"{kind}-fine@{STEPS + 1}"
        assert facts["sampled_from"] == f"{kind}-fine@{STEPS}"


@pytest.mark.parametrize("kind", _BY_KIND)
def test_logprobs_of_the_server_are_those_of_the_trainer(runs, kind):
    ranks, _ = runs.fine(kind)
    assert len(ranks[0]["history"]) == STEPS
    assert max(row["rollout/logprob_gap"] for row in ranks[0]["history"]) <= 1e-4


@pytest.mark.parametrize("kind", _BY_KIND)
def test_two_processes_are_one(runs, kind):
    ranks, out = runs.fine(kind)
    assert_alike(outcome(ranks[0]["history"], out, runs.model), runs.alone()[0])


@pytest.mark.long
def test_processes_that_sample_ahead_are_one_process_that_does_though_one_is_slow(runs):
    alone = runs.ahead()
    for kind in KINDS:
        assert_alike(runs.ahead(kind), alone)


@pytest.mark.long
def test_version_that_the_server_lost_is_published_again_for_all_ranks(runs):
    code, ranks, output, out = runs.get("ddp", "version on the server")
    assert code == 0, output[-4000:]
    assert "publishing it again" in output
    assert len(ranks[0]["records"]) == STEPS + 1
    assert_alike(outcome(ranks[0]["history"], out, runs.model), runs.alone()[0])


@pytest.mark.parametrize("kind", _BY_KIND)
def test_last_version_answers_as_the_collected_adapter(runs, model_dir, kind):
    ranks, out = runs.fine(kind)
    twin = PeftTwin(model_dir("qwen3"))
    last = Adapter(tensors=load_file(out / "last.safetensors"), rank=8)
    with twin.collector.swapped(last):
        cases = twin.clear_cases()
    assert_served(runs.server(), ranks[0]["current"], cases)


@pytest.mark.parametrize(
    ("kind", "fail", "error", "words"),
    [
        ("ddp", "reward on rank 1", "RankFailed", "rank 1 failed: ValueError: no reward for this"),
        pytest.param(
            *(
                "fsdp2",
                "collect on rank 1",
                "RankFailed",
                "rank 1 failed: MemoryError: no memory to",
            ),
            marks=pytest.mark.long,
        ),
        pytest.param(
            *("zero3", "publish on rank 0", "PublishFailed", "could not be published"),
            marks=pytest.mark.long,
        ),
    ],
)
def test_failure_on_one_rank_ends_the_run_on_all_with_the_same_error(
    runs, kind, fail, error, words
):
    code, ranks, output, _ = runs.get(kind, fail)
    assert code not in (0, None), output[-4000:]
    failed = int(fail[-1])
    other = ranks[1 - failed]
    assert other["error"] == error
    assert words in other["message"]
    assert ranks[failed]["message"] in other["message"]


@pytest.mark.long
def test_publish_that_fails_leaves_a_whole_checkpoint_also_of_a_partitioned_model(runs):
    _, ranks, _, out = runs.get("zero3", "publish on rank 0")
    assert f"--resume_from_checkpoint {out}/checkpoint-2" in ranks[0]["message"]
    saved = load_file(out / "checkpoint-2" / "adapter_model.safetensors")
    collected = load_file(out / "last.safetensors")
    assert sum(t.numel() for t in saved.values()) == sum(t.numel() for t in collected.values())
