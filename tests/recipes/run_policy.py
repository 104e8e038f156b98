"""One of the runs of `test_two_policies_learn_on_one_server`: GRPO on digits with a chosen reward."""

from __future__ import annotations

import sys
from typing import Any

from transformers import AutoTokenizer
from trl import GRPOConfig, TrlParser

import tink_rl
from recipes.common import RecipeArguments, base_of, lora_of, server_of, train_and_save
from recipes.tasks import digits
from recipes.tasks.digits import exact_answer


def wrong_answer(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """The opposite of the task's reward."""
    return [1.0 - right for right in exact_answer(completions, answer)]


REWARDS = {"right": exact_answer, "wrong": wrong_answer}


def main(policy: str, *arguments: str) -> None:
    """Train the policy `right` or `wrong` with the reward of that name."""
    parser = TrlParser((RecipeArguments, GRPOConfig))
    recipe, config = parser.parse_args_and_config(list(arguments))
    base = base_of(recipe, config)
    with server_of(recipe, config, base) as (url, sync):
        train_and_save(
            tink_rl.GRPOTrainer(
                model=base,
                reward_funcs=REWARDS[policy],
                args=config,
                train_dataset=digits.load(config.seed).train,
                processing_class=AutoTokenizer.from_pretrained(base),
                peft_config=lora_of(recipe),
                servers=url,
                sync=sync,
            )
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
