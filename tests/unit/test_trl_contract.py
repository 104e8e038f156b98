"""TRL's seam, as its installed source has it: fails loudly when a release moves it."""

from __future__ import annotations

import inspect
import re

import pytest
import trl

from tink_rl.training import trl_names
from tink_rl.training.trainer import SUPPORTED

SCORED = (trl.GRPOTrainer, trl.RLOOTrainer)
OURS = {"policy_link"}
OF_REWARDS = {
    *("_calculate_rewards", "reward_func_names", "reward_weights", "num_generations_eval"),
    "_get_per_token_logps_and_entropies",
}
OF_THE_RATIO = {"vllm_importance_sampling_correction", "vllm_importance_sampling_mode"}


def names_of(*protocols):
    return {name for protocol in protocols for name in protocol.__annotations__}


@pytest.mark.parametrize("trainer", SUPPORTED)
def test_names_that_are_read_of_a_trainer_are_its_own(trainer):
    source = "".join(
        inspect.getsource(cls)
        for cls in trainer.__mro__
        if cls.__module__.startswith(("trl.", "transformers."))
    )
    read = names_of(trl_names.Trainer, trl_names.RolloutTrainer) - OURS
    for name in read - (set() if trainer in SCORED else OF_REWARDS | {"num_generations"}):
        assert hasattr(trainer, name) or f"self.{name}" in source, name


@pytest.mark.parametrize("config", [trl.GRPOConfig, trl.RLOOConfig, trl.DistillationConfig])
def test_names_that_are_read_of_its_arguments_are_its_own(config, tmp_path):
    args = config(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    read = names_of(trl_names.Arguments, trl_names.SamplingArguments)
    for name in read - (set() if config is trl.GRPOConfig else OF_THE_RATIO):
        assert hasattr(args, name), name


def test_installed_release_is_the_tested_one():
    assert trl.__version__.startswith(f"{trl_names.TESTED_TRL}.")


@pytest.mark.parametrize("trainer", SUPPORTED)
def test_trainer_reads_of_its_vllm_object_only_what_stands_in_for_it(trainer):
    source = inspect.getsource(trainer)
    used = set(re.findall(r"self\.vllm_generation\.(\w+)", source))
    # The other two are read in colocate mode and by a check of TRL's own, made before it is replaced.
    assert used <= {"sync_weights", "generate", "llm", "vllm_client"}
    call = inspect.getsource(trainer._generate_single_turn)
    for argument in ("prompts=", "images=", "num_generations=", "profiler="):
        assert argument in call.partition("vllm_generation.generate(")[2], argument
    assert "self.state.global_step != self._last_loaded_step" in call


@pytest.mark.parametrize("trainer", SUPPORTED)
def test_rollouts_are_generated_and_scored_in_one_method(trainer):
    method = trainer._generate_and_score_completions
    assert list(inspect.signature(method).parameters) == ["self", "inputs"]
    source = inspect.getsource(method)
    assert "self._generate(prompts)" in source
    assert (
        inspect.getsource(trainer).count("_generate_and_score_completions(generation_batch)") == 2
    )


@pytest.mark.parametrize("trainer", SCORED)
def test_rewards_of_all_ranks_come_from_one_method(trainer):
    parameters = list(inspect.signature(trainer._calculate_rewards).parameters)
    assert parameters == ["self", "inputs", "prompts", "completions", "completion_ids_list"]
    source = inspect.getsource(trainer._generate_and_score_completions)
    assert "rewards_per_func = self._calculate_rewards(" in source
    assert '"advantages": advantages' in source
    assert "gather(rewards_per_func)" in inspect.getsource(trainer._calculate_rewards)
    for name in ("reward_func_names", "reward_weights", "num_generations_eval"):
        assert f"self.{name} = " in inspect.getsource(trainer.__init__)


@pytest.mark.parametrize("trainer", SCORED)
def test_batch_is_scored_by_one_method_in_the_contexts_in_which_it_is_scored_again(trainer):
    source = inspect.getsource(trainer._generate_and_score_completions)
    contexts = "disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs)"
    scored = source.partition(f"with torch.no_grad(), {contexts}:")[2]
    arguments = [
        *("self.model", "prompt_completion_ids", "attention_mask", "logits_to_keep", "batch_size"),
    ]
    call = scored.partition("self._get_per_token_logps_and_entropies(")[2].replace(
        "batch_size=", ""
    )
    assert [word.strip() for word in call.split(",")[:5]] == arguments
    method = inspect.signature(trainer._get_per_token_logps_and_entropies)
    assert list(method.parameters)[1:6] == [
        *("model", "input_ids", "attention_mask", "logits_to_keep", "batch_size"),
    ]


@pytest.mark.parametrize("trainer", (trl.GRPOTrainer, trl.DistillationTrainer))
def test_later_turns_extend_what_was_sampled_token_by_token(trainer):
    source = inspect.getsource(trainer._tool_call_loop)
    assert "prompt_ids[idx_with_tool] + completion_ids[idx_with_tool] + suffix_ids" in source
