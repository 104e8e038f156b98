"""Real GRPO on a real server: both modes, the logprob gap, checks, attach, resume."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from transformers import TrainerCallback
from trl import GRPOConfig, RLOOConfig
from trl import GRPOTrainer as PlainGRPOTrainer

import tink_rl
from tests.policies import PeftTwin, assert_served
from tests.trainers import PROMPTS, make_trainer, rows, settings
from tink_rl import errors
from tink_rl.publish.packets import PacketTransfer
from tink_rl.training import checks

pytestmark = [pytest.mark.server, pytest.mark.home]


@pytest.mark.parametrize("mode", ["adapter", "merged", "full"])
def test_run_samples_every_rollout_from_the_version_just_published(
    server, model_dir, tmp_path, mode
):
    policy = f"run-{mode}"
    last_version = 0
    trainer = make_trainer(
        server, model_dir, tmp_path, sync=settings(server, mode=mode, policy=policy)
    )
    trainer.train()
    history = rows(trainer)
    assert len(history) == 4
    first = trainer.policy_link.records[0].version
    assert first == last_version + 1  # the start-up probe takes no number
    assert [row["rollout/policy_version"] for row in history] == [
        first,
        first + 1,
        first + 2,
        first + 3,
    ]
    assert [row["sync/policy_version"] for row in history][1:] == [first + 2, first + 3, first + 4]
    assert max(row["rollout/logprob_gap"] for row in history) <= 1e-4
    assert all(row["sampling/importance_sampling_ratio/mean"] > 0.99 for row in history)
    for key in ("sync/seconds", "sync/held_seconds", "sync/bytes", "sync/phase/stage"):
        assert all(key in row for row in history)
    twin = PeftTwin(model_dir("qwen3"))
    twin.model = trainer.model.eval()
    assert_served(server, trainer.policy_link.current, twin.clear_cases())


@pytest.mark.parametrize(
    ("cls", "config_cls"),
    [(tink_rl.GRPOTrainer, GRPOConfig), (tink_rl.RLOOTrainer, RLOOConfig)],
    ids=["grpo", "rloo"],
)
def test_run_in_trls_default_precision_ends_well_however_large_its_adapter_grows(
    server, model_dir, tmp_path, caplog, cls, config_cls
):
    trainer = make_trainer(
        server,
        model_dir,
        tmp_path,
        sync=settings(server, mode="merged", policy="autocast"),
        cls=cls,
        config_cls=config_cls,
        bf16=config_cls(output_dir=str(tmp_path), use_cpu=True).bf16,
        learning_rate=0.1,
        max_steps=12,
    )
    trainer.train()
    assert trainer.accelerator.mixed_precision == "bf16"
    assert "training computes under bfloat16 autocast and the server in float32" in caplog.text
    probed = [r.probe_gap for r in trainer.policy_link.records if r.probe_gap is not None]
    assert len(probed) == 2 and max(probed) <= 1e-3
    own = "rollout/logprob_gap" if cls is tink_rl.GRPOTrainer else "rollout/sequence_logprob_gap"
    assert rows(trainer)[-1][own] > 0.01  # what a probe under autocast would have judged


def test_dora_trains_in_full_mode_and_auto_says_why(server, model_dir, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="tink_rl")
    trainer = make_trainer(
        server,
        model_dir,
        tmp_path,
        sync=settings(server, policy="dora"),
        lora_changes={"use_dora": True},
        max_steps=3,
    )
    trainer.train()
    assert trainer.policy_link.sync.mode == "full"
    assert "mode auto: full: DoRA (use_dora=True) needs it" in caplog.text
    history = rows(trainer)
    assert max(row["rollout/logprob_gap"] for row in history) <= 1e-4
    versions = [row["rollout/policy_version"] for row in history]
    assert versions == sorted(set(versions)) and len(versions) == 3


def test_auto_takes_merged_and_says_so(server, model_dir, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="tink_rl")
    trainer = make_trainer(server, model_dir, tmp_path, sync=settings(server), max_steps=1)
    trainer.train()
    assert trainer.policy_link.sync.mode == "merged"
    assert "mode auto took merged on a float32 server" in caplog.text


def test_attach_gives_a_built_trainer_the_same(server, model_dir, tmp_path):
    trainer = make_trainer(server, model_dir, tmp_path, cls=PlainGRPOTrainer, max_steps=2)
    link = tink_rl.attach(trainer, server.url, sync=settings(server, mode="adapter"))
    with pytest.raises(errors.ConfigError, match="already"):
        tink_rl.attach(trainer, server.url, sync=settings(server))
    trainer.train()
    assert len(link.records) == 3
    assert all("rollout/logprob_gap" in row for row in rows(trainer))


def test_evaluate_before_training_publishes_first_and_is_not_sent_twice(
    server, model_dir, tmp_path
):
    trainer = make_trainer(server, model_dir, tmp_path, sync=settings(server), max_steps=1)
    trainer.evaluate(PROMPTS.select(range(16)))
    assert len(trainer.policy_link.records) == 1
    trainer.train()
    assert len(trainer.policy_link.records) == 2


def test_evaluation_outside_of_training_gives_the_lease_back(server, model_dir, tmp_path):
    sync = settings(server, lease_wait_s=0.01)
    first, second = (
        make_trainer(server, model_dir, tmp_path / name, sync=sync, max_steps=1) for name in "ab"
    )
    for trainer in (first, second, first):
        trainer.evaluate(PROMPTS.select(range(16)))
    second.train()


def test_best_model_that_is_loaded_at_the_end_is_served_named_and_evaluated(
    server, model_dir, tmp_path
):
    num_calls = 0

    def worse_and_worse(completions, **_):
        nonlocal num_calls
        num_calls += 1
        return [len(set(text)) - 100.0 * num_calls for text in completions]

    trainer = make_trainer(
        server,
        model_dir,
        tmp_path,
        sync=settings(server, policy="best"),
        extra={"reward_funcs": worse_and_worse, "eval_dataset": PROMPTS.select(range(4))},
        max_steps=3,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_reward",
        greater_is_better=True,
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")
    best, left = (
        json.loads((tmp_path / folder / "tink_policy.json").read_text())
        for folder in ("checkpoint-1", ".")
    )
    assert left["digest"] == best["digest"] and left["version"] > best["version"]
    link = trainer.policy_link
    assert server.client().status().served[link.current] == best["digest"]
    with torch.no_grad():
        next(p for n, p in trainer.model.named_parameters() if "lora_B" in n).add_(0.1)
    trainer.evaluate()
    assert len(link.records) == 6 and link.records[-1].digest != best["digest"]
    assert trainer.vllm_generation.last_model == link.current
    link.close()


def test_resumed_run_publishes_the_restored_adapter_under_the_next_free_version(
    server, model_dir, tmp_path
):
    class Crash(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 3:
                raise KeyboardInterrupt

    sync = settings(server, mode="adapter", keep_versions=1)
    trainer = make_trainer(
        server, model_dir, tmp_path, sync=sync, save_strategy="steps", save_steps=2
    )
    trainer.add_callback(Crash())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    saved = json.loads((tmp_path / "checkpoint-2" / "tink_policy.json").read_text())
    by_version = {r.version: r.digest for r in trainer.policy_link.records}
    assert by_version[saved["version"]] == saved["digest"]
    last = max(by_version)

    resumed = make_trainer(server, model_dir, tmp_path, sync=sync)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    records = resumed.policy_link.records
    assert (records[0].version, records[0].digest) == (last + 1, saved["digest"])
    history = [row for row in rows(resumed) if row["step"] > 2]
    assert history[0]["rollout/policy_version"] == last + 1


def test_publish_that_fails_twice_ends_the_run_with_a_checkpoint(
    server, model_dir, tmp_path, monkeypatch
):
    trainer = make_trainer(server, model_dir, tmp_path, sync=settings(server))
    stage = PacketTransfer.stage

    def lose_the_wire_after_two_versions(transfer):
        if transfer.version > trainer.policy_link.records[0].version + 1:
            raise errors.ChannelLost("injected", replica=server.url)
        stage(transfer)

    def start_losing(*_):
        monkeypatch.setattr(PacketTransfer, "stage", lose_the_wire_after_two_versions)

    class Later(TrainerCallback):
        def on_step_begin(self, *args, **_):
            start_losing()

    trainer.add_callback(Later())
    with pytest.raises(errors.PublishFailed, match="--resume_from_checkpoint") as caught:
        trainer.train()
    assert caught.value.details["replica"] == server.url
    step = trainer.state.global_step
    checkpoint = tmp_path / f"checkpoint-{step}"
    assert (checkpoint / "adapter_model.safetensors").is_file()
    # No version holds these weights; the numbers go on after the last that there is.
    saved = json.loads((checkpoint / "tink_policy.json").read_text())
    last = trainer.policy_link.records[-1]
    assert (saved["version"], saved["digest"]) == (last.version, None)


def test_second_publisher_of_one_model_is_refused(server, model_dir, tmp_path):
    trainer = make_trainer(server, model_dir, tmp_path, sync=settings(server), max_steps=1)
    other = tink_rl.WeightSync(server.url, base_model=model_dir("qwen3"), config=settings(server))
    with pytest.raises(errors.SecondPublisher, match="already published"):
        other.claim(trainer.model)
    trainer.policy_link.close()
    other.claim(trainer.model)
    other.close()


def test_colocate_vespo_and_dora_are_refused_before_the_first_step(server, model_dir, tmp_path):
    with pytest.raises(errors.ConfigError, match="vllm_mode='server'"):
        make_trainer(server, model_dir, tmp_path, use_vllm=True, vllm_mode="colocate")
    with pytest.raises(errors.ConfigError, match="token_truncate"):
        make_trainer(server, model_dir, tmp_path, loss_type="vespo")
    with pytest.raises(errors.UnsupportedAdapter, match="'merged' cannot express DoRA"):
        make_trainer(
            server,
            model_dir,
            tmp_path,
            sync=settings(server, mode="merged"),
            lora_changes={"use_dora": True},
        )


def test_settings_that_bias_the_importance_ratio_are_told(server):
    status = server.client().status()
    plain = GRPOConfig(use_cpu=True, bf16=False, max_completion_length=8)
    with pytest.warns(UserWarning, match="lora_dropout=0.1"):
        checks.check_sampling(plain, status, dropout=0.1)
    raw = type(status)(**{**status.__dict__, "logprobs_mode": "raw_logprobs"})
    with pytest.raises(errors.ConfigError, match="--logprobs-mode processed_logprobs"):
        checks.check_sampling(plain, raw, dropout=0.0)
    long = GRPOConfig(use_cpu=True, bf16=False, max_completion_length=4096)
    with pytest.raises(errors.ConfigError, match="--max-model-len"):
        checks.check_sampling(long, status, dropout=0.0)
