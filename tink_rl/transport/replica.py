"""One server, as its publisher sees it: packets, commits and full updates."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tink_rl import errors, protocol
from tink_rl.config import SyncConfig
from tink_rl.errors import TinkError
from tink_rl.transport.connection import Connection
from tink_rl.transport.outgoing import OutgoingPacket
from tink_rl.transport.sampling_client import SamplingClient
from tink_rl.transport.shared_memory import Segment, SegmentPool
from tink_rl.types import Transport

if TYPE_CHECKING:
    import torch

_CHUNK_BYTES = 8 * 2**20


class Replica(Connection):
    """One server to which versions are published."""

    def __init__(
        self, client: SamplingClient, config: SyncConfig, *, writer: str, lasting: bool = False
    ) -> None:
        super().__init__(client, config, writer=writer, lasting=lasting)
        self.segments = SegmentPool()
        """Shared memory that packets are packed into; a fleet's replicas have one."""

    # -- one packet -------------------------------------------------------------------------------

    def stage(self, outgoing: OutgoingPacket) -> str:
        """Send header, bytes and digest; the stage's id once every worker has checked them.

        Raises:
            TinkError: what is wrong; the server serves what it served before.
        """
        stage_id = self.send(outgoing)
        self._check(stage_id, outgoing.digest(), self._config.stage_timeout_s)
        return stage_id

    def send(self, outgoing: OutgoingPacket, update_id: str | None = None) -> str:
        """Send header and bytes; the stage's id.

        They are checked when the digest follows.

        Raises:
            TinkError: what is wrong with the header; the server serves what it served before.
        """
        header, buffer = outgoing.header, outgoing.buffer
        joined, timeout_s = self._opened, self._config.stage_timeout_s
        segment = self._segment_with(buffer) if joined.transport is Transport.SHM else None
        request = protocol.StageRequest(
            header=header.named(header.policy, header.version, joined.epoch),
            transport=joined.transport,
            timeout_s=timeout_s,
            update_id=update_id,
            segment=None if segment is None else segment.spec,
        )
        stage_id = self._control(protocol.STAGE, request, timeout_s).stage_id
        outgoing.start_digest()
        # The header was accepted and every worker is receiving: only now do bytes travel.
        if joined.transport is Transport.HTTP:
            self._send_chunks(stage_id, buffer, timeout_s)
        elif segment is None:
            self._broadcast(stage_id, buffer, timeout_s)
        return stage_id

    def _check(self, stage_id: str, digest: str, timeout_s: float) -> None:
        request = protocol.StagedRequest(
            stage_id=stage_id, digest=digest, timeout_s=self._config.stage_timeout_s
        )
        self._control(protocol.STAGED, request, timeout_s)

    def _segment_with(self, buffer: torch.Tensor) -> Segment:
        """The packet in shared memory: where it was packed, else copied to a segment of our own.

        Raises:
            SegmentUnreachable: there is no memory for it; gloo is taken from now on (`auto`).
        """
        packed_in = self.segments.holding(buffer)
        if packed_in is not None:
            return packed_in
        if self._segment is None or self._segment.buffer.numel() < buffer.numel():
            try:
                self._segment = Segment.create(buffer.numel())
            except errors.SegmentUnreachable as error:
                self.do_without_shared_memory(error)
                raise
        self._segment.buffer[: buffer.numel()].copy_(buffer)
        return self._segment

    def _broadcast(self, stage_id: str, buffer: torch.Tensor, timeout_s: float) -> None:
        from tink_rl.transport.communicator import transfer

        assert self._channel is not None and self._joined is not None
        src, moved = self._joined.rank, buffer.cpu()
        try:
            for _ in transfer(self._channel, moved, src=src, timeout_s=timeout_s):
                pass
        except errors.ChannelLost:
            self.discard(stage_id)
            self.close()
            raise

    def _send_chunks(self, stage_id: str, buffer: torch.Tensor, timeout_s: float) -> None:
        data = buffer.numpy().data
        for offset in range(0, len(data), _CHUNK_BYTES):
            self.client.control(
                f"stage/{stage_id}/chunk",
                timeout_s=timeout_s,
                content=bytes(data[offset : offset + _CHUNK_BYTES]),
                params={"offset": offset},
            )

    def discard(self, stage_id: str) -> None:
        """Forget a stage; never raises."""
        with contextlib.suppress(TinkError):
            self._control(protocol.DISCARD, protocol.DiscardRequest(stage_id=stage_id), 5.0)

    def commit(
        self, stage_id: str, retire: Sequence[str] = (), digest: str | None = None
    ) -> protocol.CommitAnswer:
        """Serve a stage, and stop serving the slot versions `retire` of the same policy.

        Args:
            stage_id: What `stage` gave; with `digest`, what `send` gave.
            retire: Names of versions.
            digest: Check the packet first; for a replica that nobody has to wait for.

        Returns:
            What the workers hold then.

        Raises:
            TinkError: the packet is refused; the server serves what it served before.
            DrainTimeout, CommitFailed, WorkersDiffer.
        """
        config = self._config
        request = protocol.CommitRequest(
            stage_id=stage_id,
            retire=tuple(retire),
            digest=digest,
            timeout_s=config.stage_timeout_s,
            drain_timeout_s=config.drain_timeout_s,
            on_running=config.on_running,
        )
        timeout_s = config.commit_timeout_s + config.drain_timeout_s
        return self._control(protocol.COMMIT, request, timeout_s + config.stage_timeout_s)

    def drop(self, name: str) -> None:
        """Stop serving `name`; a version that is not served is fine."""
        config = self._config
        request = protocol.DropRequest(
            name=name,
            epoch=self.epoch,
            drain_timeout_s=config.drain_timeout_s,
            on_running=config.on_running,
        )
        with contextlib.suppress(errors.UnknownVersion):
            self._control(protocol.DROP, request, config.commit_timeout_s + config.drain_timeout_s)

    # -- one full update --------------------------------------------------------------------------

    def layout(self) -> list[list[str]]:
        """Names of the served checkpoint's tensors, by group that must be sent whole.

        Raises:
            ModeUnavailable: the server does not offer full mode.
        """
        return protocol.LAYOUT.read_answer(self.client.control("layout", timeout_s=30.0)).groups

    def begin_update(
        self, *, version: int, base_fingerprint: str, plan: list[dict[str, Any]] | None
    ) -> str:
        """Let the server check what will be sent, and hold its requests; the update's id.

        Raises:
            TinkError: what is wrong; nothing has changed.
        """
        config = self._config
        request = protocol.BeginRequest(
            policy=config.policy,
            version=version,
            epoch=self.epoch,
            base_fingerprint=base_fingerprint,
            plan=None if plan is None else [protocol.PlannedTensor(**planned) for planned in plan],
            timeout_s=config.stage_timeout_s,
            drain_timeout_s=config.drain_timeout_s,
            on_running=config.on_running,
        )
        timeout_s = config.commit_timeout_s + config.drain_timeout_s
        return self._control(protocol.BEGIN, request, timeout_s).update_id

    def send_bucket(self, update_id: str, outgoing: OutgoingPacket) -> None:
        """Send one bucket of a full update; returns once it is checked and written.

        Raises:
            TinkError: what is wrong; the update has ended.
        """
        config = self._config
        stage_id = self.send(outgoing, update_id)
        self._check(stage_id, outgoing.digest(), config.stage_timeout_s + config.commit_timeout_s)

    def finish_update(self, update_id: str, digest: str) -> protocol.CommitAnswer:
        """Serve what was sent; what the workers hold then.

        Raises:
            IncompleteGroup, DigestMismatch, CommitFailed, WorkersDiffer.
        """
        request = protocol.FinishRequest(update_id=update_id, digest=digest)
        return self._control(protocol.FINISH, request, self._config.commit_timeout_s)

    def abort_update(self, update_id: str, reason: str) -> None:
        """End a full update early; never raises."""
        with contextlib.suppress(TinkError):
            self._control(
                protocol.ABORT, protocol.AbortRequest(update_id=update_id, reason=reason), 30.0
            )
