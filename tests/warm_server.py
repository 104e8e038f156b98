"""vLLM servers forked from a process that has imported vLLM already: 8 s of processor time instead of 55.

API server, engine core and worker of a server on a CPU import vLLM one after the other, 16 s each on a slow
core, and the suite starts dozens. Here one process imports it once and those three are forks of it. What they
run is vLLM's own code from its `main` on, with the command line and environment of `VLLMServer`. Servers of
commands, recipes and notebooks are started as users start them.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import setproctitle

from tink_rl import serve_options
from tink_rl.errors import LaunchFailed
from tink_rl.gpus import has_gpu
from tink_rl.launch import VLLMServer

_IMPORTS = (
    *("vllm.entrypoints.openai.api_server", "vllm.entrypoints.launchers.api_server.entry"),
    *("vllm.v1.engine.core", "vllm.v1.executor.multiproc_executor"),
    *("vllm.v1.worker.cpu_worker", "vllm.v1.worker.cpu_model_runner", "vllm.lora.worker_manager"),
    *("vllm.model_executor.models.qwen3", "vllm.model_executor.models.llama"),
    "tink_rl.server.vllm_names",
)
_IMPORT_S = 240.0
_END_S = 10.0


CAN_FORK = not has_gpu()
"""What is forked here is vLLM's CPU build; a process that holds a GPU cannot be."""
_READ_EARLY = ("ATEN_CPU_CAPABILITY", "HF_HUB_CACHE", "ONEDNN_MAX_CPU_ISA")
"""Variables that are read while importing: servers that differ in one have parents of their own."""


_READ_LATE = ("PYTHONPATH", "TINK_TEST_SWITCH", "VLLM_CPU_OMP_THREADS_BIND", "VLLM_PLUGINS")
"""Variables that nothing reads before a server's `main`."""


def make_server(model: str | Path, **settings: Any) -> VLLMServer:
    """The server for these `ServerOptions`, not started; forked where its variables are known here."""
    is_known = set(settings.get("env", {})) <= {*_READ_EARLY, *_READ_LATE}
    return (WarmServer if is_known and CAN_FORK else VLLMServer)(model, **settings)


class WarmServer(VLLMServer):
    """A `VLLMServer` that is forked; it has no watchdog, its parent ends it when the tests end."""

    def _popen(self, line: list[str], *, env: dict[str, str], log: Any) -> Any:
        return start(line, env, log.name)

    def stop(self) -> None:
        """As `VLLMServer.stop`; its forks hold the API server's socket for as long as they take to end."""
        was_started = self.pid is not None
        super().stop()
        deadline = time.monotonic() + _END_S
        while was_started and not _is_free(self.options.port) and time.monotonic() < deadline:
            time.sleep(0.02)


def _is_free(port: int) -> bool:
    try:
        serve_options._free_port("127.0.0.1", port)
    except LaunchFailed:
        return False
    return True


class Forked:
    """What the tests use of a `Popen`."""

    def __init__(self, parent: _Parent, pid: int) -> None:
        self.pid, self._parent = pid, parent
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Its exit code, 128 + N if signal N ended it; None while it runs."""
        if self.returncode is None:
            self.returncode = self._parent.ask({"poll": self.pid})["code"]
        return self.returncode

    def wait(self, timeout: float) -> int | None:
        """`poll`, until `timeout` (s)."""
        deadline = time.monotonic() + timeout
        while self.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        return self.returncode


def start(line: list[str], env: dict[str, str], log: str) -> Forked:
    """Fork `python -m MODULE ARGUMENTS...` with the environment `env`, writing to the file `log`."""
    early = tuple((name, env[name]) for name in _READ_EARLY if name in env)
    parent = _parents.get(early) or _parents.setdefault(early, _Parent(dict(early)))
    return Forked(parent, parent.ask({"line": line, "env": env, "log": log})["pid"])


class _Parent:
    """The process with the imports, from the side of the tests."""

    def __init__(self, early: dict[str, str]) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env={**os.environ, **early, "LD_PRELOAD": _openmp()},
                start_new_session=True,
            )
        ours.settimeout(_IMPORT_S)
        self._messages = ours.makefile("rw")

    def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        print(json.dumps(message), file=self._messages, flush=True)
        return json.loads(self._messages.readline())


_parents: dict[tuple[tuple[str, str], ...], _Parent] = {}


def _openmp() -> str:
    """What vLLM preloads into its workers; by then the library of a fork is loaded."""
    found = sorted(Path(sys.prefix).glob("lib/python*/site-packages/torch/lib/libgomp*.so*"))
    return str(found[0]) if found else ""


def serve(number: int) -> None:
    """In the parent: fork as asked, until nobody is there to ask."""
    for name in _IMPORTS:
        __import__(name)
    setproctitle.getproctitle()  # it looks for the arguments' place, which a new environment hides
    codes: dict[int, int | None] = {}
    with socket.socket(fileno=number) as ours, ours.makefile("rw") as messages:
        for text in messages:
            message = json.loads(text)
            if "poll" in message:
                _reap(codes)
                answer = {"code": codes[message["poll"]]}
            else:
                pid = os.fork()
                if pid == 0:
                    ours.close()
                    _become(message)
                codes[pid] = None
                answer = {"pid": pid}
            print(json.dumps(answer), file=messages, flush=True)
    for pid in (pid for pid, code in codes.items() if code is None):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)


def _reap(codes: dict[int, int | None]) -> None:
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            code = os.waitstatus_to_exitcode(ended[1])
            codes[ended[0]] = code if code >= 0 else 128 - code  # as the watchdog says it


def _become(message: dict[str, Any]) -> None:
    """Go on as the command line says, with all of its own: session, log, environment, randomness."""
    os.setsid()
    log = os.open(message["log"], os.O_WRONLY | os.O_APPEND)
    for stream, opened in ((0, os.open(os.devnull, os.O_RDONLY)), (1, log), (2, log)):
        os.dup2(opened, stream)
    os.environ.clear()
    os.environ.update(message["env"])
    os.sched_setaffinity(0, range(os.cpu_count() or 1))
    random.seed()
    _fork_the_others_too()
    _, _, module, *arguments = message["line"]
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:  # noqa: BLE001 (the fork must end here, not in the parent's loop)
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _fork_the_others_too() -> None:
    """vLLM's CPU platform spawns, so that a worker reads what OpenMP goes by; here that is set already."""
    from vllm.platforms.cpu import CpuPlatform

    original = CpuPlatform.check_and_update_config.__func__

    def check(cls: Any, config: Any) -> None:
        original(cls, config)
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"

    CpuPlatform.check_and_update_config = classmethod(check)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
