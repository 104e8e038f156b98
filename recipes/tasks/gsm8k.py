"""Grade-school maths (https://huggingface.co/datasets/openai/gsm8k) with an exact-answer reward."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from recipes.tasks import Task

SAMPLE = Path(__file__).parent / "data" / "gsm8k_sample.jsonl"
"""Eight problems of the same format, for tests and for a machine without the hub."""
_INSTRUCTION = "Solve the problem step by step. End with a line '#### ' and the number."
_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?")


def final_number(text: str) -> str | None:
    """The number a text ends with: after `####`, in the last `\\boxed{}`, else the last one; or None.

    >>> final_number("so 1,200 dollars. #### $1,200.00")
    '1200'
    """
    for marker in (r"####\s*([^\n]*)", r"\\boxed\{([^}]*)\}"):
        found = re.findall(marker, text)
        if found:
            text = found[-1]
            break
    numbers = _NUMBER.findall(text)
    return _normalise(numbers[-1]) if numbers else None


def _normalise(number: str) -> str:
    plain = number.replace(",", "").replace("$", "")
    return plain.rstrip("0").rstrip(".") if "." in plain else plain


def exact_answer(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """1.0 where the final number of the completion is that of the answer, otherwise 0.0."""
    return [
        float(final_number(_text(completion)) == right)
        for completion, right in zip(completions, answer, strict=True)
    ]


def _text(completion: Any) -> str:
    """Plain text, or the last message of a conversation."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def load(seed: int = 0, data_path: str | None = None) -> Task:
    """The hub's train and test splits, or one JSONL file (`question`, `answer`) for both.

    Raises:
        FileNotFoundError: `data_path` does not exist.
        ValueError: a problem's answer has no `####` line.
    """
    from datasets import load_dataset

    if data_path is None:
        raw = load_dataset("openai/gsm8k", "main")
        train, heldout = raw["train"], raw["test"]
    else:
        if not Path(data_path).is_file():
            raise FileNotFoundError(
                f"data_path {data_path!r}: no such file; expected JSONL with question and answer"
            )
        train = heldout = load_dataset("json", data_files=data_path, split="train")
    return Task(
        train=_prepare(train.shuffle(seed=seed)), heldout=_prepare(heldout), reward=exact_answer
    )


def _prepare(rows: Any) -> Any:
    return rows.map(_example, remove_columns=rows.column_names)


def _example(row: dict[str, str]) -> dict[str, Any]:
    if "####" not in row["answer"]:
        raise ValueError(f"the answer of {row['question'][:60]!r} has no '#### NUMBER' line")
    return {
        "prompt": [{"role": "user", "content": f"{row['question']}\n{_INSTRUCTION}"}],
        "answer": final_number(row["answer"]),
    }
