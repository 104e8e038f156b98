"""The sender of a full update: whole tensors to every replica, bucket by bucket, one transaction.

`begin` holds the servers' requests, `add` fills a bucket and sends it when it is full, `finish` makes
what was sent the served policy. Whatever fails ends the update on all replicas: a server to which
nothing was written yet goes on as before, any other is NOT READY until a later update is whole.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from tink_rl import errors
from tink_rl.policy import packet
from tink_rl.protocol import CommitAnswer
from tink_rl.transport.outgoing import OutgoingPacket
from tink_rl.types import SyncMode

if TYPE_CHECKING:
    import torch

    from tink_rl.transport.fleet import Fleet
    from tink_rl.transport.replica import Replica

BUCKET_BYTES = 64 * 2**20
"""Bytes of whole tensors that travel, and wait, at once, unless said otherwise."""


class FullUpdate:
    """One full version on its way to all replicas of a fleet."""

    def __init__(
        self,
        fleet: Fleet,
        *,
        policy: str,
        version: int,
        base_fingerprint: str,
        dtype: str,
        bucket_bytes: int,
        expected: str | None = None,
    ) -> None:
        """Store; `begin` speaks to the servers.

        Args:
            fleet: All servers of the policy.
            policy: Its name.
            version: A fresh number; or, with `expected`, one that these weights had before.
            base_fingerprint: Of the checkpoint that the tensors replace.
            dtype: The servers'.
            bucket_bytes: What travels at once.
            expected: Digest without which the update is not finished.
        """
        self._fleet = fleet
        self._policy, self.version = policy, version
        self._expected = expected
        self._fingerprint, self._dtype = base_fingerprint, dtype
        self._bucket_bytes = bucket_bytes
        self._ids: dict[str, str] = {}
        self._bucket: dict[str, torch.Tensor] = {}
        self._filled = 0
        self._memory: torch.Tensor | None = None
        self._chain = packet.DigestChain()
        self.num_bytes = 0
        """Sent so far, to each replica."""

    @property
    def name(self) -> str:
        """The version that is being sent."""
        return f"{self._policy}@{self.version}"

    def begin(self, plan: list[dict[str, Any]] | None) -> None:
        """Let every replica check `plan` (None: nothing is known beforehand) and hold its requests.

        Raises:
            TinkError: a replica refuses; nothing has changed on any.
        """

        def begin(replica: Replica) -> None:
            replica.ensure_channel()
            self._ids[replica.url] = replica.begin_update(
                version=self.version, base_fingerprint=self._fingerprint, plan=plan
            )

        with self._ended_on_failure():
            # Before anything begins: a stream of tensors cannot be read again on another transport.
            self._memory = self._fleet.allocate_buffer(self._bucket_bytes)
            try:
                self._fleet.each(begin)
            except errors.TinkError as error:
                if error.retry is not errors.Retry.RECONNECT:
                    raise
                # A restarted server knows nothing of the old one; no tensor was read yet.
                self._fleet.close_channels()
                self._fleet.each(begin)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take one tensor; it is sent in the server's dtype, now or with the ones that follow.

        Raises:
            TinkError: a replica refused the bucket; the update has ended on all.
        """
        with self._ended_on_failure():
            self._take(name, tensor)

    def add_all(self, pairs: Iterable[tuple[str, torch.Tensor]]) -> None:
        """`add` each of `pairs`, and send the last bucket; the update also ends if reading them fails."""
        with self._ended_on_failure():
            for name, tensor in pairs:
                self._take(name, tensor)
            self._flush()

    def _take(self, name: str, tensor: torch.Tensor) -> None:
        import torch

        if name in self._bucket:
            raise errors.BadRequest(f"tensor {name!r} came twice")
        # Copied now: what is given may be a view that its owner writes to again.
        moved = tensor.detach().to(device="cpu", dtype=getattr(torch, self._dtype), copy=True)
        size = moved.numel() * moved.element_size()
        if self._bucket and self._filled + size > self._bucket_bytes:
            self._flush()
        self._bucket[name] = moved
        self._filled += size

    @property
    def digest(self) -> str:
        """Of all buckets sent so far."""
        return self._chain.digest()

    def finish(self) -> list[CommitAnswer]:
        """Serve what was sent; what each replica holds then.

        Raises:
            DigestMismatch: it is not what was expected; it is served by no replica.
            IncompleteGroup, CommitFailed, ...
        """
        with self._ended_on_failure():
            self._flush()
            digest = self.digest
            if self._expected not in (None, digest):
                raise errors.DigestMismatch(
                    f"{self.name} was served with other weights than the model holds now, and a version "
                    "is never given to others; publish the model again, as a new one"
                )
            answers = self._fleet.each(
                lambda replica: replica.finish_update(self._ids[replica.url], digest)
            )
            for replica, answer in zip(self._fleet.replicas, answers, strict=True):
                if answer.digest != digest:
                    raise errors.DigestMismatch(
                        f"{replica.url} holds {answer.digest}, sent was {digest}",
                        replica=replica.url,
                    )
        self._free_memory()
        return answers

    def abort(self, reason: str) -> None:
        """End the update on every replica; never raises."""
        for replica in self._fleet.replicas:
            update_id = self._ids.pop(replica.url, None)
            if update_id is not None:
                replica.abort_update(update_id, reason)
        self._bucket = {}
        self._free_memory()

    def _free_memory(self) -> None:
        # A bucket is far larger than an adapter; the next update makes its own.
        if self._memory is not None:
            self._fleet.free_buffer(self._memory)
        self._memory = None

    @contextlib.contextmanager
    def _ended_on_failure(self) -> Any:
        try:
            yield
        except BaseException as error:
            self.abort(f"{type(error).__name__}: {error}"[:200])
            raise

    def _flush(self) -> None:
        if not self._bucket:
            return
        header, buffer = packet.pack(
            self._bucket,
            mode=SyncMode.FULL,
            base_fingerprint=self._fingerprint,
            rank=0,
            allocate=self._allocate,
        )
        self._bucket, self._filled = {}, 0
        header = header.named(self._policy, self.version, 0)
        outgoing = OutgoingPacket(header, buffer)
        self._fleet.each(lambda replica: replica.send_bucket(self._ids[replica.url], outgoing))
        self._chain.add(outgoing.digest())
        self.num_bytes += buffer.numel()

    def _allocate(self, num_bytes: int) -> torch.Tensor:
        old, self._memory = self._memory, self._fleet.allocate_buffer(num_bytes, self._memory)
        if old is not None and old is not self._memory:
            self._fleet.free_buffer(old)
        return self._memory[:num_bytes]
