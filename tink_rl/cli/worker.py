"""`tink-rl worker`: the sampling service over HTTP."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
from typing import Any

from tink_rl import placement
from tink_rl.cli.console import say

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
    worker.add_argument("--host", help="address to listen on (127.0.0.1)")
    worker.add_argument("--port", type=int, help="port to listen on (8001); 0: any free one")
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
    worker.add_argument(
        "--sample-token-file",
        metavar="FILE",
        help="ask for this token when sampling; made if it does not exist",
    )
    worker.add_argument(
        "--token-file",
        metavar="FILE",
        help="the admin token; made if it does not exist (default: the one of `tink-rl serve`)",
    )
    worker.add_argument("--max-running", type=int, help="sequences at the backend at once (128)")
    worker.add_argument("--max-queued", type=int, help="requests that may wait; then 429 (256)")
    worker.add_argument("--timeout", type=float, help="deadline of a request, seconds (300)")
    worker.add_argument("--drain", type=float, help="seconds for running requests at the end (20)")
    worker.add_argument("--ledger", metavar="FILE", help="append every request and its end")
    worker.set_defaults(run=run)


def run(arguments: argparse.Namespace, rest: list[str]) -> int:
    """Serve until SIGTERM or SIGINT; 0 once everything under way was answered.

    Ends the process itself if a thread of the backend still waits for its server then.
    """
    from tink_rl.worker.options import load_options

    options = load_options(
        host=arguments.host,
        port=arguments.port,
        sample_token_file=arguments.sample_token_file,
        admin_token_file=arguments.token_file,
        max_running=arguments.max_running,
        max_queued=arguments.max_queued,
        timeout_s=arguments.timeout,
        drain_s=arguments.drain,
        ledger=arguments.ledger,
    )
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
