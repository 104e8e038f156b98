"""The segment of shared memory: what one process writes another one reads, and who may not."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tink_rl.errors import BadRequest, SegmentUnreachable
from tink_rl.transport import shared_memory
from tink_rl.transport.shared_memory import MAX_SEGMENTS, Segment, SegmentSpec, Shelf


@pytest.fixture
def segment():
    made = Segment.create(1000)
    yield made
    made.unlink()


def test_another_process_reads_what_was_written_also_after_the_name_is_gone(segment):
    code = (
        "import sys\nfrom tink_rl.transport.shared_memory import MAX_SEGMENTS, Segment, SegmentSpec, Shelf\n"
        f"s = Segment.attach(SegmentSpec(**{dataclasses.asdict(segment.spec)!r}))\n"
        "print('open', flush=True); sys.stdin.readline(); print(s.buffer.sum().item())"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "open\n"
    segment.unlink()
    segment.buffer.fill_(3)
    assert child.communicate("\n", timeout=60)[0] == "3000\n"
    with pytest.raises(SegmentUnreachable):
        Segment.attach(segment.spec)


def test_packet_bytes_are_aligned_for_every_dtype(segment):
    assert segment.buffer.data_ptr() % 64 == 0 and segment.buffer.numel() == 1000


def test_only_its_owner_may_open_it(segment):
    path = Path("/dev/shm") / segment.spec.name
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("change", [{"nonce": "0" * 64}, {"num_bytes": 999}])
def test_another_segment_of_the_name_is_refused(segment, change):
    with pytest.raises(SegmentUnreachable, match="not the trainer's"):
        Segment.attach(dataclasses.replace(segment.spec, **change))


def test_symlink_and_fifo_of_the_name_are_refused_at_once(segment, tmp_path):
    path = Path("/dev/shm") / segment.spec.name
    path.unlink()
    target = tmp_path / "target"
    target.write_bytes(b"x" * 1064)
    path.symlink_to(target)
    with pytest.raises(SegmentUnreachable):
        Segment.attach(segment.spec)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(SegmentUnreachable):
        Segment.attach(segment.spec)


@pytest.mark.parametrize(
    "data", [None, {}, {"name": "../etc/passwd", "nonce": "0" * 64, "num_bytes": 1}]
)
def test_malformed_spec_is_refused(data):
    with pytest.raises(BadRequest):
        SegmentSpec.from_json(data)


def test_segment_that_does_not_fit_is_refused_and_leaves_nothing(monkeypatch):
    before = set(Path("/dev/shm").iterdir())

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shared_memory.os, "posix_fallocate", full)
    with pytest.raises(SegmentUnreachable, match="shm-size"):
        Segment.create(10)
    assert set(Path("/dev/shm").iterdir()) == before


def test_copy_out_of_a_segment_does_not_follow_later_writes(segment):
    segment.buffer.fill_(1)
    copied = torch.empty(1000, dtype=torch.uint8).copy_(segment.buffer)
    segment.buffer.fill_(2)
    assert copied.sum().item() == 1000


def test_shelf_finds_the_segment_that_a_packet_was_packed_into():
    shelf = Shelf()
    first, second = shelf.new(128), shelf.new(128)
    assert shelf.holding(second[:64]).buffer is second and shelf.holding(first).buffer is first
    assert shelf.holding(torch.empty(128, dtype=torch.uint8)) is None
    assert shelf.holding(first).named
    shelf.unlink()
    assert not shelf.holding(first).named
    with pytest.raises(SegmentUnreachable):
        Segment.attach(shelf.holding(first).spec)


def test_shelf_holds_a_few_segments_only():
    shelf = Shelf()
    rooms = [shelf.new(64) for _ in range(MAX_SEGMENTS + 1)]
    assert [shelf.holding(room) is not None for room in rooms] == [False] + [True] * MAX_SEGMENTS
    shelf.unlink()
