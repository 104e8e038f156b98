"""Tasks: prompts, answers and a reward, by name."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


class Reward(Protocol):
    """A TRL reward function: one number per completion, from it and the columns of its row."""

    __name__: str

    def __call__(self, completions: list[Any], **columns: Any) -> list[float]: ...


@dataclass(frozen=True, kw_only=True)
class Task:
    """`train` and `heldout` are `datasets.Dataset` with a column `prompt`; the reward gets the others."""

    train: Any
    reward: Reward
    heldout: Any = None


TASKS = ("digits", "gsm8k")


def load_task(name: str, *, seed: int = 0, data_path: str | None = None) -> Task:
    """The task `name`.

    Args:
        name: One of `TASKS`, or a Python file with `load(seed) -> Task`.
        seed: Order of the training problems.
        data_path: gsm8k only: a JSONL file instead of the hub's dataset.

    Raises:
        ValueError: no task has this name, or the file gives none.
    """
    if name.endswith(".py"):
        return _from_file(Path(name), seed)
    if name == "digits":
        from recipes.tasks import digits

        return digits.load(seed)
    if name == "gsm8k":
        from recipes.tasks import gsm8k

        return gsm8k.load(seed, data_path)
    raise ValueError(
        f"task {name!r}: expected one of {', '.join(TASKS)}, or a file FILE.py; set --task"
    )


def _from_file(path: Path, seed: int) -> Task:
    if not path.is_file():
        raise ValueError(f"--task {path}: no such file; give the path of a Python file")
    spec = importlib.util.spec_from_file_location(f"tink_task_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    load = getattr(module, "load", None)
    task = load(seed) if callable(load) else None
    if not isinstance(task, Task):
        raise ValueError(f"--task {path}: expected a function load(seed) that returns a Task")
    return task
