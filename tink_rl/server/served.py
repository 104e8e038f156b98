"""The versions that can be sampled, whose they are, and since when nobody has asked for them.

A policy is its lease holder's. Without a lease it is nobody's, unless a sampling service keeps it: whoever
needs its place takes it, and after an idle time it goes (`leftovers.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from tink_rl.server.gate import Gate
from tink_rl.server.leases import Leases
from tink_rl.types import PolicyVersion, ServedPolicy, SyncMode


@dataclass(kw_only=True)
class Served:
    """A version that can be sampled."""

    name: str
    digest: str
    mode: SyncMode
    path: str = ""
    lora_id: int = 0
    writer: str = ""
    """Who published it."""
    lasting: bool = False
    """See `Lease.lasting`."""
    num_bytes: int = 0
    last_used: float = field(default_factory=time.monotonic)

    def was_used(self) -> None:
        """Somebody asked for it just now."""
        self.last_used = time.monotonic()

    @property
    def policy(self) -> str:
        """The policy that this is a version of."""
        return PolicyVersion.parse(self.name).policy


class Slots(dict[str, Any]):
    """vLLM's table of adapters by name, which says when one is looked up for a request."""

    def __init__(self, given: dict[str, Any], asked_for: Callable[[str], None]) -> None:
        super().__init__(given)
        self._asked_for = asked_for

    def __getitem__(self, name: str) -> Any:
        found = super().__getitem__(name)
        self._asked_for(name)
        return found


def owner_of(served: Served, leases: Leases) -> str | None:
    """Who publishes or keeps `served`; None: nobody."""
    lease = leases.holder(served.policy)
    if lease is not None:
        return f"writer {lease.writer!r}"
    return "a sampling service" if served.lasting else None


def served_policies(
    everything: Iterable[Served], leases: Leases, gate: Gate
) -> Iterator[ServedPolicy]:
    """What is served of each policy, by its name."""
    now = time.monotonic()
    for policy, group in groupby(sorted(everything, key=_policy), key=_policy):
        versions = list(group)
        lease, newest = leases.holder(policy), versions[-1]
        used = max(version.last_used for version in versions)
        if newest.mode is not SyncMode.ADAPTER:  # it is the base of whatever runs
            used = max(used, gate.last_admitted)
        yield ServedPolicy(
            policy=policy,
            mode=newest.mode,
            versions=tuple(version.name for version in versions),
            owner=owner_of(newest, leases),
            lease_s=None if lease is None else leases.left_s(lease),
            num_bytes=sum(version.num_bytes for version in versions),
            idle_s=now - used,
        )


def _policy(served: Served) -> str:
    return served.policy
