"""Admission to the API server: holds new requests during a merged commit, counts running ones.

A request that was admitted before a commit ends before it; one that was held is looked up by name
after it. So no completion mixes two versions and a stale name gets its 404. While the server is NOT
READY every sampling request is refused. What a client does with its socket holds nobody: a request is
admitted once its body is complete, and has ended when its handler has (`admission.py`).
"""

from __future__ import annotations

import asyncio
import itertools
import time
from dataclasses import dataclass, field

from tink_rl.errors import TinkError
from tink_rl.types import PendingRequest

_MOST_SHOWN = 20
_OTHER_SPELLINGS = (b"\\u", b"\\/", b"\0")
"""What lets a name stand in a body in other bytes than its own: JSON's escapes, UTF-16."""


@dataclass(kw_only=True, eq=False)
class Arrival:
    """A request from its first byte until its handler has ended."""

    what: str = ""
    """Its method and path."""
    address: str = ""
    body: bytes | None = None
    """JSON; None: nothing in which a name can be looked for."""
    state: str = "receiving"
    """Or "held", or "running"."""
    since: float = field(default_factory=time.monotonic)
    cut: asyncio.Event = field(default_factory=asyncio.Event)
    """Set once the request must end, whatever its client wants."""

    def may_name(self, name: bytes) -> bool:
        """Whether the request may be for the model `name`; False is certain."""
        body = self.body
        return body is None or any(found in body for found in (name, *_OTHER_SPELLINGS))


class Gate:
    """State shared by the middleware and the routes; lives in the API server's event loop."""

    def __init__(self) -> None:
        self._open = asyncio.Event()
        self._open.set()
        self._changed = asyncio.Event()
        self._tickets = itertools.count(1)
        self._waiting: set[Arrival] = set()
        self._running: dict[int, Arrival] = {}
        self.last_admitted = 0.0
        """When (monotonic seconds)."""
        self.refusal: TinkError | None = None
        """Why sampling is refused, or None."""

    @property
    def num_running(self) -> int:
        """Requests that were admitted and have not ended."""
        return len(self._running)

    @property
    def is_holding(self) -> bool:
        """Whether new requests are held."""
        return not self._open.is_set()

    def arrived(self, arrival: Arrival) -> None:
        """A request has begun; `enter` or `gone` must follow."""
        self._waiting.add(arrival)

    def gone(self, arrival: Arrival) -> None:
        """A request that was not admitted is no more; one that was is fine."""
        self._waiting.discard(arrival)

    async def enter(self, arrival: Arrival | None = None) -> int:
        """Wait until the gate is open; the ticket must be given back to `leave`.

        Raises:
            TinkError: `refusal`, if set.
        """
        arrival = arrival or Arrival()
        arrival.state = "held"
        while not self._open.is_set():
            await self._open.wait()
        if self.refusal is not None:
            raise self.refusal
        ticket = next(self._tickets)
        arrival.state, self.last_admitted = "running", time.monotonic()
        self._waiting.discard(arrival)
        self._running[ticket] = arrival
        return ticket

    def leave(self, ticket: int) -> None:
        """The request of `ticket` has ended; more than once is fine."""
        self._running.pop(ticket, None)
        self._changed.set()

    def close(self) -> None:
        """Hold new requests."""
        self._open.clear()

    def open(self) -> None:
        """Admit the held requests and new ones."""
        self._open.set()

    def running(self, name: str | None = None) -> frozenset[int]:
        """Tickets of what runs now; with `name`, of those that may name that model."""
        return frozenset(
            ticket
            for ticket, arrival in self._running.items()
            if name is None or arrival.may_name(name.encode())
        )

    async def drained(self, timeout_s: float, tickets: frozenset[int] | None = None) -> bool:
        """True once none of `tickets` runs; False after `timeout_s`. None: what runs at this call."""
        tickets = self.running() if tickets is None else tickets
        try:
            async with asyncio.timeout(timeout_s):
                while not tickets.isdisjoint(self._running):
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            return False
        return True

    def cut(self) -> None:
        """End what runs: to its handler its client is gone, and whoever waits for it is told so."""
        for arrival in self._running.values():
            arrival.cut.set()

    def pending(self, *states: str) -> tuple[PendingRequest, ...]:
        """The oldest requests that have not ended, oldest first; all, or those in one of `states`."""
        everyone = (*self._waiting, *self._running.values())
        chosen = [arrival for arrival in everyone if not states or arrival.state in states]
        found, now = sorted(chosen, key=lambda arrival: arrival.since), time.monotonic()
        return tuple(
            PendingRequest(state=a.state, what=a.what, address=a.address, age_s=now - a.since)
            for a in found[:_MOST_SHOWN]
        )


GATE = Gate()
"""The gate of this API server process."""
