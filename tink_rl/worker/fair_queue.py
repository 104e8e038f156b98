"""Whose turn it is: every key gets its share, however much another one asks for."""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")
_MAX_IDLE_KEYS = 1024


class FairQueue(Generic[T]):
    """Items wait by key; the key that was served least goes next (start-time fair queueing).

    A key that was idle starts level with the others: it is owed nothing for its silence. Not
    thread-safe; its owner holds a lock.
    """

    def __init__(self) -> None:
        self._waiting: dict[str, deque[tuple[T, float]]] = {}
        self._served: dict[str, float] = {}
        self._now = 0.0
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def push(self, key: str, item: T, cost: float) -> None:
        """Let `item` wait; `cost` is what it will take of its key's share."""
        if key not in self._waiting:
            self._waiting[key] = deque()
            self._served[key] = max(self._served.get(key, 0.0), self._now)
        self._waiting[key].append((item, cost))
        self._length += 1

    def peek(self) -> T | None:
        """The item whose turn it is, or None."""
        return self._waiting[self._next()][0][0] if self._length else None

    def pop(self) -> T:
        """Take the item whose turn it is.

        Raises:
            IndexError: nothing waits.
        """
        if not self._length:
            raise IndexError("nothing waits")
        key = self._next()
        item, cost = self._waiting[key].popleft()
        self._now = self._served[key]
        self._served[key] += cost
        self._taken(key)
        return item

    def remove(self, key: str, item: T) -> bool:
        """Take `item` out of turn; False if it does not wait."""
        waiting = self._waiting.get(key, deque())
        for entry in waiting:
            if entry[0] is item:
                waiting.remove(entry)
                self._taken(key)
                return True
        return False

    def items(self) -> list[T]:
        """All that wait, by key."""
        return [item for waiting in self._waiting.values() for item, _ in waiting]

    def _next(self) -> str:
        return min(self._waiting, key=self._served.__getitem__)

    def _taken(self, key: str) -> None:
        self._length -= 1
        if not self._waiting[key]:
            del self._waiting[key]
        if not self._length and len(self._served) > _MAX_IDLE_KEYS:
            self._served.clear()  # nobody waits, so nobody is owed much
            self._now = 0.0
        # A key that is level with the clock would start there anyway: forget it.
        idle = [k for k, v in self._served.items() if k not in self._waiting and v <= self._now]
        for name in idle:
            del self._served[name]
