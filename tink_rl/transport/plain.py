"""Numbers, arrays and tensors of numpy and torch as JSON has them: numbers and lists."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def plain(value: Any) -> Any:
    """`value` with what numpy and torch made in it as plain numbers and lists, at any depth.

    Whether it is what a field takes is for others to say: a tensor of floats becomes floats.
    """
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)) and set(map(type, value)) - {int, str}:
        return [plain(item) for item in value]
    return value
