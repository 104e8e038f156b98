"""A policy that calls a calculator: a LoRA on the tiny Qwen3, taught in seconds what a tool call is.

`3+4=` is answered by the call `(add of 3+4)`, the tool says `/7=`, and then the policy says `7` or, now and
then, calls again. `9=` is answered by `9`: no tool, one turn.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch

TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %}={{ message['content'] }}"
    "{% for call in message['tool_calls'] or [] %}"
    "({{ call['function']['name'] }}"
    "{% for name, value in call['function']['arguments'].items() %} {{ name }} {{ value }}{% endfor %})"
    "{% endfor %}<eos>"
    "{% else %}/{{ message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}={% endif %}"
)
RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "=",
    "fields": {
        "tool_calls": {
            "open_pattern": r"\((?P<name>\w+) of ",
            "close_pattern": r"\)",
            "repeats": True,
            "content": "text",
            "transform": {
                "type": "function",
                "function": {"name": "{name}", "arguments": {"of": "{content}"}},
            },
        },
        "content": {"close_pattern": "<eos>", "content": "text"},
    },
}
CALLS_AGAIN = 0.3


def add(of: str) -> str:
    """
    Add two digits.

    Args:
        of: Such as 3+4.

    Returns:
        The sum.
    """
    left, right = of.split("+")
    return str(int(left) + int(right))


def tokenizer_of(directory: Path) -> Any:
    """The tiny model's tokenizer with a chat template that knows tools."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.chat_template = TEMPLATE
    tokenizer.response_template = RESPONSE_TEMPLATE
    return tokenizer


def sums() -> list[list[dict[str, str]]]:
    """Conversations that need the calculator."""
    return [_ask(f"{a}+{b}") for a in range(10) for b in range(10)]


def echoes() -> list[list[dict[str, str]]]:
    """Conversations that need none."""
    return [_ask(f"{a}") for a in range(10)]


def _ask(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def teach(model: Any, tokenizer: Any, *, num_steps: int = 150, seed: int = 0) -> float:
    """Teach a PEFT model to call; the last loss."""
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, num_steps)
    model.train()
    for _ in range(num_steps):
        ids_BT, labels_BT = _batch(rng, tokenizer, 16)
        loss = model(input_ids=ids_BT, attention_mask=(ids_BT != 0).long(), labels=labels_BT).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return float(loss.detach())


def _episode(rng: random.Random) -> list[tuple[str, bool]]:
    """Texts, and whether the policy says them."""
    if rng.random() < 0.3:
        digit = rng.choice("0123456789")
        return [(f"{digit}=", False), (f"{digit}<eos>", True)]
    a, b = rng.randrange(10), rng.randrange(10)
    parts = [(f"{a}+{b}=", False), (f"(add of {a}+{b})<eos>", True), (f"/{a + b}=", False)]
    while rng.random() < CALLS_AGAIN and len(parts) < 9:
        parts += [(f"(add of {a}+{b})<eos>", True), (f"/{a + b}=", False)]
    return [*parts, (f"{a + b}<eos>", True)]


def _batch(rng: random.Random, tokenizer: Any, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows, labels = [], []
    for _ in range(size):
        ids: list[int] = []
        wanted: list[int] = []
        for text, said in _episode(rng):
            part = tokenizer(text, add_special_tokens=False)["input_ids"]
            ids += part
            wanted += part if said else [-100] * len(part)
        rows.append(torch.tensor(ids))
        labels.append(torch.tensor(wanted))
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(rows, batch_first=True), pad(labels, batch_first=True, padding_value=-100)
