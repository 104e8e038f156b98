"""`PolicySyncCallback` on a real server: any trainer's policy is served while it learns."""

from __future__ import annotations

import json

import pytest
from datasets import Dataset
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import tink_rl
from tests.policies import PeftTwin, assert_served
from tests.trainers import SHORT_RUN, lora, make_trainer, settings
from tink_rl import errors

pytestmark = [pytest.mark.server, pytest.mark.home]
PAIRS = [(f"{i}+{j}=", f"{i + j}") for i in range(4) for j in range(4)]
SHARED = {
    name: SHORT_RUN[name]
    for name in ("use_cpu", "bf16", "max_steps", "report_to", "save_strategy", "disable_tqdm")
}


def arguments(cls, path, **changes):
    settings = {"per_device_train_batch_size": 4, "learning_rate": 5e-3, "logging_steps": 1}
    return cls(output_dir=str(path), **{**SHARED, **settings, **changes})


def sft(model_dir, path, **changes):
    directory = model_dir("qwen3")
    return SFTTrainer(
        model=str(directory),
        args=arguments(
            SFTConfig, path, model_init_kwargs={"dtype": "float32"}, max_length=16, **changes
        ),
        train_dataset=Dataset.from_dict(
            {"prompt": [p for p, _ in PAIRS], "completion": [c for _, c in PAIRS]}
        ),
        processing_class=AutoTokenizer.from_pretrained(directory),
        peft_config=lora(),
    )


def assert_last_is_served(server, model_dir, trainer):
    twin = PeftTwin(model_dir("qwen3"))
    twin.model = trainer.model.eval()
    assert_served(server, trainer.policy_link.current, twin.clear_cases())


def synced(trainer):
    return [row for row in trainer.state.log_history if "sync/policy_version" in row]


@pytest.mark.parametrize("mode", ["adapter", "merged"])
def test_sft_policy_is_published_at_begin_and_after_each_step(server, model_dir, tmp_path, mode):
    trainer = sft(model_dir, tmp_path, save_strategy="steps", save_steps=4)
    trainer.add_callback(
        tink_rl.PolicySyncCallback(
            trainer, server.url, sync=settings(server, mode=mode, policy=f"sft-{mode}")
        )
    )
    trainer.train()
    records = trainer.policy_link.records
    assert [r.version for r in records] == [records[0].version + i for i in range(5)]
    history = synced(trainer)
    assert [row["step"] for row in history] == [1, 2, 3, 4]
    assert [row["sync/policy_version"] for row in history] == [r.version for r in records[1:]]
    for key in ("sync/seconds", "sync/held_seconds", "sync/bytes", "sync/phase/stage", "loss"):
        assert all(key in row for row in history)
    assert (tmp_path / "checkpoint-4" / "tink_policy.json").is_file()
    assert_last_is_served(server, model_dir, trainer)


def test_every_kth_step_is_published_and_so_is_the_last(server, model_dir, tmp_path):
    trainer = sft(
        model_dir, tmp_path, max_steps=5, logging_steps=5, save_strategy="steps", save_steps=3
    )
    callback = tink_rl.PolicySyncCallback(trainer, server.url, sync=settings(server), every=2)
    trainer.add_callback(callback)
    trainer.train()
    # Begin, step 2, step 4, end; and step 3, for its checkpoint to name what it holds.
    records = trainer.policy_link.records
    assert len(records) == 5
    for folder, record in (("checkpoint-3", records[2]), (".", records[4])):
        named = json.loads((tmp_path / folder / "tink_policy.json").read_text())
        assert (named["version"], named["digest"]) == (record.version, record.digest)
    (row,) = synced(trainer)
    # The row of step 5 was written before the end's publish.
    assert row["sync/policy_version"] == records[3].version
    assert_last_is_served(server, model_dir, trainer)


def test_samples_show_the_policy_of_their_step(server, model_dir, tmp_path, capsys):
    trainer = sft(model_dir, tmp_path)
    callback = tink_rl.PolicySyncCallback(
        trainer,
        server.url,
        sync=settings(server, policy="shown"),
        sample_prompts=["1+1=", [{"role": "user", "content": "2+1"}]],
        sample_every=2,
        max_tokens=8,
    )
    trainer.add_callback(callback)
    trainer.train()
    records = trainer.policy_link.records
    assert [(s["step"], s["version"]) for s in callback.samples[::2]] == [
        (0, records[0].version),
        (2, records[2].version),
        (4, records[4].version),
    ]
    assert [s["prompt"] for s in callback.samples[:2]] == ["1+1=", "2+1"]
    shown = capsys.readouterr().out
    assert f"step 4, {records[4].name}" in shown and "2+1" in shown
    twin = PeftTwin(model_dir("qwen3"))
    twin.model = trainer.model.eval()
    tokenizer = trainer.processing_class
    prompt = tokenizer("1+1=", add_special_tokens=False)["input_ids"]
    ((tokens, _),) = twin.greedy([prompt])
    text = tokenizer.decode(tokens).split("<eos>")[0]
    assert callback.samples[-2]["completion"] == text.replace("<pad>", "").replace("<bos>", "")


def test_dpo_policy_is_published(server, model_dir, tmp_path):
    directory = model_dir("qwen3")
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(directory),
        args=arguments(DPOConfig, tmp_path, max_steps=2, max_length=16),
        train_dataset=Dataset.from_dict(
            {
                "prompt": [p for p, _ in PAIRS],
                "chosen": [c for _, c in PAIRS],
                "rejected": ["no"] * len(PAIRS),
            }
        ),
        processing_class=AutoTokenizer.from_pretrained(directory),
        peft_config=lora(),
    )
    trainer.add_callback(tink_rl.PolicySyncCallback(trainer, server.url, sync=settings(server)))
    trainer.train()
    assert len(trainer.policy_link.records) == 3 and len(synced(trainer)) == 2
    assert_last_is_served(server, model_dir, trainer)


def test_plain_trainer_policy_is_published(server, model_dir, tmp_path):
    directory = model_dir("qwen3")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = [tokenizer(f"{p}{c:0>2}")["input_ids"] for p, c in PAIRS]
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(directory), lora())
    trainer = Trainer(
        model=model,
        args=arguments(TrainingArguments, tmp_path, max_steps=2),
        train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}),
    )
    trainer.add_callback(tink_rl.PolicySyncCallback(trainer, server.url, sync=settings(server)))
    trainer.train()
    assert len(trainer.policy_link.records) == 3 and len(synced(trainer)) == 2
    assert_last_is_served(server, model_dir, trainer)


def test_second_publisher_of_a_model_is_refused(server, model_dir, tmp_path):
    trainer = make_trainer(server, model_dir, tmp_path, sync=settings(server))
    with pytest.raises(errors.SecondPublisher, match="already published"):
        tink_rl.PolicySyncCallback(trainer, server.url, sync=settings(server))
    trainer.policy_link.close()


@pytest.mark.parametrize("wrong", [{"every": 0}, {"sample_every": 0}, {"max_tokens": 0}])
def test_setting_out_of_range_is_refused(server, model_dir, tmp_path, wrong):
    with pytest.raises(errors.ConfigError, match=f"{next(iter(wrong))}=0"):
        tink_rl.PolicySyncCallback(object(), server.url, sync=settings(server), **wrong)


def test_samples_that_cannot_fit_are_refused_before_the_first_step(server, model_dir, tmp_path):
    trainer = sft(model_dir, tmp_path)
    trainer.add_callback(
        tink_rl.PolicySyncCallback(
            trainer, server.url, sync=settings(server), sample_prompts=["1"], max_tokens=4096
        )
    )
    with pytest.raises(errors.ConfigError, match="--max-model-len"):
        trainer.train()
    # The failed run gave the model back: another callback can publish it.
    tink_rl.PolicySyncCallback(trainer, server.url, sync=settings(server))
    trainer.policy_link.close()


def test_samples_without_a_tokenizer_are_refused_before_the_first_step(server, model_dir, tmp_path):
    trainer = sft(model_dir, tmp_path)
    trainer.processing_class = None
    with pytest.raises(errors.ConfigError, match="processing_class"):
        tink_rl.PolicySyncCallback(trainer, server.url, sync=settings(server), sample_prompts=["1"])
