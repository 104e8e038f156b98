"""Decisions without a server: settings, modes, leases, the gate, requests, client answers."""

from __future__ import annotations

import asyncio
import json
import math
import time
from types import SimpleNamespace

import httpx
import pytest
import torch

from tink_rl import errors
from tink_rl.config import SyncConfig
from tink_rl.policy import packet
from tink_rl.protocol import JoinAnswer
from tink_rl.publish.full_update import FullUpdate
from tink_rl.publish.modes import choose_mode
from tink_rl.publish.packets import PacketTransfer
from tink_rl.publish.probe_rules import largest_gap
from tink_rl.publish.publisher import WeightSync
from tink_rl.publish.stopwatch import Stopwatch
from tink_rl.publish.vllm_client import VLLMClient
from tink_rl.server.gate import Gate
from tink_rl.server.leases import LEASE_S, Leases
from tink_rl.server.state import ServedState
from tink_rl.transport.fleet import Fleet
from tink_rl.transport.outgoing import Outgoing
from tink_rl.transport.shared_memory import Segment
from tink_rl.types import PROTOCOL_VERSION, PolicyVersion, ServerStatus, SyncMode, Transport


def status(modes=("adapter", "merged"), **changes):
    base = {
        **{
            "protocol": PROTOCOL_VERSION,
            "incarnation": "i",
            "state": "ready",
            "modes": modes,
            "world_size": 1,
        },
        **{"base_model": "b", "base_fingerprint": "f", "dtype": "float32"},
        **{"adapter_dtype": "float32", "max_lora_rank": 16, "max_loras": 2, "max_model_len": 256},
        **{"logprobs_mode": "processed_logprobs", "device": "cpu", "served": {}},
    }
    return ServerStatus.from_json({**base, "a_field_of_a_newer_server": 1, **changes})


@pytest.mark.parametrize(
    "wrong",
    [
        {"mode": "half"},
        {"bucket_mib": 0},
        {"transport": "carrier-pigeon"},
        {"on_running": "ignore"},
        {"policy": "a@b"},
        {"policy": ""},
        {"keep_versions": 0},
        {"probe_every": -1},
        {"probe_tolerance": 0.0},
        {"probe_tolerance": float("nan")},
        {"stage_timeout_s": -1.0},
        {"stage_timeout_s": "soon"},
    ],
)
def test_wrong_setting_names_the_field(wrong):
    with pytest.raises(errors.ConfigError, match=next(iter(wrong))):
        SyncConfig(**wrong)


def test_token_comes_from_argument_file_or_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("TINK_TOKEN", raising=False)
    monkeypatch.delenv("TINK_TOKEN_FILE", raising=False)
    (tmp_path / "token").write_text("from-file\n")
    assert SyncConfig(token="given").read_token() == "given"
    assert SyncConfig(token_file=str(tmp_path / "token")).read_token() == "from-file"
    monkeypatch.setenv("TINK_TOKEN", "from-environment")
    assert SyncConfig().read_token() == "from-environment"
    with pytest.raises(errors.ConfigError, match="tink-rl serve"):
        SyncConfig(token_file=str(tmp_path / "none")).read_token()


@pytest.mark.parametrize(
    ("wanted", "server", "mode"),
    [
        ("auto", status(), SyncMode.MERGED),
        ("auto", status(("adapter",)), SyncMode.ADAPTER),
        ("auto", status(served={"other@3": "d"}), SyncMode.ADAPTER),
        ("auto", status(served={"p@3": "d"}, merged="p@3"), SyncMode.MERGED),
        ("adapter", status(), SyncMode.ADAPTER),
    ],
)
def test_mode_follows_what_the_server_offers(wanted, server, mode):
    assert choose_mode(wanted, server).mode is mode


def test_mode_that_is_not_offered_is_refused():
    with pytest.raises(errors.ModeUnavailable, match="--mode merged"):
        choose_mode("merged", status(("adapter",)))


def test_versions_are_written_and_read():
    assert str(PolicyVersion.parse("my.policy@17")) == "my.policy@17"
    for wrong in ("policy", "@3", "policy@-1", "policy@x", "a b@1"):
        with pytest.raises(ValueError):
            PolicyVersion.parse(wrong)


def test_nan_never_passes_as_a_small_gap():
    assert math.isnan(largest_gap([0.0, math.nan, 0.0], [0.0, 0.0, 0.5]))
    assert largest_gap([0.0, 1.0], [0.25, 1.0]) == 0.25


def test_lease_expires_only_unrenewed_and_epochs_grow():
    now = [0.0]
    leases = Leases(clock=lambda: now[0])
    first, _ = leases.take("p", "a")
    now[0] = LEASE_S - 1
    with pytest.raises(errors.LeaseHeld, match="SyncConfig"):
        leases.take("p", "b")
    leases.check("p", first.epoch)
    now[0] += 2
    with pytest.raises(errors.LeaseHeld):
        leases.take("p", "b")
    now[0] += LEASE_S
    second, old = leases.take("p", "b")
    assert old is first and second.epoch > first.epoch
    with pytest.raises(errors.StaleEpoch):
        leases.check("p", first.epoch)
    leases.release("p", first.epoch)
    leases.check("p", second.epoch)


def test_gate_waits_for_the_requests_up_to_a_ticket_however_many_come_after_it():
    async def run():
        gate = Gate()
        old = await gate.enter()
        last = gate.last_ticket
        await gate.enter()
        assert not await gate.drained(0.01, last)
        gate.leave(old)
        assert await gate.drained(0.01, last)
        assert not await gate.drained(0.01)

    asyncio.run(run())


def test_gate_holds_new_requests_and_waits_only_for_older_ones():
    async def run():
        gate = Gate()
        old = await gate.enter()
        gate.close()
        held = asyncio.create_task(gate.enter())
        assert not await gate.drained(0.02)
        gate.leave(old)
        assert await gate.drained(1.0)
        assert not held.done()
        gate.open()
        ticket = await asyncio.wait_for(held, 1.0)
        gate.refusal = errors.NotReady("half a policy")
        with pytest.raises(errors.NotReady):
            await gate.enter()
        assert gate.num_running == 1
        gate.leave(ticket)

    asyncio.run(run())


def _client(handler):
    return VLLMClient("http://server", token="t" * 20, transport=httpx.MockTransport(handler))


def test_server_without_plugin_is_told_from_one_that_refuses():
    plain = _client(lambda request: httpx.Response(404, json={"detail": "Not Found"}))
    with pytest.raises(errors.PluginMissing, match="tink-rl serve"):
        plain.status()
    body = errors.UnknownVersion("gone").to_wire()
    with pytest.raises(errors.UnknownVersion):
        _client(lambda request: httpx.Response(404, json=body)).status()


def test_server_with_a_key_of_its_own_says_which_variable_to_set():
    client = _client(lambda request: httpx.Response(401, json={"error": "Unauthorized"}))
    for ask in (
        client.models,
        lambda: client.generate([[1]], model="base"),
        lambda: client.load_lora("a", "somewhere"),
        lambda: client.unload_lora("a"),
    ):
        with pytest.raises(errors.BadToken, match=r"wants its own --api-key.*set VLLM_API_KEY or"):
            ask()


def test_every_error_survives_the_wire():
    for code, cls in errors.by_code().items():
        sent = cls("why", code=code, a=1)
        found = errors.from_wire(json.loads(json.dumps(sent.to_wire())), sent.status)
        assert type(found) is cls and found.message == "why" and found.details == {"a": 1}
        assert (found.code, found.status) == (code, sent.status)
    assert "502" in str(errors.from_wire("<html>", 502))


def test_completion_of_another_version_is_not_taken():
    answer = {"model": "p@2", "choices": []}
    client = _client(lambda request: httpx.Response(200, json=answer))
    with pytest.raises(errors.UnknownVersion, match="answered as 'p@2'"):
        client.generate([[1]], model="p@1")


def test_deadline_and_missing_server_are_errors_with_a_remedy():
    def slow(request):
        raise httpx.ReadTimeout("slow", request=request)

    with pytest.raises(errors.RequestTimeout, match="not answered within"):
        _client(slow).status()
    with pytest.raises(ConnectionError, match="The vLLM server can't be reached at http://127"):
        VLLMClient("http://127.0.0.1:9", token="t").status()


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
    allocate, shelf = sharing._preparation._packer.allocate, sharing.fleet._shelf
    room = allocate(1000)
    assert {allocate(size).data_ptr() for size in (1000, 500, 1000)} == {room.data_ptr()}
    sharing._preparation._packer.reuse(None)  # a version is in it now
    other = allocate(1000)
    assert other.data_ptr() != room.data_ptr() and len(shelf._segments) == 2
    assert shelf.holding(room) is not None


def test_broken_weights_are_named_whatever_else_ends_their_publish(sharing, monkeypatch):
    def lost(*_, **__):
        raise errors.PublishFailed("the server is gone")

    monkeypatch.setattr(PacketTransfer, "stage", lost)
    for value, error in ((0.5, errors.PublishFailed), (float("nan"), errors.NonFiniteWeights)):
        tensors = {"m.lora_A.weight": torch.full((1, 16), value)}
        settings = {"mode": SyncMode.ADAPTER, "base_fingerprint": "", "rank": 1}
        outgoing = Outgoing(*packet.pack(tensors, **settings))
        with pytest.raises(error):  # only what is not broken is a checkpoint to resume from
            sharing._deliver(PacketTransfer(sharing.fleet, outgoing), Stopwatch())


def test_memory_of_a_full_update_is_given_back_at_its_end(sharing):
    settings = {"policy": "p", "version": 1, "base_fingerprint": "f", "dtype": "float32"}
    for _ in range(3):
        update = FullUpdate(sharing.fleet, bucket_bytes=1000, **settings)
        update._room = sharing.fleet.room(1000)
        update._room_for(2000)
        assert len(sharing.fleet._shelf._segments) == 1
        update.abort("enough")
        assert sharing.fleet._shelf._segments == []


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


def test_closed_client_says_that_it_is_closed():
    client = _client(lambda request: httpx.Response(200, json={}))
    client.close()
    with pytest.raises(errors.ConfigError, match="was closed; make a new"):
        client.status()


@pytest.mark.parametrize(
    "call",
    [
        lambda c: c.generate([], model="m"),
        lambda c: c.generate([[1]], features=[{}], model="m"),
        lambda c: c.generate([[1]], model="m", generation_kwargs={"chat_template": "x"}),
        lambda c: c.chat([[{}]], model="m", chat_template="x"),
    ],
)
def test_what_the_client_cannot_do_is_refused_before_a_request(call):
    def never(request):
        raise AssertionError("a request was sent")

    with pytest.raises(errors.TinkError):
        call(_client(never))


def test_epochs_of_a_restarted_server_are_above_those_of_its_earlier_life():
    before, _ = Leases().take("policy", "one")
    time.sleep(0.002)
    after, _ = Leases().take("policy", "two")
    assert after.epoch > before.epoch


class _Engine:
    """Aborts what is in it; what comes while it is paused waits until it is resumed."""

    def __init__(self, gate):
        self._gate = gate
        self._inside, self._waiting = [gate.enter()], [gate.enter()]

    async def arrive(self):
        self._inside = [await ticket for ticket in self._inside]
        self._waiting = [await ticket for ticket in self._waiting]

    async def pause_generation(self, *, mode, clear_cache):
        assert mode == "abort"
        for ticket in self._inside:
            self._gate.leave(ticket)
        self._inside = []

    async def resume_generation(self):
        self._inside, self._waiting = self._waiting, []


def test_abort_ends_requests_that_reach_the_engine_after_it():
    async def run():
        state = object.__new__(ServedState)
        state.gate = Gate()
        state.engine = engine = _Engine(state.gate)
        await engine.arrive()
        await state.hold(5.0, "abort")
        assert state.gate.num_running == 0

    asyncio.run(run())


def test_fleet_of_two_is_asked_again_after_it_was_closed():
    two = [SimpleNamespace(url=f"http://127.0.0.1:{port}", close=lambda: None) for port in (1, 2)]
    fleet = Fleet(two)
    for _ in range(2):
        assert fleet.each(lambda replica: replica.url[-1]) == ["1", "2"]
        fleet.close()
