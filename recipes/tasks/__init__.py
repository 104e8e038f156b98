"""Tasks: prompts, answers and a reward, by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol


class Reward(Protocol):
    """A TRL reward function: one number per completion."""

    __name__: str

    def __call__(self, completions: list[Any], answer: list[str], **_: Any) -> list[float]: ...


@dataclass(frozen=True, kw_only=True)
class Task:
    """`train` and `heldout` are `datasets.Dataset` with the columns `prompt` and `answer`."""

    train: Any
    heldout: Any
    reward: Reward


TASKS = ("digits", "gsm8k")


def load_task(name: str, *, seed: int = 0, data_path: str | None = None) -> Task:
    """The task `name`.

    Args:
        name: One of `TASKS`.
        seed: Order of the training problems.
        data_path: gsm8k only: a JSONL file instead of the hub's dataset.

    Raises:
        ValueError: no task has this name.
    """
    if name == "digits":
        from recipes.tasks import digits

        return digits.load(seed)
    if name == "gsm8k":
        from recipes.tasks import gsm8k

        return gsm8k.load(seed, data_path)
    raise ValueError(f"task {name!r}: expected one of {', '.join(TASKS)}; set --task")
