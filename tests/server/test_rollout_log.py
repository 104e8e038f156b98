"""What a run leaves behind: every completion can be sampled again, also from a checkpoint."""

from __future__ import annotations

import json
import statistics

import pytest

from tests.policies import sync_to
from tests.trainers import make_trainer, reward_noise, rows, settings
from tink_rl.training.rollouts import read_rollouts, requests_of

pytestmark = [pytest.mark.server, pytest.mark.home]


def sampled_again(client, row, **changes):
    (request,) = requests_of(row)
    output = client.generate(**{**request, **changes})
    return output["completion_ids"][0], [values[0] for values in output["logprobs"][0]]


def test_every_logged_completion_is_sampled_again_from_its_version_and_seed(
    server, model_dir, tmp_path
):
    sync = settings(server, mode="adapter", policy="logged", keep_versions=9)
    trainer = make_trainer(server, model_dir, tmp_path, sync=sync, max_steps=3)
    trainer.train()
    logged = list(read_rollouts(tmp_path / "rollouts.jsonl"))
    published = {record.version: record.digest for record in trainer.policy_link.records}
    assert [row["step"] for row in logged] == [0] * 16 + [1] * 16 + [2] * 16
    assert all(published[row["version"]] == row["digest"] for row in logged)
    with server.client() as client:
        for row in logged:
            tokens, logprobs = sampled_again(client, row)
            assert tokens == row["turns"][0]["completion_ids"]
            assert logprobs == pytest.approx(row["turns"][0]["logprobs"], abs=1e-4)
        # The seed is what makes it so: another one gives other tokens.
        (request,) = requests_of(logged[0])
        others = [
            client.generate(**{**request, "generation_kwargs": {"seed": seed}})["completion_ids"][0]
            for seed in range(4)
        ]
    assert any(tokens != logged[0]["turns"][0]["completion_ids"] for tokens in others)


def test_completion_is_sampled_again_from_a_checkpoint_that_names_its_digest(
    server, model_dir, tmp_path
):
    sync = settings(server, mode="adapter", policy="gone", keep_versions=1)
    trainer = make_trainer(
        server, model_dir, tmp_path, sync=sync, save_strategy="steps", save_steps=2
    )
    trainer.train()
    checkpoint = tmp_path / "checkpoint-2"
    digest = json.loads((checkpoint / "tink_policy.json").read_text())["digest"]
    logged = [r for r in read_rollouts(tmp_path / "rollouts.jsonl") if r["digest"] == digest]
    assert len(logged) == 16
    with (
        server.client() as client,
        sync_to(server, model_dir("qwen3"), "adapter", policy="back") as again,
    ):
        record = again.publish(checkpoint)
        assert record.digest == digest
        for row in logged:
            tokens, _ = sampled_again(client, row, model=record.name)
            assert tokens == row["turns"][0]["completion_ids"]


def test_log_has_the_reward_and_advantage_that_the_trainer_used(server, model_dir, tmp_path):
    trainer = make_trainer(server, model_dir, tmp_path, sync=settings(server), max_steps=2)
    trainer.train()
    logged = list(read_rollouts(tmp_path / "rollouts.jsonl"))
    for row in logged:
        assert row["reward"] == row["rewards"]["reward_noise"]
        assert [row["reward"]] == reward_noise([row["completion"]])
    by_step = [statistics.mean(r["reward"] for r in logged if r["step"] == s) for s in (0, 1)]
    assert by_step == pytest.approx([row["reward"] for row in rows(trainer)], abs=1e-5)
    groups = {(row["step"], row["group"]) for row in logged}
    assert len(groups) == 8
    for key in groups:
        group = [row for row in logged if (row["step"], row["group"]) == key]
        assert [row["index"] for row in group] == [0, 1, 2, 3]
        assert len({row["prompt"] for row in group}) == 1
        assert sum(row["advantage"] for row in group) == pytest.approx(0.0, abs=1e-4)


def test_two_runs_of_one_seed_sample_the_same_and_of_another_do_not(server, model_dir, tmp_path):
    found = []
    for run, seed in enumerate((0, 0, 1)):
        path = tmp_path / str(run)
        sync = settings(server, mode="adapter", policy=f"run{run}")
        trainer = make_trainer(server, model_dir, path, sync=sync, max_steps=1, seed=seed)
        trainer.train()
        logged = list(read_rollouts(path / "rollouts.jsonl"))
        found.append([row["turns"][0]["completion_ids"] for row in logged])
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize(("every", "steps"), [(2, {0, 2}), (0, set())])
def test_log_of_every_kth_step(server, model_dir, tmp_path, every, steps):
    sync = settings(server, rollout_log_every=every)
    make_trainer(server, model_dir, tmp_path, sync=sync, max_steps=3).train()
    path = tmp_path / "rollouts.jsonl"
    assert {r["step"] for r in (read_rollouts(path) if path.exists() else ())} == steps


def test_wandb_gets_the_metrics_and_a_table_of_completions(
    server, model_dir, tmp_path, monkeypatch
):
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    trainer = make_trainer(
        server, model_dir, tmp_path, sync=settings(server), max_steps=2, report_to=["wandb"]
    )
    trainer.train()
    summary = dict(wandb.run.summary)
    wandb.finish()
    tables = [json.loads(p.read_text()) for p in tmp_path.rglob("rollouts_*.table.json")]
    assert [t["columns"] for t in tables] == [
        ["step", "policy", "prompt", "completion", "reward"]
    ] * 2
    shown = {tuple(row) for table in tables for row in table["data"]}
    logged = list(read_rollouts(tmp_path / "rollouts.jsonl"))
    assert shown == {
        (r["step"], f"policy@{r['version']}", r["prompt"], r["completion"], r["reward"])
        for r in [*logged[:8], *logged[16:24]]
    }
    assert {"train/sync/seconds", "train/rollout/logprob_gap"} <= set(summary)
