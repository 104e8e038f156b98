"""The writers of one API server: who holds the lease of a policy, and the channel that its packets take."""

from __future__ import annotations

import secrets
from typing import Any

from tink_rl.protocol import (
    Empty,
    HeartbeatAnswer,
    JoinAnswer,
    JoinedRequest,
    JoinRequest,
    LeaseRequest,
)
from tink_rl.server.leases import LEASE_S, Lease
from tink_rl.server.stages import Stages
from tink_rl.server.state import ServedState
from tink_rl.server.updates import FullUpdates
from tink_rl.types import Transport


class Writers:
    """Joining, staying and leaving."""

    def __init__(
        self, state: ServedState, stages: Stages, updates: FullUpdates, *, host: str, port: int
    ) -> None:
        """Store.

        Args:
            state: The server.
            stages: Its packets; those of a writer that joins again are forgotten.
            updates: Its full update, which ends when its writer joins again.
            host: Interface that channels bind.
            port: Port that channels bind, 0 for any.
        """
        self._state, self._stages, self._updates = state, stages, updates
        self._workers, self._leases = state.workers, state.leases
        self._host, self._port = host, port

    async def join(self, request: JoinRequest) -> JoinAnswer:
        """Take the lease of a policy and open a channel; the trainer dials what this answers.

        Raises:
            LeaseHeld, ConfigError, SegmentUnreachable.
        """
        policy = request.policy
        if request.transport is Transport.SHM:  # before anything changes: can every worker map it?
            assert request.segment is not None, "what was read holds a segment"
            await self._workers.ask("tink_attach", request.segment.to_json())
        lease, old = self._leases.take(policy, request.writer, lasting=request.lasting)
        if old is not None:
            await self._workers.ask("tink_close", old.epoch)
        await self._stages.forget_policy(policy)  # its writer died before the commit
        update = self._updates.current
        if update is not None and update.policy == policy:
            await self._updates.abort(update, "its writer joined again")
        answer: dict[str, Any] = {
            "epoch": lease.epoch,
            "incarnation": self._state.incarnation,
            "lease_s": LEASE_S,
            "last_version": self._state.numbers.last(policy),
            "transport": request.transport,
        }
        if request.transport not in (Transport.HTTP, Transport.SHM):
            answer |= await self._open_channel(lease, request.transport, request.timeout_s)
        return JoinAnswer(**answer)

    async def _open_channel(
        self, lease: Lease, transport: Transport, timeout_s: float
    ) -> dict[str, Any]:
        bound = await self._workers.ask("tink_bind", lease.epoch, self._host, self._port, timeout_s)
        spec = {
            "transport": transport,
            "host": self._host,
            "port": bound[0],
            "nonce": secrets.token_hex(16),
            "world_size": self._state.world_size + 1,
            "timeout_s": timeout_s,
        }
        await self._workers.ask("tink_join", lease.epoch, spec)
        return {**spec, "rank": self._state.world_size}

    async def joined(self, request: JoinedRequest) -> Empty:
        """Wait until every worker is in the channel."""
        lease = self._leases.check(request.policy, request.epoch)
        await self._workers.until_done(
            "tink_join_state", lease.epoch, request.timeout_s, "joining the channel"
        )
        return Empty()

    async def heartbeat(self, request: LeaseRequest) -> HeartbeatAnswer:
        """Renew the lease."""
        self._leases.check(request.policy, request.epoch)
        return HeartbeatAnswer(incarnation=self._state.incarnation)

    async def leave(self, request: LeaseRequest) -> Empty:
        """End lease and channel; what is served stays served."""
        lease = self._leases.check(request.policy, request.epoch)
        await self._workers.ask("tink_close", lease.epoch)
        self._leases.release(lease.policy, lease.epoch)
        return Empty()
