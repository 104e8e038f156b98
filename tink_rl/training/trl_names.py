"""What is read, called and set of TRL's trainers (and of what they are made of), all of it, in one place.

`trl_seam.check` looks at them when a trainer is attached; `tests/unit/test_trl_contract.py` holds what else
is assumed of them.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch


class Arguments(Protocol):
    """Of any Hugging Face trainer."""

    output_dir: str
    seed: int
    report_to: list[str]
    eval_strategy: Any
    eval_on_start: bool
    model_init_kwargs: dict[str, Any] | None
    """TRL's; transformers' own trainer has none."""
    device: torch.device
    distributed_state: Any
    _n_gpu: int


class SamplingArguments(Arguments, Protocol):
    """Of a trainer that samples; beside what `SamplingSettings.of` reads by TRL's names."""

    temperature: float
    max_completion_length: int
    generation_kwargs: dict[str, Any] | None
    use_vllm: bool
    vllm_mode: str
    vllm_structured_outputs_regex: str | None
    vllm_importance_sampling_correction: bool
    vllm_importance_sampling_mode: str


class State(Protocol):
    """How far a training is."""

    global_step: int
    max_steps: int
    is_world_process_zero: bool


class Accelerator(Protocol):
    """The processes of a run."""

    process_index: int
    num_processes: int
    is_main_process: bool
    distributed_type: Any
    unwrap_model: Callable[..., Any]


class Tokenizer(Protocol):
    """Between ids and text."""

    def decode(self, token_ids: list[int], skip_special_tokens: bool = ...) -> str:
        """The text of some tokens."""


class Trainer(Protocol):
    """Any Hugging Face trainer with a PEFT model."""

    args: Any
    state: State
    model: Any
    accelerator: Accelerator
    processing_class: Any
    train: Callable[..., Any]
    evaluate: Callable[..., Any]
    log: Callable[..., None]
    add_callback: Callable[[Any], None]
    _save_checkpoint: Callable[..., None]
    policy_link: Any
    """Ours, once it is connected."""


class RolloutTrainer(Trainer, Protocol):
    """GRPO's, RLOO's and distillation's: they read their rollouts through `vllm_generation`."""

    train_dataset: Any
    eval_dataset: Any
    use_vllm: bool
    vllm_mode: str
    vllm_generation: Any
    """Read by TRL for `sync_weights` and `generate` alone; ours, once it is attached."""
    get_batch_samples: Callable[..., Any]
    """transformers': the micro-batches of one optimizer step, from the iterator of its data loader."""
    _step: int
    """Micro-batches that were trained on."""
    _last_loaded_step: int
    """TRL publishes on its own where this is not the step."""
    _metrics: MutableMapping[str, MutableMapping[str, list[float]]]
    _tokenize_prompts: Callable[[list[Any]], tuple[list[list[int]], Any]]
    _generate_and_score_completions: Callable[[Any], dict[str, Any]]
    _get_per_token_logps_and_entropies: Callable[..., tuple[torch.Tensor, Any, Any]]
    """GRPO's and RLOO's alone, as what follows: distillation has neither old logprobs nor rewards."""
    _calculate_rewards: Callable[..., torch.Tensor]
    reward_func_names: Sequence[str]
    reward_weights: torch.Tensor
    num_generations: int
    num_generations_eval: int


SET_BY_US = {"policy_link", "use_vllm", "vllm_mode", "vllm_generation", "_last_loaded_step"}
"""What `attach` puts into a trainer, beside its own methods."""
OF_SCORED = {
    *("_calculate_rewards", "_get_per_token_logps_and_entropies"),
    *("reward_func_names", "reward_weights", "num_generations", "num_generations_eval"),
}
"""What distillation lacks."""
OF_THE_RATIO = {"vllm_importance_sampling_correction", "vllm_importance_sampling_mode"}
"""What the arguments of GRPO alone have."""
READ_OF_GENERATION = {"sync_weights", "generate", "llm", "vllm_client"}
"""The last two are read in colocate mode, and by a check of TRL's own before ours is there."""
SAID_WHERE_IT_SAMPLES = (
    "self.vllm_generation.generate(",
    "self.state.global_step != self._last_loaded_step",
)
METHODS = {
    "_generate_and_score_completions": ("self", "inputs"),
    "_generate_single_turn": (),
    "_tokenize_prompts": ("self", "prompts"),
}
"""Method of a trainer -> its parameters, where they matter."""
METHODS_OF_SCORED = {
    "_calculate_rewards": ("self", "inputs", "prompts", "completions", "completion_ids_list"),
}


def generate_every(trainer: RolloutTrainer) -> int:
    """Micro-batches that one generation batch is trained on: TRL generates on every so many."""
    args = trainer.args
    per_generation = getattr(args, "steps_per_generation", None) or args.gradient_accumulation_steps
    return int(per_generation * getattr(trainer, "num_iterations", 1))
