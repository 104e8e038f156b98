"""Who may publish which policy: one writer per name, fenced by an epoch that only grows. Pure."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass

from tink_rl.errors import LeaseHeld, StaleEpoch

LEASE_S = 15.0


@dataclass(kw_only=True)
class Lease:
    """The right of one writer to publish one policy until `expires` (monotonic seconds)."""

    policy: str
    writer: str
    epoch: int
    expires: float
    lasting: bool = False
    """What is published under it belongs to its writer afterwards too: a sampling service's adapters."""


class Leases:
    """All leases of one server."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        # Above those of an earlier life of the server, whose writers may still be there.
        self._epochs = itertools.count(time.time_ns() // 1_000_000)
        self._leases: dict[str, Lease] = {}

    def take(
        self, policy: str, writer: str, *, lasting: bool = False
    ) -> tuple[Lease, Lease | None]:
        """A lease with a fresh epoch, and the one that it replaces (whose channel must be closed).

        Raises:
            LeaseHeld: another writer's lease has not expired.
        """
        old = self._leases.get(policy)
        if old is not None and old.writer != writer and old.expires > self._clock():
            left = old.expires - self._clock()
            raise LeaseHeld(
                f"policy {policy!r} is published by writer {old.writer!r} (its lease ends in "
                f"{left:.0f} s unless renewed); stop that run, or choose another name with "
                "SyncConfig(policy=...)",
                writer=old.writer,
                expires_in_s=left,
            )
        lease = Lease(
            policy=policy,
            writer=writer,
            epoch=next(self._epochs),
            expires=self._clock() + LEASE_S,
            lasting=lasting,
        )
        self._leases[policy] = lease
        return lease, old

    def check(self, policy: str, epoch: int) -> Lease:
        """Renew and give the lease of `policy`.

        Raises:
            StaleEpoch: `epoch` is not the current one.
        """
        lease = self._leases.get(policy)
        if lease is None or lease.epoch != epoch:
            raise StaleEpoch(
                f"channel {epoch} of policy {policy!r} was closed or replaced by "
                f"{lease.epoch if lease else 'none'}; join again"
            )
        lease.expires = self._clock() + LEASE_S
        return lease

    def holds(self, policy: str, epoch: int) -> bool:
        """Whether the lease of `epoch` is the current one and has not expired."""
        lease = self._leases.get(policy)
        return lease is not None and lease.epoch == epoch and lease.expires > self._clock()

    def holder(self, policy: str) -> Lease | None:
        """The lease of `policy`, if it has not expired."""
        lease = self._leases.get(policy)
        return lease if lease is not None and lease.expires > self._clock() else None

    def left_s(self, lease: Lease) -> float:
        """Seconds until `lease` expires unless it is renewed."""
        return lease.expires - self._clock()

    def release(self, policy: str, epoch: int) -> None:
        """End the lease, if it is still this one."""
        lease = self._leases.get(policy)
        if lease is not None and lease.epoch == epoch:
            del self._leases[policy]
