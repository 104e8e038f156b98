"""Every way in which `tink_rl` refuses or fails: a code and an HTTP status per cause.

```text
TinkError
├ what was asked for     ConfigError, BadRequest, ModeUnavailable, SecondPublisher
├ the adapter            UnsupportedAdapter, NonFiniteWeights, PathNotAllowed, AdapterPathMissing,
│                        AdapterFilesInvalid ─ AdapterConfigInvalid
├ the packet and its     DigestMismatch, BaseMismatch, RankExceeded, UnknownModules, ShapeMismatch,
│ server                 IncompleteGroup, WorkersDiffer, ProbeFailed
├ who may publish what   ProtocolMismatch, BadToken, LeaseHeld, StaleEpoch, UnknownVersion, VersionTaken
├ a publish that failed  ChannelLost, SegmentUnreachable, DrainTimeout, CommitFailed, NotReady,
│                        PublishFailed, RankFailed
├ the server             ServerUnreachable ─ TLSFailed, RequestTimeout, PluginMissing, LaunchFailed
└ the sampling service   SamplingRefused, NotSupportedByBackend, UnknownAdapter, AdapterConflict,
                         StorageFull, StoreDamaged, QueueFull, DeadlineExceeded, RequestCancelled,
                         BackendError, EngineUnavailable
```

Catch a class; compare `error.code` for a cause that no class tells apart (`AdapterFilesInvalid.codes`).
Whether it helps to try again, and whose fault it is, stands on the class (`retry`, `blame`); what it says
and what mends it in `tink_rl.remedies`. The message carries what was given, what was expected and the
next command or setting. On the wire an error is `{"error": {"code", "message", "details"}}`; `from_wire`
gives the exception back, so that a trainer sees the one that the server raised.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum, Flag, auto
from typing import Any, ClassVar, Self


class Retry(Enum):
    """Whether the same request may succeed if it is sent again."""

    NO = auto()
    """Somebody has to mend something first."""
    LATER = auto()
    """It is over by itself: a lease ends, requests end, another registration ends."""
    RECONNECT = auto()
    """Nobody knows whether it was done: ask again, over a new channel."""
    RESEND = auto()
    """It was not done: send the bytes again, over another transport if this one cannot carry them."""


class Blame(Flag):
    """Which requests to the sampling service are themselves at fault; any other error is the server's."""

    SERVER = 0
    SAMPLING = auto()
    REGISTERING = auto()


class TinkError(Exception):
    """Base of all errors of this package.

    Attributes:
        code: Stable identifier on the wire and in tests.
        status: HTTP status with which the server plugin answers.
        codes: More codes of this class, with their status; `code=` chooses one.
        retry: Whether to try again.
        blame: Which requests to the sampling service are at fault.
        details: JSON-able facts about this occurrence (which tensor, which replica, ...).
    """

    code: str = "internal"
    status: int = 500
    codes: ClassVar[Mapping[str, int]] = {}
    retry: ClassVar[Retry] = Retry.NO
    blame: ClassVar[Blame] = Blame.SERVER

    def __init__(self, message: str, *, code: str | None = None, **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.details = details
        if code is not None and code != type(self).code:
            self.code, self.status = code, self.codes[code]

    def restated(self, message: str, **details: Any) -> Self:
        """The same error with another message and more details."""
        return type(self)(message, code=self.code, **{**self.details, **details})

    def to_wire(self) -> dict[str, Any]:
        """The JSON body for this error."""
        return {"error": {"code": self.code, "message": self.message, "details": self.details}}


class ConfigError(TinkError, ValueError):
    """A setting is wrong, or two settings contradict each other."""

    code, status, blame = "config_invalid", 400, Blame.REGISTERING
    codes = {"seam_moved": 500}


class BadRequest(TinkError, ValueError):
    """A request does not have the form that the route expects."""

    code, status, blame = "bad_request", 400, Blame.REGISTERING
    codes = {
        "invalid_json": 400,
        "body_timeout": 408,
        "unsupported_media_type": 415,
        "request_id_reused": 409,
    }


class UnsupportedAdapter(TinkError, ValueError):
    """The adapter uses a feature that no available sync mode can express."""

    code, status, blame = "unsupported_adapter", 422, Blame.REGISTERING


class NonFiniteWeights(TinkError, ValueError):
    """A tensor holds NaN, infinity, or a magnitude beyond the bound of the server."""

    code, status, blame = "nonfinite_weights", 422, Blame.REGISTERING
    codes = {"weight_out_of_range": 422}


class AdapterFilesInvalid(TinkError, ValueError):
    """A directory cannot be read as a PEFT adapter: missing, damaged, incomplete, too large, pickled."""

    code, status, blame = "adapter_files_invalid", 422, Blame.REGISTERING
    codes = dict.fromkeys(
        (
            "adapter_corrupt",
            "adapter_incomplete",
            "rank_mismatch",
            "adapter_too_large",
            "pickle_refused",
        ),
        422,
    )


class AdapterConfigInvalid(AdapterFilesInvalid):
    """`adapter_config.json` is missing, not strict JSON, or holds a number that makes no sense."""

    code = "adapter_config_invalid"


class DigestMismatch(TinkError):
    """The bytes that arrived are not the bytes that were sent, or not as many."""

    code, status, retry = "digest_mismatch", 422, Retry.RESEND
    codes = {"truncated_packet": 422}


class BaseMismatch(TinkError):
    """The adapter was trained on another base model than the one that is served."""

    code, status, blame = "base_mismatch", 422, Blame.REGISTERING


class RankExceeded(TinkError):
    """The adapter's rank does not fit the server's LoRA slots."""

    code, status, blame = "rank_exceeded", 422, Blame.REGISTERING


class UnknownModules(TinkError):
    """Tensor names of the packet match no module of the served model."""

    code, status, blame = "unknown_modules", 422, Blame.REGISTERING


class ShapeMismatch(TinkError):
    """A tensor's shape or dtype does not fit the module of the served model."""

    code, status, blame = "shape_mismatch", 422, Blame.REGISTERING
    codes = {"dtype_mismatch": 422}


class IncompleteGroup(TinkError):
    """Only a part of the tensors that the served model keeps in one module was sent."""

    code, status, blame = "incomplete_group", 422, Blame.REGISTERING


class ProtocolMismatch(TinkError):
    """Trainer and server speak different versions of the tink_rl protocol."""

    code, status = "protocol_mismatch", 426


class BadToken(TinkError):
    """The bearer token of a request is missing, wrong, or not one for this route."""

    code, status = "bad_token", 401
    codes = {"wrong_scope": 403}


class LeaseHeld(TinkError):
    """Another writer publishes this policy name on this server."""

    code, status, retry = "lease_held", 409, Retry.LATER


class StaleEpoch(TinkError):
    """The channel of this request was replaced by a newer one."""

    code, status, retry = "stale_epoch", 410, Retry.RECONNECT


class ModeUnavailable(TinkError):
    """The server cannot serve this sync mode: not started for it, no memory, or taken by another policy."""

    code, status = "mode_unavailable", 405
    codes = {"golden_does_not_fit": 507}


class UnknownVersion(TinkError):
    """The server does not hold this policy version (any more)."""

    code, status, retry = "unknown_version", 404, Retry.RECONNECT


class VersionTaken(TinkError):
    """This version number was committed with other weights before; a name means one set of weights."""

    code, status = "version_taken", 409


class NotReady(TinkError):
    """The server's weights are in no defined state; it serves nothing until it is healed."""

    code, status = "not_ready", 503


class CommitFailed(TinkError):
    """A commit failed midway; the server is NOT READY until the next publish folds from golden."""

    code, status, retry = "commit_failed", 500, Retry.RESEND


class DrainTimeout(TinkError):
    """Running requests did not end within the drain deadline; nothing was written."""

    code, status, retry = "drain_timeout", 408, Retry.LATER


class ChannelLost(TinkError, ConnectionError):
    """The communicator's peer is gone, or a transfer did not end within its deadline."""

    code, status, retry = "channel_lost", 502, Retry.RECONNECT


class SegmentUnreachable(TinkError):
    """Shared memory cannot carry the bytes here; the publisher takes gloo instead."""

    code, status, retry = "segment_unreachable", 424, Retry.RESEND


class WorkersDiffer(TinkError):
    """The workers of one server answered differently; their state cannot be said."""

    code, status = "workers_differ", 500


class PathNotAllowed(TinkError, ValueError):
    """A path lies outside the adapter roots, or is not a plain file or directory."""

    code, status, blame = "path_not_allowed", 403, Blame.REGISTERING


class AdapterPathMissing(TinkError, ValueError):
    """The LoRA path does not exist."""

    code, status, blame = "lora_path_missing", 422, Blame.REGISTERING


class StorageFull(TinkError, OSError):
    """The adapter store, or a checkpoint, cannot be written."""

    code, status, blame = "insufficient_storage", 507, Blame.REGISTERING


class StoreDamaged(TinkError):
    """The adapter store or its registry no longer holds what was written."""

    code, status = "store_damaged", 500


class UnknownAdapter(TinkError, KeyError):
    """No adapter is registered under this id."""

    code, status = "unknown_adapter", 404
    blame = Blame.SAMPLING | Blame.REGISTERING

    def __str__(self) -> str:
        return self.message  # KeyError would show its repr


class AdapterConflict(TinkError):
    """This adapter id was registered with other bytes at the same time."""

    code, status, retry, blame = "name_exists", 409, Retry.LATER, Blame.REGISTERING


class NotSupportedByBackend(TinkError, ValueError):
    """The backend cannot do what the request asks; nothing is dropped in silence."""

    code, status = "unsupported_by_backend", 400
    blame = Blame.SAMPLING | Blame.REGISTERING


class BackendError(TinkError):
    """The backend answered with something that is not a completion."""

    code, status = "backend_error", 502


class EngineUnavailable(TinkError, ConnectionError):
    """The engine behind the worker does not answer; try again."""

    code, status, retry = "engine_unavailable", 503, Retry.LATER


class QueueFull(TinkError):
    """The queue holds as many requests as it may; `details["retry_after_s"]` says when to try again."""

    code, status, retry, blame = "overloaded", 429, Retry.LATER, Blame.REGISTERING


class DeadlineExceeded(TinkError, TimeoutError):
    """A request was not finished by its deadline."""

    code, status = "deadline_exceeded", 504


class RequestCancelled(TinkError):
    """A request ended unfinished: its client went away, or the worker is stopping."""

    code, status = "cancelled", 499
    codes = {"shutting_down": 503}


class ServerUnreachable(TinkError, ConnectionError):
    """No vLLM server answers at the URL."""

    code, status, retry = "server_unreachable", 503, Retry.RECONNECT


class TLSFailed(ServerUnreachable):
    """The server's certificate is not trusted, or one side speaks TLS and the other does not."""

    code = "tls_failed"


class RequestTimeout(TinkError, TimeoutError):
    """The server did not answer within the deadline of the request."""

    code, status, retry = "request_timeout", 504, Retry.RECONNECT


class PluginMissing(TinkError):
    """The vLLM server runs without the tink_rl plugin, or without loading adapters while it runs."""

    code, status = "plugin_missing", 501
    codes = {"runtime_loading_off": 501}


class SamplingRefused(TinkError, ValueError):
    """vLLM refused a sampling request."""

    code, status, blame = "sampling_refused", 400, Blame.SAMPLING


class ProbeFailed(TinkError):
    """The server's logprobs of the probe prompt are not those of the trainer's policy."""

    code, status = "probe_failed", 412


class SecondPublisher(TinkError):
    """This model is already published by another trainer, callback or attach() in this process."""

    code, status = "second_publisher", 409


class PublishFailed(TinkError):
    """A publish failed twice; `details` name the phase and the replica, `__cause__` the reason."""

    code, status = "publish_failed", 500


class RankFailed(TinkError):
    """Another process of this run failed, or does not answer; the run ends on all of them."""

    code, status = "rank_failed", 500


class LaunchFailed(TinkError):
    """A managed vLLM server could not be started. `exit_code` is what `tink-rl serve` exits with."""

    code, status = "launch_failed", 500
    exit_codes: ClassVar[Mapping[str, int]] = {
        "port_taken": 3,
        "model_not_found": 4,
        "rank_not_allowed": 5,
        "out_of_memory": 6,
        "start_timeout": 7,
    }
    codes = dict.fromkeys(exit_codes, 500)

    @property
    def exit_code(self) -> int:
        """Says to scripts what the code says to people."""
        return self.exit_codes.get(self.code, 1)


def by_code() -> dict[str, type[TinkError]]:
    """Every code, and the class that carries it."""
    of_class = (
        (cls, (cls.code, *vars(cls).get("codes", ()))) for cls in _all_subclasses(TinkError)
    )
    return {code: cls for cls, codes in of_class for code in codes}


def _all_subclasses(cls: type[TinkError]) -> list[type[TinkError]]:
    return [cls, *(found for sub in cls.__subclasses__() for found in _all_subclasses(sub))]


def from_wire(body: Any, status: int) -> TinkError:
    """The exception that the server raised, from its JSON body.

    An unknown code (a newer server) becomes a plain `TinkError` that carries status and message.
    """
    error = body.get("error") if isinstance(body, dict) else None
    if not isinstance(error, dict):
        return TinkError(f"the server answered HTTP {status}: {str(body)[:300]}", status=status)
    code = str(error.get("code"))
    cls, details = by_code().get(code), error.get("details")
    details = details if isinstance(details, dict) else {}
    if cls is None:
        return TinkError(str(error.get("message")), **details)
    return cls(str(error.get("message")), code=code, **details)
