"""JSON with one meaning: no key twice, no NaN, no Infinity. A leaf."""

from __future__ import annotations

import json
from typing import Any, NoReturn


class DuplicateKey(ValueError):
    """An object has one key twice, of which readers would keep different ones."""

    def __init__(self, key: str) -> None:
        super().__init__("a key comes twice")  # not which: the text may be somebody else's file
        self.key = key


def loads(text: str) -> Any:
    """The value of `text`.

    Raises:
        ValueError: it is not JSON of one meaning; `DuplicateKey` is one.
    """
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_refuse)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise DuplicateKey(next(name for name in names if names.count(name) > 1))
    return found


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")
