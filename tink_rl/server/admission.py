"""The ASGI middleware in front of every POST that is not ours: what a request is to the gate.

It counts from the last byte of its body to the end of its handler, so that neither a client that sends
half a body nor one that does not read its answer is waited for.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

from tink_rl.errors import BadRequest, EngineUnavailable, TinkError
from tink_rl.server.gate import GATE, Arrival, Gate

_OPEN_PREFIX = "/tink/"
_BODY_S = 60.0
"""A body must be complete after so long."""


class _ClientLeft(Exception):
    """Before its body was complete: there is nobody to answer."""


class GateMiddleware:
    """ASGI middleware: every POST outside `/tink/` passes the gate."""

    def __init__(self, app: Any, gate: Gate = GATE, body_s: float = _BODY_S) -> None:
        self.app, self.gate, self.body_s = app, gate, body_s

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Handle one request."""
        guarded = scope["type"] == "websocket" or (
            scope["type"] == "http" and scope["method"] == "POST"
        )
        if not guarded or scope["path"].startswith(_OPEN_PREFIX):
            await self.app(scope, receive, send)
            return
        arrival = Arrival(
            what=f"{scope.get('method', 'websocket')} {scope['path']}",
            address=":".join(map(str, scope.get("client") or ("unknown",))),
        )
        self.gate.arrived(arrival)
        try:
            body = None if scope["type"] == "websocket" else await self._body(receive)
            arrival.body = body if _is_json(scope) else None
            ticket = await self.gate.enter(arrival)
        except _ClientLeft:
            return
        except TinkError as error:
            await _refuse(error, scope, send)
            return
        finally:
            self.gate.gone(arrival)
        answer = _Answer(send, arrival, ended=lambda: self.gate.leave(ticket))
        try:
            await self.app(scope, _receiver(scope, receive, body, arrival), answer)
        finally:
            self.gate.leave(ticket)
            await answer.sent()
        if arrival.cut.is_set() and not answer.is_begun:
            ended = "this request was ended for a weight update (on_running='abort'); try again"
            await _refuse(EngineUnavailable(ended), scope, send)

    async def _body(self, receive: Any) -> bytes:
        """The whole body.

        Raises:
            BadRequest: it did not come in time.
        """
        parts: list[bytes] = []
        more = True
        try:
            async with asyncio.timeout(self.body_s):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _ClientLeft
                    parts.append(message.get("body", b""))
                    more = message.get("more_body", False)
        except TimeoutError as error:
            raise BadRequest(
                f"the body was not complete after {self.body_s:g} s, {sum(map(len, parts))} bytes came; "
                "send it whole",
                code="body_timeout",
            ) from error
        return b"".join(parts)


class _Answer:
    """What a handler sends, on its way to the client.

    An answer whose length is known has its end with it. Parts of a longer one wait here for a client that
    reads slowly, and the handler goes on: it ends when the engine has, not when the client has read.
    """

    def __init__(self, send: Any, arrival: Arrival, ended: Callable[[], None]) -> None:
        self._send, self._arrival, self._ended = send, arrival, ended
        self._parts: asyncio.Queue[Any] = asyncio.Queue()
        self._sender: asyncio.Task[None] | None = None
        self.is_begun = False

    async def __call__(self, message: Any) -> None:
        """What ASGI calls `send`."""
        if not self.is_begun and self._arrival.cut.is_set():
            return  # what a handler says whose client is gone
        if message["type"] == "http.response.start":
            if any(name.lower() == b"content-length" for name, _ in message.get("headers", ())):
                self._ended()
            else:
                self._sender = asyncio.create_task(self._send_parts())
        self.is_begun = True
        if self._sender is None:
            await self._send(message)
            return
        self._parts.put_nowait(message)
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self._ended()

    async def _send_parts(self) -> None:
        while (message := await self._parts.get()) is not None:
            await self._send(message)

    async def sent(self) -> None:
        """Wait until the client has what the handler sent."""
        if self._sender is not None:
            self._parts.put_nowait(None)
            await self._sender


def _receiver(scope: Any, receive: Any, body: bytes | None, arrival: Arrival) -> Any:
    """What ASGI calls `receive`, for the handler: the body, then whatever comes; once cut, the end.

    vLLM's handlers end what they began in the engine when their client leaves, and only then.
    """
    kind = scope["type"]
    waiting = [] if body is None else [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> Any:
        if waiting:
            return waiting.pop()
        coming, cut = (asyncio.ensure_future(w) for w in (receive(), arrival.cut.wait()))
        try:
            await asyncio.wait({coming, cut}, return_when=asyncio.FIRST_COMPLETED)
            gone = {"type": f"{kind}.disconnect", "code": 1013}
            return gone if cut.done() else coming.result()
        finally:
            coming.cancel()
            cut.cancel()

    return next_message


def _is_json(scope: Any) -> bool:
    kinds = [value for name, value in scope.get("headers", ()) if name.lower() == b"content-type"]
    return len(kinds) == 1 and kinds[0].partition(b";")[0].strip().lower() == b"application/json"


async def _refuse(error: TinkError, scope: Any, send: Any) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1013, "reason": error.code})
        return
    body = json.dumps(error.to_wire()).encode()
    headers = [(b"content-type", b"application/json"), (b"retry-after", b"1")]
    if error.code == "body_timeout":  # what is left of it is no new request
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
