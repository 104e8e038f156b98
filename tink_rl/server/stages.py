"""The packets of one API server between their header and their commit. A refused one changes nothing."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, replace
from typing import Any

from tink_rl import errors
from tink_rl.policy.packet import PacketHeader
from tink_rl.protocol import DiscardRequest, Empty, StageAnswer, StagedRequest, StageRequest
from tink_rl.server.state import ServedState
from tink_rl.server.updates import FullUpdates, Update
from tink_rl.types import SyncMode, Transport

_IDLE_PATIENCE_S = 0.02
"""An engine without requests may wait this long for a packet instead of being asked again and again."""


@dataclass(kw_only=True)
class Staged:
    """A packet that the workers are receiving or have checked."""

    stage_id: str
    name: str
    header: PacketHeader
    transport: Transport
    update: Update | None = None
    """The full update that this is a bucket of."""
    checked: bool = False
    """Every worker holds the bytes and found nothing wrong with them."""


class Stages:
    """What is being received or was checked, by stage id."""

    def __init__(self, state: ServedState, updates: FullUpdates) -> None:
        self._state, self._updates, self._workers = state, updates, state.workers
        self._stages: dict[str, Staged] = {}

    async def stage(self, request: StageRequest) -> StageAnswer:
        """Check a header and start receiving; the bytes may be sent once this has answered.

        Raises:
            TinkError: whatever is wrong with the packet; nothing has changed then.
        """
        header = request.header
        self._state.leases.check(header.policy, header.epoch)
        if header.mode is SyncMode.FULL:
            self._updates.check_header(header, request.update_id)
        else:
            self._state.check_mode(header.mode, header.policy)
        self._state.check_base(header.base_fingerprint)
        name = f"{header.policy}@{header.version}"
        staged = Staged(
            stage_id=f"{name}~{uuid.uuid4().hex[:8]}",
            name=name,
            header=header,
            transport=request.transport,
            update=self._updates.current if header.mode is SyncMode.FULL else None,
        )
        options = {
            "transport": request.transport,
            "src": self._state.world_size,
            "timeout_s": request.timeout_s,
            "update_id": request.update_id,
            "segment": None if request.segment is None else request.segment.to_json(),
        }
        await self.all_or_none(
            staged, self._workers.ask("tink_stage", staged.stage_id, header.to_json(), options)
        )
        self._stages[staged.stage_id] = staged
        return StageAnswer(stage_id=staged.stage_id)

    async def all_or_none(self, staged: Staged, work: Any) -> Any:
        """What `work` gives; if it fails, no worker keeps the stage, and a full update ends."""
        try:
            if staged.update is None:
                return await work
            with staged.update.busy():
                return await work
        except Exception as error:
            await self._forget(staged)
            if staged.update is not None:
                await self._updates.abort(staged.update, str(error))
            raise

    async def _forget(self, staged: Staged) -> None:
        self._stages.pop(staged.stage_id, None)
        await self._workers.tell("tink_discard", staged.stage_id)

    async def check(self, staged: Staged, digest: str, timeout_s: float) -> None:
        """Wait until every worker has found the packet right, which hashes to `digest`.

        Raises:
            TinkError: what is wrong; the packet is forgotten.
        """
        await self.all_or_none(staged, self._received(staged, digest, timeout_s))

    async def _received(self, staged: Staged, digest: str, timeout_s: float) -> None:
        if any(state != "done" for state in await self._sent("tink_sent", staged, digest)):
            await self._until_received(staged, timeout_s)
        staged.checked = True

    async def serve(
        self, staged: Staged, digest: str, timeout_s: float, slot: tuple[str, str, int]
    ) -> list[str | None]:
        """Let every worker put the packet into a slot; the digests that they hold then.

        Args:
            staged: One that was checked, or `is_checked_as_served`.
            digest: What the sender says.
            timeout_s: For what is still to be copied.
            slot: The version's name, its path, and its number in vLLM.

        Raises:
            TinkError: what is wrong with the packet, or why vLLM refuses it.
        """
        held = await self._sent("tink_serve", staged, digest, *slot)
        if None in held:
            await self._until_received(staged, timeout_s)
            held = await self._sent("tink_serve", staged, digest, *slot)
        return held

    def is_checked_as_served(self, staged: Staged) -> bool:
        """Whether checking and serving may be one call.

        One worker: of several none serves before all have found the packet right. And bytes that are on
        this machine once the sender says their digest: nobody waits for a peer within a commit. In
        one run on two busy cores a publish of 0.5 MB took 123 ms so, and 174 ms by two calls.
        """
        return (
            staged.header.mode is SyncMode.ADAPTER
            and staged.transport in (Transport.SHM, Transport.HTTP)
            and self._state.world_size == 1
        )

    async def _sent(self, method: str, staged: Staged, digest: str, *args: Any) -> list[Any]:
        """Tell the workers by `method` that all bytes were sent, and hash to `digest`."""
        staged.header = replace(staged.header, digest=digest)
        patience_s = 0.0 if self._state.gate.num_running else _IDLE_PATIENCE_S
        return await self._workers.ask(method, staged.stage_id, digest, patience_s, *args)

    async def _until_received(self, staged: Staged, timeout_s: float) -> None:
        await self._workers.until_done(
            "tink_stage_state", staged.stage_id, timeout_s, f"receiving {staged.name}"
        )

    async def chunk(self, stage_id: str, offset: int, data: bytes) -> Empty:
        """One chunk of a packet that travels as HTTP body."""
        staged = self.find(stage_id)
        work = self._workers.ask("tink_chunk", stage_id, offset, data)
        await self.all_or_none(staged, work)
        return Empty()

    async def staged(self, request: StagedRequest) -> StageAnswer:
        """All bytes were sent, and hash to `digest`: answer when every worker has checked them."""
        staged = self.find(request.stage_id)
        await self.check(staged, request.digest, request.timeout_s)
        if staged.update is not None:
            await self.all_or_none(staged, self._updates.write(staged.update, staged.stage_id))
            self.pop(staged)
        return StageAnswer(stage_id=staged.stage_id)

    async def discard(self, request: DiscardRequest) -> Empty:
        """Forget a stage; unknown ones are fine."""
        self._stages.pop(request.stage_id, None)
        await self._workers.ask("tink_discard", request.stage_id)
        return Empty()

    def find(self, stage_id: str) -> Staged:
        """The packet of `stage_id`.

        Raises:
            UnknownVersion: there is none.
        """
        staged = self._stages.get(stage_id)
        if staged is None:
            raise errors.UnknownVersion(f"nothing is staged as {stage_id!r}; stage it first")
        return staged

    async def forget_policy(self, policy: str) -> None:
        """Forget every packet of `policy`."""
        for staged in [s for s in self._stages.values() if s.header.policy == policy]:
            await self._forget(staged)

    def pop(self, staged: Staged) -> None:
        """The workers have made use of it."""
        self._stages.pop(staged.stage_id, None)
