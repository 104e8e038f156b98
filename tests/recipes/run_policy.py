"""One of the runs of `test_two_policies_learn_on_one_server`: GRPO on digits with a chosen reward."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from typing import Any

from tink_rl import placement

if __name__ == "__main__":
    placement.apply_to_trainer(placement.plan_here())

from trl import GRPOConfig, TrlParser

import tink_rl
from recipes.common import RecipeArguments, set_up, train_and_save
from recipes.tasks.digits import exact_answer


def wrong_answer(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """The opposite of the task's reward."""
    return [1.0 - right for right in exact_answer(completions, answer)]


REWARDS = {"right": exact_answer, "wrong": wrong_answer}


def main(policy: str, *arguments: str) -> None:
    """Train the policy `right` or `wrong` with the reward of that name."""
    parser = TrlParser((RecipeArguments, GRPOConfig))
    recipe, config = parser.parse_args_and_config(list(arguments))
    with ExitStack() as stack:
        setup = set_up(recipe, config, stack)
        train_and_save(
            tink_rl.GRPOTrainer(
                model=setup.model,
                reward_funcs=REWARDS[policy],
                args=config,
                train_dataset=setup.task.train,
                processing_class=setup.tokenizer,
                peft_config=setup.lora,
                servers=setup.server,
                sync=setup.sync,
            )
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
