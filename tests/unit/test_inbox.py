"""Where a packet's bytes lie in a worker whose model is on a GPU (a fake one)."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tink_rl.server import inbox as inbox_module
from tink_rl.server.channels import Channels
from tink_rl.server.inbox import Inbox


@pytest.fixture
def gpu(monkeypatch):
    """What was asked of CUDA: `pinned` sizes, `waited` for the stream."""
    found = SimpleNamespace(pinned=[], waited=0, refuses=False)
    empty = torch.empty

    def pinned_too(size, *, dtype, pin_memory=False):
        if pin_memory and found.refuses:
            raise RuntimeError("CUDA error: out of memory")
        found.pinned += [size] if pin_memory else []
        return empty(size, dtype=dtype)

    def synchronize():
        found.waited += 1

    monkeypatch.setattr(inbox_module.torch, "empty", pinned_too)
    stream = SimpleNamespace(synchronize=synchronize)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    return found


def make(device: str) -> Inbox:
    return Inbox(Channels(rank=0), device=torch.device(device))


def test_packets_for_a_gpu_are_pinned_and_used_again_only_when_it_has_read_them(gpu):
    box = make("cuda")
    buffer = box._buffer(100)
    assert gpu.pinned == [100] and gpu.waited == 0
    box.give_back(buffer)
    assert gpu.waited == 1
    assert box._buffer(100) is buffer and gpu.pinned == [100]


def test_memory_that_cannot_be_pinned_is_said_once_and_done_without(gpu, caplog):
    gpu.refuses = True
    box = make("cuda")
    assert box._buffer(100).numel() == box._buffer(50).numel() * 2
    assert [r.message.split(",")[0] for r in caplog.records] == ["tink_rl: packets are not pinned"]


def test_a_cpu_pins_nothing_and_waits_for_nobody(gpu):
    box = make("cpu")
    box.give_back(box._buffer(100))
    assert gpu.pinned == [] and gpu.waited == 0
