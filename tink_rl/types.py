"""Frozen records and enums that every package shares. A leaf: imports neither torch, TRL nor vLLM."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

PROTOCOL_VERSION = 3
"""Version of the control routes and the packet header; both sides state it at join."""

FULL_LOGPROBS = "tink_full_logprobs"
"""In a request's `vllm_xargs`: send the sampled tokens' logprobs as they were before top-k, a grammar, ..."""
IDS_ONLY = "tink_ids_only"
"""In a request's `vllm_xargs`: nobody reads its texts, so no token is decoded."""

METRICS_FILE = "metrics.jsonl"
"""A run writes a line of it per logged step; `tink-rl report` reads it."""
ROLLOUT_FILE = "rollouts.jsonl"
"""A line per completion; see `training/rollout_log.py`."""

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
_POLICY_NAME = re.compile(rf"^{_NAME}$")
_POLICY_VERSION = re.compile(rf"^(?P<policy>{_NAME})@(?P<version>[0-9]{{1,18}})$")


class SyncMode(StrEnum):
    """How a version becomes the served policy."""

    ADAPTER = "adapter"
    """Into one of vLLM's LoRA slots, served beside other versions."""
    MERGED = "merged"
    """Folded into the served weights by the receiver."""
    FULL = "full"
    """Whole tensors, as whole fused groups, in place of the served ones."""


class Phase(StrEnum):
    """The steps of one publish, in order; an error names the one it happened in."""

    COLLECT = "collect"
    NORMALISE = "normalise"
    PACK = "pack"
    JOIN = "join"
    STAGE = "stage"
    COMMIT = "commit"
    VERIFY = "verify"
    POINT = "point"


OnRunning = Literal["drain", "abort"]
"""What becomes of requests that run while weights are to be written."""


class ServerState(StrEnum):
    """Whether the weights that a server holds are in a state that can be said."""

    READY = "ready"
    COMMITTING = "committing"
    NOT_READY = "not_ready"


class Transport(StrEnum):
    """What carries the packet's bytes."""

    AUTO = "auto"
    SHM = "shm"
    """A segment of shared memory: trainer and server on one machine, under one user."""
    GLOO = "gloo"
    HTTP = "http"


@dataclass(frozen=True, kw_only=True)
class PolicyVersion:
    """One version of one policy, written `policy@17`. Version 0 is the base, never published.

    >>> str(PolicyVersion(policy="demo", version=17))
    'demo@17'
    """

    policy: str
    version: int

    def __post_init__(self) -> None:
        if not _POLICY_NAME.match(self.policy):
            raise ValueError(
                f"policy name {self.policy!r}: expected 1-128 letters, digits, '.', '_' or '-', "
                "starting with a letter or digit; set SyncConfig(policy=...)"
            )
        if self.version < 0:
            raise ValueError(f"policy version {self.version!r}: expected an integer >= 0")

    def __str__(self) -> str:
        return f"{self.policy}@{self.version}"

    @classmethod
    def find(cls, name: str) -> PolicyVersion | None:
        """The version that `name` says, or None if it does not have the form `policy@N`."""
        match = _POLICY_VERSION.match(name)
        return match and cls(policy=match["policy"], version=int(match["version"]))

    @classmethod
    def parse(cls, name: str) -> PolicyVersion:
        """The version that `policy@N` names.

        Raises:
            ValueError: `name` does not have that form.
        """
        found = cls.find(name)
        if found is None:
            raise ValueError(f"policy version {name!r}: expected NAME@NUMBER, such as policy@17")
        return found


@dataclass(frozen=True, kw_only=True)
class PublishRecord:
    """What one publish did.

    Example: `PublishRecord(policy="demo", version=17, digest="9f..", mode=SyncMode.MERGED,
    num_bytes=393216, seconds=0.031, held_seconds=0.012, phase_seconds={"stage": 0.006, ...},
    published=True)`
    """

    policy: str
    version: int
    digest: str
    """blake3 of the packet, as every replica says that it serves it."""
    mode: SyncMode
    num_bytes: int
    """Bytes of the flat buffer that each replica received; 0 if nothing had to be sent."""
    seconds: float
    held_seconds: float
    """Longest time that a replica held new requests (merged mode; 0 in adapter mode)."""
    phase_seconds: dict[str, float] = field(default_factory=dict)
    published: bool = True
    """False if this digest was already served, so that nothing was sent."""
    probe_gap: float | None = None
    """Largest |trainer logprob - server logprob| on the probe prompt, if this publish probed."""

    @property
    def name(self) -> str:
        """The model name under which the server serves this version."""
        return f"{self.policy}@{self.version}"

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> PublishRecord:
        """The record whose fields are `data`, as another process of the run got them."""
        return cls(**{**data, "mode": SyncMode(data["mode"])})


@dataclass(frozen=True, kw_only=True)
class PendingRequest:
    """A request to a server that has not ended: `PendingRequest(state="held", what="POST
    /v1/completions", address="10.0.0.7:51234", age_s=3.2)`"""

    state: str
    """"receiving" its body, "held" because a commit waits or writes, or "running"."""
    what: str
    """Method and path."""
    address: str
    """Of the client."""
    age_s: float
    """Since its first byte."""


@dataclass(frozen=True, kw_only=True)
class ServedPolicy:
    """What a server serves of one policy: `ServedPolicy(policy="math", mode=SyncMode.ADAPTER,
    versions=("math@3", "math@4"), owner=None, lease_s=None, num_bytes=786432, idle_s=41.5)`"""

    policy: str
    mode: SyncMode
    versions: tuple[str, ...]
    owner: str | None
    """Who publishes or keeps it; None: whoever needs its place may take it."""
    lease_s: float | None
    """Until the owner's lease ends unless renewed; None: nobody holds one."""
    num_bytes: int
    """Of the versions' packets; 0 for whole tensors."""
    idle_s: float
    """Since a version was asked for or published last."""


@dataclass(frozen=True, kw_only=True)
class ServerStatus:
    """What `GET /tink/v1/status` says of one server."""

    protocol: int
    incarnation: str
    """Identifier of one life of the server process."""
    state: ServerState
    modes: tuple[SyncMode, ...]
    """Sync modes that the server was started for."""
    world_size: int
    """Number of vLLM workers, each of which joins a channel."""
    base_model: str
    """Name under which the untouched base is (or was) served."""
    base_fingerprint: str
    dtype: str
    adapter_dtype: str
    max_lora_rank: int
    max_loras: int
    max_model_len: int
    logprobs_mode: str
    device: str
    served: dict[str, str]
    """Name `policy@N` -> digest of every version that can be sampled."""
    base_revision: str | None = None
    """Commit of the hub's that is served; None: the base is a directory."""
    vocab_size: int | None = None
    """Rows of the served embedding: token ids are below it."""
    max_prompts: int = 1024
    """Prompts that one request may hold."""
    merged: str | None = None
    """The version folded into the weights, or None for the base."""
    full: str | None = None
    """The version whose whole tensors are served, or None; slot adapters add to *its* weights."""
    reason: str | None = None
    """Why the server is not ready."""
    golden: dict[str, Any] = field(default_factory=dict)
    """Golden weights: tier, bytes, budget."""
    versions: dict[str, str] = field(default_factory=dict)
    """Versions of vllm, torch and tink_rl in the server."""
    amx: bool | None = None
    """Whether vLLM's workers may use AMX's tile registers; None: torch reports no AMX there."""
    base_files: str | None = None
    """Which files the base was loaded from (`policy.content.files_identity`); None: not known."""
    draining: dict[str, int] = field(default_factory=dict)
    """Dropped versions whose host copy waits for requests that may name them, and how many those are."""
    running: int = 0
    """Requests that were admitted and have not ended."""
    holding: bool = False
    """Whether new requests are held, because a commit waits for the running ones or writes."""
    launch_id: str | None = None
    """By which its launcher knows it, on a port where two may have been started."""
    policies: tuple[ServedPolicy, ...] = ()
    """What of each policy is served, and whose it is."""
    pending: tuple[PendingRequest, ...] = ()
    """The oldest requests that have not ended."""
    no_full_logprobs: str | None = "its tink_rl is older than the trainer's"
    """Why no request may ask for logprobs over the whole vocabulary; None: any may."""


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One sampled completion, and the weights that produced it.

    Example: `Completion(prompt_index=0, index=0, text="1347", token_ids=[5, 7, 8, 11, 2],
    logprobs=[-0.1, ...], finish_reason="stop", model_id="math", version=3, digest="9f..")`
    """

    prompt_index: int
    """Which prompt of the request."""
    index: int
    """Which of its `n` completions."""
    text: str
    token_ids: list[int] | None
    """`[T]`; None where the backend does not say."""
    logprobs: list[float] | None
    """`[T]`, of the sampled tokens; None if not asked for."""
    top_logprobs: list[dict[int, float]] | None = None
    """`[T]`: token id -> logprob, if more than the sampled one was asked for."""
    prompt_token_ids: list[int] | None = None
    finish_reason: str | None = None
    """"stop", "length" or None where the backend does not say."""
    model_id: str | None = None
    """What was asked for; None is the base."""
    version: int | None = None
    """Version of the adapter or policy that sampled this; None for the base."""
    digest: str | None = None
    """Digest of that version; None for the base."""
