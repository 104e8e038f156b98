"""A packet on its way from the trainer: what every replica sends, hashed once beside the sending."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from tink_rl.policy import packet

if TYPE_CHECKING:
    import torch


class OutgoingPacket:
    """One packet: header, bytes, and a digest that is computed once, in a thread.

    A header that is sealed already has its digest.
    """

    def __init__(self, header: packet.PacketHeader, buffer: torch.Tensor) -> None:
        self.header = header
        self.buffer = buffer
        """`[num_bytes] uint8` on the CPU."""
        self._lock = threading.Lock()
        self._digest: Future[str] | None = None

    def start_digest(self) -> Future[str]:
        """Begin to hash the bytes, which must be complete, if nobody did. Never holds a header up."""
        with self._lock:
            if self._digest is None:
                pool = ThreadPoolExecutor(1, thread_name_prefix="tink-packet")
                self._digest = pool.submit(
                    lambda: self.header.digest or packet.digest_of(self.header, self.buffer)
                )
                pool.shutdown(wait=False)
            return self._digest

    def digest(self) -> str:
        """blake3, hex."""
        return self.start_digest().result()
