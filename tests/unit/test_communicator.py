"""The communicator: real gloo between threads; a lost peer is an exception within the deadline."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from tink_rl.errors import ChannelLost, ConfigError
from tink_rl.transport import communicator
from tink_rl.types import Transport


def _join(world_size: int, timeout_s: float = 10.0) -> list[communicator.Channel]:
    store, port = communicator.bind_store("127.0.0.1", 0, timeout_s)
    channels: dict[int, communicator.Channel] = {}

    def join(rank: int) -> None:
        mine = store if rank == 0 else communicator.dial_store("127.0.0.1", port, timeout_s)
        channels[rank] = communicator.open_channel(
            Transport.GLOO,
            mine,
            nonce="test",
            rank=rank,
            world_size=world_size,
            host="127.0.0.1",
            device=torch.device("cpu"),
            timeout_s=timeout_s,
        )

    threads = [threading.Thread(target=join, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [channels[rank] for rank in range(world_size)]


def test_every_rank_gets_the_bytes_of_the_last_one():
    channels = _join(3)
    sent = torch.randint(0, 256, (300_000,), dtype=torch.uint8)
    buffers = [torch.zeros_like(sent), torch.zeros_like(sent), sent.clone()]
    for _ in range(3):
        threads = [
            threading.Thread(target=c.broadcast, args=(b,), kwargs={"src": 2, "timeout_s": 10})
            for c, b in zip(channels, buffers, strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(buffer, sent) for buffer in buffers)
    for channel in channels:
        channel.close()


def test_silent_peer_is_an_exception_within_the_deadline_and_a_fresh_channel_works():
    first, second = _join(2)
    start = time.monotonic()
    with pytest.raises(ChannelLost, match="gone or too slow"):
        first.broadcast(torch.zeros(1000, dtype=torch.uint8), src=1, timeout_s=1.0)
    assert time.monotonic() - start < 6.0
    for channel in (first, second):
        channel.close()
        channel.close()
    with pytest.raises(ChannelLost, match="was closed"):
        first.broadcast(torch.zeros(1, dtype=torch.uint8), src=1, timeout_s=1.0)
    test_every_rank_gets_the_bytes_of_the_last_one()


def test_missing_rank_is_named_at_join():
    store, _ = communicator.bind_store("127.0.0.1", 0, 5.0)
    with pytest.raises(ChannelLost, match="did not join within 1 s"):
        communicator.GlooChannel(
            store, nonce="x", rank=0, world_size=2, host="127.0.0.1", timeout_s=1.0
        )


def test_dialling_nobody_says_what_else_can_be_done():
    with pytest.raises(ChannelLost, match="transport='http'"):
        communicator.dial_store("127.0.0.1", 9, 1.0)


def test_store_listens_on_the_given_interface_only():
    store, port = communicator.bind_store("127.0.0.1", 0, 5.0)
    with pytest.raises(ConfigError, match="--channel-port"):
        communicator.bind_store("127.0.0.1", port, 5.0)
    with open("/proc/net/tcp") as table:
        lines = [line.split() for line in table if f":{port:04X} " in line]
    listening = [line[1] for line in lines if line[3] == "0A"]
    assert listening == [f"0100007F:{port:04X}"]
    assert store is not None


@pytest.mark.parametrize(
    ("wanted", "trainer", "server", "same_machine", "found"),
    [
        ("auto", "cpu", "cpu", False, "gloo"),
        ("auto", "cuda", "cuda", False, "gloo"),
        ("auto", "cpu", "cpu", True, "shm"),
        ("auto", "cuda", "cuda", True, "shm"),
        ("http", "cuda", "cuda", True, "http"),
        ("gloo", "cpu", "cpu", True, "gloo"),
        ("nccl", "cuda", "cuda", False, "nccl"),
    ],
)
def test_transport_follows_machine_and_devices(wanted, trainer, server, same_machine, found):
    choice = communicator.choose_transport(
        Transport(wanted), trainer_device=trainer, server_device=server, same_machine=same_machine
    )
    assert choice is Transport(found)


def test_nccl_without_a_gpu_is_refused_with_the_remedy():
    with pytest.raises(ConfigError, match="transport='gloo'"):
        communicator.choose_transport(
            Transport.NCCL, trainer_device="cpu", server_device="cuda", same_machine=True
        )
    store, _ = communicator.bind_store("127.0.0.1", 0, 5.0)
    with pytest.raises(ConfigError, match="NCCL needs a GPU"):
        communicator.open_channel(
            Transport.NCCL,
            store,
            nonce="x",
            rank=0,
            world_size=1,
            host="127.0.0.1",
            device=torch.device("cpu"),
            timeout_s=1.0,
        )


class _Work:
    """Of a broadcast whose peer is gone: it never ends."""

    def is_completed(self):
        return False


class _Group:
    aborted = False

    def broadcast(self, tensors, options):
        return _Work()

    def abort(self):
        self.aborted = True


def test_nccl_gives_a_lost_peer_up_at_the_deadline():
    channel, group = object.__new__(communicator.NcclChannel), _Group()
    channel._group, channel._store = group, None
    with pytest.raises(ChannelLost, match=r"within 0\.05 s"):
        channel.broadcast(torch.zeros(8, dtype=torch.uint8), src=0, timeout_s=0.05)
    assert group.aborted
    with pytest.raises(ChannelLost, match="was closed"):
        channel.broadcast(torch.zeros(8, dtype=torch.uint8), src=0, timeout_s=0.05)


def test_ranks_meet_before_nccl_begins_or_say_that_they_did_not():
    store, port = communicator.bind_store("127.0.0.1", 0, 5.0)
    with pytest.raises(RuntimeError):
        communicator._meet(store, "x", 0, 2, 0.2)
    other = communicator.dial_store("127.0.0.1", port, 5.0)
    communicator._meet(other, "x", 1, 2, 5.0)
    communicator._meet(store, "x", 0, 2, 5.0)


@pytest.mark.gpu
def test_nccl_moves_bytes_on_a_gpu():
    store, _ = communicator.bind_store("127.0.0.1", 0, 10.0)
    channel = communicator.open_channel(
        Transport.NCCL,
        store,
        nonce="x",
        rank=0,
        world_size=1,
        host="127.0.0.1",
        device=torch.device("cuda:0"),
        timeout_s=10.0,
    )
    buffer = torch.arange(100, dtype=torch.uint8, device="cuda:0")
    channel.broadcast(buffer, src=0, timeout_s=10.0)
    assert torch.equal(buffer.cpu(), torch.arange(100, dtype=torch.uint8))
    channel.close()
