"""Start, watch and stop a stock vLLM server with our plugin loaded.

`VLLMServer` is a context manager for scripts, tests and notebooks; `tink-rl serve` is the same from a
shell. What can be known before loading is checked before loading. The server is a process group of
its own, because killing vLLM's API server alone would leave its engine behind.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import BinaryIO

from tink_rl import errors, gpus, memory_plan, placement, shared_names
from tink_rl.download import download, is_from_hub
from tink_rl.errors import ConfigError, LaunchFailed, TinkError
from tink_rl.post_mortem import count_oom_kills, explain
from tink_rl.publish.vllm_client import VLLMClient
from tink_rl.serve_options import ServerOptions, check_options, command, environment
from tink_rl.startup_log import stage
from tink_rl.tokens import ensure_token_file
from tink_rl.types import ServerState

logger = logging.getLogger("tink_rl")
_END_S = 5.0


class VLLMServer:
    """A managed vLLM server.

    Example:
        with VLLMServer("models/base", mode="merged") as server:
            client = server.client()
            client.generate(["12="], max_tokens=4)
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        options: ServerOptions | None = None,
        on_wait: Callable[[str, float], None] | None = None,
        **settings: object,
    ) -> None:
        """Store; `start` (or `with`) starts it.

        Args:
            model: Directory or hub id; the rest of `ServerOptions` as keywords.
            options: Instead of `model` and keywords.
            on_wait: Called about once a second with what is waited for, and since how long (s);
                at last with "ready".
        """
        if options is None:
            if model is None:
                raise ConfigError("VLLMServer needs a model: VLLMServer('path/to/base')")
            options = ServerOptions(model=str(model), **settings)  # type: ignore[arg-type]
        self.options = options
        self._on_wait = on_wait or (lambda text, seconds: None)
        self._process: subprocess.Popen[bytes] | None = None
        self.token_file: Path | None = None
        self.log_path: Path | None = None
        self.memory_line = ""
        """Who takes what of the GPU, once `prepare` or `start` ran; "" on a CPU."""
        self._log_offset = 0
        self._oom_kills: int | None = None
        self._is_prepared = False
        self._launch_id = ""

    def __enter__(self) -> VLLMServer:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """`http://HOST:PORT`."""
        return self.options.url

    @property
    def token(self) -> str:
        """Token of the control routes."""
        if self.token_file is None:
            raise ConfigError("the server was not started yet; call start()")
        return self.token_file.read_text().strip()

    @property
    def pid(self) -> int | None:
        """Process id (and process group) of the API server."""
        return self._process.pid if self._process else None

    @property
    def alive(self) -> bool:
        """Whether the API server's process runs."""
        return self._process is not None and self._process.poll() is None

    def client(self) -> VLLMClient:
        """A client with this server's token."""
        return VLLMClient(self.url, token=self.token, api_key=self.options.api_key)

    def prepare(self) -> VLLMServer:
        """All of `start` that comes before vLLM: checks, the download of a hub id, the memory plan.

        Raises:
            LaunchFailed: or one of its codes; a setting or a model with which vLLM would not start.
            ImportError: vLLM is not installed.
        """
        self.options = check_options(self.options)
        self._download()
        if gpus.has_gpu() and (found := gpus.visible_gpus()):
            self.memory_line = _memory_line(self.options, found)
        self.token_file = ensure_token_file(self.options.token_file)
        self._is_prepared = True
        return self

    def _download(self) -> None:
        options, start = self.options, time.monotonic()
        special = options.extra("--load-format") not in (None, "auto", "safetensors")
        if (
            Path(options.model).is_dir()
            or special
            or not is_from_hub({**os.environ, **options.env})
        ):
            return

        def report(text: str) -> None:
            self._on_wait(text, time.monotonic() - start)

        cache_dir = options.extra("--download-dir")
        download(options.model, report=report, revision=options.revision, cache_dir=cache_dir)

    def start(self) -> VLLMServer:
        """Start and wait until a first completion was sampled; nothing is left behind on failure.

        Raises:
            LaunchFailed: or one of its codes, in one line, with the log's path.
            ImportError: vLLM is not installed.
        """
        if self.alive:
            return self
        if not self._is_prepared:
            self.prepare()
            if self.memory_line:
                logger.info("%s", self.memory_line)
        self._is_prepared = False  # a port that was free then may be taken at another start
        atexit.register(self.stop)
        try:
            self._spawn()
            self._wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def _spawn(self) -> None:
        assert self.token_file is not None
        gpu = gpus.has_gpu()
        plan = placement.plan_here(self.options.tensor_parallel_size)
        binding = plan.server_binding if self.options.shared_with_trainer else None
        if binding is None and self.options.tensor_parallel_size > 1:
            binding = plan.server_binding
        _remove_shared_memory_of_the_dead()
        self._launch_id = uuid.uuid4().hex
        env = environment(
            self.options,
            os.environ,
            token_file=self.token_file,
            launch_id=self._launch_id,
            server_binding=binding,
            waits_asleep=placement.who_waits_asleep(shares_cores=self.options.shared_with_trainer),
            has_gpu=gpu,
        )
        self.log_path, self._oom_kills = self._make_log(), count_oom_kills()
        with self.log_path.open("ab") as log:
            self._log_offset = log.tell()
            self._process = self._popen(command(self.options, has_gpu=gpu), env=env, log=log)

    def _popen(
        self, line: list[str], *, env: dict[str, str], log: BinaryIO
    ) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            _watched(line),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=env,
            start_new_session=True,
            preexec_fn=_all_cores,
        )

    def _make_log(self) -> Path:
        """The log's file, which can be written.

        Raises:
            ConfigError: it cannot.
        """
        given = self.options.log_file
        try:
            path = Path(given or Path(tempfile.mkdtemp(prefix="tink-vllm-")) / "server.log")
            path = path.expanduser()
            path.parent.mkdir(parents=True, exist_ok=True)
            path.open("ab").close()
        except OSError as error:
            where = f"--log-file {given}" if given else f"a log in {error.filename or 'TMPDIR'}"
            raise ConfigError(
                f"{where} cannot be written ({error.strerror or error}); name a file that can be, with "
                "--log-file FILE"
            ) from error
        return path

    def _wait_ready(self) -> None:
        start = time.monotonic()
        client = self.client()
        timeout_s = self.options.startup_timeout(has_gpu=gpus.has_gpu())
        said = -1.0
        while not _answers(client, self._launch_id):
            seconds = time.monotonic() - start
            if not self.alive:
                raise self._failure("vLLM ended while starting")
            if seconds > timeout_s:
                raise errors.LaunchFailed(
                    f"vLLM was not ready after {timeout_s:g} s "
                    f"({self._stage()}); raise --startup-timeout; log: {self.log_path}",
                    code="start_timeout",
                )
            if seconds - said >= 1.0:
                self._on_wait(self._stage(), seconds)
                said = seconds
            time.sleep(0.1)
        try:
            self._first_request(client, start)
        except TinkError as error:
            if isinstance(error, ConnectionError):
                self._wait_for_the_end()
            raise self._failure(f"the first request failed: {error}") from error
        finally:
            client.close()
        assert self.pid is not None
        shared_names.note(self.pid, group_members(self.pid))
        self._on_wait("ready", time.monotonic() - start)

    def _wait_for_the_end(self) -> None:
        """A worker that dies takes the others with it within seconds, and the log then says how it died."""
        deadline = time.monotonic() + _END_S
        while self.alive and time.monotonic() < deadline:
            time.sleep(0.1)

    def _first_request(self, client: VLLMClient, start: float) -> None:
        """It takes seconds more than any later one; `on_wait` goes on meanwhile."""
        with ThreadPoolExecutor(1, thread_name_prefix="tink-first-request") as pool:
            answer = pool.submit(client.generate, [[1]], max_tokens=1)
            while not wait([answer], timeout=1.0).done:
                self._on_wait("first request", time.monotonic() - start)
            answer.result()

    def _stage(self) -> str:
        return stage(self.log_tail(200_000))

    def log_tail(self, num_bytes: int = 4000) -> str:
        """The end of this start's log."""
        if self.log_path is None or not self.log_path.exists():
            return ""
        with self.log_path.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(self._log_offset, size - num_bytes))
            return log.read().decode(errors="replace")

    def _failure(self, what: str) -> LaunchFailed | TinkError:
        code = self._process.poll() if self._process else None
        now = count_oom_kills()
        known = now is not None and self._oom_kills is not None
        return explain(
            what,
            self.log_tail(200_000),
            str(self.log_path),
            exit_code=code,
            oom_kills=(now or 0) - (self._oom_kills or 0) if known else None,
        )

    def exit_reason(self) -> str:
        """One line on why the server is not alive any more."""
        code = self._process.poll() if self._process else None
        return f"{self._failure(f'the server ended with exit code {code}')}"

    def stop(self) -> None:
        """End the whole process group; idempotent. Afterwards none of its processes is left."""
        process, self._process = self._process, None
        atexit.unregister(self.stop)
        if process is None:
            return
        _end_group(process.pid, signal.SIGTERM, 15.0)
        _end_group(process.pid, signal.SIGKILL, 10.0)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5.0)
        _remove_shared_memory_of_the_dead()


def _memory_line(options: ServerOptions, found: list[gpus.Gpu]) -> str:
    """The plan is a service: a model that it cannot read is none of its business."""
    try:
        shape = memory_plan.read_shape(options.model, revision=options.revision)
        plan = memory_plan.plan_memory(shape, options)
    except (TinkError, KeyError, ValueError, OSError) as error:
        logger.debug("no memory plan of %s: %s", options.model, error)
        return ""
    return memory_plan.gpu_line(plan, options, found)


def _remove_shared_memory_of_the_dead() -> None:
    if removed := shared_names.remove_left(lambda group: bool(group_members(group))):
        logger.info(
            "removed %s from /dev/shm, left by a server that was killed", ", ".join(removed)
        )


def _watched(line: list[str]) -> list[str]:
    """Start `line` under a tiny parent that ends the group when *its* parent, our process, dies.

    A pipe or PR_SET_PDEATHSIG would do without a second process, but the signal fires when the thread
    that started the server ends, which in a notebook happens long before the kernel does.
    """
    return [sys.executable, "-m", "tink_rl.watchdog", str(os.getpid()), *line]


def _all_cores() -> None:
    # A trainer that pinned itself must not hand its narrow mask down to the server.
    with contextlib.suppress(OSError):
        os.sched_setaffinity(0, placement.CORES)


def _answers(client: VLLMClient, launch_id: str) -> bool:
    """Whether the server of `launch_id` is ready; another one on its port will be the end of it."""
    try:
        status = client.status(timeout_s=5.0)
        return status.state is ServerState.READY and status.launch_id == launch_id
    except (errors.ServerUnreachable, errors.RequestTimeout, errors.NotReady):
        return False


def group_members(group: int) -> list[int]:
    """Processes of a process group that are not zombies."""
    members = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        with contextlib.suppress(OSError, ValueError, IndexError):
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            if int(fields[2]) == group and fields[0] != "Z":
                members.append(int(entry.name))
    return members


def _end_group(group: int, number: signal.Signals, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    if not group_members(group):
        return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)
    while group_members(group) and time.monotonic() < deadline:
        time.sleep(0.05)
