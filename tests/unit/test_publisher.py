"""Memory, failures and replicas of a publish, without a server."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tink_rl import errors
from tink_rl.policy import packet
from tink_rl.protocol import JoinAnswer
from tink_rl.publish.full_update import FullUpdate
from tink_rl.publish.packets import PacketTransfer
from tink_rl.publish.publisher import WeightSync
from tink_rl.publish.stopwatch import Stopwatch
from tink_rl.transport.fleet import Fleet
from tink_rl.transport.outgoing import OutgoingPacket
from tink_rl.transport.shared_memory import Segment
from tink_rl.types import SyncMode, Transport

JOINED = JoinAnswer(epoch=1, incarnation="i", lease_s=15.0, last_version=0, transport=Transport.SHM)


@pytest.fixture
def sharing():
    """A publisher whose one server reads its memory."""
    sync = WeightSync("http://127.0.0.1:9", base_model="nowhere")
    [replica] = sync.fleet.replicas
    replica._joined = JOINED
    yield sync
    replica.forget_channel()


def test_memory_of_a_publish_that_came_to_nothing_is_packed_into_again(sharing):
    allocate, pool = sharing._preparation._packer.allocate, sharing.fleet._segments
    buffer = allocate(1000)
    assert {allocate(size).data_ptr() for size in (1000, 500, 1000)} == {buffer.data_ptr()}
    sharing._preparation._packer.reuse(None)  # a version is in it now
    other = allocate(1000)
    assert other.data_ptr() != buffer.data_ptr() and len(pool._segments) == 2
    assert pool.holding(buffer) is not None


def test_broken_weights_are_named_whatever_else_ends_their_publish(sharing, monkeypatch):
    def lost(*_, **__):
        raise errors.PublishFailed("the server is gone")

    monkeypatch.setattr(PacketTransfer, "stage", lost)
    for value, error in ((0.5, errors.PublishFailed), (float("nan"), errors.NonFiniteWeights)):
        tensors = {"m.lora_A.weight": torch.full((1, 16), value)}
        settings = {"mode": SyncMode.ADAPTER, "base_fingerprint": "", "rank": 1}
        outgoing = OutgoingPacket(*packet.pack(tensors, **settings))
        with pytest.raises(error):  # only what is not broken is a checkpoint to resume from
            sharing._deliver(PacketTransfer(sharing.fleet, outgoing), Stopwatch())


def test_memory_of_a_full_update_is_given_back_at_its_end(sharing):
    settings = {"policy": "p", "version": 1, "base_fingerprint": "f", "dtype": "float32"}
    for _ in range(3):
        update = FullUpdate(sharing.fleet, bucket_bytes=1000, **settings)
        update._memory = sharing.fleet.allocate_buffer(1000)
        update._allocate(2000)
        assert len(sharing.fleet._segments._segments) == 1
        update.abort("enough")
        assert sharing.fleet._segments._segments == []


def test_memory_that_cannot_be_shared_gives_way_to_gloo_or_is_an_error(sharing, monkeypatch):
    def full(_):
        raise errors.SegmentUnreachable("no memory")

    monkeypatch.setattr(Segment, "create", full)
    [replica] = sharing.fleet.replicas
    monkeypatch.setattr(replica, "_control", lambda *_: {})
    assert sharing._preparation._packer.allocate(1000).numel() == 1000
    assert not replica.shares_memory and replica._transport is Transport.GLOO
    replica._joined, replica._transport = JOINED, Transport.SHM
    sharing._preparation._packer.reuse(None)
    with pytest.raises(errors.SegmentUnreachable):
        sharing._preparation._packer.allocate(1000)


def test_fleet_of_two_is_asked_again_after_it_was_closed():
    two = [SimpleNamespace(url=f"http://127.0.0.1:{port}", close=lambda: None) for port in (1, 2)]
    fleet = Fleet(two)
    for _ in range(2):
        assert fleet.each(lambda replica: replica.url[-1]) == ["1", "2"]
        fleet.close()
