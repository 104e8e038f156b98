"""Settings, each explained once. A leaf: imports neither torch, TRL nor vLLM."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import get_args

from tink_rl.errors import ConfigError
from tink_rl.tokens import default_token_file, vllm_api_key
from tink_rl.types import OnRunning, PolicyVersion, SyncMode, Transport

MODES = ("auto", *SyncMode)
ON_RUNNING = get_args(OnRunning)
_LEAST = {"keep_versions": 1, "probe_every": 0, "rollout_log_every": 0, "max_staleness": 0}


@dataclass(frozen=True, kw_only=True)
class SyncConfig:
    """How a policy is published and sampled.

    Example: `SyncConfig(mode="adapter", policy="math", servers=("http://10.0.0.7:8000",))`
    """

    mode: str = field(
        default="auto",
        metadata={
            "help": "`merged` folds the adapter into the served weights (fastest decode, one policy), "
            "`adapter` uses a LoRA slot (many policies), `full` sends whole tensors (what no adapter can "
            "say), `auto` takes what the server offers and says which."
        },
    )
    policy: str = field(
        default="policy", metadata={"help": "Name; versions are NAME@1, NAME@2, ..."}
    )
    servers: tuple[str, ...] = field(
        default=(),
        metadata={"help": "URL(s) of the vLLM servers; empty: TRL's vllm_server_* arguments."},
    )
    token: str | None = field(default=None, metadata={"help": "Token of the control routes."})
    token_file: str | None = field(
        default=None,
        metadata={
            "help": "File with that token; else TINK_TOKEN, TINK_TOKEN_FILE, then the default."
        },
    )
    api_key: str | None = field(
        default=None,
        metadata={
            "help": "vLLM's own --api-key, if it has one; else TINK_VLLM_API_KEY_FILE, VLLM_API_KEY."
        },
    )
    ca_file: str | None = field(
        default=None,
        metadata={
            "help": "https: PEM file of the authorities to trust beside the system's (or SSL_CERT_FILE's); "
            "else TINK_CA_FILE."
        },
    )
    transport: str = field(
        default="auto",
        metadata={
            "help": "What carries the bytes: `shm` (one machine), `gloo`, `http` (no port needed), "
            "or `auto`: shared memory where both sides can map it, else gloo."
        },
    )
    on_running: OnRunning = field(
        default="drain",
        metadata={"help": "Merged commit: `drain` running requests, or `abort` them."},
    )
    bucket_mib: float = field(
        default=64.0,
        metadata={"help": "Full mode: MiB of whole tensors that travel, and wait, at once."},
    )
    keep_versions: int = field(
        default=2,
        metadata={"help": "Adapter mode: versions that stay served, the newest included."},
    )
    max_staleness: int = field(
        default=0,
        metadata={
            "help": "How many versions old a row may be when it is trained on. 0: sample, then train. 1: the "
            "next batch is sampled while this one trains. More needs mode `adapter`. See docs/overlap.md."
        },
    )
    probe_every: int = field(
        default=10,
        metadata={
            "help": "Compare trainer and server logprobs on every k-th publish; 0: only at start."
        },
    )
    probe_tolerance: float | None = field(
        default=None,
        metadata={
            "help": "Largest allowed |logprob difference| of a probe, in nats; None: what rounding explains."
        },
    )
    rollout_log_every: int = field(
        default=1,
        metadata={"help": "Write the rollouts of every k-th step to rollouts.jsonl; 0: none."},
    )
    join_timeout_s: float = field(default=30.0, metadata={"help": "Deadline of opening a channel."})
    stage_timeout_s: float = field(
        default=60.0, metadata={"help": "Deadline of moving one packet."}
    )
    commit_timeout_s: float = field(default=60.0, metadata={"help": "Deadline of one commit."})
    drain_timeout_s: float = field(
        default=30.0, metadata={"help": "Merged commit: how long running requests may take to end."}
    )
    lease_wait_s: float = field(
        default=20.0,
        metadata={"help": "How long to wait for a dead writer's lease of this policy to expire."},
    )
    request_timeout_s: float = field(
        default=600.0, metadata={"help": "Deadline of one sampling request."}
    )

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            ConfigError: names the field, the value and what is allowed.
        """
        given = self.servers.split(",") if isinstance(self.servers, str) else self.servers
        object.__setattr__(self, "servers", tuple(url for url in given if url))
        _one_of("mode", self.mode, MODES)
        if self.transport == "nccl":
            raise ConfigError(
                "SyncConfig.transport='nccl': NCCL is not offered (two ranks of it cannot share a GPU, and "
                "a lost peer would end vLLM's worker); use 'auto': shared memory, or gloo between machines"
            )
        _one_of("transport", self.transport, tuple(Transport))
        _one_of("on_running", self.on_running, ON_RUNNING)
        try:
            PolicyVersion(policy=self.policy, version=0)
        except ValueError as error:
            raise ConfigError(f"SyncConfig.policy: {error}") from error
        if not self.bucket_mib > 0:
            raise ConfigError(f"SyncConfig.bucket_mib={self.bucket_mib}: expected MiB > 0")
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value < least:
                raise ConfigError(f"SyncConfig.{name}={value}: expected at least {least}")
        if self.max_staleness > 1 and self.mode in (SyncMode.MERGED, SyncMode.FULL):
            raise ConfigError(
                f"SyncConfig.max_staleness={self.max_staleness} with mode={self.mode!r}: the served weights "
                "hold one version at a time, so rows can be one version old at most; set max_staleness=1, "
                "or mode='adapter'"
            )
        if self.probe_tolerance is not None and not self.probe_tolerance > 0:
            raise ConfigError(
                f"SyncConfig.probe_tolerance={self.probe_tolerance}: expected nats > 0, or None"
            )
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name.endswith("_s") and not (isinstance(value, (int, float)) and value >= 0):
                raise ConfigError(f"SyncConfig.{item.name}={value!r}: expected seconds >= 0")

    @property
    def wanted_mode(self) -> str:
        """`mode`, where only slots hold as many versions side by side as `max_staleness` needs."""
        return SyncMode.ADAPTER if self.mode == "auto" and self.max_staleness > 1 else self.mode

    def read_token(self) -> str:
        """The token of the control routes: given, from the file, the environment or the default file.

        Raises:
            ConfigError: there is none.
        """
        if self.token or (self.token_file is None and os.environ.get("TINK_TOKEN")):
            return self.token or os.environ["TINK_TOKEN"]
        path = Path(
            self.token_file or os.environ.get("TINK_TOKEN_FILE") or default_token_file()
        ).expanduser()
        try:
            return path.read_text().strip()
        except OSError as error:
            raise ConfigError(
                f"no token for the server's control routes: {path} cannot be read "
                f"({error.strerror}); start the server with `tink-rl serve`, which makes one, or "
                "set SyncConfig(token_file=...)"
            ) from error

    def read_api_key(self) -> str | None:
        """vLLM's own key: given, from the file of TINK_VLLM_API_KEY_FILE, or VLLM_API_KEY; None: none.

        Raises:
            ConfigError: the file cannot be read, or is empty.
        """
        return vllm_api_key(self.api_key)


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        names = ", ".join(str(item) for item in allowed)
        raise ConfigError(f"SyncConfig.{name}={value!r}: expected one of {names}")
