"""Trainers whose base is not what the real server serves: refused before the first step, by name."""

from __future__ import annotations

import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import tink_rl
from tests.trainers import PROMPTS, config, lora, reward_noise, rows, settings
from tests.unit.test_base_content import change_one_row
from tink_rl import errors

pytestmark = [pytest.mark.server, pytest.mark.home]


def load(directory):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def tuned_and_merged(directory):
    """What an SFT run leaves in memory: its adapter folded into the base, whose name stays."""
    torch.manual_seed(3)
    tuned = get_peft_model(load(directory), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.01)
    return tuned.merge_and_unload()


def trainer_of(server, directory, path, model, **changes):
    changes = {"model_init_kwargs": None, "max_steps": 1, **changes}
    return tink_rl.GRPOTrainer(
        model=model,
        reward_funcs=reward_noise,
        args=config(path, **changes),
        train_dataset=PROMPTS,
        processing_class=AutoTokenizer.from_pretrained(directory),
        peft_config=lora(),
        servers=server.url,
        sync=settings(server, policy="live"),
    )


def test_adapter_that_was_merged_in_memory_is_refused_and_its_saved_base_is_the_way_out(
    server, model_dir, tmp_path
):
    directory = model_dir("qwen3")
    trainer = trainer_of(server, directory, tmp_path, tuned_and_merged(directory))
    with pytest.raises(errors.BaseMismatch, match="NEW_DIR") as caught:
        trainer.train()
    assert caught.value.details["tensor"] == "model.layers.0.self_attn.q_proj.weight"
    assert caught.value.details["num_tensors"] == 4
    assert trainer.state.global_step == 0 and server.client().status().served == {}
    untouched = trainer_of(server, directory, tmp_path, load(directory))  # the names are free again
    untouched.train()
    assert rows(untouched)[0]["rollout/logprob_gap"] <= 1e-4


def test_added_tokens_are_refused_before_the_first_step(server, model_dir, tmp_path):
    directory = model_dir("qwen3")
    model = load(directory)
    model.resize_token_embeddings(68)
    trainer = trainer_of(server, directory, tmp_path, model)
    with pytest.raises(errors.BaseMismatch, match="68 rows, in the checkpoint 64"):
        trainer.train()
    assert server.client().status().served == {}


@pytest.mark.parametrize("before", ["train", "evaluate"])
def test_base_that_is_changed_between_two_calls_is_refused_by_the_second(
    server, model_dir, tmp_path, before
):
    directory = model_dir("qwen3")
    trainer = trainer_of(server, directory, tmp_path, load(directory))
    trainer.eval_dataset = PROMPTS.select(range(4))
    getattr(trainer, before)()
    with torch.no_grad():
        trainer.model.get_base_model().model.norm.weight.mul_(1.05)
    for again in (trainer.train, trainer.evaluate):
        with pytest.raises(errors.BaseMismatch, match=r"model\.norm\.weight differs"):
            again()


def test_copy_of_the_served_base_passes_and_one_with_another_row_does_not(
    server, model_dir, tmp_path
):
    copy = shutil.copytree(model_dir("qwen3"), tmp_path / "copy")
    with tink_rl.WeightSync(server.url, base_model=copy, config=settings(server)):
        pass
    change_one_row(copy)
    with pytest.raises(errors.BaseMismatch, match=r"embed_tokens\.weight differs"):
        tink_rl.WeightSync(server.url, base_model=copy, config=settings(server)).open()
