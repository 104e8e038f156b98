"""Admission to the API server: holds new requests during a merged commit, counts running ones.

A request that was admitted before a commit ends before it; one that was held is looked up by name
after it. So no completion mixes two versions and a stale name gets its 404. While the server is NOT
READY every sampling request is refused.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from typing import Any

from tink_rl.errors import TinkError

_OPEN_PREFIX = "/tink/"


class Gate:
    """State shared by the middleware and the routes; lives in the API server's event loop."""

    def __init__(self) -> None:
        self._open = asyncio.Event()
        self._open.set()
        self._changed = asyncio.Event()
        self._tickets = itertools.count(1)
        self._running: set[int] = set()
        self._last_ticket = 0
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

    async def enter(self) -> int:
        """Wait until the gate is open; the ticket must be given back to `leave`.

        Raises:
            TinkError: `refusal`, if set.
        """
        while not self._open.is_set():
            await self._open.wait()
        if self.refusal is not None:
            raise self.refusal
        ticket = self._last_ticket = next(self._tickets)
        self._running.add(ticket)
        return ticket

    def leave(self, ticket: int) -> None:
        """The request of `ticket` has ended."""
        self._running.discard(ticket)
        self._changed.set()

    def close(self) -> None:
        """Hold new requests."""
        self._open.clear()

    def open(self) -> None:
        """Admit the held requests and new ones."""
        self._open.set()

    @property
    def last_ticket(self) -> int:
        """Of the request that was admitted last."""
        return self._last_ticket

    async def drained(self, timeout_s: float, last: int | None = None) -> bool:
        """True once nothing runs that was admitted up to the ticket `last`; False after `timeout_s`.

        Without `last`: that was admitted before this call.
        """
        last = self._last_ticket if last is None else last
        try:
            async with asyncio.timeout(timeout_s):
                while any(ticket <= last for ticket in self._running):
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            return False
        return True


GATE = Gate()
"""The gate of this API server process."""


class GateMiddleware:
    """ASGI middleware: every POST outside `/tink/` passes the gate."""

    def __init__(self, app: Any, gate: Gate = GATE) -> None:
        self.app = app
        self.gate = gate

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Handle one request."""
        guarded = scope["type"] == "websocket" or (
            scope["type"] == "http" and scope["method"] == "POST"
        )
        if not guarded or scope["path"].startswith(_OPEN_PREFIX):
            await self.app(scope, receive, send)
            return
        try:
            ticket = await self.gate.enter()
        except TinkError as error:
            await _refuse(error, scope, send)
            return
        try:
            await self.app(scope, receive, send)
        finally:
            self.gate.leave(ticket)


async def _refuse(error: TinkError, scope: Any, send: Any) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1013, "reason": error.code})
        return
    body = json.dumps(error.to_wire()).encode()
    headers = [(b"content-type", b"application/json"), (b"retry-after", b"1")]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
