"""One publisher per live model in this process."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

from tink_rl.errors import SecondPublisher

if TYPE_CHECKING:
    from tink_rl.publish.versions import Versions

_OWNERS: weakref.WeakValueDictionary[int, Versions] = weakref.WeakValueDictionary()
"""By `id(model)`: the versions that are published of it, which live as long as their publisher."""


def claim(model: object, versions: Versions) -> None:
    """Say that `versions` are the one policy that is published of `model`.

    Raises:
        SecondPublisher: it has another publisher.
    """
    other = _OWNERS.get(id(model))
    if other is not None and other is not versions:
        raise SecondPublisher(
            f"this model is already published as policy {other.policy!r}; use one trainer, "
            "callback or attach() per model, or close() the other one"
        )
    _OWNERS[id(model)] = versions


def release(versions: Versions) -> None:
    """Let the models of `versions` have another publisher."""
    for key in [key for key, other in _OWNERS.items() if other is versions]:
        del _OWNERS[key]
