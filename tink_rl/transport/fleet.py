"""Several servers as one: every replica stages, then every replica commits.

A `Fleet` does one thing on all replicas at once and names the replica in the error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

from tink_rl import errors
from tink_rl.errors import TinkError
from tink_rl.transport.replica import Replica
from tink_rl.transport.shared_memory import SegmentPool
from tink_rl.types import ServerStatus

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


class Fleet:
    """Several replicas that serve the same policy."""

    def __init__(self, replicas: Sequence[Replica]) -> None:
        if not replicas:
            raise errors.ConfigError("no vLLM server was given; set SyncConfig(servers=(URL,))")
        self.replicas = list(replicas)
        self._segments = SegmentPool()
        for replica in self.replicas:
            replica.segments = self._segments
        self._pool: ThreadPoolExecutor | None = None

    def each(self, work: Callable[[Replica], T]) -> list[T]:
        """`work(replica)` on all at once, in order of the replicas.

        Raises:
            TinkError: the first that failed, with the replica's URL in its details, after all ended.
        """
        if len(self.replicas) == 1:
            return [_named(work, self.replicas[0])]
        if self._pool is None:
            self._pool = ThreadPoolExecutor(len(self.replicas), thread_name_prefix="tink-fleet")
        futures = [self._pool.submit(_named, work, replica) for replica in self.replicas]
        failures = [f.exception() for f in futures]
        for failure in failures:
            if failure is not None:
                raise failure
        return [future.result() for future in futures]

    def allocate_buffer(self, num_bytes: int, spare: torch.Tensor | None = None) -> torch.Tensor:
        """Memory for a packet, `[>= num_bytes] uint8`: `spare` where it still serves, else new memory.

        Shared with the servers on this machine, so that what is packed into it needs no further copy.
        Where there is none a sharing replica's channel is closed, and its next one is another.

        Raises:
            SegmentUnreachable: there is none, and `transport="shm"` was asked for.
        """
        import torch

        sharing = [replica for replica in self.replicas if replica.shares_memory]
        serves = spare is not None and (not sharing or self._segments.holding(spare) is not None)
        if spare is not None and serves and spare.numel() >= num_bytes:
            return spare
        try:
            if sharing:
                return self._segments.new(num_bytes)
        except errors.SegmentUnreachable as error:
            for replica in sharing:
                replica.do_without_shared_memory(error)
        return torch.empty(num_bytes, dtype=torch.uint8)

    def free_buffer(self, buffer: torch.Tensor) -> None:
        """Let go of memory that `allocate_buffer` gave and that nobody packs into again."""
        self._segments.drop(buffer)

    def statuses(self) -> list[ServerStatus]:
        """Status of every replica; raises if one is NOT READY only when it is published to."""
        return self.each(lambda replica: replica.status())

    def check_alike(self) -> ServerStatus:
        """The facts that all replicas share.

        Raises:
            ConfigError: they differ in base, dtype, modes, slots or logprobs.
        """
        statuses = self.statuses()
        alike = ("base_fingerprint", "dtype", "adapter_dtype", "modes", "max_lora_rank")
        for name in (*alike, "logprobs_mode", "no_full_logprobs"):
            values = {str(getattr(status, name)) for status in statuses}
            if len(values) > 1:
                raise errors.ConfigError(
                    f"the servers differ in {name}: {sorted(values)}; start all of them alike"
                )
        return statuses[0]

    def close_channels(self) -> None:
        """Give all leases back; the next publish joins again."""
        for replica in self.replicas:
            replica.close()

    def close(self) -> None:
        """Give all leases and threads back; what is asked later takes them anew."""
        self.close_channels()
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=False)


def _named(work: Callable[[Replica], T], replica: Replica) -> T:
    try:
        return work(replica)
    except TinkError as error:
        error.details.setdefault("replica", replica.url)
        raise
