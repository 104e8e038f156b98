"""Whose fault an error of the backend is: the client's stay as they are, the worker's own become 5xx."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tink_rl import errors
from tink_rl.errors import TinkError

SAMPLING: tuple[type[TinkError], ...] = (
    errors.UnknownAdapter,
    errors.SamplingRefused,
    errors.NotSupportedByBackend,
)
"""What a request for samples can be at fault for, see `Backend.sample`."""
REGISTERING: tuple[type[TinkError], ...] = (
    errors.ConfigError,
    errors.BadRequest,
    errors.NotSupportedByBackend,
    errors.UnknownAdapter,
    errors.AdapterConflict,
    errors.QueueFull,
    errors.StorageFull,
    errors.PathNotAllowed,
    errors.AdapterPathMissing,
    errors.AdapterFilesInvalid,
    errors.UnsupportedAdapter,
    errors.NonFiniteWeights,
    errors.WeightOutOfRange,
    errors.BaseMismatch,
    errors.RankExceeded,
    errors.UnknownModules,
    errors.ShapeMismatch,
    errors.IncompleteGroup,
    errors.DtypeMismatch,
)
"""What a registration is told as it is: mostly what is wrong with the adapter."""
_PASSES = (
    errors.LeaseHeld,
    errors.StaleEpoch,
    errors.UnknownVersion,
    errors.DrainTimeout,
    errors.AdapterConflict,
)
"""Trouble with the server that is over by itself; all other trouble somebody has to mend."""


def for_client(error: TinkError, own: tuple[type[TinkError], ...]) -> TinkError:
    """What a client is told of an error of the backend: kinds in `own` and 5xx as they are.

    The rest is between the worker and its server, and no 4xx of the client: 503 if it is over by itself,
    else 502, with the message kept.
    """
    is_told = (
        500 <= error.status <= 504 and type(error) is not TinkError
    )  # that: what no code names
    if isinstance(error, own) or is_told:
        return error
    kind = errors.EngineUnavailable if isinstance(error, _PASSES) else errors.BackendError
    found = kind(error.message)
    found.details = {**error.details, "cause": error.code}
    found.__cause__ = error
    return found


@contextmanager
def told(own: tuple[type[TinkError], ...]) -> Iterator[None]:
    """Raises what `for_client` makes of an error in the block."""
    try:
        yield
    except TinkError as error:
        found = for_client(error, own)
        if found is error:
            raise
        raise found from error
