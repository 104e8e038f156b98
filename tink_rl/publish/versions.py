"""Numbers and names of one policy's versions: which comes next, and which stay served. Pure.

A number is taken when its commit is sent, whatever is heard of it: it is never given to other weights.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable


class Versions:
    """The versions of one policy, as its publisher knows them."""

    def __init__(self, policy: str, *, keep: int) -> None:
        """Nothing was published yet.

        Args:
            policy: Its name.
            keep: How many versions stay served side by side, where slots hold them.
        """
        self.policy, self._keep = policy, keep
        self.last = 0
        """The highest number whose commit was ever sent, whatever became of it."""
        self.kept: list[str] = []
        """Slot versions that may be served, the oldest first."""
        self.pinned: str | None = None
        """A version that stays served beyond `keep`, because a rollout goes on with it."""

    def name(self, number: int) -> str:
        """`policy@number`."""
        return f"{self.policy}@{number}"

    def next(self, known_to_servers: Iterable[int]) -> int:
        """A number above all that were taken, here or by an earlier publisher."""
        return max(self.last, *known_to_servers) + 1

    def take(self, number: int) -> None:
        """Never give `number` to other weights: its commit is being sent."""
        self.last = max(self.last, number)

    def superseded(self) -> list[str]:
        """What the next commit may drop.

        Not the current version, which stays until the next is proven, nor one that a rollout goes on
        with.
        """
        old = self.kept[: -max(1, self._keep - 1)]
        return [name for name in old if name != self.pinned]

    def add(self, name: str) -> list[str]:
        """Keep `name` as the newest; what is to be dropped for it."""
        self.kept.append(name)
        old = [other for other in self.kept[: -self._keep] if other != self.pinned]
        self.discard(old)
        return old

    def add_uncertain(self, name: str) -> None:
        """Keep `name`, which may be served, as the first that a later commit drops."""
        self.kept.insert(0, name)

    def discard(self, names: Collection[str]) -> None:
        """These are served no more."""
        self.kept = [name for name in self.kept if name not in names]
