"""What may pass and is tried once more, what it is called when it does not, and who lost a version."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from tink_rl import errors
from tink_rl.errors import Retry, TinkError

if TYPE_CHECKING:
    from tink_rl.transport.fleet import Fleet

logger = logging.getLogger("tink_rl")


def may_pass(error: TinkError) -> bool:
    """Whether a second attempt, on fresh channels, may succeed."""
    return error.retry in (Retry.RECONNECT, Retry.RESEND)


def publish_failed(name: str, phase: str, error: TinkError) -> errors.PublishFailed:
    """What ended the last attempt to publish `name`, with phase and replica."""
    replica = error.details.get("replica")
    return errors.PublishFailed(
        f"{name} could not be published: phase {phase!r}, replica {replica}: {error.message}",
        phase=phase,
        replica=replica,
        cause=error.code,
    )


def forget_where_lost(fleet: Fleet, name: str) -> bool:
    """Drop the channels of the replicas that do not serve `name` (restarted ones); True if any did.

    Raises:
        TinkError: a replica does not answer.
    """
    lost = [replica for replica in fleet.replicas if name not in replica.status().served]
    for replica in lost:
        logger.warning("%s lost %s (restarted?); publishing it again", replica.url, name)
        replica.forget_channel()
    return bool(lost)
