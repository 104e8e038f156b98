"""Accuracy of a served version on problems, sampled through the server."""

from __future__ import annotations

from typing import Any

from recipes.tasks import Task
from tink_rl import VLLMClient


def accuracy(
    client: VLLMClient,
    task: Task,
    tokenizer: Any,
    *,
    model: str,
    temperature: float,
    num_problems: int = 128,
    num_samples: int = 8,
    max_tokens: int = 8,
    seed: int = 0,
) -> float:
    """Mean reward over the first held-out problems; at temperature 0 one sample each."""
    rows = task.heldout.select(range(min(num_problems, len(task.heldout))))
    n = 1 if temperature == 0 else num_samples
    output = client.generate(
        [tokenizer(prompt)["input_ids"] for prompt in rows["prompt"]],
        n=n,
        temperature=temperature,
        max_tokens=max_tokens,
        model=model,
        generation_kwargs={"seed": seed} if temperature == 0 else None,
    )
    texts = tokenizer.batch_decode(output["completion_ids"], skip_special_tokens=True)
    rewards = task.reward(completions=texts, answer=[a for a in rows["answer"] for _ in range(n)])
    return sum(rewards) / len(rewards)
