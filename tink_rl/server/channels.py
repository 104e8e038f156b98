"""How one vLLM worker is reached: the channel of each epoch, and the trainer's shared memory.

Joining blocks, and vLLM's engine loop must not, so it runs in a thread whose outcome is asked for.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

from tink_rl.errors import ChannelLost, DigestMismatch, StaleEpoch, TinkError
from tink_rl.protocol import SegmentSpec
from tink_rl.transport import communicator
from tink_rl.transport.shared_memory import MAX_SEGMENTS, Segment

logger = logging.getLogger("tink_rl.server")


class Task:
    """A thread whose outcome is asked for, never waited for."""

    def __init__(self, run: Callable[[], Any]) -> None:
        self._run = run
        self.error: TinkError | None = None
        self.value: Any = None
        self._thread = threading.Thread(target=self._main, daemon=True, name="tink-receiver")

    def start(self) -> None:
        self._thread.start()

    def _main(self) -> None:
        try:
            self.value = self._run()
        except TinkError as error:
            self.error = error
        except Exception as error:  # reported to whoever asks for the state
            logger.exception("tink_rl: receiver thread failed")
            self.error = TinkError(f"{type(error).__name__}: {error}")

    def state(self, patience_s: float = 0.0) -> str:
        """ "running", or "done" (waits up to `patience_s` for it); raises what the thread raised."""
        if patience_s > 0:
            self._thread.join(patience_s)
        if self._thread.is_alive():
            return "running"
        if self.error is not None:
            raise self.error
        return "done"


class Channels:
    """All channels of one worker, by epoch."""

    def __init__(self, *, rank: int) -> None:
        self._rank = rank
        self._stores: dict[int, Any] = {}
        self._joins: dict[int, Task] = {}
        self._segments: dict[int, dict[str, Segment]] = {}
        """The trainer's shared memory, by epoch and nonce."""

    def bind(self, epoch: int, host: str, port: int, timeout_s: float) -> int | None:
        """Rank 0 binds the rendezvous store of `epoch` and gives its port; the others give None."""
        if self._rank != 0:
            return None
        store, bound = communicator.bind_store(host, port, timeout_s)
        self._stores[epoch] = store
        return bound

    def join(self, epoch: int, spec: dict[str, Any]) -> None:
        """Start joining the channel of `epoch`."""
        store = self._stores.get(epoch)

        def join() -> communicator.Channel:
            timeout_s = spec["timeout_s"]
            host, port = spec["host"], spec["port"]
            return communicator.Channel(
                store or communicator.dial_store(host, port, timeout_s),
                nonce=spec["nonce"],
                rank=self._rank,
                world_size=spec["world_size"],
                # Not the server's own: a worker on another node does not have that address.
                host=communicator.local_address(host, port),
                timeout_s=timeout_s,
            )

        task = self._joins[epoch] = Task(join)
        task.start()

    def state(self, epoch: int) -> str:
        """Of joining: "running" or "done".

        Raises:
            StaleEpoch: no such channel. ChannelLost: joining failed.
        """
        return self._find(epoch).state()

    def joined(self, epoch: int) -> communicator.Channel:
        """The open channel of `epoch`.

        Raises:
            StaleEpoch: no such channel. ChannelLost: joining failed or goes on.
        """
        task = self._find(epoch)
        if task.state() != "done":
            raise ChannelLost(f"channel {epoch} is still joining")
        channel: communicator.Channel = task.value
        return channel

    def _find(self, epoch: int) -> Task:
        task = self._joins.get(epoch)
        if task is None:
            raise StaleEpoch(f"channel {epoch} was closed or replaced; join again")
        return task

    def segment(self, epoch: int, spec: SegmentSpec, num_bytes: int) -> Segment:
        """The trainer's segment, opened once; it must hold `num_bytes`.

        Raises:
            SegmentUnreachable: it cannot be opened. DigestMismatch: it is too small.
        """
        segments = self._segments.setdefault(epoch, {})
        segment = segments.get(spec.nonce)
        if segment is None or segment.spec != spec:
            segment = segments[spec.nonce] = Segment.attach(spec)
            for nonce in list(segments)[:-MAX_SEGMENTS]:
                del segments[nonce]
        if spec.num_bytes < num_bytes:
            raise DigestMismatch(
                f"the segment holds {spec.num_bytes} bytes, the header announced {num_bytes}",
                code="truncated_packet",
            )
        return segment

    def forget_segments(self, epoch: int) -> None:
        """Let go of the shared memory of `epoch`."""
        self._segments.pop(epoch, None)

    def close(self, epoch: int) -> None:
        """Close the channel of `epoch`; unknown ones are fine."""
        self.forget_segments(epoch)
        task = self._joins.pop(epoch, None)
        self._stores.pop(epoch, None)
        if task is not None and task.value is not None:
            task.value.close()
