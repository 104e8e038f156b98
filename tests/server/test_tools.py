"""TRL's tool loop for real: a policy that calls a calculator, every turn from one version."""

from __future__ import annotations

import json

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import tink_rl
from tests import calculator
from tests.multi.launching import accelerate
from tests.trainers import config, lora, rows, settings
from tink_rl.training.rollouts import read_rollouts, requests_of

pytestmark = [pytest.mark.server, pytest.mark.home]


@pytest.fixture(scope="module")
def caller(model_dir, tmp_path_factory):
    """The directory of a LoRA that calls the calculator."""
    torch.manual_seed(0)
    base = model_dir("qwen3")
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), lora(r=16, lora_alpha=32)
    )
    calculator.teach(model, calculator.tokenizer_of(base))
    directory = tmp_path_factory.mktemp("caller")
    model.save_pretrained(directory)
    return directory


def reward_short(completions, **_):
    """Fewer messages are better, so that every step changes the policy."""
    return [-float(len(messages)) for messages in completions]


def make(server, model_dir, caller, path, *, sync, tool=calculator.add, **changes):
    base = AutoModelForCausalLM.from_pretrained(model_dir("qwen3"), dtype=torch.float32)
    arguments = {"max_completion_length": 64, "model_init_kwargs": None, "max_steps": 2, **changes}
    return tink_rl.GRPOTrainer(
        model=PeftModel.from_pretrained(base, caller, is_trainable=True),
        reward_funcs=reward_short,
        args=config(path, **arguments),
        train_dataset=Dataset.from_dict({"prompt": calculator.sums()}),
        processing_class=calculator.tokenizer_of(model_dir("qwen3")),
        tools=[tool],
        servers=server.url,
        sync=sync,
    )


def log_requests(trainer):
    """What the server was asked for: `(step, model)` of every request."""
    asked = []
    for client in trainer.vllm_generation.clients:
        original = client.generate

        def generate(prompts, *args, _original=original, model=None, **kwargs):
            asked.append((trainer.state.global_step, model))
            return _original(prompts, *args, model=model, **kwargs)

        client.generate = generate
    return asked


@pytest.mark.parametrize("mode", ["adapter", "merged"])
def test_every_turn_is_sampled_from_the_version_its_rollout_began_with(
    server, model_dir, caller, tmp_path, mode
):
    sync = settings(server, mode=mode, policy=f"tools-{mode}")
    trainer = make(server, model_dir, caller, tmp_path, sync=sync)
    asked = log_requests(trainer)
    trainer.train()
    names = [record.name for record in trainer.policy_link.records]
    assert {step: {m for s, m in asked if s == step} for step in (0, 1)} == {
        0: {names[0]},
        1: {names[1]},
    }
    history = rows(trainer)
    assert all(row["tools/call_frequency"] >= 0.9 for row in history)
    assert all(row["tools/failure_frequency"] <= 0.1 for row in history)
    # A turn from other weights would show here: the trainer scores all turns with one policy.
    assert max(row["rollout/logprob_gap"] for row in history) <= 1e-3
    logged = list(read_rollouts(tmp_path / "rollouts.jsonl"))
    assert {len(row["turns"]) for row in logged} >= {2, 3}
    assert all(turn["inserted_ids"] for row in logged for turn in row["turns"][1:])


def test_every_turn_can_be_sampled_again(server, model_dir, caller, tmp_path):
    sync = settings(server, mode="adapter", policy="turns", keep_versions=9)
    make(server, model_dir, caller, tmp_path, sync=sync).train()
    logged = list(read_rollouts(tmp_path / "rollouts.jsonl"))
    with server.client() as client:
        for row in logged:
            again = [client.generate(**r)["completion_ids"][0] for r in requests_of(row)]
            assert again == [turn["completion_ids"] for turn in row["turns"]]


def test_publish_in_the_middle_of_a_rollout_changes_none_of_its_turns(
    server, model_dir, caller, tmp_path
):
    published = []

    def add(of: str) -> str:
        """
        Add two digits, and publish other weights.

        Args:
            of: Such as 3+4.

        Returns:
            The sum.
        """
        if len(published) < 3:
            with torch.no_grad():
                for name, parameter in trainer.model.named_parameters():
                    if "lora_B" in name:
                        parameter.mul_(0.9)
            published.append(trainer.policy_link.publish().name)
        return calculator.add(of)

    # One version is kept, yet the pinned one outlives three more.
    sync = settings(server, mode="adapter", policy="pinned", keep_versions=1)
    trainer = make(server, model_dir, caller, tmp_path, sync=sync, tool=add, max_steps=1)
    asked = log_requests(trainer)
    trainer.train()
    assert published == ["pinned@2", "pinned@3", "pinned@4"]
    assert {model for _, model in asked} == {"pinned@1"} and len(asked) >= 2
    with server.client() as client:
        served = [name for name in client.models() if name.startswith("pinned@")]
    assert served == ["pinned@5"]


def test_merged_mode_publishes_nothing_in_the_middle_of_a_rollout(
    server, model_dir, caller, tmp_path
):
    refused = []

    def add(of: str) -> str:
        """
        Add two digits, and try to publish.

        Args:
            of: Such as 3+4.

        Returns:
            The sum.
        """
        try:
            trainer.policy_link.publish()
        except tink_rl.TinkError as error:
            refused.append(str(error))
        return calculator.add(of)

    sync = settings(server, mode="merged", policy="whole")
    trainer = make(server, model_dir, caller, tmp_path, sync=sync, tool=add, max_steps=1)
    trainer.train()
    assert refused and all("in the middle of a rollout" in text for text in refused)
    assert [record.name for record in trainer.policy_link.records] == ["whole@1", "whole@2"]


@pytest.mark.timeout(300)
def test_two_ranks_take_different_numbers_of_turns(server, model_dir, caller, tmp_path):
    script = ["-m", "tests.server.run_tools", str(model_dir("qwen3")), str(caller), server.url]
    script += [str(server.token_file), str(tmp_path)]
    code, output = accelerate("accelerate_configs/cpu_2proc.yaml", script, tmp_path)
    assert code == 0, output[-4000:]
    turns = [json.loads((tmp_path / f"turns-{rank}.json").read_text()) for rank in (0, 1)]
    names = [f"two-ranks@{version}" for version in (1, 2, 3)]
    # Rank 0's prompts need the calculator, rank 1's do not: no rank waits for the other's turns.
    for step, name in enumerate(names):
        asked = [[m for s, m in rank if s == step] for rank in turns]
        assert {*asked[0], *asked[1]} == {name}
    assert len(turns[0]) > len(turns[1])
    for rank, name in enumerate(("rollouts.jsonl", "rollouts-rank1.jsonl")):
        logged = list(read_rollouts(tmp_path / name))
        assert len(logged) == 3 * 8
        assert [f"{r['policy']}@{r['version']}" for r in logged[::8]] == names
        assert (max(len(row["turns"]) for row in logged) > 1) == (rank == 0)
