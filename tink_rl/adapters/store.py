"""The private, content-addressed store: what is served is a checked copy, never the caller's path.

    ROOT/<digest>/adapter_config.json          ours: r = the largest rank, lora_alpha = r, no patterns
    ROOT/<digest>/adapter_model.safetensors    float32, every module's scaling folded into B
    ROOT/.tmp-*                                a copy that is being written, or removed
    ROOT/.lock                                 held for a moment to make or clean those

The digest is blake3 over both files, so the same weights are stored once, however they were saved. A
directory appears complete, by one rename. It is a plain PEFT directory: stock vLLM and PEFT compute
W + B·A from it. Modules of a lower rank are filled up with zeros, because vLLM ignores `rank_pattern`.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tink_rl.adapters.normalised import layout_of, sync_directory, write_normalised
from tink_rl.errors import (
    AdapterFilesInvalid,
    ConfigError,
    DeadlineExceeded,
    StorageFull,
    StoreDamaged,
    UnknownVersion,
)
from tink_rl.policy.adapter_folder import CONFIG_FILE
from tink_rl.policy.peft_dir import WEIGHTS_FILE, open_peft_dir

if TYPE_CHECKING:
    from tink_rl.policy.adapter import Adapter
    from tink_rl.policy.shapes import BaseShapes

MAX_RANK = 512
"""Largest rank that vLLM has LoRA kernels for."""
GC_MIN_AGE_S = 3600.0
_LOCK_S = 10.0
_DIGEST = re.compile(r"^[0-9a-f]{64}$")
_TEMPORARY = ".tmp-"


@dataclass(frozen=True, kw_only=True)
class StoredAdapter:
    """One adapter in the store.

    Example: `StoredAdapter(digest="9f3a..", path=Path(".../9f3a.."), rank=16, num_bytes=393216,
    dtype="BF16", modules=("model.layers.0.self_attn.q_proj", ...))`
    """

    digest: str
    """blake3 of the stored files, 64 hex digits."""
    path: Path
    """A PEFT directory of our own; nobody may write to it."""
    rank: int
    num_bytes: int
    """Bytes of the stored weights file."""
    dtype: str
    """What the source held; stored is float32."""
    modules: tuple[str, ...]


def default_store_dir() -> Path:
    """`$TINK_STORE_DIR`, else `tink_rl/adapters` under `$XDG_DATA_HOME` or `~/.local/share`."""
    if named := os.environ.get("TINK_STORE_DIR"):
        return Path(named).expanduser().absolute()
    base = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(base).expanduser().absolute() / "tink_rl" / "adapters"


class AdapterStore:
    """Adapters by digest under one directory. Many threads and processes may use it at once."""

    def __init__(self, root: str | Path | None = None) -> None:
        self.root = Path(root).expanduser().absolute() if root else default_store_dir()
        self._cleaned = False

    def add(
        self,
        source: str | Path,
        *,
        roots: Sequence[Path] | None = None,
        base: BaseShapes | None = None,
        max_rank: int = MAX_RANK,
    ) -> StoredAdapter:
        """Check the PEFT directory `source` and store a normalised copy; the same weights only once.

        Args:
            source: The caller's path; read once, through open handles.
            roots: Directories that it must lie under; None trusts the caller (`paths.open_source`).
            base: The base that it must fit, if that is known.
            max_rank: Largest rank that is taken.

        Nothing is left behind on failure.

        Raises:
            PathNotAllowed, AdapterPathMissing, AdapterFilesInvalid, UnsupportedAdapter, RankExceeded,
                ShapeMismatch: see `peft_dir.open_peft_dir`.
            UnknownModules, BaseMismatch: it does not fit `base`.
            NonFiniteWeights: its values.
            StorageFull: the store cannot be written.
            ConfigError: the store's directory is not private.
        """
        with open_peft_dir(source, roots=roots, max_rank=max_rank, base=base) as adapter:
            if base is not None:
                base.check(
                    {m.name: m.shape for m in adapter.modules},
                    where=adapter.where,
                    trained_on=adapter.base_fingerprint,
                )
            layout = layout_of(adapter)
            with self._temporary() as directory:
                digest, num_bytes = write_normalised(adapter, layout, directory)
                self._commit(directory, digest)
            return StoredAdapter(
                digest=digest,
                path=self.root / digest,
                rank=adapter.rank,
                num_bytes=num_bytes,
                dtype=adapter.dtype,
                modules=tuple(module.name for module in adapter.modules),
            )

    def open(self, digest: str) -> Path:
        """The directory of `digest`.

        Raises:
            UnknownVersion: it is not stored.
        """
        path = self.root / digest
        if not _DIGEST.match(digest) or not path.is_dir():
            raise UnknownVersion(
                f"adapter {digest[:64]!r} is not in the store; register it again",
                digest=digest[:64],
            )
        return path

    def read(self, digest: str) -> Adapter:
        """The stored adapter, its bytes checked against `digest`.

        Raises:
            UnknownVersion: it is not stored.
            StoreDamaged: the files are not those that were written.
        """
        from blake3 import blake3

        from tink_rl.errors import PathNotAllowed
        from tink_rl.policy.adapter import from_peft_dir

        path = self.open(digest)
        hasher = blake3()
        try:
            hasher.update((path / CONFIG_FILE).read_bytes())
            hasher.update(b"\0")
            with (path / WEIGHTS_FILE).open("rb") as file:
                while piece := file.read(1 << 20):
                    hasher.update(piece)
            adapter = from_peft_dir(path, as_written=True)
        except (OSError, AdapterFilesInvalid, PathNotAllowed) as error:
            raise _damaged(path, str(error)) from error
        if hasher.hexdigest() != digest:
            raise _damaged(path, "its bytes hash to something else")
        return adapter

    def digests(self) -> list[str]:
        """Every stored digest, sorted."""
        with suppress(FileNotFoundError):
            return sorted(name for name in os.listdir(self.root) if _DIGEST.match(name))
        return []

    def remove(self, digest: str) -> None:
        """Forget `digest`; nothing happens if it is not stored.

        The caller knows that no server can name it any more: a server that evicted an adapter reads
        its directory again, and dies if that is gone.

        Raises:
            StorageFull: the store cannot be written.
        """
        if not _DIGEST.match(digest):
            return
        with self._lock():
            self._remove(digest)

    def gc(self, keep: Iterable[str], *, min_age_s: float = GC_MIN_AGE_S) -> list[str]:
        """Remove what is not in `keep` and was not added within `min_age_s`; the removed digests.

        The age gives time to whoever has just added a digest and is about to register it.

        Raises:
            StorageFull: the store cannot be written.
        """
        kept, removed = set(keep), []
        if not self.root.is_dir():
            return []
        self.clean()
        with self._lock():
            oldest = time.time() - min_age_s
            for digest in self.digests():
                if digest not in kept and (self.root / digest).stat().st_mtime <= oldest:
                    self._remove(digest)
                    removed.append(digest)
        return removed

    def clean(self) -> int:
        """Remove what dead writers left; the number of directories. Copies under way are left alone.

        The first `add` of an object does it too.

        Raises:
            StorageFull: the store cannot be written.
        """
        if not self.root.is_dir():
            return 0
        with self._lock():
            stale = [name for name in os.listdir(self.root) if name.startswith(_TEMPORARY)]
            return sum(_remove_unless_held(self.root / name) for name in stale)

    def _remove(self, digest: str) -> None:
        # Renamed first: at no moment is there a directory of that name with half of its files.
        with suppress(FileNotFoundError):
            doomed = self.root / f"{_TEMPORARY}{os.urandom(8).hex()}"
            os.rename(self.root / digest, doomed)
            shutil.rmtree(doomed)

    def _commit(self, directory: Path, digest: str) -> None:
        with self._lock():
            target = self.root / digest
            if target.is_dir():
                os.utime(target)  # young again, so that gc leaves it to be registered
                return
            os.rename(directory, target)
            sync_directory(self.root)

    @contextmanager
    def _temporary(self) -> Iterator[Path]:
        """A fresh directory that `clean` of any process leaves alone; gone after the block."""
        self._prepare()
        if not self._cleaned:
            self.clean()
            self._cleaned = True
        with self._lock():
            directory = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=self.root))
            handle = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
            fcntl.flock(handle, fcntl.LOCK_EX)
        try:
            with _storage(self.root):
                yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)
            os.close(handle)  # last: `clean` of another process must not remove it at the same time

    def _prepare(self) -> None:
        with _storage(self.root):
            self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
            found = self.root.stat()
        if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o022:
            raise ConfigError(
                f"adapter store {self.root} has mode {stat.S_IMODE(found.st_mode):04o} and owner "
                f"{found.st_uid}: others could change what is served; chown it and chmod 700 it"
            )

    @contextmanager
    def _lock(self) -> Iterator[None]:
        with _storage(self.root):
            handle = os.open(self.root / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                _acquire(handle, self.root)
                yield
            finally:
                os.close(handle)


@contextmanager
def _storage(root: Path) -> Iterator[None]:
    """Turn what the operating system says about writing into `StorageFull`."""
    try:
        yield
    except (StorageFull, DeadlineExceeded):
        raise
    except OSError as error:
        raise StorageFull(
            f"adapter store {root} cannot be written: {error.strerror}; free space, `chmod u+w` it, or "
            "set TINK_STORE_DIR to another directory",
            errno=error.errno,
        ) from error


def _acquire(handle: int, root: Path) -> None:
    deadline = time.monotonic() + _LOCK_S
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise DeadlineExceeded(
                    f"adapter store {root} was locked for {_LOCK_S:g} s, though the lock is held for a "
                    "rename only; `fuser .lock` there names the process that is stuck"
                ) from None
            time.sleep(0.002)


def _damaged(path: Path, what: str) -> StoreDamaged:
    return StoreDamaged(
        f"adapter store: {path.name[:12]} is damaged ({what}); remove {path} and register the adapter again"
    )


def _remove_unless_held(directory: Path) -> bool:
    try:
        handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return False  # its writer has just finished
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(handle)
    with suppress(FileNotFoundError):  # its writer has just finished
        shutil.rmtree(directory)
    return True
