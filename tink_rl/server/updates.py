"""A full update of one API server: begin, bucket by bucket, finish. Speaks for the server while it runs.

`full` cannot stage a second model beside the served one, so from `begin` to `finish` new requests are
held at the gate and the server calls itself NOT READY. Every bucket is checked whole before any of it
is written. What ends early before the first write leaves the old policy as it was; what ends early
after it leaves the server NOT READY until a later version, or the base, was written whole.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tink_rl import errors
from tink_rl.errors import TinkError
from tink_rl.policy.packet import PacketHeader, specs_from_plan
from tink_rl.protocol import (
    AbortRequest,
    BeginAnswer,
    BeginRequest,
    CommitAnswer,
    Empty,
    FinishRequest,
    LayoutAnswer,
)
from tink_rl.server.caches import forget_caches
from tink_rl.server.rpc import check_alike
from tink_rl.server.state import ServedState
from tink_rl.types import PolicyVersion, SyncMode

if TYPE_CHECKING:
    from collections.abc import Iterator

logger = logging.getLogger("tink_rl.server")
_LOOK_EVERY_S = 0.5
_FOUND_BEFORE_WRITING = (
    errors.IncompleteGroup,
    errors.DigestMismatch,
    errors.StaleEpoch,
    errors.VersionTaken,
)


@dataclass(kw_only=True)
class Update:
    """One full version on its way in."""

    update_id: str
    name: str
    policy: str
    version: int
    epoch: int
    idle_timeout_s: float
    written: bool = False
    """A bucket reached the weights (or may have)."""
    num_busy: int = 0
    """Requests about this update that are being answered."""
    last_seen: float = field(default_factory=time.monotonic)
    start: float = field(default_factory=time.monotonic)

    @contextmanager
    def busy(self) -> Iterator[None]:
        """The sender is alive inside the block."""
        self.num_busy += 1
        try:
            yield
        finally:
            self.num_busy -= 1
            self.last_seen = time.monotonic()


class FullUpdates:
    """The full updates of one server; at most one at a time, and no other commit beside it."""

    def __init__(self, state: ServedState) -> None:
        self._state = state
        self.current: Update | None = None
        self._watch: asyncio.Task[None] | None = None

    async def layout(self) -> LayoutAnswer:
        """Names of the checkpoint's tensors by group, as every rank sees them."""
        return LayoutAnswer(groups=(await self._state.workers.ask("tink_layout"))[0])

    async def end(self, request: AbortRequest) -> Empty:
        """End an update early; one that has ended is fine."""
        update = self.current
        if update is not None and update.update_id == request.update_id:
            await self.abort(update, request.reason[:300])
        return Empty()

    # -- begin ------------------------------------------------------------------------------------

    async def begin(self, request: BeginRequest) -> BeginAnswer:
        """Check what is going to be sent, hold new requests and let running ones end.

        Raises:
            TinkError: what is wrong with lease, mode, base or plan; nothing has changed.
            DrainTimeout: running requests did not end; nothing has changed.
        """
        state = self._state
        version = PolicyVersion(policy=request.policy, version=request.version)
        state.leases.check(version.policy, request.epoch)
        state.check_mode(SyncMode.FULL, version.policy)
        state.check_base(request.base_fingerprint)
        plan = None if request.plan is None else [dict(planned) for planned in request.plan]
        if plan is not None:
            specs_from_plan(plan)
            await state.workers.ask("tink_check_plan", plan)
        await state.lock.acquire()
        try:
            state.leases.check(version.policy, request.epoch)
            state.check_mode(SyncMode.FULL, version.policy)
            update = Update(
                update_id=f"{version}~{uuid.uuid4().hex[:8]}",
                name=str(version),
                policy=version.policy,
                version=version.version,
                epoch=request.epoch,
                idle_timeout_s=request.timeout_s,
            )
            await state.hold(request.drain_timeout_s, request.on_running)
            names = [item["name"] for item in plan or ()]
            await state.workers.ask("tink_begin", update.update_id, names, update.epoch)
        except BaseException:
            state.gate.open()
            state.lock.release()
            raise
        self.current, state.writing = update, update.name
        self._watch = asyncio.create_task(self._watch_sender(update))
        return BeginAnswer(update_id=update.update_id)

    def find(self, update_id: str | None) -> Update:
        """The update under way.

        Raises:
            UnknownVersion: it ended, or never began.
        """
        if self.current is None or self.current.update_id != update_id:
            raise errors.UnknownVersion(f"no full update {update_id!r} is under way; begin again")
        return self.current

    # -- buckets ----------------------------------------------------------------------------------

    def check_header(self, header: PacketHeader, update_id: str | None) -> None:
        """Raise unless `header` is a bucket of the update under way."""
        update = self.find(update_id)
        if (header.policy, header.version) != (update.policy, update.version):
            raise errors.BadRequest(
                f"a bucket of {header.policy}@{header.version} came in the update to {update.name}"
            )

    async def write(self, update: Update, stage_id: str) -> None:
        """Write a bucket that every worker has checked."""
        before, update.written = update.written, True
        counts = await self._state.workers.ask("tink_write", stage_id)
        update.written = before or any(counts)

    # -- end --------------------------------------------------------------------------------------

    async def finish(self, request: FinishRequest) -> CommitAnswer:
        """Serve what was sent, under its name only.

        Raises:
            IncompleteGroup, DigestMismatch: not all of it came.
            VersionTaken: this number was given to other weights.
            CommitFailed: the server is NOT READY.
        """
        update, digest = self.find(request.update_id), request.digest
        state, before = self._state, update.written
        try:
            with update.busy():
                state.leases.check(update.policy, update.epoch)
                state.numbers.take(update.name, digest)
                update.written = True  # finishing writes too: what is not sent is restored
                held = await state.workers.ask("tink_finish", update.update_id, digest)
                check_alike(update.name, digest, held)
                await forget_caches(state.engine)
        except _FOUND_BEFORE_WRITING as error:
            update.written = before
            await self.abort(update, str(error))
            raise
        except Exception as error:
            await self.abort(update, f"finishing failed: {error}")
            raise errors.CommitFailed(
                f"the full update to {update.name} failed at its end ({error}); the server is NOT "
                "READY until the next full or merged publish, or a restart"
            ) from error
        state.mark_served(update.name, digest, SyncMode.FULL)
        held_s = time.monotonic() - update.start
        self._end()
        return CommitAnswer(held_seconds=held_s, digest=digest)

    async def abort(self, update: Update, reason: str) -> None:
        """End `update` without serving it; an update that has ended is fine."""
        if self.current is not update:
            return
        try:
            await self._state.workers.ask("tink_abort")
        except TinkError as error:
            logger.warning("tink_rl: aborting %s: %s", update.name, error)
        if update.written:
            self._state.not_ready(
                f"the full update to {update.name} ended midway: {reason}", update.name
            )
        self._end()

    def _end(self) -> None:
        self.current = self._state.writing = None
        if self._watch is not None and self._watch is not asyncio.current_task():
            self._watch.cancel()
        self._watch = None
        self._state.gate.open()
        self._state.lock.release()

    async def _watch_sender(self, update: Update) -> None:
        """A sender that died must not hold requests for ever."""
        leases = self._state.leases
        while self.current is update:
            await asyncio.sleep(_LOOK_EVERY_S)
            if update.num_busy:
                continue
            if not leases.holds(update.policy, update.epoch):
                await self.abort(update, "its sender's lease ended")
            elif time.monotonic() - update.last_seen > update.idle_timeout_s:
                await self.abort(update, f"nothing came for {update.idle_timeout_s:g} s")
