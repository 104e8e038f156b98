"""The account of what is off-policy: an honest sampler, a wrong one, and a policy that moved."""

from __future__ import annotations

import logging
import math
import threading
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import trl
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.policies import PeftTwin
from tink_rl import errors
from tink_rl.training.checks import check_off_policy
from tink_rl.training.kept_versions import KeptVersions
from tink_rl.training.log_ratio import effective_share, k3
from tink_rl.training.offpolicy import OffPolicyAccount, sample_of
from tink_rl.training.rollouts import RolloutBatch, Turn

ROWS, PROMPT, TOKENS, CAP = 16, 5, 6, 3.0


class Trainer:
    """Scores as TRL does, without its way of computing logprobs; and what it would say of a batch."""

    def __init__(self, model):
        self.model = model
        model.is_gradient_checkpointing = False
        self.args = SimpleNamespace(
            gradient_checkpointing_kwargs=None, per_device_train_batch_size=4
        )
        self._metrics = {"train": defaultdict(list)}
        self.scored = []
        """How many rows each forward had."""

    def _get_per_token_logps_and_entropies(self, model, ids, mask, length, batch_size):
        self.scored.append(len(ids))
        return logprobs(model, ids, length), None, None

    def last(self):
        return {key: values[-1] for key, values in self._metrics["train"].items()}


@torch.no_grad()
def logprobs(model, ids, length):
    rows = model(input_ids=ids).logits[:, :-1].float().log_softmax(-1)
    return rows.gather(-1, ids[:, 1:, None])[..., 0][:, -length:]


class Rig:
    """A trainer at `policy@1`, and a sampler of its own model that holds the same."""

    def __init__(self, directory, max_staleness=1, **account):
        self.twin, self.sampler = PeftTwin(directory), PeftTwin(directory)
        self.twin.randomise(1)
        self.trainer = Trainer(self.twin.model)
        self.kept = KeptVersions(self.twin.model, max_staleness + 1)
        self.account = OffPolicyAccount(self.trainer, self.kept, **account)
        self.version = 0
        self.publish()
        self.serve()

    def publish(self):
        self.version += 1
        self.account.remember(f"policy@{self.version}")

    def step(self, size, seed=2):
        """An optimizer step: every trained number moves."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in trained(self.twin.model):
                p += torch.randn(p.shape, generator=generator) * size
        self.publish()

    @torch.no_grad()
    def serve(self, factor=1.0, dtype=None):
        """The sampler holds the trainer's weights, B times a factor, computing in another dtype."""
        own = dict(self.twin.model.named_parameters())
        for name, p in self.sampler.model.named_parameters():
            p.copy_(own[name] * (factor if "lora_B" in name else 1.0))
        if dtype is not None:
            self.sampler.model.to(dtype)

    def rows(self):
        """What is sampled now, and the version's name."""
        generator = torch.Generator().manual_seed(9)
        ids = torch.randint(3, 64, (ROWS, PROMPT + TOKENS), generator=generator)
        return ids, logprobs(self.sampler.model, ids, TOKENS), f"policy@{self.version}"

    def look(self, rows, step=3, make=None, **batch):
        """Score the rows as TRL does, let the account look; what it added to the metrics."""
        ids, sampled, name = rows
        now = logprobs(self.twin.model, ids, TOKENS)
        output = {
            **{"prompt_ids": ids[:, :PROMPT], "completion_ids": ids[:, PROMPT:]},
            "prompt_mask": torch.ones(ROWS, PROMPT, dtype=torch.long),
            "completion_mask": torch.ones(ROWS, TOKENS, dtype=torch.long),
            **(make or of_tokens)(now, sampled),
        }
        turns = [
            [Turn(prompt_ids=[], completion_ids=[], logprobs=row.tolist(), seed=None)]
            for row in sampled
        ]
        looked = RolloutBatch(step=step, model=name, turns=turns, **batch)
        self.account.look(looked, output)
        return self.trainer.last()


def of_tokens(now, sampled):
    """GRPO's, under `token_truncate`."""
    ratio = (now - sampled).exp().clamp(max=CAP)
    return {
        "old_per_token_logps": now,
        "sampling_per_token_logps": sampled,
        "importance_sampling_ratio": ratio,
    }


def of_masked_sequences(now, sampled):
    """GRPO's, under TRL's default `sequence_mask`."""
    ratio = (now - sampled).sum(1, keepdim=True).exp()
    return of_tokens(now, sampled) | {
        "importance_sampling_ratio": ratio.masked_fill(ratio > CAP, 0)
    }


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


@pytest.fixture
def rig(model_dir):
    return Rig(model_dir("qwen3"))


def test_fresh_rows_are_all_looked_at_without_another_forward(rig):
    found = rig.look(rig.rows())
    assert rig.trainer.scored == []
    assert found.pop("offpolicy/numerics_gap") < 1e-5 and found.pop("offpolicy/ess") > 0.999
    assert found.pop("rollout/logprob_gap") < 1e-5
    assert found == {
        f"offpolicy/{what}": 0.0 for what in ("age_mean", "age_max", "policy_kl", "masked_share")
    }


def test_step_of_the_policy_raises_the_policy_part_alone(rig):
    kls = []
    for seed, size in enumerate((0.001, 0.01, 0.03)):
        rows = rig.rows()
        rig.step(size, seed)
        found = rig.look(rows)
        rig.serve()
        assert max(found["offpolicy/numerics_gap"], found["rollout/logprob_gap"]) < 1e-5
        assert found["offpolicy/age_mean"] == found["offpolicy/age_max"] == 1.0
        kls.append(found["offpolicy/policy_kl"])
    assert kls[0] < kls[1] / 5 < kls[2] / 20 and kls[2] > 0.02
    assert rig.trainer.scored == [ROWS // 8] * 3


@pytest.mark.parametrize(
    "wrong", [{"factor": 1.1}, {"factor": 0.0}, {"dtype": torch.bfloat16}], ids=str
)
@pytest.mark.parametrize("age", [0, 1])
def test_wrong_policy_raises_the_numerics_part_alone_and_ends_the_run(rig, wrong, age):
    rig.look(rig.rows())
    rig.step(0.01)
    rig.serve()
    honest = rig.rows()
    rig.serve(**wrong)
    planted = rig.rows()
    if age:
        rig.step(0.01, seed=3)
    before = rig.look(honest, step=17)
    with pytest.raises(
        errors.ProbeFailed, match="does not serve the policy that is trained"
    ) as caught:
        rig.look(planted, step=17)
    after, said = rig.trainer.last(), caught.value
    assert after["offpolicy/policy_kl"] == before["offpolicy/policy_kl"]
    assert before["offpolicy/numerics_gap"] < 1e-5 and after["offpolicy/numerics_gap"] > 1e-3
    assert said.details == {
        **{"version": "policy@2", "step": 17, "ranks": "all", "bound": 1e-3},
        "gap": after["offpolicy/numerics_gap"],
    }
    for word in ("policy@2", "step 17", f"{said.details['gap']:.2g}", "0.001"):
        assert word in said.message


def test_gap_beyond_the_first_steps_is_a_warning_once_until_it_is_over(rig, caplog):
    rig.serve(dtype=torch.bfloat16)
    first = rig.look(rig.rows())["offpolicy/numerics_gap"]
    assert 1e-3 < first < 0.2
    ids, sampled, name = rig.rows()
    coarse = sampled + 5 * first * torch.tensor([1.0, -1.0]).repeat(TOKENS // 2)
    with caplog.at_level(logging.WARNING, "tink_rl"):
        for step, rows in enumerate((coarse, coarse, sampled, coarse)):
            rig.look((ids, rows, name), step=step)
    assert [record.args[0] for record in caplog.records] == [0, 3]
    assert "policy@1 sampled differ from the trainer" in caplog.text


def test_users_tolerance_stands_in_place_of_what_rounding_explains(model_dir):
    rig = Rig(model_dir("qwen3"), tolerance=0.5)
    rig.look(rig.rows())
    rig.serve(dtype=torch.bfloat16)
    assert rig.look(rig.rows())["offpolicy/numerics_gap"] > 1e-3
    rig.serve(factor=-3.0)
    with pytest.raises(errors.ProbeFailed, match=r"0\.5 is the most"):
        rig.look(rig.rows())


def test_weights_that_leave_little_ask_once_for_fresh_rows(rig, caplog):
    rig.look(rig.rows())
    rows = rig.rows()
    rig.step(0.15)
    with caplog.at_level(logging.WARNING, "tink_rl"):
        found = rig.look(rows, make=of_masked_sequences)
        assert found["offpolicy/ess"] < 0.5 < found["offpolicy/masked_share"] + 0.5
        assert rig.account.wants_fresh
        rig.look(rows, make=of_masked_sequences)
        assert rig.account.wants_fresh and len(caplog.records) == 1
        rig.serve()
        rig.look(rig.rows(), make=of_masked_sequences)
    assert not rig.account.wants_fresh
    assert "the next rows are sampled by the newest version" in caplog.text


def test_rloo_compares_sequences_and_has_no_weights(rig):
    rig.look(rig.rows())
    rows = rig.rows()
    rig.step(0.02)
    found = rig.look(rows, make=lambda now, sampled: {"old_logps": now.sum(1)})
    ids, sampled, _ = rows
    some = sample_of(ROWS, 3)
    moved = (logprobs(rig.twin.model, ids, TOKENS) - sampled).sum(1)[some].double()
    assert found["offpolicy/policy_kl"] == pytest.approx(float(k3(moved).mean()), rel=1e-3)
    assert found["offpolicy/numerics_gap"] < 1e-4 and not rig.account.wants_fresh


def test_distillation_has_an_age_and_no_logprobs_and_an_evaluation_nothing(rig):
    rows = rig.rows()
    rig.step(0.01)
    found = rig.look(rows, make=lambda now, sampled: {})
    assert found == {"offpolicy/age_mean": 1.0, "offpolicy/age_max": 1.0}
    rig.trainer._metrics["train"].clear()
    assert rig.look(rows, phase="eval") == {} and rig.trainer.scored == []


def test_tokens_without_a_logprob_and_of_tools_are_left_out(rig):
    rig.look(rig.rows())
    ids, sampled, name = rig.rows()
    sampled[:, 1], sampled[:, 3] = math.nan, 50.0
    tools = torch.ones(ROWS, TOKENS, dtype=torch.long)
    tools[:, 3] = 0

    def make(now, told):
        changed = {"sampling_per_token_logps": told, "tool_mask": tools}
        return of_tokens(now, told.nan_to_num()) | changed

    assert rig.look((ids, sampled, name), make=make)["offpolicy/numerics_gap"] < 1e-5


# -- figures -----------------------------------------------------------------------------------------


def test_estimators_by_hand():
    assert effective_share(6.0, 14.0, 3) == pytest.approx(36 / 42)  # weights 1, 2, 3
    assert effective_share(4.0, 16.0, 4) == 0.25  # one weight of four
    assert effective_share(0.0, 0.0, 4) == 0.0
    ratios = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    by_hand = [0.5 - 1 - math.log(0.5), 0.0, 2 - 1 - math.log(2)]
    assert k3(ratios.log()).tolist() == pytest.approx(by_hand)


def test_k3_estimates_the_divergence_from_what_was_sampled():
    q, p = (torch.tensor(x, dtype=torch.float64) for x in ([0.7, 0.2, 0.1], [0.5, 0.3, 0.2]))
    exact = float((q * (q / p).log()).sum())
    assert float((q * k3((p / q).log())).sum()) == pytest.approx(exact)


def test_masked_share_is_of_completions_or_of_tokens(rig):
    rows = rig.rows()
    zero = torch.ones(ROWS, 1)
    zero[:4] = 0
    of_sequences = rig.look(
        rows, make=lambda n, s: of_tokens(n, s) | {"importance_sampling_ratio": zero}
    )
    assert of_sequences["offpolicy/masked_share"] == 0.25 and of_sequences["offpolicy/ess"] == 0.75
    zero = torch.ones(ROWS, TOKENS)
    zero[0, :3] = 0
    found = rig.look(rows, make=lambda n, s: of_tokens(n, s) | {"importance_sampling_ratio": zero})
    assert found["offpolicy/masked_share"] == pytest.approx(3 / (ROWS * TOKENS))


@pytest.mark.parametrize("num_rows", [1, 5, 8, 64])
def test_sample_is_an_eighth_and_comes_to_every_row(num_rows):
    samples = [sample_of(num_rows, step) for step in range(8)]
    assert {row for rows in samples for row in rows} == set(range(num_rows))
    assert {len(rows) for rows in samples} == {math.ceil(num_rows / 8)}


# -- versions ----------------------------------------------------------------------------------------


def test_swapped_version_comes_and_goes_bit_for_bit_in_the_same_memory(rig):
    first = [p.detach().clone() for p in trained(rig.twin.model)]
    places = [p.data_ptr() for p in trained(rig.twin.model)]
    rig.step(0.1)
    trained(rig.twin.model)[0].data.view(-1)[0] = -0.0
    now = [p.detach().clone() for p in trained(rig.twin.model)]

    class Stopped(Exception):
        pass

    with suppress(Stopped), rig.kept.swapped("policy@1"):
        assert all(map(torch.equal, trained(rig.twin.model), first))
        raise Stopped
    found = trained(rig.twin.model)
    assert [p.data_ptr() for p in found] == places
    assert all(
        map(torch.equal, [p.view(torch.int32) for p in found], [p.view(torch.int32) for p in now])
    )


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_shards_are_swapped_also_where_a_forward_left_whole_tensors(rig, mesh):
    model, (ids, before, _) = rig.twin.model, rig.rows()
    for part in [*model.get_base_model().model.layers, model]:
        fully_shard(part, mesh=mesh)
    kept = KeptVersions(model, 2)
    kept.remember("policy@1")
    with torch.no_grad():
        for p in trained(model):
            p.to_local().add_(0.02)
    after = logprobs(model, ids, TOKENS)
    with kept.swapped("policy@1"):
        assert torch.allclose(logprobs(model, ids, TOKENS), before, atol=1e-5)
    assert torch.equal(logprobs(model, ids, TOKENS), after)
    assert not torch.allclose(before, after, atol=1e-2)


def test_oldest_version_makes_room(model_dir):
    rig = Rig(model_dir("qwen3"), max_staleness=2)
    for _ in range(3):
        rig.step(0.1)
    with rig.kept.swapped("policy@2"):
        pass
    with (
        pytest.raises(AssertionError, match="policy@1 is not among the kept"),
        rig.kept.swapped("policy@1"),
    ):
        pass


def test_large_versions_wait_in_the_hosts_memory(monkeypatch, caplog):
    monkeypatch.setattr("tink_rl.training.kept_versions._ON_DEVICE_BYTES", 63)
    model = torch.nn.Linear(4, 1, bias=False, device="meta")
    kept = KeptVersions(model, 2)
    assert kept._device([torch.empty(4, device="meta")]) == torch.device("meta")
    assert kept._device([torch.empty(8, device="meta")]) == torch.device("cpu")


# -- ranks -------------------------------------------------------------------------------------------


def test_ranks_whose_rows_are_of_different_versions_score_under_each_together(model_dir):
    rigs = [Rig(model_dir("qwen3"), max_staleness=2) for _ in range(3)]
    oldest = rigs[0].rows()
    for rig in rigs:
        rig.step(0.01, seed=1)
    older = rigs[1].rows()[0], logprobs(rigs[1].twin.model, oldest[0], TOKENS), "policy@2"
    for rig in rigs:
        rig.step(0.01, seed=2)
        rig.serve()
    rows = [oldest, older, rigs[2].rows()]
    barrier, given = threading.Barrier(3), [None] * 3

    def gather_of(rank):
        def gather(values):
            barrier.wait()
            given[rank] = values
            barrier.wait()
            return [value for rank_values in given for value in rank_values]

        return gather

    def look(rank):
        swapped = []
        kept = rigs[rank].kept
        plain, kept.swapped = kept.swapped, lambda name: swapped.append(name) or plain(name)
        return rigs[rank].look(rows[rank], rank=rank, gather=gather_of(rank)), swapped

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(look, range(3)))
    metrics, swapped = zip(*found, strict=True)
    assert swapped == (["policy@1", "policy@2"],) * 3
    assert metrics[0] == metrics[1] == metrics[2]
    assert metrics[0]["offpolicy/age_max"] == 2.0 and metrics[0]["offpolicy/age_mean"] == 1.0
    assert metrics[0]["offpolicy/numerics_gap"] < 1e-5 < metrics[0]["offpolicy/policy_kl"]


# -- before the first step ---------------------------------------------------------------------------


def arguments(path, **changes):
    return trl.GRPOConfig(output_dir=str(path), use_cpu=True, bf16=False, **changes)


def test_uncorrected_rows_of_an_older_version_are_refused(tmp_path):
    off = arguments(tmp_path, vllm_importance_sampling_correction=False)
    check_off_policy(off, 0)
    with pytest.raises(errors.ConfigError, match=r"max_staleness=1 with vllm_.*=False.*set the"):
        check_off_policy(off, 1)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({}, "'token_truncate' keeps them"),
        ({"vllm_importance_sampling_mode": "token_truncate"}, ""),
    ],
)
def test_default_that_masks_whole_completions_is_said_with_what_keeps_them(
    tmp_path, caplog, changes, word
):
    with caplog.at_level(logging.INFO, "tink_rl"):
        check_off_policy(arguments(tmp_path, **changes), 1)
    assert len(caplog.records) == bool(word) and word in caplog.text


def test_trainer_without_a_ratio_is_warned_of(tmp_path, caplog):
    check_off_policy(trl.RLOOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False), 1)
    assert "weighs no row by an importance ratio" in caplog.text
