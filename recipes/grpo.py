"""GRPO with LoRA; rollouts from a vLLM server that always holds the current policy.

No GPU (two cores, about three minutes with the tiny base and the start of the server):

    accelerate launch --config_file accelerate_configs/cpu.yaml recipes/grpo.py \
        --config recipes/configs/digits.yaml

One GPU, a real model, the server in another terminal:

    tink-rl serve Qwen/Qwen2.5-1.5B-Instruct --max-model-len 2048
    accelerate launch --config_file accelerate_configs/gpu.yaml recipes/grpo.py \
        --task gsm8k --model_name_or_path Qwen/Qwen2.5-1.5B-Instruct \
        --vllm_server http://127.0.0.1:8000 --learning_rate 1e-5 --max_completion_length 512 \
        --per_device_train_batch_size 16 --num_generations 8 --max_steps 200

LoRA defaults follow "LoRA Without Regret" (https://thinkingmachines.ai/blog/lora): all linear layers,
alpha 32, no dropout, and about ten times the learning rate of full fine-tuning.
"""

from __future__ import annotations

import logging
import os
import sys
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

# `accelerate launch recipes/grpo.py` puts recipes/ on the path, not the folder that holds it.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tink_rl import placement

if __name__ == "__main__":
    placement.apply_to_trainer(placement.plan_here())  # before torch is imported

from accelerate.utils import broadcast_object_list
from peft import LoraConfig
from transformers import AutoTokenizer
from trl import GRPOConfig, TrlParser

import tink_rl
from recipes.tasks import TASKS, load_task
from recipes.tiny_base import ensure_tiny_base
from tink_rl.cli import show_wait


@dataclass
class RecipeArguments:
    """What this recipe adds to TRL's `GRPOConfig`."""

    task: str = field(default="digits", metadata={"help": f"One of {', '.join(TASKS)}."})
    data_path: str | None = field(default=None, metadata={"help": "gsm8k: a JSONL file to use."})
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "The base; default: the tiny base, trained on first use."}
    )
    dtype: str = field(
        default="auto", metadata={"help": "Of the trainer's base; tiny base: float32."}
    )
    lora_r: int = field(default=16, metadata={"help": "LoRA rank."})
    lora_alpha: int = field(default=32, metadata={"help": "LoRA alpha."})
    lora_target_modules: str = field(
        default="all-linear", metadata={"help": "all-linear, or module names joined by commas."}
    )
    vllm_server: str = field(
        default="auto",
        metadata={"help": "URL of a running server; auto: start one, stop it at the end."},
    )
    server_mode: str = field(
        default="both", metadata={"help": "auto server: merged, adapter or both."}
    )
    server_max_model_len: int = field(default=0, metadata={"help": "auto server; 0: the model's."})
    sync_mode: str = field(default="auto", metadata={"help": "merged, adapter or auto."})
    policy: str = field(default="policy", metadata={"help": "Name of the policy on the server."})
    token_file: str | None = field(default=None, metadata={"help": "Token of the control routes."})


def main() -> None:
    """Train; prints where the run's files are."""
    recipe, config = TrlParser((RecipeArguments, GRPOConfig)).parse_args_and_config()
    if "WANDB_API_KEY" not in os.environ and not Path("~/.netrc").expanduser().exists():
        os.environ.setdefault("WANDB_MODE", "offline")  # logged out: keep the run on disk
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("tink_rl").setLevel(logging.INFO)
    with ExitStack() as stack:
        model = recipe.model_name_or_path or _tiny_base(config)
        trainer = tink_rl.GRPOTrainer(
            model=model,
            reward_funcs=(
                task := load_task(recipe.task, seed=config.seed, data_path=recipe.data_path)
            ).reward,
            args=_with_dtype(config, recipe),
            train_dataset=task.train,
            processing_class=AutoTokenizer.from_pretrained(model),
            peft_config=_lora(recipe),
            servers=_server(recipe, config, model, stack),
            sync=tink_rl.SyncConfig(
                mode=recipe.sync_mode, policy=recipe.policy, token_file=recipe.token_file
            ),
        )
        trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
        trainer.save_model()
        trainer.save_state()
        if trainer.accelerator.is_main_process:
            trainer.policy_link.save(config.output_dir)
            print(f"adapter, log and version of the last policy: {config.output_dir}")


def _lora(recipe: RecipeArguments) -> LoraConfig:
    names = recipe.lora_target_modules
    return LoraConfig(
        r=recipe.lora_r,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=0.0,
        target_modules=names if names == "all-linear" else names.split(","),
        task_type="CAUSAL_LM",
    )


def _with_dtype(config: GRPOConfig, recipe: RecipeArguments) -> GRPOConfig:
    dtype = "float32" if recipe.model_name_or_path is None else recipe.dtype
    config.model_init_kwargs = {"dtype": dtype, **(config.model_init_kwargs or {})}
    return config


def _tiny_base(config: GRPOConfig) -> str:
    with config.main_process_first(desc="training the tiny base"):
        return str(ensure_tiny_base())


def _server(recipe: RecipeArguments, config: GRPOConfig, model: str, stack: ExitStack) -> str:
    """URL of the server; rank 0 starts a managed one, which the stack stops."""
    url = [recipe.vllm_server]
    if recipe.vllm_server == "auto" and config.process_index == 0:
        server = tink_rl.VLLMServer(
            model,
            mode=recipe.server_mode,
            dtype="float32" if recipe.model_name_or_path is None else "auto",
            max_model_len=recipe.server_max_model_len or None,
            token_file=recipe.token_file,
            shared_with_trainer=True,
            log_file=str(Path(config.output_dir) / "vllm.log"),
            on_wait=show_wait,
        )
        url = [stack.enter_context(server).url]
    if config.world_size > 1:
        broadcast_object_list(url, from_process=0)
    return url[0]


if __name__ == "__main__":
    main()
