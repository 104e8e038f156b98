"""The processes of one run: all run the same lines, rank 0 alone speaks to the servers, all fail together.

Under FSDP2 and ZeRO-3 even reading the adapter and computing a probe are collectives: `each(work)` is
what every rank does, `on_leader(work)` what rank 0 does and all get the result of.

Results and failures travel as JSON through the key-value store that torch.distributed was started with,
not as collectives: the store has deadlines, and it still answers when a collective hangs or broke.
A rank that fails posts its error there first. The ranks that wait for it, or whose collective breaks
because it ended, raise that same error.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from tink_rl import errors
from tink_rl.errors import RankFailed, TinkError

logger = logging.getLogger("tink_rl")

_FAILED = "failed"
_SHORTEST_WAIT_S, _LONGEST_WAIT_S = 0.001, 0.02
_WATCH_S = 1.0
_FAREWELL_S = 10.0
"""A failed rank stays this long for the others to see why, then it ends."""

T = TypeVar("T")
_RUNS = iter(range(10**9))


class Ranks:
    """This process among the `count` of its run. With one process everything is a plain call."""

    def __init__(self, index: int, count: int, *, timeout_s: float, store: Any = None) -> None:
        """Store; opens nothing.

        Args:
            index: This process's rank.
            count: Number of processes.
            timeout_s: How long to wait for another rank; the trainer's `ddp_timeout`.
            store: A `torch.distributed.Store`; None: the one of the default process group.
        """
        self.index, self.count, self._timeout_s = index, count, timeout_s
        self._given_store = store
        self._store: Any = None
        # Every process makes its links in the same order, so the number is the same on all ranks.
        self._prefix = f"tink_rl/{next(_RUNS)}"
        self._turn = 0
        self._closed = threading.Event()
        self._watcher: threading.Thread | None = None

    @property
    def is_leader(self) -> bool:
        """Whether this is the rank that speaks to the servers."""
        return self.index == 0

    # -- one turn ---------------------------------------------------------------------------------

    def on_leader(self, work: Callable[[], T]) -> T:
        """`work()` on rank 0; every rank gets its result (as JSON gives it), or raises what it raised.

        Every rank must call it.

        Raises:
            RankFailed: another rank failed with an error that is not ours, or did not answer in time.
            TinkError: what `work` raised.
        """
        if self.count == 1:
            return work()
        key = self._next_turn()
        if not self.is_leader:
            said = json.loads(self._wait(key, 0))
            if "error" in said:
                raise errors.from_wire(said["error"], 500)
            result: T = said["result"]
            return result
        try:
            result = work()
            said = json.dumps({"result": result})
        except BaseException as error:
            self._set(key, json.dumps({"error": self._wire(error)}))
            raise
        self._set(key, said)
        return result

    def each(self, work: Callable[[], T]) -> T:
        """`work()` on every rank at the same time; this rank's result, once all have theirs.

        Every rank must call it.

        Raises:
            TinkError: it failed, on this rank or on another one.
        """
        if self.count == 1:
            return work()
        key = self._next_turn()
        try:
            result = work()
        except BaseException as error:
            self._fail(error)
            # A collective breaks here when the rank that failed ends: its reason is the reason.
            self._raise_posted(cause=error)
            raise
        if self.is_leader:
            for rank in range(1, self.count):
                self._wait(f"{key}/{rank}", rank)
            self._set(key, "1")
        else:
            self._set(f"{key}/{self.index}", "1")
            self._wait(key, 0)
        return result

    def _next_turn(self) -> str:
        self._open()
        self._turn += 1
        return str(self._turn)

    # -- failing together -------------------------------------------------------------------------

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """What fails inside on any rank fails on every rank, with the same error.

        The rank that failed waits a moment until the others have seen why. Another rank is told when
        its next collective or wait ends, which it does at the latest when the failed process ends.
        """
        if self.count > 1:
            self._open()
        try:
            yield
        except BaseException as error:
            if self.count > 1:
                self._fail(error)
                self._say_seen()
                self._raise_posted(cause=error)
                self._say_farewell()
            raise

    def _fail(self, error: BaseException) -> None:
        """Post the reason, unless another rank posted one before."""
        text = json.dumps({"rank": self.index, "error": self._wire(error)})
        with _store_may_be_gone():
            self._store.compare_set(_FAILED, "", text)

    def _raise_posted(self, cause: BaseException | None = None) -> None:
        """Raise another rank's error, if one was posted.

        Raises:
            TinkError: as said.
        """
        posted = self._posted()
        if posted is None or posted["rank"] == self.index:
            return
        self._say_seen()
        found = errors.from_wire(posted["error"], 500)
        if cause is not None and str(cause) == str(found):
            return  # all failed alike: each keeps its own
        raise found from cause

    def _posted(self) -> dict[str, Any] | None:
        with _store_may_be_gone():
            if self._store is not None and self._store.check([_FAILED]):
                found: dict[str, Any] = json.loads(self._store.get(_FAILED))
                return found
        return None

    def _wire(self, error: BaseException) -> dict[str, Any]:
        known = error if isinstance(error, TinkError) else None
        wrapped = known or RankFailed(
            f"rank {self.index} failed: {type(error).__name__}: {error}", rank=self.index
        )
        wire: dict[str, Any] = json.loads(json.dumps(wrapped.to_wire(), default=str))
        return wire

    def _say_seen(self) -> None:
        with _store_may_be_gone():
            self._store.set(f"seen/{self.index}", "1")

    def _say_farewell(self) -> None:
        deadline = time.monotonic() + _FAREWELL_S
        others = [f"seen/{rank}" for rank in range(self.count) if rank != self.index]
        with _store_may_be_gone():
            while time.monotonic() < deadline and not self._store.check(others):
                time.sleep(_LONGEST_WAIT_S)

    # -- the store --------------------------------------------------------------------------------

    def _open(self) -> None:
        if self._store is not None:
            return
        from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

        # A connection of our own: torch's waits on the default one would block ours.
        base: Any = self._given_store or _get_default_store()
        self._store = PrefixStore(self._prefix, base.clone())
        self._watcher = threading.Thread(target=self._watch, name="tink-ranks", daemon=True)
        self._watcher.start()

    def _set(self, key: str, value: str) -> None:
        try:
            self._store.set(key, value)
        except RuntimeError as error:
            raise self._lost(error) from error

    def _wait(self, key: str, rank: int) -> bytes:
        """The value of `key`, which `rank` will set."""
        # The leader gives up first: it knows which rank is missing, a follower would name the leader.
        timeout_s = self._timeout_s if self.is_leader else 2 * self._timeout_s
        deadline = time.monotonic() + timeout_s
        pause_s = _SHORTEST_WAIT_S
        while True:
            self._raise_posted()
            try:
                if self._store.check([key]):
                    value: bytes = self._store.get(key)
                    return value
            except RuntimeError as error:
                raise self._lost(error) from error
            if time.monotonic() > deadline:
                raise RankFailed(
                    f"rank {rank} did not answer rank {self.index} within {timeout_s:g} s "
                    f"(waited for {key}); look into its log, or raise ddp_timeout",
                    rank=rank,
                )
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_WAIT_S)

    def _lost(self, error: Exception) -> RankFailed:
        return RankFailed(
            f"rank {self.index} lost the store of the run ({error}); the process that holds it ended",
            rank=0,
        )

    def _watch(self) -> None:
        """Say what failed elsewhere, also while this rank hangs; free it from an NCCL collective."""
        while not self._closed.wait(_WATCH_S):
            posted = self._posted()
            if posted is None:
                continue
            if posted["rank"] != self.index:
                logger.error(
                    "rank %d failed: %s", posted["rank"], posted["error"]["error"]["message"]
                )
                self._say_seen()
                if not self._closed.wait(_FAREWELL_S):
                    _abort_nccl()
            return

    def close(self) -> None:
        """Stop watching; idempotent."""
        self._closed.set()


@contextmanager
def _store_may_be_gone() -> Iterator[None]:
    """Without the store no reason can be told; what this rank knows is raised as it is."""
    try:
        yield
    except RuntimeError as error:
        logger.warning("the store of the run does not answer: %s", error)


def _abort_nccl() -> None:
    # A collective that waits for a rank which ended cannot be interrupted from Python. gloo's breaks
    # when that process ends; NCCL's has to be aborted.
    import torch.distributed as dist

    if dist.is_initialized() and "nccl" in dist.get_backend():
        dist.distributed_c10d._abort_process_group()
