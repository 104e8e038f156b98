"""Commits of one API server: serve a staged version in a slot or in the weights, and drop it again.

A commit that fails midway in the weights leaves the server NOT READY until a later one writes them whole.
Full versions end in `updates.py`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from tink_rl import errors
from tink_rl.errors import TinkError
from tink_rl.protocol import CommitAnswer, CommitRequest, DropRequest, Empty
from tink_rl.server.caches import forget_caches
from tink_rl.server.rpc import check_alike
from tink_rl.server.served import Served, owner_of
from tink_rl.server.staged_adapters import SCHEME
from tink_rl.server.stages import Staged, Stages
from tink_rl.server.state import ServedState
from tink_rl.types import OnRunning, PolicyVersion, ServerState, SyncMode

logger = logging.getLogger("tink_rl.server")
_DRAIN_S = 30.0


class Commits:
    """What makes a staged packet the served policy, and the base come back."""

    def __init__(
        self, state: ServedState, stages: Stages, make_lora_request: Callable[..., Any]
    ) -> None:
        """Store.

        Args:
            state: The server.
            stages: Its packets.
            make_lora_request: vLLM's `LoRARequest`.
        """
        self._state, self._stages = state, stages
        self._make_lora_request = make_lora_request

    async def commit(self, request: CommitRequest) -> CommitAnswer:
        """Serve a staged version and stop serving those of `retire`; answers what every worker then holds.

        With a `digest` the packet is checked first, or as it is served: a publisher with one replica asks
        for both at once.

        Raises:
            TinkError: what is wrong with the packet; nothing has changed.
            VersionTaken: this number was given to other weights.
            DrainTimeout: running requests did not end; nothing was written.
            CommitFailed: the server is NOT READY.
        """
        staged = self._stages.find(request.stage_id)
        lease = self._state.leases.check(staged.header.policy, staged.header.epoch)
        if not staged.checked:
            if not request.digest:
                raise errors.BadRequest(f"{staged.name} was not received whole; call staged first")
            if not self._stages.is_checked_as_served(staged):
                await self._stages.check(staged, request.digest, request.timeout_s)
        if staged.update is not None:
            raise errors.BadRequest("a bucket of a full update is not committed; call finish")
        for name in request.retire:
            if PolicyVersion.parse(name).policy != staged.header.policy:
                raise errors.BadRequest(
                    f"{name} is no version of {staged.header.policy!r}, whose lease this is"
                )
        async with self._state.lock:
            self._state.leases.check(staged.header.policy, staged.header.epoch)
            self._state.check_mode(staged.header.mode, staged.header.policy)
            await self._make_room(staged, request)
            # From here on, whatever becomes of it: who joins meanwhile counts on from this number.
            digest = staged.header.digest if staged.checked else str(request.digest)
            self._state.numbers.take(staged.name, digest)
            if staged.header.mode is SyncMode.ADAPTER:
                work = self._commit_adapter(staged, digest, request.timeout_s)
            else:
                work = self._commit_merged(staged, request.drain_timeout_s, request.on_running)
            held_s: float = await self._stages.all_or_none(staged, work)
            served = self._state.served[staged.name]
            served.writer, served.lasting = lease.writer, lease.lasting
            served.num_bytes = staged.header.num_bytes
            for name in (*request.retire, *self._left_by_others(served)):
                self._state.retire_slot(name)
        self._stages.pop(staged)
        full = next((v.name for v in self._state.served.values() if v.mode is SyncMode.FULL), None)
        digest = self._state.served[staged.name].digest
        return CommitAnswer(held_seconds=held_s, digest=digest, full=full)

    async def _make_room(self, staged: Staged, request: CommitRequest) -> None:
        """Drop what nobody owns and what excludes the version that comes."""
        for old in self._state.in_the_way(staged.header.mode, staged.header.policy):
            logger.info("tink_rl: %s, which nobody owns, makes room for %s", old.name, staged.name)
            await self._end(old, request.drain_timeout_s, request.on_running)

    def _left_by_others(self, new: Served) -> list[str]:
        """Versions of the policy of `new` in slots that another writer published: its heir ends them.

        Not for version 0, which a probe tries before the heir has proven that it can publish.
        """
        if new.lasting or PolicyVersion.parse(new.name).version == 0:
            return []
        return [
            old.name
            for old in self._state.served.values()
            if old.policy == new.policy and old.writer != new.writer and not old.lasting
        ]

    async def _commit_adapter(self, staged: Staged, digest: str, timeout_s: float) -> float:
        name = staged.name
        path = f"{SCHEME}{name}/{digest[:16]}/{staged.stage_id.rpartition('~')[2]}"
        lora_id = self._state.next_slot_id()
        request = self._make_lora_request(lora_name=name, lora_int_id=lora_id, lora_path=path)
        try:
            held = await self._stages.serve(staged, digest, timeout_s, (name, path, lora_id))
            check_alike(name, digest, held)
        except TinkError:  # some workers may have it; what is served stays
            await self._state.workers.tell("tink_release", path, lora_id)
            raise
        served = Served(name=name, digest=digest, mode=SyncMode.ADAPTER, path=path, lora_id=lora_id)
        self._state.fill_slot(served, request)
        return 0.0

    async def _commit_merged(
        self, staged: Staged | None, drain_timeout_s: float, on_running: OnRunning
    ) -> float:
        start = time.monotonic()
        try:
            await self._state.hold(drain_timeout_s, on_running)
            if staged is not None:  # nobody joined meanwhile, which forgets the packet
                self._state.leases.check(staged.header.policy, staged.header.epoch)
            await self._fold(staged)
        finally:
            self._state.gate.open()
        return time.monotonic() - start

    async def _fold(self, staged: Staged | None) -> None:
        """Write, forget the old weights' cache, change the name. Nothing runs meanwhile."""
        name = self._state.base_name if staged is None else staged.name
        self._state.server_state = ServerState.COMMITTING
        try:
            stage_id, digest = (
                (None, None) if staged is None else (staged.stage_id, staged.header.digest)
            )
            check_alike(name, digest, await self._state.workers.ask("tink_fold", stage_id))
            await forget_caches(self._state.engine)
        except Exception as error:  # whatever it was, half a policy may lie in the weights
            self._state.not_ready(f"the commit of {name} failed midway: {error}", name)
            raise errors.CommitFailed(
                f"the commit of {name} failed midway ({error}); the server is NOT READY until the "
                "next publish writes the weights whole, or it is restarted"
            ) from error
        self._state.mark_served(name, digest or "", None if staged is None else SyncMode.MERGED)

    async def drop(self, request: DropRequest) -> Empty:
        """Stop serving a version; requests that run on it end on it. Merged, full: the base comes back.

        Raises:
            UnknownVersion: it is not served.
        """
        name = request.name
        self._state.leases.check(PolicyVersion.parse(name).policy, request.epoch)
        async with self._state.lock:
            served = self._state.served.get(name)
            if name == self._state.broken:
                served = Served(name=name, digest="", mode=SyncMode.FULL)
            if served is None:
                raise errors.UnknownVersion(
                    f"{name} is not served; served are {sorted(self._state.served) or 'none'}"
                )
            await self._end(served, request.drain_timeout_s, request.on_running)
        return Empty()

    async def drop_unowned(self, policy: str) -> None:
        """Stop serving every version of `policy`, unless somebody owns it by now.

        Raises:
            DrainTimeout, CommitFailed: the base could not be brought back.
        """
        async with self._state.lock:
            for served in list(self._state.served.values()):
                if served.policy == policy and owner_of(served, self._state.leases) is None:
                    await self._end(served, _DRAIN_S, "drain")

    async def _end(self, served: Served, drain_timeout_s: float, on_running: OnRunning) -> None:
        if served.mode is SyncMode.ADAPTER:
            self._state.retire_slot(served.name)
        else:
            await self._commit_merged(None, drain_timeout_s, on_running)
