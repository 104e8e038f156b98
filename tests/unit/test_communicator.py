"""The communicator: real gloo between threads; a lost peer is an exception within the deadline."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from tests.worker_rig import wait_until
from tink_rl.config import SyncConfig
from tink_rl.errors import ChannelLost, ConfigError
from tink_rl.server.channels import Channels
from tink_rl.transport import communicator
from tink_rl.types import Transport


def _join(
    world_size: int, timeout_s: float = 10.0, hosts: tuple[str, ...] = ("127.0.0.1",)
) -> list[communicator.Channel]:
    store, port = communicator.bind_store("127.0.0.1", 0, timeout_s)
    channels: dict[int, communicator.Channel] = {}

    def join(rank: int) -> None:
        mine = store if rank == 0 else communicator.dial_store("127.0.0.1", port, timeout_s)
        channels[rank] = communicator.Channel(
            mine,
            nonce="test",
            rank=rank,
            world_size=world_size,
            host=hosts[rank % len(hosts)],
            timeout_s=timeout_s,
        )

    threads = [threading.Thread(target=join, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [channels[rank] for rank in range(world_size)]


@pytest.mark.parametrize("hosts", [("127.0.0.1",), ("127.0.0.1", "127.0.0.2", "127.0.0.3")])
def test_every_rank_gets_the_bytes_of_the_last_one(hosts):
    channels = _join(3, hosts=hosts)
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
    test_every_rank_gets_the_bytes_of_the_last_one(("127.0.0.1",))


def test_missing_rank_is_named_at_join():
    store, _ = communicator.bind_store("127.0.0.1", 0, 5.0)
    with pytest.raises(ChannelLost, match="did not join within 1 s"):
        communicator.Channel(
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


def test_address_of_another_machine_is_a_lost_channel_that_names_it():
    store, _ = communicator.bind_store("127.0.0.1", 0, 5.0)
    with pytest.raises(ChannelLost, match=r"rank 1 of 2 cannot use 10\.255\.255\.1"):
        communicator.Channel(
            store, nonce="x", rank=1, world_size=2, host="10.255.255.1", timeout_s=1.0
        )


def test_worker_of_another_node_joins_under_its_own_address(monkeypatch):
    monkeypatch.setattr(communicator, "local_address", lambda host, port: "127.0.0.9")
    monkeypatch.setattr(communicator, "dial_store", lambda host, port, timeout_s: "store")
    monkeypatch.setattr(communicator, "Channel", lambda store, **given: given)
    channels = Channels(rank=1)
    spec = {"host": "127.0.0.1", "port": 1, "nonce": "x", "world_size": 3, "timeout_s": 5.0}
    channels.join(7, spec)
    wait_until(lambda: channels.state(7) == "done")
    assert channels.joined(7)["host"] == "127.0.0.9"


@pytest.mark.parametrize(
    ("wanted", "same_machine", "found"),
    [
        ("auto", False, "gloo"),
        ("auto", True, "shm"),
        ("http", True, "http"),
        ("gloo", True, "gloo"),
    ],
)
def test_transport_follows_the_machine(wanted, same_machine, found):
    choice = communicator.choose_transport(Transport(wanted), same_machine=same_machine)
    assert choice is Transport(found)


def test_nccl_is_refused_with_the_reason_and_what_is_there_instead():
    with pytest.raises(ConfigError, match=r"NCCL is not offered.*use 'auto'"):
        SyncConfig(transport="nccl")
