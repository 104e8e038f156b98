"""One machine: a packet's bytes through a segment of shared memory that both sides map.

The trainer makes the segment and writes; the workers copy out of it. Its name and a nonce travel in the
control request: a worker in another container or under another user cannot open it, says so, and the
bytes travel through gloo instead. Once every worker has it open its name is removed, so that nothing is
left behind however either side ends.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tink_rl.errors import BadRequest, SegmentUnreachable

if TYPE_CHECKING:
    import torch

_DIRECTORY = Path("/dev/shm")
_NAME = re.compile(r"^tink-[0-9a-f]{32}$")
_NONCE_BYTES = 64
"""The nonce stands before the packet and keeps its bytes aligned."""
MAX_SEGMENTS = 4
"""Of one publisher, at once, on either side."""


@dataclass(frozen=True, kw_only=True)
class SegmentSpec:
    """What the trainer tells of a segment: `SegmentSpec(name="tink-3f..", nonce="9a..", num_bytes=4096)`"""

    name: str
    nonce: str
    num_bytes: int
    """Room for a packet, without the nonce."""

    @classmethod
    def from_json(cls, data: Any) -> SegmentSpec:
        """Read and check what came over the wire.

        Raises:
            BadRequest: a field is missing or not of its form; a name is never a path.
        """
        try:
            spec = cls(
                name=str(data["name"]), nonce=str(data["nonce"]), num_bytes=int(data["num_bytes"])
            )
        except (KeyError, TypeError, ValueError) as error:
            raise BadRequest(f"shared memory segment is malformed: {error!r}") from error
        if not _NAME.match(spec.name) or len(spec.nonce) != _NONCE_BYTES or spec.num_bytes < 1:
            raise BadRequest(f"shared memory segment {spec.name[:80]!r}: not one of this package")
        return spec


class Segment:
    """A mapped segment. The mapping lives as long as `buffer` is referred to."""

    def __init__(self, spec: SegmentSpec, buffer: torch.Tensor) -> None:
        self.spec = spec
        self.buffer = buffer
        """`[num_bytes] uint8`, shared."""
        self._named = True

    @classmethod
    def create(cls, num_bytes: int) -> Segment:
        """A new segment of this process (mode 0600), its memory reserved.

        Raises:
            SegmentUnreachable: there is no shared memory here, or too little of it.
        """
        spec = SegmentSpec(
            name=f"tink-{secrets.token_hex(16)}",
            nonce=secrets.token_hex(_NONCE_BYTES // 2),
            num_bytes=num_bytes,
        )
        size = _NONCE_BYTES + num_bytes
        try:
            handle = os.open(_DIRECTORY / spec.name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        except OSError as error:
            raise SegmentUnreachable(f"no shared memory on this machine: {error}") from error
        try:
            # Reserved now: a page that tmpfs cannot give later would be a SIGBUS, not an error.
            os.posix_fallocate(handle, 0, size)
            os.pwrite(handle, spec.nonce.encode(), 0)
        except OSError as error:
            (_DIRECTORY / spec.name).unlink()
            raise SegmentUnreachable(
                f"{size} bytes of shared memory are not to be had ({error.strerror}); in a container "
                "raise --shm-size"
            ) from error
        finally:
            os.close(handle)
        return cls(spec, _map(_DIRECTORY / spec.name, size))

    @classmethod
    def attach(cls, spec: SegmentSpec) -> Segment:
        """The segment that another process of this machine and user made.

        Raises:
            SegmentUnreachable: it cannot be opened here, or is another one of the same name.
        """
        size = _NONCE_BYTES + spec.num_bytes
        path = _DIRECTORY / spec.name
        try:
            handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError as error:
            raise SegmentUnreachable(
                f"the trainer's shared memory cannot be opened here ({error.strerror})"
            ) from error
        try:
            info = os.fstat(handle)
            plain = stat.S_ISREG(info.st_mode) and info.st_uid == os.geteuid()
            if (
                not plain
                or info.st_size != size
                or os.pread(handle, _NONCE_BYTES, 0) != (spec.nonce.encode())
            ):
                raise SegmentUnreachable(f"{spec.name} here is not the trainer's segment")
            return cls(spec, _map(Path(f"/proc/self/fd/{handle}"), size))
        finally:
            os.close(handle)

    @property
    def named(self) -> bool:
        """Whether another process can still open it."""
        return self._named

    def unlink(self) -> None:
        """Remove the name; who has the segment mapped keeps it. Idempotent."""
        if self._named:
            self._named = False
            with contextlib.suppress(OSError):
                (_DIRECTORY / self.spec.name).unlink()


class Shelf:
    """The segments that one publisher packs into: two versions in turn, so a few."""

    def __init__(self) -> None:
        self._segments: list[Segment] = []

    def new(self, num_bytes: int) -> torch.Tensor:
        """Memory `[num_bytes] uint8` of a new segment.

        Raises:
            SegmentUnreachable: there is no room for it.
        """
        segment = Segment.create(num_bytes)
        self._segments = [*self._segments, segment][-MAX_SEGMENTS:]
        return segment.buffer

    def holding(self, buffer: torch.Tensor) -> Segment | None:
        """The segment whose memory `buffer` is the beginning of; None if that is not shared."""
        for segment in self._segments:
            if segment.buffer.data_ptr() == buffer.data_ptr():
                return segment
        return None

    def unlink(self) -> None:
        """Remove all names."""
        for segment in self._segments:
            segment.unlink()


def _map(path: Path, size: int) -> torch.Tensor:
    import torch

    whole = torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8)
    return whole[_NONCE_BYTES:]
