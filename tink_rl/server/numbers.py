"""Version numbers of one server's life: each is given to one set of weights. Pure."""

from __future__ import annotations

from tink_rl.errors import VersionTaken
from tink_rl.types import PolicyVersion

_MOST_NAMES = 50_000
"""Whose digests are remembered, 200 bytes each; the highest number of a policy always is."""


class Numbers:
    """Which weights every version was given to, from the moment its commit arrived."""

    def __init__(self) -> None:
        self._last: dict[str, int] = {}
        self._digests: dict[str, str] = {}

    def last(self, policy: str) -> int:
        """Highest version of `policy` whose commit ever arrived here, or 0."""
        return self._last.get(policy, 0)

    def take(self, name: str, digest: str) -> None:
        """Give the number of `name` to the weights of `digest`, if it is theirs or nobody's.

        Version 0 is not a version of the policy but what a probe tries: it is given again and again.

        Raises:
            VersionTaken: it is others'.
        """
        version = PolicyVersion.parse(name)
        if version.version == 0:
            return
        taken = self._digests.setdefault(name, digest[:16])
        if taken != digest[:16]:
            raise VersionTaken(
                f"{name} was committed with other weights (digest {taken}, now {digest[:16]}); publish "
                f"under a number above {self.last(version.policy)}"
            )
        self._last[version.policy] = max(self.last(version.policy), version.version)
        if len(self._digests) > _MOST_NAMES:
            del self._digests[next(iter(self._digests))]
