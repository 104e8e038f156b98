"""The table of resident adapter versions: pins, one load per name, least recently used out. No I/O.

A version is loaded by the first who asks for it; whoever asks meanwhile waits for that load. It stays
while it is pinned. Over the capacity the least recently used unpinned one is dropped; a retired one
(replaced, unregistered) is dropped as soon as its last request has ended. Drops happen in one thread
of their own, so `release` never waits.
"""

from __future__ import annotations

import functools
import itertools
import logging
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from enum import Enum, auto
from typing import Protocol

from tink_rl import errors
from tink_rl.adapters.registry import Registration

logger = logging.getLogger("tink_rl")


class Loader(Protocol):
    """Brings a version onto a server, and takes it away. Called from several threads at once."""

    def load(self, wanted: Registration) -> None:
        """Return once the server serves `wanted.server_name`; fine if it does already.

        Raises:
            TinkError: why it does not.
        """
        ...

    def drop(self, name: str) -> None:
        """Return once the server does not list `name` any more; fine if it never did."""
        ...


class _State(Enum):
    LOADING = auto()
    RESIDENT = auto()
    DROPPING = auto()
    GONE = auto()


class Entry:
    """One version's place in the table; who holds it gives it back to `AdapterCache.release`."""

    def __init__(self, registered: Registration) -> None:
        self.registered = registered
        self.state = _State.LOADING
        self.pins = 0
        self.used = 0
        self.retired = False
        self.settled: Future[None] = Future()
        """Done when the load has ended, with its exception if it failed."""
        self.dropped = threading.Event()


class AdapterCache:
    """The versions on one server, for any number of threads."""

    def __init__(self, loader: Loader, *, capacity: int, wait_s: float = 120.0) -> None:
        """Store.

        Args:
            loader: Does the work.
            capacity: Versions that are kept; more are there only while they are pinned.
            wait_s: Longest wait for another thread's load or for a drop.
        """
        self._loader, self._capacity, self._wait_s = loader, capacity, wait_s
        self._lock = threading.Lock()
        self._entries: dict[str, Entry] = {}
        self._clock = itertools.count(1)
        self._janitor = ThreadPoolExecutor(1, thread_name_prefix="tink-cache")

    # -- use --------------------------------------------------------------------------------------

    def pin_if_resident(self, wanted: Registration) -> Entry | None:
        """The pinned entry of a version that is there already, at once; None if it is not."""
        with self._lock:
            entry = self._entries.get(wanted.server_name)
            if entry is None or entry.state is not _State.RESIDENT:
                return None
            return self._pin(entry)

    def acquire(self, wanted: Registration) -> Entry:
        """The pinned entry of `wanted`, loaded if it was not there. Waits; never call it in a loop.

        Raises:
            TinkError: what the load raised, for everybody who waited for it.
            DeadlineExceeded: another thread's load or a drop did not end.
        """
        while True:
            with self._lock:
                entry = self._entries.get(wanted.server_name)
                fresh = entry is None
                if entry is None:
                    entry = self._entries[wanted.server_name] = Entry(wanted)
                leaving = entry.state is _State.DROPPING
                if not leaving:
                    self._pin(entry)
            if not leaving:
                break
            if not entry.dropped.wait(self._wait_s):
                raise self._too_long(wanted.server_name, "drop")
        if fresh:
            self._load(entry)
        else:
            self._wait_for_load(entry)
        return entry

    def _pin(self, entry: Entry) -> Entry:
        entry.pins += 1
        entry.used = next(self._clock)
        return entry

    def _wait_for_load(self, entry: Entry) -> None:
        try:
            entry.settled.result(self._wait_s)
        except BaseException as error:
            self.release(entry)
            if isinstance(error, TimeoutError) and not isinstance(error, errors.TinkError):
                raise self._too_long(entry.registered.server_name, "load") from error
            raise

    def _too_long(self, name: str, what: str) -> errors.DeadlineExceeded:
        return errors.DeadlineExceeded(
            f"adapter {name}: its {what} did not end within {self._wait_s:g} s; is the vLLM server "
            "overloaded? try again"
        )

    def _load(self, entry: Entry) -> None:
        try:
            self._loader.load(entry.registered)
        except BaseException as error:
            with self._lock:
                entry.pins -= 1
                self._take_out(entry)
            entry.settled.set_exception(error)
            raise
        with self._lock:
            if entry.state is _State.LOADING:
                entry.state = _State.RESIDENT
            victims = self._victims()
        entry.settled.set_result(None)
        self._drop_later(victims)

    def release(self, entry: Entry) -> None:
        """Give a pinned entry back; returns at once."""
        with self._lock:
            entry.pins -= 1
            victims = self._victims()
        self._drop_later(victims)

    # -- leave ------------------------------------------------------------------------------------

    def _victims(self) -> list[Entry]:
        """What must leave now, marked as leaving. Under the lock."""
        staying = [e for e in self._entries.values() if e.state is not _State.DROPPING]
        idle = [e for e in staying if e.state is _State.RESIDENT and not e.pins]
        leaving = [entry for entry in idle if entry.retired]
        excess = len(staying) - len(leaving) - self._capacity
        if excess > 0:
            by_use = sorted((e for e in idle if not e.retired), key=lambda e: e.used)
            leaving += by_use[:excess]
        for entry in leaving:
            entry.state = _State.DROPPING
        return leaving

    def _drop_later(self, victims: list[Entry]) -> None:
        for entry in victims:
            try:
                dropping = self._janitor.submit(self._drop, entry)
            except RuntimeError:  # closed meanwhile: it stays on the server
                self._left(entry)
            else:
                dropping.add_done_callback(functools.partial(self._left, entry))

    def _drop(self, entry: Entry) -> None:
        try:
            self._loader.drop(entry.registered.server_name)
        except errors.TinkError as error:
            # The server keeps it for longer than needed; a later load finds it there.
            logger.warning("adapter %s was not dropped: %s", entry.registered.server_name, error)

    def _left(self, entry: Entry, _: Future[None] | None = None) -> None:
        with self._lock:
            self._take_out(entry)
        entry.dropped.set()

    def _take_out(self, entry: Entry) -> None:
        if self._entries.get(entry.registered.server_name) is entry:
            del self._entries[entry.registered.server_name]
        entry.state = _State.GONE

    def retire(self, adapter_id: str, *, keep: int | None = None) -> None:
        """Let every version of `adapter_id` but `keep` leave once its last request has ended."""
        with self._lock:
            for entry in self._entries.values():
                if entry.registered.adapter_id == adapter_id:
                    entry.retired = entry.registered.version != keep
            victims = self._victims()
        self._drop_later(victims)

    def discard(self, entry: Entry) -> None:
        """The server turned out not to serve this entry any more; the next `acquire` loads it again."""
        with self._lock:
            if entry.state is _State.RESIDENT:
                self._take_out(entry)

    def discard_all(self) -> None:
        """The server was restarted and holds nothing; loads that are under way go on."""
        with self._lock:
            for entry in [e for e in self._entries.values() if e.state is _State.RESIDENT]:
                self._take_out(entry)

    def resident(self) -> dict[str, int]:
        """Name -> pins of every version that is believed to be there."""
        with self._lock:
            return {n: e.pins for n, e in self._entries.items() if e.state is _State.RESIDENT}

    def settle(self, timeout_s: float = 30.0) -> None:
        """Return once the drops that were decided on before this call have ended."""
        self._janitor.submit(lambda: None).result(timeout_s)

    def close(self) -> None:
        """End the thread; what lies on the server stays there."""
        self._janitor.shutdown(wait=False, cancel_futures=True)
