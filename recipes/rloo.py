"""RLOO with LoRA: GRPO's plumbing, the leave-one-out baseline, no importance ratio.

No GPU (two cores, about three minutes with the tiny base and the start of the server):

    accelerate launch --config_file accelerate_configs/cpu.yaml recipes/rloo.py \
        --config recipes/configs/digits_rloo.yaml

One GPU, a real model, the server in another terminal:

    tink-rl serve Qwen/Qwen2.5-1.5B-Instruct --max-model-len 2048
    accelerate launch --config_file accelerate_configs/gpu.yaml recipes/rloo.py \
        --task gsm8k --model_name_or_path Qwen/Qwen2.5-1.5B-Instruct \
        --vllm_server http://127.0.0.1:8000 --learning_rate 1e-5 --max_completion_length 512 \
        --per_device_train_batch_size 16 --num_generations 8 --max_steps 200
"""

from __future__ import annotations

import sys
from pathlib import Path

# `accelerate launch recipes/rloo.py` puts recipes/ on the path, not the folder that holds it.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tink_rl import placement

if __name__ == "__main__":
    placement.let_threads_sleep()  # before torch is imported

from transformers import AutoTokenizer
from trl import RLOOConfig, TrlParser

import tink_rl
from recipes.common import RecipeArguments, base_of, lora_of, server_of, train_and_save
from recipes.tasks import load_task


def main() -> None:
    """Train; prints where the run's files are."""
    recipe, config = TrlParser((RecipeArguments, RLOOConfig)).parse_args_and_config()
    base = base_of(recipe, config)
    task = load_task(recipe.task, seed=config.seed, data_path=recipe.data_path)
    with server_of(recipe, config, base) as (url, sync):
        trainer = tink_rl.RLOOTrainer(
            model=base,
            reward_funcs=task.reward,
            args=config,
            train_dataset=task.train,
            processing_class=AutoTokenizer.from_pretrained(base),
            peft_config=lora_of(recipe),
            servers=url,
            sync=sync,
        )
        train_and_save(trainer)


if __name__ == "__main__":
    main()
