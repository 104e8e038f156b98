"""Sort four digits: `4173=` -> `1347`. Small enough for a tiny transformer to compute exactly.

Every problem is one of the 10,000 strings of four digits; a fixed tenth of them is held out and never
seen in training, neither by the base model nor by the policy.
"""

from __future__ import annotations

import random
from typing import Any

from recipes.tasks import Task

NUM_DIGITS = 4
MAX_ANSWER_TOKENS = NUM_DIGITS + 1
"""The digits and the end-of-sequence token."""
_SPLIT_SEED = 20261124


def problems() -> tuple[list[str], list[str]]:
    """Digit strings for training and held-out ones, disjoint, in a fixed order."""
    strings = [f"{i:0{NUM_DIGITS}d}" for i in range(10**NUM_DIGITS)]
    random.Random(_SPLIT_SEED).shuffle(strings)
    cut = len(strings) // 10
    return strings[cut:], strings[:cut]


def prompt_of(digits: str) -> str:
    """`4173` -> `4173=`."""
    return f"{digits}="


def answer_of(digits: str) -> str:
    """`4173` -> `1347`."""
    return "".join(sorted(digits))


def exact_answer(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """1.0 for a completion that is the answer and nothing else, otherwise 0.0."""
    return [
        float(completion.strip() == right)
        for completion, right in zip(completions, answer, strict=True)
    ]


def load(seed: int = 0) -> Task:
    """Training problems in an order drawn from `seed`, and the held-out ones."""
    train, heldout = problems()
    random.Random(seed).shuffle(train)
    return Task(train=_dataset(train), heldout=_dataset(heldout), reward=exact_answer)


def _dataset(strings: list[str]) -> Any:
    from datasets import Dataset

    return Dataset.from_dict(
        {"prompt": [prompt_of(s) for s in strings], "answer": [answer_of(s) for s in strings]}
    )
