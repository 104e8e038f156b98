"""`tink-rl`: serve a base model for training, or ask a server how it is."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Sequence

from tink_rl import __version__
from tink_rl.config import SyncConfig
from tink_rl.errors import LaunchFailed, TinkError
from tink_rl.launch import ServerOptions, VLLMServer
from tink_rl.transport.vllm_client import VLLMClient

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and arguments.command != "serve":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return int(arguments.run(arguments, rest))
    except (TinkError, ImportError) as error:
        sys.stderr.write(f"tink-rl: {error}\n")
        return error.exit_code if isinstance(error, LaunchFailed) else 1
    except KeyboardInterrupt:
        sys.stderr.write("tink-rl: stopped\n")
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tink-rl", description=__doc__, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"tink-rl {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    _add_serve(commands)
    status = commands.add_parser("status", help="what a server says of itself", allow_abbrev=False)
    status.add_argument("url", nargs="?", default="http://127.0.0.1:8000")
    status.add_argument("--token-file")
    status.set_defaults(run=_status)
    return parser


def _add_serve(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    serve = commands.add_parser(
        "serve",
        help="start vLLM with the plugin",
        description="Start stock vLLM with the tink_rl plugin. Flags that are not listed here are "
        "passed on to vLLM.",
        allow_abbrev=False,
    )
    serve.add_argument("model", help="model directory or hub id")
    serve.add_argument("--mode", default="both", help="merged, adapter or both (default)")
    serve.add_argument("--host", default="127.0.0.1")
    serve.add_argument("--port", type=int, default=8000)
    serve.add_argument("--dtype", default="auto")
    serve.add_argument("--max-model-len", type=int)
    serve.add_argument("--max-lora-rank", type=int, default=32)
    serve.add_argument("--max-loras", type=int, default=4)
    serve.add_argument("--max-cpu-loras", type=int)
    serve.add_argument("--tensor-parallel-size", "-tp", type=int, default=1)
    serve.add_argument("--gpu-memory-utilization", type=float)
    serve.add_argument(
        "--alone",
        action="store_true",
        help="no trainer shares this machine: take all its cores, or all of its GPU",
    )
    serve.add_argument(
        "--token-file", help="token of the control routes; made if it does not exist"
    )
    serve.add_argument(
        "--golden-budget-gib", type=float, help="merged: memory for the base weights"
    )
    serve.add_argument("--golden-tier", default="auto", help="auto, device, host or file")
    serve.add_argument("--channel-port", type=int, default=0, help="0: any free port")
    serve.add_argument("--startup-timeout", type=float, default=300.0, help="seconds")
    serve.add_argument("--log-file")
    serve.set_defaults(run=_serve)


def _serve(arguments: argparse.Namespace, rest: list[str]) -> int:
    options = ServerOptions(
        model=arguments.model,
        mode=arguments.mode,
        host=arguments.host,
        port=arguments.port,
        dtype=arguments.dtype,
        max_model_len=arguments.max_model_len,
        max_lora_rank=arguments.max_lora_rank,
        max_loras=arguments.max_loras,
        max_cpu_loras=arguments.max_cpu_loras,
        tensor_parallel_size=arguments.tensor_parallel_size,
        gpu_memory_utilization=arguments.gpu_memory_utilization,
        shared_with_trainer=not arguments.alone,
        token_file=arguments.token_file,
        golden_budget_gib=arguments.golden_budget_gib,
        golden_tier=arguments.golden_tier,
        channel_port=arguments.channel_port,
        startup_timeout_s=arguments.startup_timeout,
        log_file=arguments.log_file,
        extra_args=tuple(rest),
    )
    stop = threading.Event()
    # Before the start: a signal that arrives while vLLM loads must end it too.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    if options.host not in _LOOPBACK:
        _say(
            f"warning: --host {options.host}: port {options.port} and the channel port are reachable "
            "from other machines, without encryption; put a TLS proxy in front and set vLLM's --api-key"
        )
    server = VLLMServer(options=options, on_wait=show_wait)
    try:
        server.start()
        _say_ready(server)
        while not stop.wait(0.5):
            if not server.alive:
                _say(f"the server died: {server.exit_reason()}")
                return 1
    finally:
        server.stop()
    return 0


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def show_wait(what: str, seconds: float) -> None:
    """One line on a terminal, a line every ten seconds elsewhere."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[Kvllm: {what} ({seconds:.0f} s)")
        sys.stderr.flush()
    elif int(seconds) % 10 == 0 or what == "first request":
        sys.stderr.write(f"vllm: {what} ({seconds:.0f} s)\n")


def _say(text: str) -> None:
    clear = "\r\x1b[K" if sys.stderr.isatty() else ""
    sys.stderr.write(f"{clear}tink-rl: {text}\n")
    sys.stderr.flush()


def _say_ready(server: VLLMServer) -> None:
    with server.client() as client:
        status = client.status()
    _say(f"ready at {server.url}, modes {', '.join(status.modes)}, log {server.log_path}")
    _say(f"base model {status.base_model!r}, {status.dtype}, max rank {status.max_lora_rank}")
    if status.golden:
        _say(
            f"golden weights: {status.golden['bytes'] / 2**20:.1f} MiB per worker on tier "
            f"{status.golden['tier']!r}"
        )
    _say(f"token of the control routes: {server.token_file}")
    _say(f"train with: recipes/grpo.py --vllm_server {server.url}   (Ctrl-C stops the server)")


def _status(arguments: argparse.Namespace, rest: list[str]) -> int:
    token = SyncConfig(token_file=arguments.token_file).read_token()
    with VLLMClient(arguments.url, token=token) as client:
        status = client.status()
    for name in status.__dataclass_fields__:
        value = getattr(status, name)
        sys.stdout.write(f"{name:18} {value}\n")
    return 0 if status.reason is None else 1


if __name__ == "__main__":
    raise SystemExit(main())
