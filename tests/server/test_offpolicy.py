"""The account of what is off-policy on a real server: honest runs, and one that samples another policy."""

from __future__ import annotations

from dataclasses import replace

import pytest
from trl import RLOOConfig

import tink_rl
from tests.trainers import make_trainer, rows, settings
from tink_rl import errors

pytestmark = [pytest.mark.server, pytest.mark.home]


def column(trainer, name):
    return [row.get(f"offpolicy/{name}") for row in rows(trainer)]


def test_age_of_rows_moves_the_policy_part_and_leaves_numerics_where_they_were(
    server, model_dir, tmp_path
):
    trainer = make_trainer(
        server,
        model_dir,
        tmp_path,
        sync=settings(server, mode="merged", max_staleness=1),
        lora_changes={"init_lora_weights": False},
        learning_rate=5e-4,
    )
    trainer.train()
    assert column(trainer, "age_max") == column(trainer, "age_mean") == [0.0, 1.0, 1.0, 1.0]
    assert max(column(trainer, "numerics_gap")) < 1e-4
    kls = column(trainer, "policy_kl")
    assert kls[0] < 1e-9 and min(kls[1:]) > 1e-6
    raw = [row["sampling/sampling_logp_difference/max"] for row in rows(trainer)]
    assert raw[0] < 1e-4 and min(raw[1:]) > 1e-3  # which alone would not say that it is age
    assert max(row["rollout/logprob_gap"] for row in rows(trainer)) < 1e-4
    assert all(0.5 < share <= 1.0 for share in column(trainer, "ess"))
    assert all(0.0 <= share < 0.5 for share in column(trainer, "masked_share"))


def test_step_that_moves_the_policy_far_is_followed_by_fresh_rows(
    server, model_dir, tmp_path, caplog
):
    trainer = make_trainer(
        server,
        model_dir,
        tmp_path,
        sync=settings(server, mode="merged", max_staleness=1),
        lora_changes={"init_lora_weights": False},
        learning_rate=2e-2,
        max_steps=6,
    )
    trainer.train()
    ages, shares = column(trainer, "age_max"), column(trainer, "ess")
    assert ages[1:] == [float(share >= 0.5) for share in shares[:-1]] and 0.0 in ages[1:]
    assert max(column(trainer, "numerics_gap")) < 1e-3
    assert "the next rows are sampled by the newest version" in caplog.text
    hits = [row["overlap/hit_share"] for row in rows(trainer)]
    assert hits == ages


def test_wrong_policy_on_the_server_ends_the_run_with_its_name_and_a_checkpoint(
    server, model_dir, tmp_path
):
    trainer = make_trainer(
        server,
        model_dir,
        tmp_path,
        sync=settings(server, mode="adapter", max_staleness=1, probe_every=0, policy="planted"),
        lora_changes={"init_lora_weights": False},
        learning_rate=5e-4,
        max_steps=6,
    )
    collector = trainer.policy_link.collector
    collect = collector.collect

    def scaled(*args, **kwargs):
        found = collect(*args, **kwargs)
        factor = 1.1 if trainer.state.global_step == 2 else 1.0
        tensors = {n: t * factor if "lora_B" in n else t for n, t in found.tensors.items()}
        return replace(found, tensors=tensors)

    collector.collect = scaled
    with pytest.raises(
        errors.ProbeFailed, match=r"planted@3: .*at step 3 .*checkpoint-3"
    ) as caught:
        trainer.train()
    assert caught.value.details["version"] == "planted@3"
    assert caught.value.details["gap"] > caught.value.details["bound"] == 1e-3


def test_rloo_has_the_parts_of_sequences(server, model_dir, tmp_path, caplog):
    trainer = make_trainer(
        server,
        model_dir,
        tmp_path,
        cls=tink_rl.RLOOTrainer,
        config_cls=RLOOConfig,
        sync=settings(server, mode="adapter", max_staleness=2),
    )
    trainer.train()
    assert column(trainer, "age_max") == [0.0, 1.0, 2.0, 2.0]
    assert max(column(trainer, "numerics_gap")) < 1e-4 < max(column(trainer, "policy_kl"))
    assert column(trainer, "ess") == [None] * 4
    assert "weighs no row by an importance ratio" in caplog.text
