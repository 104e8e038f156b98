"""What a server is started with: its options, what can be known of them before loading, and vLLM's command
line and environment. Pure, but for a look at the machine before a start.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

from tink_rl import errors, gpus, memory_plan
from tink_rl.errors import ConfigError
from tink_rl.loopback import http_url, is_loopback
from tink_rl.plugin_settings import KEEP_IDLE_S, PluginSettings
from tink_rl.policy.fingerprint import base_fingerprint
from tink_rl.policy.model_dir import model_to_serve
from tink_rl.settings import LORA_RANKS, slot_for
from tink_rl.types import SyncMode

_MODES = {
    # Full mode needs nothing kept ready, so every server offers it.
    "merged": (SyncMode.MERGED, SyncMode.FULL),
    "adapter": (SyncMode.ADAPTER, SyncMode.FULL),
    "both": (SyncMode.ADAPTER, SyncMode.MERGED, SyncMode.FULL),
    "full": (SyncMode.FULL,),
}
_PLUGIN = "tink_rl"
_RECEIVER = "tink_rl.server.receiver.TinkWorkerExtension"
# Our own settings that vLLM would misread or warn about, and what a launcher such as torchrun or
# accelerate leaves in the environment of a trainer.
_NOT_FOR_THE_SERVER = re.compile(
    r"^(USE_VLLM|USE_MEGATRON|MEGATRON_SERVER_URL|VLLM_(BASE_URL|HOST|PORT|GROUP_PORT|TIMEOUT|"
    r"ENABLE_LORA|MAX_LORAS|MAX_LORA_RANK)|RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|MASTER_ADDR|"
    r"MASTER_PORT|ACCELERATE_.*|TORCHELASTIC_.*|FSDP_.*|OMP_(NUM_THREADS|WAIT_POLICY)|TINK_.*)$"
)


@dataclass(frozen=True, kw_only=True)
class ServerOptions(memory_plan.ServePlan):
    """What to start. Example: `ServerOptions(model="models/base", mode="merged", port=8000)`"""

    model: str
    """Directory of the base model, or a hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; None: its main branch."""
    subfolder: str = ""
    """Of the model in that directory or repository."""
    host: str = "127.0.0.1"
    port: int = 0
    """0 picks a free one."""
    max_cpu_loras: int | None = None
    token_file: str | None = None
    golden_budget_gib: float | None = None
    keep_idle_s: float = KEEP_IDLE_S
    """For so long a policy stays served that nobody publishes or samples; 0: until its place is needed."""
    channel_port: int = 0
    startup_timeout_s: float | None = None
    """None: 600, or 1800 with a GPU (compiling, capturing graphs) or a hub id; downloading is not in it."""
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
        return 1800.0 if has_gpu or not Path(self.model).is_dir() else 600.0

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
        LaunchFailed, ConfigError.
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
        raise errors.LaunchFailed(
            f"--max-lora-rank {options.max_lora_rank}: vLLM has kernels for "
            f"{', '.join(map(str, LORA_RANKS))}{hint}",
            code="rank_not_allowed",
        )
    model = model_to_serve(options.model, options.revision, options.subfolder)
    if any(Path(model).expanduser().glob("*.safetensors*")):
        base_fingerprint(model)  # what is damaged is said now, not after vLLM has started
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
            raise errors.LaunchFailed(
                f"port {port} on {host} is in use{port_holder(port)}; stop that process or give another "
                f"--port ({error.strerror})",
                code="port_taken",
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
    launch_id: str | None = None,
    server_binding: str | None,
    waits_asleep: str,
    has_gpu: bool,
) -> dict[str, str]:
    """The server's environment: the current one without what is not for it, plus ours."""
    env = {k: v for k, v in current.items() if not _NOT_FOR_THE_SERVER.match(k)}
    env["VLLM_PLUGINS"] = _plugins(current.get("VLLM_PLUGINS"))
    env |= PluginSettings.load(
        modes=",".join(options.modes),
        token_file=str(token_file),
        launch_id=launch_id,
        channel_host=options.host,
        channel_port=options.channel_port,
        golden_tier=options.golden_tier,
        golden_budget_gib=options.golden_budget_gib,
        keep_idle_s=options.keep_idle_s,
        shared=options.shared_with_trainer,
        waits_asleep=waits_asleep,
    ).as_environment()
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
