"""`tink-rl worker`: the sampling service over HTTP."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from tink_rl import placement
from tink_rl.cli.console import say
from tink_rl.worker.options import WorkerOptions, load_options

_FLAGS = {
    "host": "--host",
    "port": "--port",
    "sample_token_file": "--sample-token-file",
    "admin_token_file": "--token-file",
    "max_running": "--max-running",
    "max_queued": "--max-queued",
    "timeout_s": "--timeout",
    "drain_s": "--drain",
    "ledger": "--ledger",
}
"""Fields of `WorkerOptions`."""
_KINDS: dict[object, Callable[[str], Any]] = {int: int, float: float}
_LAST_S = 1.0
"""What threads get to end by themselves once the worker has stopped."""


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to `commands`."""
    worker = commands.add_parser(
        "worker",
        help="serve the sampling API over HTTP",
        description="Serve POST /api/v1/sample and its neighbours over a vLLM or Megatron server. "
        "Flags win over TINK_WORKER_* and the other settings of .env.example.",
        allow_abbrev=False,
    )
    for name, flag in _FLAGS.items():
        field = WorkerOptions.model_fields[name]
        shown = "" if field.default is None else f" ({field.default})"
        kind = _KINDS.get(field.annotation, str)
        worker.add_argument(flag, dest=name, type=kind, help=f"{field.description}{shown}")
    worker.add_argument("--vllm-url", help="URL of the vLLM server (http://localhost:8000)")
    worker.add_argument(
        "--ca-file", metavar="PEM", help="authorities to trust for https (default: TINK_CA_FILE)"
    )
    worker.add_argument(
        "--adapter-root",
        action="append",
        default=[],
        metavar="DIR",
        help="adapters below this directory may be registered over HTTP; repeatable",
    )
    worker.set_defaults(run=run)


def run(arguments: argparse.Namespace, rest: list[str]) -> int:
    """Serve until SIGTERM or SIGINT; 0 once everything under way was answered.

    Ends the process itself if a thread of the backend still waits for its server then.
    """
    options = load_options(**{name: getattr(arguments, name) for name in _FLAGS})
    from tink_rl.worker.http_server import bind, raise_file_limit

    taken = bind(options.host, options.port)  # before anything slow is loaded
    from tink_rl.settings import Settings
    from tink_rl.worker.app import create_app
    from tink_rl.worker.build import build_service, join_roots
    from tink_rl.worker.http_server import HttpServer

    given = {
        "base_url": arguments.vllm_url,
        "tink_ca_file": arguments.ca_file,
        "tink_adapter_roots": join_roots(arguments.adapter_root),
    }
    settings = Settings.load({k: v for k, v in given.items() if v is not None})
    raise_file_limit()
    if settings.shares_machine:
        placement.apply_to_worker(placement.plan_here())
    service = build_service(settings, options).start()
    server = HttpServer(create_app(service), taken, num_threads=options.num_threads)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    thread = threading.Thread(target=server.run, name="tink-http")
    thread.start()
    _say_ready(server.url, service)
    while not stop.wait(1.0):
        if not thread.is_alive():
            say("the HTTP server ended; see the lines above")
            return 1
    say(f"stopping: no new requests, up to {options.drain_s:g} s for those under way")
    num_cut = service.stop()
    server.stop()
    thread.join(10.0)
    say(f"stopped; {num_cut} requests were cut off")
    _end_if_threads_wait()
    return 0


def _end_if_threads_wait() -> None:
    """End the process with 0 if other threads would keep it; returns once there are none.

    A thread that loads an adapter or looks at a wedged vLLM ends only at the deadline of its request,
    minutes later, and Python joins it before it exits: a supervisor would have to kill a worker that
    has long answered everybody. Daemons count: those of an executor are joined all the same.
    """
    deadline = time.monotonic() + _LAST_S
    while threading.active_count() > 1:
        if time.monotonic() > deadline:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
        time.sleep(0.01)


def _say_ready(url: str, service: Any) -> None:
    facts = service.backend.describe()
    say(f"worker at {url} over {facts.get('backend')} at {facts.get('url')}; docs at {url}/docs")
    say(f"admin token: {service.admin_token_file}")
    needs = service.options.sample_token_file
    say(f"sampling needs {'the token in ' + needs if needs else 'no token (loopback only)'}")
