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
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

from tink_rl import errors, gpus, memory_plan, placement
from tink_rl.download import download, is_from_hub
from tink_rl.errors import ConfigError, LaunchFailed, TinkError
from tink_rl.loopback import http_url, is_loopback
from tink_rl.policy.model_dir import model_to_serve
from tink_rl.post_mortem import count_oom_kills, explain
from tink_rl.settings import LORA_RANKS, slot_for
from tink_rl.startup_log import stage
from tink_rl.tokens import ensure_token_file
from tink_rl.transport.vllm_client import VLLMClient
from tink_rl.types import ServerState, SyncMode

logger = logging.getLogger("tink_rl")

_MODES = {
    # Full mode needs nothing kept ready, so every server offers it.
    "merged": (SyncMode.MERGED, SyncMode.FULL),
    "adapter": (SyncMode.ADAPTER, SyncMode.FULL),
    "both": (SyncMode.ADAPTER, SyncMode.MERGED, SyncMode.FULL),
    "full": (SyncMode.FULL,),
}
_PLUGIN = "tink_rl"
_END_S = 5.0
_RECEIVER = "tink_rl.server.receiver.TinkWorkerExtension"
# Our own settings that vLLM would misread or warn about, and what a launcher such as torchrun or
# accelerate leaves in the environment of a trainer.
_NOT_FOR_THE_SERVER = re.compile(
    r"^(USE_VLLM|USE_MEGATRON|MEGATRON_SERVER_URL|VLLM_(BASE_URL|HOST|PORT|GROUP_PORT|TIMEOUT|"
    r"ENABLE_LORA|MAX_LORAS|MAX_LORA_RANK)|RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|MASTER_ADDR|"
    r"MASTER_PORT|ACCELERATE_.*|TORCHELASTIC_.*|FSDP_.*|OMP_NUM_THREADS|TINK_.*)$"
)


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """What to start. Example: `ServerOptions(model="models/base", mode="merged", port=8000)`"""

    model: str
    """Directory of the base model, or a hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; None: its main branch."""
    subfolder: str = ""
    """Of the model in that directory or repository."""
    mode: str = "both"
    """`merged`, `adapter` or `both`, each with full mode beside it, or `full` alone."""
    host: str = "127.0.0.1"
    port: int = 0
    """0 picks a free one."""
    max_lora_rank: int = 32
    max_loras: int = 4
    max_cpu_loras: int | None = None
    max_model_len: int | None = None
    dtype: str = "auto"
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float | None = None
    """Share of the GPU; None: 0.45 where a trainer shares it, else vLLM's default (0.92)."""
    shared_with_trainer: bool = True
    """A trainer runs on the same machine: leave it cores, or its share of one GPU (and the golden
    weights out of that)."""
    token_file: str | None = None
    golden_tier: str = "auto"
    golden_budget_gib: float | None = None
    channel_port: int = 0
    startup_timeout_s: float | None = None
    """None: 300, or 1800 with a GPU (compiling, capturing graphs) or a hub id; downloading is not in it."""
    log_file: str | None = None
    worker_extension_cls: str = _RECEIVER
    extra_args: tuple[str, ...] = ()
    """Passed on to vLLM as they are."""
    env: Mapping[str, str] = field(default_factory=dict)
    """Added to the server's environment."""

    @property
    def modes(self) -> tuple[SyncMode, ...]:
        """The sync modes of `mode`.

        Raises:
            ConfigError: `mode` is unknown.
        """
        if self.mode not in _MODES:
            raise ConfigError(f"--mode {self.mode!r}: expected one of {', '.join(_MODES)}")
        return _MODES[self.mode]

    @property
    def api_key(self) -> str | None:
        """vLLM's own key, if `extra_args` or the environment give the server one."""
        own = self.env.get("VLLM_API_KEY") or os.environ.get("VLLM_API_KEY")
        return self.extra("--api-key") or own or None

    def extra(self, flag: str) -> str | None:
        """The value that `extra_args` give a flag of vLLM, in either spelling; the last one counts."""
        found = None
        for i, word in enumerate(self.extra_args):
            name, given, value = word.partition("=")
            if name.replace("_", "-") == flag:
                found = value if given else next(iter(self.extra_args[i + 1 :]), None)
        return found

    def startup_timeout(self, *, has_gpu: bool) -> float:
        """Seconds that vLLM may take to start."""
        if self.startup_timeout_s is not None:
            return self.startup_timeout_s
        return 1800.0 if has_gpu or not Path(self.model).is_dir() else 300.0

    def memory(self) -> memory_plan.ServePlan:
        """The settings that decide about memory."""
        return memory_plan.ServePlan(
            mode=self.mode,
            max_lora_rank=self.max_lora_rank,
            max_loras=self.max_loras,
            max_model_len=self.max_model_len,
            dtype=self.dtype,
            tensor_parallel_size=self.tensor_parallel_size,
            alone=not self.shared_with_trainer,
            gpu_memory_utilization=self.gpu_memory_utilization,
            golden_tier=self.golden_tier,
        )

    @property
    def url(self) -> str:
        """Where a client on this machine reaches the server."""
        host = "127.0.0.1" if self.host in ("0.0.0.0", "::") else self.host
        return http_url(host, self.port)


# -- before loading ---------------------------------------------------------------------------------


def check_options(options: ServerOptions, *, has_gpu: bool | None = None) -> ServerOptions:
    """Everything that can be known before loading; the options with a port.

    Args:
        options: What to start.
        has_gpu: Whether it will run on a GPU; None: looks.

    Raises:
        PortTaken, ModelNotFound, RankNotAllowed, ConfigError.
        ImportError: vLLM is not installed.
    """
    if find_spec("vllm") is None:
        raise ImportError(
            "vLLM is not available\nServing needs it: `pip install 'tink-rl[gpu]'` (with a GPU), "
            "`pip install 'tink-rl[cpu]'`, or `make setup`. Sampling and weight sync do without."
        )
    modes = options.modes
    _check_device(options, gpus.has_gpu() if has_gpu is None else has_gpu)
    if SyncMode.ADAPTER in modes and options.max_lora_rank not in LORA_RANKS:
        fits = slot_for(options.max_lora_rank)
        hint = f"; take --max-lora-rank {fits}" if fits and options.max_lora_rank > 0 else ""
        raise errors.RankNotAllowed(
            f"--max-lora-rank {options.max_lora_rank}: vLLM has kernels for "
            f"{', '.join(map(str, LORA_RANKS))}{hint}"
        )
    model = model_to_serve(options.model, options.revision, options.subfolder)
    return replace(options, model=model, subfolder="", port=_free_port(options.host, options.port))


def _check_device(options: ServerOptions, has_gpu: bool) -> None:
    dtype = options.extra("--dtype") or options.dtype
    if has_gpu and SyncMode.ADAPTER in options.modes and dtype in ("float32", "float"):
        raise ConfigError(
            f"--dtype {dtype} with --mode {options.mode} on a GPU: vLLM's kernels for LoRA slots take 16 "
            "bits only; take --dtype bfloat16, or --mode merged"
        )
    others = entry_points(group="vllm.platform_plugins")
    if not has_gpu and gpus.vllm_build() == "cuda" and not others:
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        raise ConfigError(
            "the installed vLLM is built for NVIDIA GPUs and none is visible here (CUDA_VISIBLE_DEVICES="
            f"{seen!r}); make one visible, or install 'tink-rl[cpu]' into an environment of its own"
        )


def _free_port(host: str, port: int) -> int:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise errors.PortTaken(
                f"port {port} on {host} is in use{port_holder(port)}; stop that process or give another "
                f"--port ({error.strerror})"
            ) from error
        return int(probe.getsockname()[1])


def port_holder(port: int) -> str:
    """` by process PID`, if that can be seen."""
    with contextlib.suppress(
        Exception
    ):  # a hint only: psutil may be missing or not allowed to look
        import psutil

        for connection in psutil.net_connections("inet"):
            if connection.laddr and connection.laddr.port == port and connection.pid:
                return f" by process {connection.pid}"
    return ""


# -- command and environment (pure) -----------------------------------------------------------------


def command(options: ServerOptions, *, has_gpu: bool) -> list[str]:
    """The command line of the server."""
    line = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", options.model]
    line += ["--host", options.host, "--port", str(options.port)]
    line += ["--worker-extension-cls", options.worker_extension_cls]
    # The importance ratio needs logprobs after temperature; -1 lets a probe ask for any number.
    line += ["--logprobs-mode", "processed_logprobs", "--max-logprobs", "-1"]
    line += ["--dtype", options.dtype, "--tensor-parallel-size", str(options.tensor_parallel_size)]
    line += ["--disable-uvicorn-access-log"]
    if SyncMode.ADAPTER in options.modes:
        cpu_loras = options.max_cpu_loras or 2 * options.max_loras
        line += ["--enable-lora", "--max-lora-rank", str(options.max_lora_rank)]
        line += ["--max-loras", str(options.max_loras), "--max-cpu-loras", str(cpu_loras)]
    line += _in_transformers_names(options)
    if options.revision is not None:
        line += ["--revision", options.revision]
    if options.max_model_len is not None:
        line += ["--max-model-len", str(options.max_model_len)]
    if not has_gpu:
        line += ["--enforce-eager"]
    share = options.gpu_memory_utilization
    if share is None and has_gpu and options.shared_with_trainer:
        # the trainer needs its copy of the base, activations and optimizer state
        share = memory_plan.SHARED_SHARE
    if share is not None and has_gpu:
        line += ["--gpu-memory-utilization", str(share)]
    return line + list(options.extra_args)


def _in_transformers_names(options: ServerOptions) -> list[str]:
    """Where vLLM would take Mistral's consolidated files: the files that the trainer loads instead.

    Of a hub id nobody has looked yet whether it has some; without them the flags change nothing.
    """
    directory = Path(options.model).expanduser()
    if directory.is_dir() and not any(directory.glob("consolidated*.safetensors")):
        return []
    given = {word.partition("=")[0].replace("_", "-") for word in options.extra_args}
    return [
        word
        for flag in ("--config-format", "--load-format")
        if flag not in given
        for word in (flag, "hf")
    ]


def environment(
    options: ServerOptions,
    current: Mapping[str, str],
    *,
    token_file: Path,
    server_binding: str | None,
    waits_asleep: str,
    has_gpu: bool,
) -> dict[str, str]:
    """The server's environment: the current one without what is not for it, plus ours."""
    env = {k: v for k, v in current.items() if not _NOT_FOR_THE_SERVER.match(k)}
    env["VLLM_PLUGINS"] = _plugins(current.get("VLLM_PLUGINS"))
    env["TINK_SERVER_MODES"] = ",".join(options.modes)
    env["TINK_SERVER_TOKEN_FILE"] = str(token_file)
    env["TINK_SERVER_CHANNEL_HOST"] = options.host
    env["TINK_SERVER_CHANNEL_PORT"] = str(options.channel_port)
    env["TINK_SERVER_GOLDEN_TIER"] = options.golden_tier
    # What the server leaves free of a GPU is the trainer's: golden weights go to host memory then.
    env["TINK_SERVER_SHARED"] = "1" if options.shared_with_trainer else "0"
    if options.golden_budget_gib is not None:
        env["TINK_SERVER_GOLDEN_BUDGET_GIB"] = str(options.golden_budget_gib)
    if host_ip := _host_ip(options):
        env.setdefault("VLLM_HOST_IP", host_ip)
    env.setdefault("VLLM_NO_USAGE_STATS", "1")
    # vLLM's 5 s are too close to our clients' 2 s on a machine under load: what is written to a
    # connection that it is just closing is lost, and a POST is not sent twice.
    env.setdefault("VLLM_HTTP_TIMEOUT_KEEP_ALIVE", "60")
    if Path(options.model).is_dir():
        env.setdefault("HF_HUB_OFFLINE", "1")
    if not has_gpu:
        env.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        if server_binding is not None:
            env.setdefault("VLLM_CPU_OMP_THREADS_BIND", server_binding)
    env["TINK_SERVER_WAITS_ASLEEP"] = waits_asleep
    return {**env, **options.env}


def _host_ip(options: ServerOptions) -> str | None:
    """Where vLLM's processes meet: on this machine, unless some are on others. None: vLLM looks."""
    over_nodes = (
        options.extra("--nnodes") or options.extra("--distributed-executor-backend") == "ray"
    )
    if not over_nodes:
        return "127.0.0.1"
    return None if options.host in ("0.0.0.0", "::") or is_loopback(options.host) else options.host


def _plugins(current: str | None) -> str:
    """VLLM_PLUGINS filters every plugin group: name what would be loaded anyway, and ours."""
    if current is not None:
        names = [name for name in current.split(",") if name]
    else:
        groups = ("general", "platform", "io_processor", "stat_logger")
        found = {e.name for group in groups for e in entry_points(group=f"vllm.{group}_plugins")}
        names = sorted(found)
    return ",".join(dict.fromkeys([*names, _PLUGIN]))


# -- the process --------------------------------------------------------------------------------------


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
            LaunchFailed: or one of its kinds; a setting or a model with which vLLM would not start.
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
            LaunchFailed: or one of its kinds, in one line, with the log's path.
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
        env = environment(
            self.options,
            os.environ,
            token_file=self.token_file,
            server_binding=binding,
            waits_asleep=placement.who_waits_asleep(),
            has_gpu=gpu,
        )
        self.log_path, self._oom_kills = self._make_log(), count_oom_kills()
        with self.log_path.open("ab") as log:
            self._log_offset = log.tell()
            self._process = subprocess.Popen(
                _watched(command(self.options, has_gpu=gpu)),
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
        while not _answers(client):
            seconds = time.monotonic() - start
            if not self.alive:
                raise self._failure("vLLM ended while starting")
            if seconds > timeout_s:
                raise errors.StartTimeout(
                    f"vLLM was not ready after {timeout_s:g} s "
                    f"({self._stage()}); raise --startup-timeout; log: {self.log_path}"
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


def _memory_line(options: ServerOptions, found: list[gpus.Gpu]) -> str:
    """The plan is a service: a model that it cannot read is none of its business."""
    serve = options.memory()
    try:
        plan = memory_plan.plan_memory(
            memory_plan.read_shape(options.model, revision=options.revision), serve
        )
    except (TinkError, KeyError, ValueError, OSError) as error:
        logger.debug("no memory plan of %s: %s", options.model, error)
        return ""
    return memory_plan.gpu_line(plan, serve, found)


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


def _answers(client: VLLMClient) -> bool:
    try:
        return client.status(timeout_s=5.0).state is ServerState.READY
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
