"""Every way in which `tink_rl` says no: one class, one wire code and one HTTP status per cause.

The message of an error carries what was given, what was expected and the next command or setting.
On the wire an error is `{"error": {"code", "message", "details"}}`; `from_wire` gives the class back,
so that a trainer sees the same exception that the server raised.
"""

from __future__ import annotations

from typing import Any, ClassVar


class TinkError(Exception):
    """Base of all errors of this package.

    Attributes:
        code: Stable identifier on the wire and in tests.
        status: HTTP status with which the server plugin answers.
        details: JSON-able facts about this occurrence (which tensor, which replica, ...).
    """

    code: ClassVar[str] = "internal"
    status: ClassVar[int] = 500

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.details = details

    def to_wire(self) -> dict[str, Any]:
        """The JSON body for this error."""
        return {"error": {"code": self.code, "message": self.message, "details": self.details}}


class ConfigError(TinkError, ValueError):
    """A setting is wrong, or two settings contradict each other."""

    code, status = "config_invalid", 400


class BadRequest(TinkError, ValueError):
    """A control request does not have the form that the route expects."""

    code, status = "bad_request", 400


# -- the adapter, before it travels ---------------------------------------------------------------


class UnsupportedAdapter(TinkError, ValueError):
    """The adapter uses a feature that no available sync mode can express."""

    code, status = "unsupported_adapter", 422


class NonFiniteWeights(TinkError, ValueError):
    """A tensor holds NaN or infinity."""

    code, status = "nonfinite_weights", 422


class WeightOutOfRange(TinkError, ValueError):
    """A tensor holds a value whose magnitude exceeds the bound of the server."""

    code, status = "weight_out_of_range", 422


class AdapterFilesInvalid(TinkError, ValueError):
    """A PEFT directory cannot be read as one (missing, truncated, pickle, config not sane)."""

    code, status = "adapter_files_invalid", 422


class AdapterCorrupt(AdapterFilesInvalid):
    """The weights file is damaged: truncated, or a header that does not describe its bytes."""

    code = "adapter_corrupt"


class AdapterConfigInvalid(AdapterFilesInvalid):
    """`adapter_config.json` is missing, no strict JSON, or holds a number that makes no sense."""

    code = "adapter_config_invalid"


class AdapterIncomplete(AdapterFilesInvalid):
    """There are no LoRA tensors, or a module has only one of its two."""

    code = "adapter_incomplete"


class RankMismatch(AdapterFilesInvalid):
    """The tensors have another rank than the config says."""

    code = "rank_mismatch"


class AdapterTooLarge(AdapterFilesInvalid):
    """A file of the adapter exceeds what the store takes."""

    code = "adapter_too_large"


# -- the packet, on arrival -----------------------------------------------------------------------


class DigestMismatch(TinkError):
    """The bytes that arrived are not the bytes that were sent."""

    code, status = "digest_mismatch", 422


class TruncatedPacket(TinkError):
    """Fewer (or more) bytes arrived than the header announced."""

    code, status = "truncated_packet", 422


class BaseMismatch(TinkError):
    """The adapter was trained on another base model than the one that is served."""

    code, status = "base_mismatch", 422


class RankExceeded(TinkError):
    """The adapter's rank does not fit the server's LoRA slots."""

    code, status = "rank_exceeded", 422


class UnknownModules(TinkError):
    """Tensor names of the packet match no module of the served model."""

    code, status = "unknown_modules", 422


class ShapeMismatch(TinkError):
    """A tensor's shape does not fit the module of the served model."""

    code, status = "shape_mismatch", 422


class IncompleteGroup(TinkError):
    """Only a part of the tensors that the served model keeps in one module was sent."""

    code, status = "incomplete_group", 422


class DtypeMismatch(TinkError):
    """A tensor's dtype is not one that the server takes."""

    code, status = "dtype_mismatch", 422


# -- control plane --------------------------------------------------------------------------------


class ProtocolMismatch(TinkError):
    """Trainer and server speak different versions of the tink_rl protocol."""

    code, status = "protocol_mismatch", 426


class BadToken(TinkError):
    """The bearer token of a control request is missing or wrong."""

    code, status = "bad_token", 401


class LeaseHeld(TinkError):
    """Another writer publishes this policy name on this server."""

    code, status = "lease_held", 409


class StaleEpoch(TinkError):
    """The channel of this request was replaced by a newer one."""

    code, status = "stale_epoch", 410


class ModeUnavailable(TinkError):
    """The server was not started for this sync mode, or the mode is taken by another policy."""

    code, status = "mode_unavailable", 405


class UnknownVersion(TinkError):
    """The server does not hold this policy version (any more)."""

    code, status = "unknown_version", 404


class VersionTaken(TinkError):
    """This version number was committed with other weights before; a name means one set of weights."""

    code, status = "version_taken", 409


class NotReady(TinkError):
    """The server's weights are in no defined state; it serves nothing until it is healed."""

    code, status = "not_ready", 503


class CommitFailed(TinkError):
    """A commit failed midway; the server is NOT READY until the next publish folds from golden."""

    code, status = "commit_failed", 500


class DrainTimeout(TinkError):
    """Running requests did not end within the drain deadline; nothing was written."""

    code, status = "drain_timeout", 408


class GoldenDoesNotFit(TinkError):
    """The golden weights of merged mode exceed their memory budget."""

    code, status = "golden_does_not_fit", 507


class ChannelLost(TinkError, ConnectionError):
    """The communicator's peer is gone, or a transfer did not end within its deadline."""

    code, status = "channel_lost", 502


class SegmentUnreachable(TinkError):
    """Shared memory cannot carry the bytes here; the publisher takes gloo instead."""

    code, status = "segment_unreachable", 424


class WorkersDiffer(TinkError):
    """The workers of one server answered differently; their state cannot be said."""

    code, status = "workers_differ", 500


# -- the service: adapters by path, requests from strangers ---------------------------------------


class PathNotAllowed(TinkError, ValueError):
    """A path lies outside the adapter roots, or is no plain file or directory."""

    code, status = "path_not_allowed", 403


class AdapterPathMissing(TinkError, ValueError):
    """The LoRA path does not exist."""

    code, status = "lora_path_missing", 422


class PickleRefused(AdapterFilesInvalid):
    """Only a pickled `adapter_model.bin` is there; pickles are never opened."""

    code = "pickle_refused"


class StorageFull(TinkError, OSError):
    """The adapter store cannot be written."""

    code, status = "insufficient_storage", 507


class StoreDamaged(TinkError):
    """The adapter store or its registry no longer holds what was written."""

    code, status = "store_damaged", 500


class UnknownAdapter(TinkError, KeyError):
    """No adapter is registered under this id."""

    code, status = "unknown_adapter", 404

    def __str__(self) -> str:
        return self.message  # KeyError would show its repr


class AdapterConflict(TinkError):
    """This adapter id was registered with other bytes at the same time."""

    code, status = "name_exists", 409


class RuntimeLoadingOff(TinkError):
    """The vLLM server runs without our plugin and without runtime LoRA updating."""

    code, status = "runtime_loading_off", 501


class NotSupportedByBackend(TinkError, ValueError):
    """The backend cannot do what the request asks; nothing is dropped in silence."""

    code, status = "unsupported_by_backend", 400


class BackendError(TinkError):
    """The backend answered with something that is no completion."""

    code, status = "backend_error", 502


class EngineUnavailable(TinkError, ConnectionError):
    """The engine behind the worker does not answer; try again."""

    code, status = "engine_unavailable", 503


class QueueFull(TinkError):
    """The queue holds as many requests as it may; `details["retry_after_s"]` says when to try again."""

    code, status = "overloaded", 429


class DeadlineExceeded(TinkError, TimeoutError):
    """A request was not finished by its deadline."""

    code, status = "deadline_exceeded", 504


class RequestCancelled(TinkError):
    """The client of a request went away."""

    code, status = "cancelled", 499


class ShuttingDown(TinkError):
    """The worker is stopping."""

    code, status = "shutting_down", 503


class RequestIdReused(TinkError, ValueError):
    """A request_id came back with another body."""

    code, status = "request_id_reused", 409


class InvalidJson(BadRequest):
    """A body is no JSON, or JSON of a kind that is refused (duplicate keys, NaN, too deep)."""

    code = "invalid_json"


class UnsupportedMediaType(BadRequest):
    """A body is not `application/json`."""

    code, status = "unsupported_media_type", 415


class WrongScope(TinkError):
    """A good token, but not one for this route."""

    code, status = "wrong_scope", 403


# -- seen from the client -------------------------------------------------------------------------


class ServerUnreachable(TinkError, ConnectionError):
    """No vLLM server answers at the URL."""

    code, status = "server_unreachable", 503


class TLSFailed(ServerUnreachable):
    """The server's certificate is not trusted, or one side speaks TLS and the other does not."""

    code = "tls_failed"


class RequestTimeout(TinkError, TimeoutError):
    """The server did not answer within the deadline of the request."""

    code, status = "request_timeout", 504


class PluginMissing(TinkError):
    """A vLLM server answers, but the tink_rl plugin is not loaded in it."""

    code, status = "plugin_missing", 501


class SamplingRefused(TinkError, ValueError):
    """vLLM refused a sampling request."""

    code, status = "sampling_refused", 400


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
    exit_code: ClassVar[int] = 1


class PortTaken(LaunchFailed):
    """The port is in use by another process."""

    code, exit_code = "port_taken", 3


class ModelNotFound(LaunchFailed):
    """The model directory does not exist or is not a model."""

    code, exit_code = "model_not_found", 4


class RankNotAllowed(LaunchFailed):
    """`--max-lora-rank` is not one that vLLM has kernels for."""

    code, exit_code = "rank_not_allowed", 5


class OutOfMemory(LaunchFailed):
    """The server does not fit into the memory of this machine with these settings."""

    code, exit_code = "out_of_memory", 6


class StartTimeout(LaunchFailed):
    """The server did not become ready within the deadline."""

    code, exit_code = "start_timeout", 7


def _all_subclasses(cls: type[TinkError]) -> list[type[TinkError]]:
    found = [cls]
    for sub in cls.__subclasses__():
        found += _all_subclasses(sub)
    return found


def from_wire(body: Any, status: int) -> TinkError:
    """The exception that the server raised, from its JSON body.

    An unknown code (a newer server) becomes a plain `TinkError` that carries status and message.
    """
    error = body.get("error") if isinstance(body, dict) else None
    if not isinstance(error, dict):
        return TinkError(f"the server answered HTTP {status}: {str(body)[:300]}", status=status)
    by_code = {cls.code: cls for cls in _all_subclasses(TinkError)}
    cls = by_code.get(str(error.get("code")), TinkError)
    details = error.get("details")
    return cls(str(error.get("message")), **(details if isinstance(details, dict) else {}))
