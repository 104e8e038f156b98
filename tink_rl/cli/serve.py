"""`tink-rl serve`: stock vLLM with the plugin."""

from __future__ import annotations

import argparse
import signal
import threading
from collections.abc import Sequence
from dataclasses import fields

from tink_rl.cli.console import say, show_wait
from tink_rl.errors import ConfigError
from tink_rl.gpus import visible_gpus
from tink_rl.launch import VLLMServer
from tink_rl.loopback import is_loopback
from tink_rl.serve_options import ServerOptions
from tink_rl.settings import Settings

_VARIABLES = {
    "port": "vllm_port",
    "max_lora_rank": "vllm_max_lora_rank",
    "max_loras": "vllm_max_loras",
    "channel_port": "vllm_group_port",
}
"""Settings that stand in for a flag that is not given."""


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to `commands`."""
    serve = commands.add_parser(
        "serve",
        help="start vLLM with the plugin",
        description="Start stock vLLM with the tink_rl plugin. Flags that are not listed here are "
        "passed on to vLLM. VLLM_PORT, VLLM_GROUP_PORT, VLLM_MAX_LORAS and VLLM_MAX_LORA_RANK are "
        "defaults, so that one set of variables configures server and clients.",
        allow_abbrev=False,
    )
    serve.add_argument("model", help="model directory or hub id (--model MODEL does as well)")
    serve.add_argument("--revision", help="branch, tag or commit of a hub id")
    serve.add_argument(
        "--subfolder", default="", help="of the model in its directory or repository"
    )
    serve.add_argument("--mode", default="both", help="merged, adapter, both (default) or full")
    serve.add_argument("--host", default="127.0.0.1")
    serve.add_argument("--port", type=int, help="default: VLLM_PORT, else 8000")
    serve.add_argument("--dtype", default="auto")
    serve.add_argument("--max-model-len", type=int)
    serve.add_argument("--max-lora-rank", type=int, help="default: VLLM_MAX_LORA_RANK, else 32")
    serve.add_argument("--max-loras", type=int, help="default: VLLM_MAX_LORAS, else 4")
    serve.add_argument("--enable-lora", action="store_true", help="mode adapter and both do anyway")
    serve.add_argument("--max-cpu-loras", type=int)
    serve.add_argument("--tensor-parallel-size", "-tp", type=int, default=1)
    serve.add_argument(
        "--gpu-memory-utilization",
        type=float,
        help="share of the GPU; default: 0.45, which leaves a trainer the rest; with --alone 0.92",
    )
    serve.add_argument(
        "--alone",
        dest="shared_with_trainer",
        action="store_false",
        help="no trainer on this GPU (or, without one, on this machine): take all of it",
    )
    serve.add_argument(
        "--token-file", help="token of the control routes; made if it does not exist"
    )
    serve.add_argument(
        "--golden-budget-gib", type=float, help="merged: memory for the base weights"
    )
    serve.add_argument("--golden-tier", default="auto", help="auto, device, host or file")
    serve.add_argument(
        "--keep-idle",
        dest="keep_idle_s",
        type=float,
        metavar="SECONDS",
        help="how long a policy stays served that nobody publishes or samples; default: 86400, a day; "
        "0: until another needs its place",
    )
    serve.add_argument(
        "--channel-port", type=int, help="default: VLLM_GROUP_PORT, else 0, which is any free port"
    )
    serve.add_argument(
        "--startup-timeout",
        dest="startup_timeout_s",
        type=float,
        help="seconds, without downloading; default: 600, with a GPU or a hub id 1800",
    )
    serve.add_argument("--log-file")
    serve.set_defaults(run=run)


def run(arguments: argparse.Namespace, rest: list[str]) -> int:
    """Start the server and watch it until a signal; the exit code."""
    _check_flags(arguments)
    options = options_of(arguments, rest)
    stop = threading.Event()
    # Before the start: a signal that arrives while vLLM loads must end it too.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    if not is_loopback(options.host):
        say(
            f"warning: --host {options.host}: port {options.port} and the channel port are reachable "
            "from other machines, without encryption; put a TLS proxy in front and set vLLM's --api-key"
        )
    server = VLLMServer(options=options, on_wait=show_wait)
    try:
        server.prepare()
        if server.memory_line:
            say(server.memory_line)
        server.start()
        _say_ready(server)
        while not stop.wait(0.5):
            if not server.alive:
                say(f"the server died: {server.exit_reason()}")
                return 1
    finally:
        server.stop()
    return 0


def options_of(arguments: argparse.Namespace, rest: Sequence[str]) -> ServerOptions:
    """What the command line and the environment ask for; `rest` goes on to vLLM."""
    names = {field.name for field in fields(ServerOptions)}
    given = {name: value for name, value in vars(arguments).items() if name in names}
    settings = Settings.load()
    for name, variable in _VARIABLES.items():
        if given[name] is None:
            given[name] = settings.set_value(variable)
    named = {name: value for name, value in given.items() if value is not None}
    return ServerOptions(**{"port": 8000, **named}, extra_args=tuple(rest))


def model_first(argv: Sequence[str]) -> list[str]:
    """`serve --model M ...`, as `trl vllm-serve` writes it, as `serve M ...`; else unchanged."""
    words = list(argv)
    if words[:1] != ["serve"]:
        return words
    for i, word in enumerate(words):
        if word == "--model" and i + 1 < len(words):
            return ["serve", words[i + 1], *words[1:i], *words[i + 2 :]]
        if word.startswith("--model="):
            return ["serve", word.removeprefix("--model="), *words[1:i], *words[i + 1 :]]
    return words


def _check_flags(arguments: argparse.Namespace) -> None:
    if arguments.enable_lora and arguments.mode not in ("adapter", "both"):
        raise ConfigError(
            f"--enable-lora with --mode {arguments.mode}: slots need --mode adapter or --mode both"
        )


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _say_ready(server: VLLMServer) -> None:
    with server.client() as client:
        status = client.status()
    say(f"ready at {server.url}, modes {', '.join(status.modes)}, log {server.log_path}")
    say(f"base model {status.base_model!r}, {status.dtype}, max rank {status.max_lora_rank}")
    if status.golden:
        say(
            f"golden weights: {status.golden['bytes'] / 2**20:.1f} MiB per worker on tier "
            f"{status.golden['tier']!r} ({status.golden['reason']})"
        )
    if server.memory_line:
        free = ", ".join(f"GPU {g.index} {g.free_bytes / 2**30:.1f} GiB" for g in visible_gpus())
        say(f"free now: {free}")
    say(f"token of the control routes: {server.token_file}")
    say(f"train with: recipes/grpo.py --vllm_server {server.url}   (Ctrl-C stops the server)")
