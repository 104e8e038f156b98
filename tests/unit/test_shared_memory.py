"""The segment of shared memory: what one process writes another one reads, and who may not."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tink_rl.errors import BadRequest, SegmentUnreachable
from tink_rl.protocol import SegmentSpec
from tink_rl.server import inbox
from tink_rl.transport import shared_memory
from tink_rl.transport.shared_memory import MAX_SEGMENTS, Segment, SegmentPool

SPEC = {"pid": 1, "handle": 3, "nonce": "0" * 64, "num_bytes": 1}


@pytest.fixture
def segment():
    return Segment.create(1000)


def _handles():
    return sorted(entry.name for entry in Path("/proc/self/fd").iterdir())


def test_another_process_reads_what_was_written_also_after_its_maker_let_go():
    segment = Segment.create(1000)
    code = (
        "import sys\nfrom tink_rl.protocol import SegmentSpec\n"
        "from tink_rl.transport.shared_memory import Segment\n"
        f"s = Segment.attach(SegmentSpec(**{dataclasses.asdict(segment.spec)!r}))\n"
        "print('open', flush=True); sys.stdin.readline(); print(s.buffer.sum().item())"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "open\n"
    segment.buffer.fill_(3)
    del segment
    gc.collect()
    assert child.communicate("\n", timeout=60)[0] == "3000\n"


def test_nothing_is_left_of_a_segment_that_nobody_refers_to():
    segment = Segment.create(1000)
    path = Path(f"/proc/self/fd/{segment.spec.handle}")
    assert "tink-packet" in os.readlink(path)
    spec = segment.spec
    del segment
    gc.collect()
    with pytest.raises(SegmentUnreachable):
        Segment.attach(spec)


def test_packet_bytes_are_aligned_for_every_dtype(segment):
    assert segment.buffer.data_ptr() % 64 == 0 and segment.buffer.numel() == 1000


def test_its_size_cannot_change_while_others_read_it(segment):
    for size in (0, 64, 2000):
        with pytest.raises(PermissionError):
            os.ftruncate(segment.spec.handle, size)


@pytest.mark.parametrize("change", [{"nonce": "0" * 64}, {"num_bytes": 999}])
def test_another_segment_under_the_handle_is_refused(segment, change):
    with pytest.raises(SegmentUnreachable, match="not the trainer's"):
        Segment.attach(dataclasses.replace(segment.spec, **change))


@pytest.mark.parametrize("kind", ["fifo", "file", "unsealed"])
def test_what_is_no_sealed_segment_is_refused_at_once(segment, tmp_path, kind):
    content = segment.spec.nonce.encode() + bytes(1000)
    if kind == "fifo":
        os.mkfifo(tmp_path / "fifo")
        handle = os.open(tmp_path / "fifo", os.O_RDWR)
    elif kind == "file":
        (tmp_path / "file").write_bytes(content)
        handle = os.open(tmp_path / "file", os.O_RDWR)
    else:
        handle = os.memfd_create("other", os.MFD_ALLOW_SEALING)
        os.write(handle, content)
    try:
        with pytest.raises(SegmentUnreachable):
            Segment.attach(dataclasses.replace(segment.spec, handle=handle))
    finally:
        os.close(handle)


@pytest.mark.parametrize(
    "data",
    [
        *(None, {}, {**SPEC, "pid": "1/../2"}, {**SPEC, "handle": -1}, {**SPEC, "pid": True}),
        *({**SPEC, "nonce": "0"}, {**SPEC, "num_bytes": 1.5}),
    ],
)
def test_malformed_spec_is_refused(data):
    with pytest.raises(BadRequest):
        SegmentSpec.from_json(json.dumps(data))


def test_spec_that_was_sent_is_read_back():
    spec = SegmentSpec(**SPEC)
    assert SegmentSpec.from_json(spec.to_json()) == spec


def test_segment_that_does_not_fit_is_refused_and_leaves_nothing(monkeypatch):
    before = _handles()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shared_memory.os, "posix_fallocate", full)
    with pytest.raises(SegmentUnreachable, match="No space left"):
        Segment.create(10)
    assert _handles() == before


def test_machine_without_such_memory_says_so(monkeypatch):
    monkeypatch.delattr(shared_memory.os, "memfd_create")
    with pytest.raises(SegmentUnreachable, match="no shared memory on this machine"):
        Segment.create(10)


def test_copy_out_of_a_segment_does_not_follow_later_writes(segment):
    segment.buffer.fill_(1)
    copied = torch.empty(1000, dtype=torch.uint8)
    assert sum(piece.numel() for piece in inbox._copied(segment, copied)) == 1000
    segment.buffer.fill_(2)
    assert copied.sum().item() == 1000


def test_copy_comes_piece_by_piece_and_is_what_was_packed(monkeypatch):
    segment, bytes_N = Segment.create(1000), torch.arange(1000).to(torch.uint8)
    monkeypatch.setattr(inbox, "_COPIED_BYTES", 100)
    segment.buffer[:] = bytes_N
    copied = torch.empty(1000, dtype=torch.uint8)
    pieces = inbox._copied(Segment.attach(segment.spec), copied)
    assert [piece.numel() for piece in pieces] == [100] * 10 and torch.equal(copied, bytes_N)


def test_pool_finds_the_segment_that_a_packet_was_packed_into():
    pool = SegmentPool()
    first, second = pool.new(128), pool.new(128)
    assert pool.holding(second[:64]).buffer is second and pool.holding(first).buffer is first
    assert pool.holding(torch.empty(128, dtype=torch.uint8)) is None


def test_pool_holds_a_few_segments_only():
    pool = SegmentPool()
    buffers = [pool.new(64) for _ in range(MAX_SEGMENTS + 1)]
    assert [pool.holding(buffer) is not None for buffer in buffers] == [False] + [
        True
    ] * MAX_SEGMENTS
