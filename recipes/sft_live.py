"""Supervised fine-tuning that can be watched: the policy is served and sampled while it learns.

The tiny base sorts digits upwards. This teaches it to sort them downwards, and every few steps shows
what the policy of that step answers: `4173=` -> 1347 at first, 7431 at the end.

No GPU (two cores, about two minutes with the tiny base and the start of the server):

    python recipes/sft_live.py --config recipes/configs/digits_sft.yaml

The same callback works for any Hugging Face `Trainer` with a LoRA: `PolicySyncCallback(trainer, url)`.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path

# `accelerate launch recipes/sft_live.py` puts recipes/ on the path, not the folder that holds it.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tink_rl import placement

if __name__ == "__main__":
    placement.apply_to_trainer(placement.plan_here())  # before torch is imported

from datasets import Dataset
from trl import SFTConfig, SFTTrainer, TrlParser

import tink_rl
from recipes.common import RecipeArguments, set_up, train_and_save

PROMPTS = ("4173=", "9025=", "6688=")


def downwards(prompts: list[str]) -> Dataset:
    """`4173=` with the completion `7431`."""
    answers = ["".join(sorted(prompt[:-1], reverse=True)) for prompt in prompts]
    return Dataset.from_dict({"prompt": prompts, "completion": answers})


def main() -> None:
    """Train; prints samples on the way, and where the run's files are."""
    recipe, config = TrlParser((RecipeArguments, SFTConfig)).parse_args_and_config()
    with ExitStack() as stack:
        setup = set_up(recipe, config, stack)
        trainer = SFTTrainer(
            model=setup.model,
            args=config,
            train_dataset=downwards(setup.task.train["prompt"]),
            processing_class=setup.tokenizer,
            peft_config=setup.lora,
        )
        trainer.add_callback(
            tink_rl.PolicySyncCallback(
                trainer,
                setup.server,
                sync=setup.sync,
                sample_prompts=PROMPTS,
                sample_every=20,
                max_tokens=8,
            )
        )
        train_and_save(trainer)


if __name__ == "__main__":
    main()
