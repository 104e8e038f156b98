"""One machine: a packet's bytes through a segment of shared memory that both sides map.

The trainer makes the segment and writes; the workers copy out of it. It has no name in any file system:
workers open it through the trainer's entry in /proc, so that nothing is left behind however either side
ends, and `--shm-size` of a container does not limit it. A worker in another container or under another
user cannot open it, says so, and the bytes travel through gloo instead. Its size is sealed: a trainer
that shrank it would end the worker that reads it.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import stat
import weakref
from typing import TYPE_CHECKING

from tink_rl.errors import SegmentUnreachable
from tink_rl.protocol import SegmentSpec

if TYPE_CHECKING:
    import torch

_NONCE_BYTES = 64
"""At the head of a segment; the packet's bytes after it stay aligned."""
MAX_SEGMENTS = 4
"""Of one publisher, at once, on either side."""


class Segment:
    """A mapped segment. The mapping lives as long as `buffer` is referred to."""

    def __init__(self, spec: SegmentSpec, memory: torch.Tensor) -> None:
        self.spec = spec
        self.buffer = memory[_NONCE_BYTES:]
        """`[num_bytes] uint8`, shared."""

    @classmethod
    def create(cls, num_bytes: int) -> Segment:
        """A new segment of this process, its memory reserved; others may open it while it exists.

        Raises:
            SegmentUnreachable: there is no shared memory here, or too little of it.
        """
        nonce, size = secrets.token_hex(_NONCE_BYTES // 2), _NONCE_BYTES + num_bytes
        try:
            handle = os.memfd_create("tink-packet", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except (OSError, AttributeError) as error:
            raise SegmentUnreachable(f"no shared memory on this machine: {error}") from error
        try:
            # Reserved now: a page that the kernel cannot give later would be a SIGBUS, not an error.
            os.posix_fallocate(handle, 0, size)
            os.pwrite(handle, nonce.encode(), 0)
            fcntl.fcntl(handle, fcntl.F_ADD_SEALS, _seals())
            memory = _map(handle, size)
        except (OSError, RuntimeError) as error:  # torch's own word for a mapping that fails
            os.close(handle)
            raise SegmentUnreachable(
                f"{size} bytes of shared memory are not to be had ({error})"
            ) from error
        spec = SegmentSpec(pid=os.getpid(), handle=handle, nonce=nonce, num_bytes=num_bytes)
        segment = cls(spec, memory)
        weakref.finalize(segment, os.close, handle)
        return segment

    @classmethod
    def attach(cls, spec: SegmentSpec) -> Segment:
        """The segment that another process of this machine and user made.

        Raises:
            SegmentUnreachable: it cannot be opened here, or is something else.
        """
        size = _NONCE_BYTES + spec.num_bytes
        try:
            flags = os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC
            handle = os.open(f"/proc/{spec.pid}/fd/{spec.handle}", flags)
        except OSError as error:
            raise SegmentUnreachable(
                f"the trainer's shared memory cannot be opened here ({error.strerror})"
            ) from error
        try:
            if not _is_sealed(handle, size) or os.pread(handle, _NONCE_BYTES, 0) != (
                spec.nonce.encode()
            ):
                raise SegmentUnreachable(
                    f"file {spec.handle} of process {spec.pid} here is not the trainer's segment"
                )
            return cls(spec, _map(handle, size))
        except RuntimeError as error:
            raise SegmentUnreachable(
                f"{size} bytes of the trainer's memory cannot be mapped here ({error})"
            ) from error
        finally:
            os.close(handle)


class SegmentPool:
    """The segments that one publisher packs into: two versions in turn, so a few."""

    def __init__(self) -> None:
        self._segments: list[Segment] = []

    def new(self, num_bytes: int) -> torch.Tensor:
        """Memory `[num_bytes] uint8` of a new segment.

        Raises:
            SegmentUnreachable: there is no memory for it.
        """
        segment = Segment.create(num_bytes)
        self._segments = [*self._segments, segment][-MAX_SEGMENTS:]
        return segment.buffer

    def drop(self, buffer: torch.Tensor) -> None:
        """Forget the segment of `buffer`; memory that is not shared is fine."""
        found = self.holding(buffer)
        self._segments = [segment for segment in self._segments if segment is not found]

    def holding(self, buffer: torch.Tensor) -> Segment | None:
        """The segment whose memory `buffer` is the beginning of; None if that is not shared."""
        for segment in self._segments:
            if segment.buffer.data_ptr() == buffer.data_ptr():
                return segment
        return None


def _seals() -> int:
    return fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


def _is_sealed(handle: int, size: int) -> bool:
    info = os.fstat(handle)
    if not stat.S_ISREG(info.st_mode) or info.st_uid != os.geteuid() or info.st_size != size:
        return False
    try:
        return fcntl.fcntl(handle, fcntl.F_GET_SEALS) == _seals()
    except OSError:  # a file on a disk has none
        return False


def _map(handle: int, size: int) -> torch.Tensor:
    import torch

    path = f"/proc/self/fd/{handle}"
    return torch.from_file(path, shared=True, size=size, dtype=torch.uint8)
