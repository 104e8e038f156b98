"""A packet on its way from the trainer: its header may be at the server while its bytes are being packed.

A server takes milliseconds to read a header, as packing and hashing take here: on one machine they go on at
the same time. Hashing never holds a header up.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from tink_rl.policy import packet

if TYPE_CHECKING:
    import torch

    from tink_rl.transport.fleet import Replica


class Outgoing:
    """One packet: header, bytes, and a digest that is computed once, in a thread.

    A header that is sealed already has its digest.
    """

    def __init__(self, header: packet.PacketHeader, buffer: torch.Tensor) -> None:
        self.header = header
        self.buffer = buffer
        """`[num_bytes] uint8` on the CPU."""
        self._lock = threading.Lock()
        self._digest: Future[str] | None = None
        self._announced: tuple[Replica, Future[str]] | None = None

    # -- digest -----------------------------------------------------------------------------------

    def start_digest(self) -> Future[str]:
        """Begin to hash the bytes, which must be complete, if nobody did."""
        with self._lock:
            if self._digest is None:
                self._digest = _in_thread(self._hash)
            return self._digest

    def _hash(self) -> str:
        return self.header.digest or packet.digest_of(self.header, self.buffer)

    def digest(self) -> str:
        """blake3, hex."""
        return self.start_digest().result()

    # -- announcing -------------------------------------------------------------------------------

    def announce(self, replica: Replica) -> None:
        """Send the header now; the bytes are still to come to the memory that `replica` shares.

        Returns when it was written, or could not be: a thread that packs leaves no other one the turn.
        """
        sent = threading.Event()
        stage_id = _in_thread(lambda: replica.announce(self, sent.set))
        stage_id.add_done_callback(lambda _: sent.set())
        self._announced = (replica, stage_id)
        sent.wait()

    def announced_stage(self) -> str | None:
        """The stage of a header that was announced, once, when all bytes are there; None: send it.

        Raises:
            TinkError: the server refused it, or is not there.
        """
        if self._announced is None:
            return None
        _, stage_id = self._announced
        self._announced = None
        self.start_digest()
        return stage_id.result()

    def withdraw(self) -> None:
        """Let the server forget what was announced and is not sent; never raises."""
        if self._announced is not None:
            replica, stage_id = self._announced
            self._announced = None
            with contextlib.suppress(Exception):  # what ended the packing is to be heard
                replica.end_announcement(self, stage_id.result())


def _in_thread(work: Callable[[], str]) -> Future[str]:
    pool = ThreadPoolExecutor(1, thread_name_prefix="tink-packet")
    future = pool.submit(work)
    pool.shutdown(wait=False)
    return future
