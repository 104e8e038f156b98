"""What a client sees of an error of the backend: its own faults as they are, the worker's as 5xx."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tink_rl import errors
from tink_rl.errors import Blame, Retry, TinkError


def for_client(error: TinkError, request: Blame) -> TinkError:
    """`error` if a `request` of this kind is at fault, or if it is a 5xx already.

    The rest is between the worker and its server, not a 4xx of the client: 503 if it is over by itself,
    else 502, with the message kept.
    """
    is_named_5xx = 500 <= error.status <= 504 and type(error) is not TinkError
    if error.blame & request or is_named_5xx:
        return error
    passes = error.retry in (Retry.LATER, Retry.RECONNECT)
    kind = errors.EngineUnavailable if passes else errors.BackendError
    found = kind(error.message)
    found.details = {**error.details, "cause": error.code}
    found.__cause__ = error
    return found


@contextmanager
def translated(request: Blame) -> Iterator[None]:
    """Raises what `for_client` makes of an error in the block."""
    try:
        yield
    except TinkError as error:
        found = for_client(error, request)
        if found is error:
            raise
        raise found from error
