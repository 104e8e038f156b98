"""Whether two checkpoints hold the same bytes: all of them, where a fingerprint samples some.

Files that are the same ones (one machine, one inode, unchanged) need no look inside. Else each side
hashes its own, a digest per tensor, so that a difference has a name and shards may be cut otherwise.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from pathlib import Path

from tink_rl.policy.fingerprint import CheckpointTensor

_BUFFER = 2**24
_BOOT = Path("/proc/sys/kernel/random/boot_id")


def files_identity(index: Mapping[str, CheckpointTensor]) -> str | None:
    """Says which files these are on this machine, and their state; None where the machine has no name.

    Equal identities mean equal bytes. A copy, or the same file seen from another machine, has another one.
    """
    from blake3 import blake3

    try:
        hasher = blake3(_BOOT.read_bytes())
        for file in sorted({entry.file for entry in index.values()}):
            found = os.stat(file)
            text = f"{found.st_dev}|{found.st_ino}|{found.st_size}|{found.st_mtime_ns}\n"
            hasher.update(text.encode())
    except OSError:
        return None
    digest: str = hasher.hexdigest()
    return digest[:32]


class ContentDigest:
    """Digests of every tensor of one checkpoint, computed in a thread; `progress` tells how far it is."""

    def __init__(self, index: Mapping[str, CheckpointTensor]) -> None:
        self._index = dict(index)
        self.num_bytes = sum(entry.num_bytes for entry in index.values())
        self.num_done = 0
        self._found: dict[str, str] | None = None
        self._error: OSError | None = None
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def start(self) -> None:
        """Begin, if that has not happened."""
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._work, name="tink-base-content", daemon=True
                )
                self._thread.start()

    def result(self) -> dict[str, str] | None:
        """Name -> digest of dtype, shape and bytes; None while it is being computed.

        Raises:
            OSError: a file could not be read.
        """
        if self._error is not None:
            raise self._error
        return self._found

    def wait(self) -> dict[str, str]:
        """`result`, as soon as it is there.

        Raises:
            OSError: a file could not be read.
        """
        self.start()
        assert self._thread is not None
        self._thread.join()
        found = self.result()
        assert found is not None
        return found

    def _work(self) -> None:
        try:
            self._found = self._digests()
        except OSError as error:
            self._error = error

    def _digests(self) -> dict[str, str]:
        from blake3 import blake3

        # Read, not mapped: a file that is cut while it is mapped would end this process.
        buffer = memoryview(bytearray(min(_BUFFER, max(1, self.num_bytes))))
        found = {}
        entries = sorted(self._index.values(), key=lambda entry: (entry.file, entry.begin))
        handles: dict[Path, int] = {}
        try:
            for entry in entries:
                if entry.file not in handles:
                    handles[entry.file] = os.open(entry.file, os.O_RDONLY)
                hasher = blake3(
                    f"{entry.dtype}|{list(entry.shape)}|".encode(), max_threads=blake3.AUTO
                )
                at = entry.begin
                while at < entry.end:
                    size = os.preadv(handles[entry.file], [buffer[: entry.end - at]], at)
                    if size == 0:
                        raise OSError(f"{entry.file} is truncated; copy it again")
                    hasher.update(buffer[:size])
                    at += size
                    self.num_done += size
                found[entry.name] = hasher.hexdigest(length=16)
        finally:
            for handle in handles.values():
                os.close(handle)
        return found
