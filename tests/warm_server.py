"""vLLM servers and training runs forked from a process that has imported all that they need already.

API server, engine core and worker of a server on a CPU import vLLM one after the other, 16 s each on a slow
core, and the suite starts dozens: 8 s of processor time instead of 55. A rank of a training run imports TRL
and PEFT, 18 s, and its launcher torch. Here one process imports each once, and those are forks of it: their
own code from its `main` on, with the command line and environment of those that users start. What belongs to
commands, recipes and notebooks is started as users start it.
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
from typing import Any, NoReturn

import setproctitle

from tink_rl import serve_options
from tink_rl.errors import LaunchFailed
from tink_rl.gpus import has_gpu
from tink_rl.launch import VLLMServer
from tink_rl.server import vllm_names

_SERVER = (
    *("vllm.entrypoints.openai.api_server", "vllm.entrypoints.launchers.api_server.entry"),
    *("vllm.v1.engine.core", "vllm.v1.executor.multiproc_executor"),
    *("vllm.v1.worker.cpu_worker", "vllm.v1.worker.cpu_model_runner", "vllm.lora.worker_manager"),
    *("vllm.model_executor.models.qwen3", "vllm.model_executor.models.llama"),
    *(path.partition(":")[0] for path in vllm_names.NAMES.values()),
)
_TRAINING = ("accelerate.commands.launch", "torch.distributed.run", "tests.multi.run")
_IMPORTS = {"server": _SERVER, "training": _TRAINING}
_IMPORT_S = 240.0
_END_S = 10.0


CAN_FORK = not has_gpu()
"""What is forked here is vLLM's CPU build; a process that holds a GPU cannot be."""
_READ_EARLY = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA")
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


def start(
    line: list[str], env: dict[str, str], log: str, *, kind: str = "server", cwd: str = "."
) -> Forked:
    """Fork the command `line` of Python with the environment `env`, writing to the file `log`."""
    early = tuple((name, env[name]) for name in _READ_EARLY if name in env)
    key = (kind, early)
    parent = _parents.get(key) or _parents.setdefault(key, _Parent(kind, dict(early)))
    asked = {"line": line, "env": env, "log": log, "cwd": str(Path(cwd).absolute())}
    return Forked(parent, parent.ask(asked)["pid"])


class _Parent:
    """The process with the imports, from the side of the tests."""

    def __init__(self, kind: str, early: dict[str, str]) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno()), kind],
                pass_fds=[theirs.fileno()],
                env={**os.environ, **early, "LD_PRELOAD": _openmp()},
                start_new_session=True,
            )
        ours.settimeout(_IMPORT_S)
        self._messages = ours.makefile("rw")

    def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        print(json.dumps(message), file=self._messages, flush=True)
        return json.loads(self._messages.readline())


_parents: dict[tuple[str, tuple[tuple[str, str], ...]], _Parent] = {}


def _openmp() -> str:
    """What vLLM preloads into its workers; by then the library of a fork is loaded."""
    found = sorted(Path(sys.prefix).glob("lib/python*/site-packages/torch/lib/libgomp*.so*"))
    return str(found[0]) if found else ""


def serve(number: int, kind: str) -> None:
    """In the parent: fork as asked, until nobody is there to ask."""
    for name in _IMPORTS[kind]:
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
                    _become(message, kind)
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


def _become(message: dict[str, Any], kind: str) -> None:
    """Go on as the command line says, with all of its own: session, log, environment, randomness."""
    os.setsid()
    log = os.open(message["log"], os.O_WRONLY | os.O_APPEND)
    for stream, opened in ((0, os.open(os.devnull, os.O_RDONLY)), (1, log), (2, log)):
        os.dup2(opened, stream)
    os.chdir(message["cwd"])
    os.sched_setaffinity(0, range(os.cpu_count() or 1))
    {"server": _fork_the_others_too, "training": _fork_the_ranks_too}[kind]()
    _run(message["line"], message["env"])


def _run(line: list[str], env: dict[str, str]) -> NoReturn:
    os.environ.clear()
    os.environ.update(env)
    random.seed()
    words = line[2:] if line[1] == "-u" else line[1:]
    is_module = words[0] == "-m"
    sys.argv = words[is_module:]
    try:
        if is_module:
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
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


def _fork_the_ranks_too() -> None:
    """`accelerate launch` starts one rank by `subprocess`, and several by torch's launcher."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    subprocess.Popen = subprocess_handler.Popen = _ForkingPopen


class _ForkingPopen(subprocess.Popen):
    """For a launcher: what it starts of Python is a fork of it."""

    def _execute_child(self, args: Any, *rest: Any) -> None:
        if args[0] != sys.executable:
            return super()._execute_child(args, *rest)
        self.pid = os.fork()
        self._child_created = True
        if self.pid == 0:
            env, is_leader = rest[5], rest[-2]
            if is_leader:
                os.setsid()
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            _run(list(args), dict(os.environ if env is None else env))


if __name__ == "__main__":
    serve(int(sys.argv[1]), sys.argv[2])
