"""Which adapter an id means now: one SQLite file beside the store, shared by threads and processes.

A version is given once and never again, also after the id was unregistered; its row stays. WAL keeps
readers and writers apart; it needs a disk of this machine, not a network one.
"""

from __future__ import annotations

import os
import re
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tink_rl.errors import (
    AdapterConflict,
    BadRequest,
    DeadlineExceeded,
    StorageFull,
    StoreDamaged,
    UnknownAdapter,
)

FILE_NAME = "registry.sqlite3"
_ADAPTER_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_BUSY_S = 10.0
_MAX_IDLE_CONNECTIONS = 8
_SCHEMA = """
CREATE TABLE IF NOT EXISTS versions (
    adapter_id TEXT NOT NULL,
    version INTEGER NOT NULL,
    digest TEXT NOT NULL,
    lora_path TEXT NOT NULL,
    registered_at REAL NOT NULL,
    active INTEGER NOT NULL,
    base_fingerprint TEXT,
    replaced_at REAL,
    PRIMARY KEY (adapter_id, version)
) WITHOUT ROWID;
CREATE UNIQUE INDEX IF NOT EXISTS one_active ON versions (adapter_id) WHERE active;
"""
_ADDED = {"base_fingerprint": "TEXT", "replaced_at": "REAL"}
"""Columns that a file of an earlier release lacks."""
_COLUMNS = "adapter_id, version, digest, lora_path, registered_at, active, base_fingerprint"
_CURRENT = f"SELECT {_COLUMNS} FROM versions WHERE adapter_id = ? AND active"
_GET = f"SELECT {_COLUMNS} FROM versions WHERE adapter_id = ? AND version = ?"
_LIST = f"SELECT {_COLUMNS} FROM versions WHERE active ORDER BY adapter_id"
_NEEDED = """
SELECT DISTINCT digest FROM versions
WHERE replaced_at > ? OR adapter_id IN (SELECT adapter_id FROM versions WHERE active)
"""


@dataclass(frozen=True, kw_only=True)
class Registration:
    """One version of one adapter id.

    Example: `Registration(adapter_id="math", version=3, digest="9f3a..", lora_path="/data/math",
    registered_at=1790000000.0, active=True)`
    """

    adapter_id: str
    version: int
    """From 1, never reused."""
    digest: str
    """Names the bytes in the store, of whatever base; a server has another one for the packet that is made of
    them, in its dtype and for its base."""
    lora_path: str
    """The caller's words; nothing is read from there any more."""
    registered_at: float
    """Seconds since 1970."""
    active: bool
    """Whether `adapter_id` means this version."""
    base_fingerprint: str | None = None
    """The base that was served when it was registered; None: nobody knew."""

    @property
    def server_name(self) -> str:
        """What a server calls it: unique per bytes, so that two registries never mix."""
        return f"{self.adapter_id}.{self.digest[:12]}@{self.version}"


def check_adapter_id(adapter_id: object) -> str:
    """`adapter_id`, if it can be one.

    Raises:
        BadRequest: it cannot.
    """
    if _is_id(adapter_id):
        return str(adapter_id)
    given = ascii(adapter_id)[:120] if isinstance(adapter_id, str) else type(adapter_id).__name__
    raise BadRequest(
        f"adapter_id {given}: expected 1-100 letters, digits, '.', '_' or '-', starting with a letter "
        "or digit ('id@3' names a version, so '@' is none of them)"
    )


def _is_id(adapter_id: object) -> bool:
    return isinstance(adapter_id, str) and _ADAPTER_ID.fullmatch(adapter_id) is not None


class AdapterRegistry:
    """Adapter ids and their versions, on disk.

    Every call sees what any thread or process has written before. The file is opened on first use, and
    again after a fork.
    """

    def __init__(self, path: str | Path) -> None:
        """Keep `path`: the file, or the directory of the store, beside whose adapters it lies."""
        given = Path(path).expanduser().absolute()
        self.path = given if given.suffix == ".sqlite3" else given / FILE_NAME
        self._connections = _Connections(self.path)

    def current(self, adapter_id: str) -> Registration | None:
        """What `adapter_id` means now, or None. Cheap: one look-up by key."""
        if not _is_id(adapter_id):
            return None
        return _one(self._connections.select(_CURRENT, (adapter_id,)))

    def get(self, adapter_id: str, version: int) -> Registration | None:
        """That version, current or not, or None if it was never given."""
        if not _is_id(adapter_id) or not 0 < version < 2**63:
            return None
        return _one(self._connections.select(_GET, (adapter_id, version)))

    def list(self) -> list[Registration]:
        """The current version of every registered id, by id."""
        return [_registration(row) for row in self._connections.select(_LIST)]

    def digests(self, *, active_only: bool = True) -> set[str]:
        """Digests that current versions name, or, if not `active_only`, any version ever."""
        where = "WHERE active" if active_only else ""
        return {
            row[0]
            for row in self._connections.select(f"SELECT DISTINCT digest FROM versions {where}")
        }

    def needed(self, since: float) -> set[str]:
        """Digests that a `model_id` may still name: every version of an id that is registered, and what
        was replaced or unregistered after `since` (seconds since 1970)."""
        return {row[0] for row in self._connections.select(_NEEDED, (since,))}

    def register(
        self,
        adapter_id: str,
        digest: str,
        lora_path: str | Path,
        expected_version: int | None = None,
        *,
        base_fingerprint: str | None = None,
    ) -> Registration:
        """Let `adapter_id` mean `digest`. The same bytes keep their version; others become the next one.

        Args:
            adapter_id: See `check_adapter_id`.
            digest: Of what `AdapterStore.add` stored.
            lora_path: The caller's words, for listings.
            expected_version: The current version (0: none) as read before the bytes were copied; None
                takes whatever is there.
            base_fingerprint: The base that it was checked against; None leaves what is known of bytes
                that are registered already.

        Raises:
            AdapterConflict: somebody else registered other bytes since `expected_version` was read.
            BadRequest: no valid id.
            StorageFull, StoreDamaged, DeadlineExceeded: the file.
        """
        check_adapter_id(adapter_id)
        with self._connections.transaction() as connection:
            current = _one(connection.execute(_CURRENT, (adapter_id,)).fetchall())
            if current is not None and current.digest == digest:
                return _checked_against(connection, current, base_fingerprint)
            if current is not None and expected_version not in (None, current.version):
                raise AdapterConflict(
                    f"adapter {adapter_id!r} was registered with other bytes meanwhile, as version "
                    f"{current.version}; look at it (list_lora_adapters), then register again",
                    adapter_id=adapter_id,
                    version=current.version,
                )
            row = (digest, _text(lora_path), time.time(), True, base_fingerprint)
            return _insert(connection, adapter_id, row)

    def unregister(self, adapter_id: str) -> Registration:
        """Let `adapter_id` mean nothing; what it meant.

        Raises:
            UnknownAdapter: nothing is registered under it.
            StorageFull, StoreDamaged, DeadlineExceeded: the file.
        """
        if not _is_id(adapter_id):
            raise _unknown(adapter_id)
        with self._connections.transaction() as connection:
            current = _one(connection.execute(_CURRENT, (adapter_id,)).fetchall())
            if current is None:
                raise _unknown(adapter_id)
            _deactivate(connection, adapter_id)
            # Its older versions too could be named until now.
            connection.execute(
                "UPDATE versions SET replaced_at = ? WHERE adapter_id = ?",
                (time.time(), adapter_id),
            )
            return current

    def close(self) -> None:
        """Close the file; a call that is under way keeps its connection, the next one opens its own."""
        self._connections.close()


def _unknown(adapter_id: object) -> UnknownAdapter:
    given = ascii(adapter_id)[:120]
    return UnknownAdapter(
        f"no adapter is registered as {given}; list_lora_adapters() or GET /api/v1/adapters shows "
        "which are",
        adapter_id=given,
    )


def _insert(connection: sqlite3.Connection, adapter_id: str, rest: tuple[Any, ...]) -> Registration:
    query = "SELECT COALESCE(MAX(version), 0) + 1 FROM versions WHERE adapter_id = ?"
    (version,) = connection.execute(query, (adapter_id,)).fetchone()
    row = (adapter_id, version, *rest)
    _deactivate(connection, adapter_id)
    connection.execute(f"INSERT INTO versions ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?)", row)
    return _registration(row)


def _checked_against(
    connection: sqlite3.Connection, current: Registration, base_fingerprint: str | None
) -> Registration:
    """The same bytes, which now belong to this base."""
    if base_fingerprint in (None, current.base_fingerprint):
        return current
    connection.execute(
        "UPDATE versions SET base_fingerprint = ? WHERE adapter_id = ? AND version = ?",
        (base_fingerprint, current.adapter_id, current.version),
    )
    return replace(current, base_fingerprint=base_fingerprint)


def _text(path: str | Path) -> str:
    # A file name may hold bytes that are not UTF-8; the database holds text.
    return str(path).encode(errors="replace").decode()


def _deactivate(connection: sqlite3.Connection, adapter_id: str) -> None:
    connection.execute(
        "UPDATE versions SET active = 0, replaced_at = ? WHERE adapter_id = ? AND active",
        (time.time(), adapter_id),
    )


def _registration(row: tuple[Any, ...]) -> Registration:
    adapter_id, version, digest, lora_path, registered_at, active, base_fingerprint = row
    return Registration(
        adapter_id=adapter_id,
        version=version,
        digest=digest,
        lora_path=lora_path,
        registered_at=registered_at,
        active=bool(active),
        base_fingerprint=base_fingerprint,
    )


def _one(rows: list[tuple[Any, ...]]) -> Registration | None:
    return _registration(rows[0]) if rows else None


class _Connections:
    """SQLite connections that the threads of this process lend each other, opened as they are needed.

    One connection behind a lock would let one request of the worker in at a time: SQLite lets
    go of the GIL inside, and whoever holds the lock then waits for it while all others wait for him.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._idle: deque[sqlite3.Connection] = deque()
        self._writing = threading.Lock()
        self._pid = os.getpid()

    @contextmanager
    def lent(self) -> Iterator[sqlite3.Connection]:
        """A connection of one's own for as long as the block lasts."""
        self._forget_parents()
        with _readable(self._path):
            try:
                connection = self._idle.pop()
            except IndexError:
                connection = _connect(self._path)
            try:
                yield connection
            finally:
                if connection.in_transaction or len(self._idle) >= _MAX_IDLE_CONNECTIONS:
                    connection.close()
                else:
                    self._idle.append(connection)

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Committed at the end of the block, rolled back by an exception; one writer at a time.

        Threads of this process take turns by a lock, which is fair; SQLite's own waiting is not.
        """
        self._forget_parents()
        with self._writing, self.lent() as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise

    def select(self, query: str, values: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        """All rows."""
        with self.lent() as connection:
            return connection.execute(query, values).fetchall()

    def close(self) -> None:
        """Close those that nobody holds; the next call opens one again."""
        while self._idle and self._pid == os.getpid():
            with suppress(IndexError):  # another thread took the last one
                self._idle.pop().close()

    def _forget_parents(self) -> None:
        """After a fork: leave the parent's connections open, which SQLite must neither use nor close."""
        if self._pid != os.getpid():
            self._inherited = self._idle
            self._idle, self._writing, self._pid = deque(), threading.Lock(), os.getpid()


def _connect(path: Path) -> sqlite3.Connection:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    connection = sqlite3.connect(
        path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False
    )
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")  # a registration survives a power cut
        connection.executescript(_SCHEMA)
        _add_columns(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def _add_columns(connection: sqlite3.Connection) -> None:
    """Bring a file of an earlier release up to date; what was replaced ages from now on."""

    def missing() -> list[str]:
        found = {row[1] for row in connection.execute("PRAGMA table_info(versions)")}
        return [name for name in _ADDED if name not in found]

    if not missing():
        return
    connection.execute("BEGIN IMMEDIATE")
    for name in missing():  # asked again: another process may have been first
        connection.execute(f"ALTER TABLE versions ADD COLUMN {name} {_ADDED[name]}")
    connection.execute(
        "UPDATE versions SET replaced_at = ? WHERE NOT active AND replaced_at IS NULL",
        (time.time(),),
    )
    connection.execute("COMMIT")


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn what SQLite says about its file into our errors."""
    try:
        yield
    except OSError as error:
        if isinstance(error, StorageFull):
            raise
        raise _unwritable(path, str(error.strerror)) from error
    except sqlite3.DatabaseError as error:
        name = getattr(error, "sqlite_errorname", "")
        if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
            raise DeadlineExceeded(
                f"adapter registry {path} was locked for {_BUSY_S:g} s by another process; try again"
            ) from error
        if name.startswith(("SQLITE_NOTADB", "SQLITE_CORRUPT")):
            raise StoreDamaged(
                f"adapter registry {path} is no intact database ({error}); move it away and register "
                "the adapters again"
            ) from error
        raise _unwritable(path, str(error)) from error


def _unwritable(path: Path, what: str) -> StorageFull:
    return StorageFull(
        f"adapter registry {path} cannot be used: {what}; free space, `chmod u+w` it, or set "
        "TINK_STORE_DIR to another directory"
    )
