"""Packets on their way into one vLLM worker: received and checked in threads, kept until they are served.

vLLM's engine loop asks between its steps, so nothing here waits longer than it is told to. A packet's
values are examined when it has arrived, and what is wrong with them is told only if its digest fits.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch

from tink_rl.errors import DigestMismatch, TinkError, UnknownVersion
from tink_rl.policy import packet
from tink_rl.policy.adapter import MAX_ABS_WEIGHT, check_packed
from tink_rl.protocol import SegmentSpec
from tink_rl.server.channels import Channels, Task
from tink_rl.transport import communicator
from tink_rl.transport.shared_memory import Segment
from tink_rl.types import SyncMode, Transport

logger = logging.getLogger("tink_rl.server")
_NUM_SPARE_BUFFERS = 2
_COPIED_BYTES = 2**20
"""At once out of shared memory: what is copied is hashed while it is in a core's cache."""
_MAX_ABS_WHOLE = 1e6
"""Largest magnitude of a whole weight: larger ones overflow and corrupt other requests too."""


class Stage:
    """One packet on its way in: buffer, header, and the thread that receives and checks it."""

    def __init__(self, header: packet.PacketHeader, buffer: torch.Tensor) -> None:
        self.header = header
        self.buffer = buffer
        self.hasher = packet.Hasher(header)
        self.received = 0
        self.tensors: dict[str, torch.Tensor] = {}
        self.task: Task | None = None
        self.refusal: TinkError | None = None
        """What is wrong with the values; told only if the digest fits, so that damage on the way is
        not mistaken for a bad adapter."""

    def examine(self) -> None:
        """Look at the values of a buffer that has arrived."""
        if self.buffer.numel() != self.header.num_bytes:
            return  # `check` will say so
        whole = self.header.mode is SyncMode.FULL
        self.tensors = packet.unpack(self.header, self.buffer)
        try:
            check_packed(self.header, self.buffer, _MAX_ABS_WHOLE if whole else MAX_ABS_WEIGHT)
        except TinkError as error:
            self.refusal = error

    def check(self) -> None:
        """Raise what is wrong with a packet that has arrived and is sealed."""
        self.hasher.check(self.header)
        if self.refusal is not None:
            raise self.refusal


class Inbox:
    """The packets that one worker receives or holds for a commit, by stage id."""

    def __init__(self, channels: Channels, *, device: torch.device) -> None:
        self._channels, self._device = channels, device
        self._pins = device.type == "cuda"
        self.stages: dict[str, Stage] = {}
        self._spare: list[torch.Tensor] = []

    def open(self, stage_id: str, header: packet.PacketHeader, options: dict[str, Any]) -> None:
        """Receive a packet whose header was found right, and check it, in a thread.

        Raises:
            ChannelLost, StaleEpoch, SegmentUnreachable, DigestMismatch: it cannot come that way.
        """
        pieces = self._source(header, options)
        stage = Stage(header, self._buffer(header.num_bytes))
        self.stages[stage_id] = stage
        if pieces is not None:
            _start(stage, pieces(stage.buffer))

    def _source(
        self, header: packet.PacketHeader, options: dict[str, Any]
    ) -> Callable[[torch.Tensor], Iterable[torch.Tensor]] | None:
        """What fills a buffer piece by piece (None: chunks will come)."""
        transport = Transport(options["transport"])
        if transport is Transport.HTTP:
            return None
        if transport is Transport.SHM:
            spec = SegmentSpec.from_json(options["segment"])
            segment = self._channels.segment(header.epoch, spec, header.num_bytes)
            return functools.partial(_copied, segment)
        channel = self._channels.joined(header.epoch)
        return functools.partial(
            communicator.transfer, channel, src=options["src"], timeout_s=options["timeout_s"]
        )

    def chunk(self, stage_id: str, offset: int, data: bytes) -> int:
        """Take one chunk of a packet that travels as HTTP body; gives the bytes received so far.

        Raises:
            DigestMismatch: the chunk is not the next one, or exceeds the buffer.
        """
        stage = self.get(stage_id)
        end = offset + len(data)
        if offset != stage.received or end > stage.header.num_bytes:
            raise DigestMismatch(
                f"chunk of bytes {offset}-{end}: expected to start at {stage.received} and to end "
                f"by {stage.header.num_bytes}",
                code="truncated_packet",
            )
        if data:
            stage.buffer[offset:end] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        stage.received = end
        return end

    def seal(self, stage_id: str, digest: str) -> None:
        """The sender is done and says the digest; chunks are hashed now, others were on arrival."""
        stage = self.get(stage_id)
        stage.header = dataclasses.replace(stage.header, digest=digest)
        if stage.task is None:
            stage.buffer = stage.buffer[: stage.received]
            _start(stage, [stage.buffer])

    def state(self, stage_id: str, patience_s: float = 0.0) -> str:
        """ "running" or "done"; raises why the packet was refused, and forgets it then."""
        stage = self.get(stage_id)
        if stage.task is None or not stage.header.digest:
            return "running"
        try:
            state = stage.task.state(patience_s)
            if state == "done":
                stage.check()
            return state
        except TinkError:
            self.discard(stage_id)
            raise

    def get(self, stage_id: str) -> Stage:
        """The packet of `stage_id`.

        Raises:
            UnknownVersion: there is none.
        """
        stage = self.stages.get(stage_id)
        if stage is None:
            raise UnknownVersion(f"nothing is staged as {stage_id!r}; stage it first")
        return stage

    def discard(self, stage_id: str) -> None:
        """Forget a packet, because it is served or never will be; unknown ones are fine."""
        self.stages.pop(stage_id, None)

    def _buffer(self, num_bytes: int) -> torch.Tensor:
        """A buffer for a packet, `[num_bytes] uint8`; an old one's where it fits.

        Fresh pages cost more than the bytes that are written to them. For a GPU they are pinned: vLLM then
        takes every tensor of an adapter as it lies, instead of pinning a copy of each.
        """
        for i, spare in enumerate(self._spare):
            if spare.numel() == num_bytes:
                return self._spare.pop(i)
        if self._pins:
            try:
                return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
            except RuntimeError as error:  # the limit of locked memory, most of all
                self._pins = False
                logger.warning("tink_rl: packets are not pinned, publishing is slower: %s", error)
        return torch.empty(num_bytes, dtype=torch.uint8)

    def give_back(self, buffer: torch.Tensor) -> None:
        """The work on the GPU that was asked for so far is the last that reads `buffer`."""
        if self._device.type == "cuda":  # copies out of pinned memory are only queued
            torch.cuda.current_stream(self._device).synchronize()
        self._spare = [*self._spare, buffer][-_NUM_SPARE_BUFFERS:]


def _copied(segment: Segment, buffer: torch.Tensor) -> Iterable[torch.Tensor]:
    """Copy the packet into `buffer`, where nobody else can write to it.

    Gives each piece in turn, while it is still in the cache.
    """
    pieces = zip(
        torch.split(buffer, _COPIED_BYTES),
        torch.split(segment.buffer[: buffer.numel()], _COPIED_BYTES),
        strict=True,
    )
    for piece, theirs in pieces:
        yield piece.copy_(theirs)


def _start(stage: Stage, pieces: Iterable[torch.Tensor]) -> None:
    def take() -> None:
        for piece in pieces:
            stage.hasher.update(piece)
        stage.examine()

    stage.task = Task(take)
    stage.task.start()
