"""Supervised fine-tuning that can be watched: the policy is served and sampled while it learns.

The tiny base sorts digits upwards. This teaches it to sort them downwards, and every few steps shows
what the policy of that step answers: `4173=` -> 1347 at first, 7431 at the end.

No GPU (two cores, about two minutes with the tiny base and the start of the server):

    python recipes/sft_live.py --config recipes/configs/digits_sft.yaml

The same callback works for any Hugging Face `Trainer` with a LoRA: `PolicySyncCallback(trainer, url)`.
"""

from __future__ import annotations

import sys
from pathlib import Path

# `accelerate launch recipes/sft_live.py` puts recipes/ on the path, not the folder that holds it.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tink_rl import placement

if __name__ == "__main__":
    placement.let_threads_sleep()  # before torch is imported

from datasets import Dataset
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer, TrlParser

import tink_rl
from recipes.common import RecipeArguments, base_of, lora_of, server_of, train_and_save
from recipes.tasks import load_task

PROMPTS = ("4173=", "9025=", "6688=")


def downwards(prompts: list[str]) -> Dataset:
    """`4173=` with the completion `7431`."""
    answers = ["".join(sorted(prompt[:-1], reverse=True)) for prompt in prompts]
    return Dataset.from_dict({"prompt": prompts, "completion": answers})


def main() -> None:
    """Train; prints samples on the way, and where the run's files are."""
    recipe, config = TrlParser((RecipeArguments, SFTConfig)).parse_args_and_config()
    base = base_of(recipe, config)
    task = load_task(recipe.task, seed=config.seed, data_path=recipe.data_path)
    with server_of(recipe, config, base) as (url, sync):
        trainer = SFTTrainer(
            model=base,
            args=config,
            train_dataset=downwards(task.train["prompt"]),
            processing_class=AutoTokenizer.from_pretrained(base),
            peft_config=lora_of(recipe),
        )
        trainer.add_callback(
            tink_rl.PolicySyncCallback(
                trainer,
                url,
                sync=sync,
                sample_prompts=PROMPTS,
                sample_every=20,
                max_tokens=8,
            )
        )
        train_and_save(trainer)


if __name__ == "__main__":
    main()
