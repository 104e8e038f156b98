"""Whether the servers loaded the same checkpoint as the trainer: every byte of it."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from tink_rl import errors
from tink_rl.policy.content import ContentDigest, files_identity
from tink_rl.policy.fingerprint import checkpoint_index
from tink_rl.protocol import BASE, Empty

if TYPE_CHECKING:
    from tink_rl.transport.fleet import Fleet
    from tink_rl.transport.replica import Replica

logger = logging.getLogger("tink_rl")
_POLL_S = 0.2
_SAY_EVERY_S = 5.0
_STALLED_S = 120.0
"""A server that read not one byte in this time does not go on."""


def check_content(fleet: Fleet, base_model: str) -> None:
    """Raise unless every server of `fleet` loaded the tensors of `base_model`, byte for byte.

    Free where trainer and server read the same files on one machine; else both hash their own once.

    Raises:
        BaseMismatch: names the first tensor that differs.
        RequestTimeout: a server makes no progress.
    """
    index = checkpoint_index(base_model)
    mine = files_identity(index)
    ours = ContentDigest(index)

    def check(replica: Replica) -> None:
        theirs = replica.status().base_files
        if mine is not None and theirs == mine:
            return
        ours.start()
        served = _digests_of(replica)
        try:
            mine_read = ours.wait()
        except OSError as error:
            raise errors.ConfigError(
                f"base model {base_model!r} cannot be read: {error}"
            ) from error
        _compare(mine_read, served, base_model, replica.url)

    fleet.each(check)


def _digests_of(replica: Replica) -> dict[str, str]:
    done, moved = -1, time.monotonic()
    said = moved
    while True:
        answer = replica.client.ask(BASE, Empty(), timeout_s=30.0)
        if answer.tensors is not None:
            return answer.tensors
        now = time.monotonic()
        if answer.num_done > done:
            done, moved = answer.num_done, now
        if now - moved > _STALLED_S:
            raise errors.RequestTimeout(
                f"{replica.url} reads its checkpoint to be compared and has stood at {done / 1e9:.1f} GB for "
                f"{_STALLED_S:g} s; look at its disk and its log",
                replica=replica.url,
            )
        if now - said > _SAY_EVERY_S:
            said = now
            logger.info(
                "%s hashes its checkpoint: %.1f of %.1f GB",
                *(replica.url, done / 1e9, answer.num_bytes / 1e9),
            )
        time.sleep(_POLL_S)


def _compare(ours: dict[str, str], served: dict[str, str], base_model: str, url: str) -> None:
    names = [name for name in {**ours, **served} if ours.get(name) != served.get(name)]
    if not names:
        return
    raise errors.BaseMismatch(
        f"the checkpoint that {url} serves is not the trainer's ({base_model!r}): {min(names)} differs, "
        f"and {len(names)} of {len(ours)} tensors do; copy the trainer's directory to the server and "
        "restart it, or load the served one in the trainer",
        tensor=min(names),
        num_tensors=len(names),
        replica=url,
    )
