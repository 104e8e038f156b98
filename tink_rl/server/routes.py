"""The control routes under `/tink/v1/`, behind our own bearer token; `protocol.py` has their messages."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute

from tink_rl import protocol
from tink_rl.errors import BadRequest, BadToken, NotReady, TinkError
from tink_rl.protocol import PREFIX, Empty, LayoutAnswer, Message, Route
from tink_rl.server.commits import Commits
from tink_rl.server.content import ServedContent
from tink_rl.server.stages import Stages
from tink_rl.server.state import ServedState
from tink_rl.server.updates import FullUpdates
from tink_rl.server.writers import Writers
from tink_rl.types import ServerStatus

_MAX_JSON_BYTES = 64 * 2**20
_MAX_CHUNK_BYTES = 64 * 2**20
Q = TypeVar("Q", bound=Message)
A = TypeVar("A", bound=Message)


@dataclass(frozen=True, kw_only=True)
class Control:
    """What the control routes speak to."""

    state: ServedState
    content: ServedContent
    updates: FullUpdates
    stages: Stages
    commits: Commits
    writers: Writers


class _Answering(APIRoute):
    """Answers an error of ours in its form on the wire; any other exception is vLLM's to answer, with 500."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """What FastAPI calls."""
        handle = super().get_route_handler()

        async def answer(request: Request) -> Response:
            try:
                return await handle(request)
            except RequestValidationError as wrong:
                error: TinkError = BadRequest(f"{request.url.path}: {wrong.errors()}"[:500])
            except TinkError as refused:
                error = refused
            return JSONResponse(error.to_wire(), status_code=error.status)

        return answer


def authorised(request: Request) -> Control:
    """The server that a request with our token speaks to; a dependency, before the body is read.

    Raises:
        BadToken: the token is missing or another one.
        NotReady: the server is not prepared yet.
    """
    given, state = request.headers.get("authorization", ""), request.app.state
    scheme, _, value = given.partition(" ")
    token: str = state.tink_token
    if scheme.lower() != "bearer" or not hmac.compare_digest(value.encode(), token.encode()):
        raise BadToken(
            "the bearer token of this request is missing or wrong; give the server's token file "
            "with SyncConfig(token_file=...), --token_file or TINK_TOKEN_FILE"
        )
    found: Control | None = getattr(state, "tink", None)
    if found is None:
        raise NotReady("the server is still preparing its workers")
    return found


Authorised = Annotated[Control, Depends(authorised)]
router = APIRouter(prefix=PREFIX, route_class=_Answering)


@router.get("/status")
async def status(control: Authorised) -> ServerStatus:
    """What a server says of itself."""
    return control.state.status()


@router.get("/layout")
async def layout(control: Authorised) -> LayoutAnswer:
    """Which tensors a full update must send together."""
    return await control.updates.layout()


@router.post("/stage/{stage_id:path}/chunk")
async def chunk(request: Request, stage_id: str, offset: int, control: Authorised) -> Empty:
    """Bytes of a packet."""
    return await control.stages.chunk(stage_id, offset, await _body(request, _MAX_CHUNK_BYTES))


def _post(route: Route[Q, A], handler: Callable[[Control], Callable[[Q], Awaitable[A]]]) -> None:
    async def answer(request: Request, control: Authorised) -> Response:
        message = route.request.read(await _body(request, _MAX_JSON_BYTES))
        answered = await handler(control)(message)
        return Response(answered.to_json(), media_type="application/json")

    router.add_api_route(f"/{route.action}", answer, methods=["POST"], name=f"tink_{route.action}")


_post(protocol.JOIN, lambda control: control.writers.join)
_post(protocol.JOINED, lambda control: control.writers.joined)
_post(protocol.HEARTBEAT, lambda control: control.writers.heartbeat)
_post(protocol.LEAVE, lambda control: control.writers.leave)
_post(protocol.STAGE, lambda control: control.stages.stage)
_post(protocol.STAGED, lambda control: control.stages.staged)
_post(protocol.DISCARD, lambda control: control.stages.discard)
_post(protocol.COMMIT, lambda control: control.commits.commit)
_post(protocol.DROP, lambda control: control.commits.drop)
_post(protocol.BEGIN, lambda control: control.updates.begin)
_post(protocol.FINISH, lambda control: control.updates.finish)
_post(protocol.ABORT, lambda control: control.updates.end)
_post(protocol.BASE, lambda control: control.content.ask)
_post(protocol.FORGET_PREFIXES, lambda control: control.state.forget_prefixes)


async def _body(request: Request, limit: int) -> bytes:
    if int(request.headers.get("content-length") or 0) > limit:
        raise BadRequest(f"the body exceeds {limit} bytes")
    return await request.body()
