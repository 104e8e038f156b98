"""The usual path: an adapter as one packet, staged on all replicas before any commits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from tink_rl.errors import TinkError
from tink_rl.policy import packet
from tink_rl.policy.adapter import Adapter
from tink_rl.protocol import CommitAnswer
from tink_rl.transport.outgoing import OutgoingPacket
from tink_rl.types import SyncMode

if TYPE_CHECKING:
    import torch

    from tink_rl.transport.fleet import Fleet
    from tink_rl.transport.replica import Replica


class Packer:
    """Packs adapters, in memory that is used again: fresh pages cost more than the copy."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._spare: torch.Tensor | None = None

    def allocate(self, num_bytes: int) -> torch.Tensor:
        """Memory for a packet, `[num_bytes] uint8`; the next call gives it again, until `reuse`."""
        # Kept at once: a publish that fails, or has nothing new, leaves it to the next one.
        self._spare = self._fleet.allocate_buffer(num_bytes, self._spare)
        return self._spare[:num_bytes]

    def reuse(self, buffer: torch.Tensor | None) -> None:
        """Pack into `buffer` from now on, which holds no version any more; what was given is kept."""
        self._spare = buffer

    def pack(self, header: packet.PacketHeader, adapter: Adapter) -> OutgoingPacket:
        """The adapter as a packet."""
        outgoing = OutgoingPacket(header, self.allocate(header.num_bytes))
        packet.fill(header, outgoing.buffer, adapter.tensors)
        return outgoing


def holds(packed: OutgoingPacket | None, header: packet.PacketHeader, adapter: Adapter) -> bool:
    """Whether `adapter`, whose layout is `header`, is bit for bit what was packed."""
    if packed is None or not packed.header.same_weights(header):
        return False
    # After an optimizer step the first tensor differs already, and the rest need not be read.
    return all(
        packet.same_bits(packet.view(packed.buffer, spec), adapter.tensors[spec.name])
        for spec in packed.header.tensors
    )


class PacketTransfer:
    """One packet on its way to all replicas."""

    def __init__(self, fleet: Fleet, outgoing: OutgoingPacket) -> None:
        """Store; `stage` speaks to the servers."""
        self._fleet = fleet
        self.packed = outgoing
        self._stages: dict[str, str] = {}

    @property
    def version(self) -> int:
        """Its number."""
        return self.packed.header.version

    @property
    def mode(self) -> SyncMode:
        """ADAPTER or MERGED."""
        return self.packed.header.mode

    @property
    def num_bytes(self) -> int:
        """Sent to each replica."""
        return self.packed.header.num_bytes

    @property
    def digest(self) -> str:
        """blake3, hex."""
        return self.packed.digest()

    def stage(self) -> None:
        """Send it to every replica. Of several, each has found it right; one alone checks as it commits.

        Raises:
            TinkError: a replica refuses, or is lost; all forget it and serve what they served before.
        """
        self._stages = {}
        try:
            self._fleet.each(self._stage)
        except TinkError:
            for replica in self._fleet.replicas:
                if replica.url in self._stages:
                    replica.discard(self._stages[replica.url])
            raise

    def _stage(self, replica: Replica) -> None:
        send = replica.send if self._is_alone else replica.stage
        self._stages[replica.url] = send(self.packed)

    @property
    def _is_alone(self) -> bool:
        return len(self._fleet.replicas) == 1

    def commit(self, retire: Sequence[str]) -> list[CommitAnswer]:
        """Serve it on every replica, and drop the versions `retire`; what each replica holds then.

        Raises:
            TinkError: see `Replica.commit`.
        """
        digest = self.digest if self._is_alone else None
        return self._fleet.each(lambda r: r.commit(self._stages[r.url], retire, digest))

    def again(self) -> PacketTransfer:
        """The same bytes under the same number, for a replica that lost them."""
        header = replace(self.packed.header, digest=self.digest)
        return PacketTransfer(self._fleet, OutgoingPacket(header, self.packed.buffer))
