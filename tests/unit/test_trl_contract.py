"""TRL's seam, as its installed source has it: fails loudly when a release moves it, and so does `attach`."""

from __future__ import annotations

import inspect
import warnings
from types import SimpleNamespace

import pytest
import trl

from tink_rl import seam
from tink_rl.errors import ConfigError
from tink_rl.training import trl_names, trl_seam
from tink_rl.training.trainer import SUPPORTED

SCORED = tuple(trainer for trainer in SUPPORTED if trl_seam.is_scored(trainer))


@pytest.mark.parametrize("trainer", SUPPORTED)
def test_names_that_are_read_of_a_trainer_are_its_own(trainer):
    source = "".join(
        inspect.getsource(cls)
        for cls in trainer.__mro__
        if cls.__module__.startswith(("trl.", "transformers."))
    )
    for name in trl_seam.attributes_of(trainer) | trl_names.SET_BY_US - {"policy_link"}:
        assert hasattr(trainer, name) or f"self.{name}" in source, name
    assert seam.misfits(trl_seam.methods_of(trainer)) == []


@pytest.mark.parametrize("config", [trl.GRPOConfig, trl.RLOOConfig, trl.DistillationConfig])
def test_names_that_are_read_of_its_arguments_are_its_own(config, tmp_path):
    args = config(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    for name in trl_seam.arguments_of(config):
        assert hasattr(args, name), name


def test_installed_release_is_a_tested_one():
    assert seam.is_known_good("trl", trl.__version__)


def made(cls):
    """A trainer of this class with every name that is read of it, which no `__init__` has seen."""
    args = SimpleNamespace(**dict.fromkeys(trl_seam.arguments_of(trl.GRPOConfig)))
    trainer = object.__new__(type("Mine", (cls,), {}))
    missing = {name for name in trl_seam.attributes_of(cls) if not hasattr(cls, name)}
    vars(trainer).update(dict.fromkeys(missing), args=args)
    return trainer


@pytest.mark.parametrize("cls", SUPPORTED)
def test_seam_check_passes_on_the_installed_release(cls):
    trl_seam.check(made(cls))


@pytest.mark.parametrize(
    "name", ["_calculate_rewards", "_generate_and_score_completions", "_tokenize_prompts"]
)
def test_method_that_is_gone_is_named(monkeypatch, name):
    trainer = made(trl.GRPOTrainer)
    monkeypatch.delattr(trl.GRPOTrainer, name)
    with pytest.raises(ConfigError, match=rf"{name} is not there.*Known good: trl 1\.13") as told:
        trl_seam.check(trainer)
    assert told.value.code == "seam_moved"


def test_other_parameters_attributes_and_arguments_are_named(monkeypatch):
    trainer = made(trl.GRPOTrainer)
    monkeypatch.setattr(trl.GRPOTrainer, "_calculate_rewards", lambda self, rows: rows)
    del trainer._step
    del trainer.args.vllm_mode
    with pytest.raises(ConfigError) as told:
        trl_seam.check(trainer)
    calculate, step, mode = told.value.details["moved"]
    assert "takes self, rows; expected self, inputs, prompts" in calculate
    assert step == "Mine._step is not there" and mode.endswith("vllm_mode is not there")


def test_trainer_that_reads_something_new_of_its_vllm_object_is_named(monkeypatch):
    monkeypatch.setattr(trl_names, "READ_OF_GENERATION", {"sync_weights", "llm", "vllm_client"})
    monkeypatch.setattr(trl_names, "SAID_WHERE_IT_SAMPLES", ("self.sampler.sample(",))
    with pytest.raises(ConfigError, match=r"reads vllm_generation\.generate.*does not say") as told:
        trl_seam.check(made(trl.GRPOTrainer))
    assert len(told.value.details["moved"]) == 2


def test_untested_release_is_told_once(monkeypatch):
    monkeypatch.setattr(trl, "__version__", "1.99.0")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        for _ in range(2):
            trl_seam.check(made(trl.RLOOTrainer))
    [one] = told
    assert "trl 1.99.0 was never tested" in str(one.message)


@pytest.mark.parametrize("trainer", SUPPORTED)
def test_trainer_reads_of_its_vllm_object_only_what_stands_in_for_it(trainer):
    used = trl_seam.read_of_generation(trainer)
    assert (
        used <= {"sync_weights", "generate", "llm", "vllm_client"} == trl_names.READ_OF_GENERATION
    )
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
    # TRL 1.14 hands on what it is given.
    scores = getattr(trainer, "_full_logits_logps", trainer._get_per_token_logps_and_entropies)
    method = inspect.signature(scores)
    assert list(method.parameters)[1:6] == [
        *("model", "input_ids", "attention_mask", "logits_to_keep", "batch_size"),
    ]


@pytest.mark.parametrize("trainer", (trl.GRPOTrainer, trl.DistillationTrainer))
def test_later_turns_extend_what_was_sampled_token_by_token(trainer):
    source = inspect.getsource(trainer._tool_call_loop)
    assert "prompt_ids[idx_with_tool] + completion_ids[idx_with_tool] + suffix_ids" in source
