"""Calls that are under way on an object, so that what they use is closed after the last of them."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

Method = TypeVar("Method", bound=Callable[..., Any])


class Calls:
    """Counts them. Thread-safe."""

    def __init__(self) -> None:
        self._count = 0
        self._changed = threading.Condition()

    @contextmanager
    def one(self) -> Iterator[None]:
        """A call, for as long as the block lasts."""
        with self._changed:
            self._count += 1
        try:
            yield
        finally:
            with self._changed:
                self._count -= 1
                self._changed.notify_all()

    def ended(self, timeout_s: float) -> bool:
        """Wait until none is under way; whether that was so within `timeout_s`."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._count, timeout_s)


def counted(method: Method) -> Method:
    """A method that counts in the `calls` of its object for as long as it runs."""

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self.calls.one():
            return method(self, *args, **kwargs)

    return cast(Method, call)
