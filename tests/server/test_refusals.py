"""Everything that must be refused: a distinct error, and what was served is still served, exactly."""

from __future__ import annotations

import dataclasses

import httpx
import pytest
import torch

from tests.policies import PeftTwin, assert_served, random_adapter, sync_to
from tests.refusals import refused, status_of
from tests.tiny_models import make_model
from tink_rl import errors
from tink_rl.config import SyncConfig
from tink_rl.policy import packet
from tink_rl.policy.adapter import Adapter
from tink_rl.publish.publisher import WeightSync
from tink_rl.publish.vllm_client import VLLMClient
from tink_rl.transport.outgoing import OutgoingPacket
from tink_rl.types import PROTOCOL_VERSION

pytestmark = [pytest.mark.server, pytest.mark.home]
MODES = pytest.mark.parametrize("mode", ["adapter", "merged"])


@pytest.fixture
def server(servers):
    return servers.get("qwen3", mode="both")


@pytest.fixture(scope="module")
def twin(model_dir):
    return PeftTwin(model_dir("qwen3"))


def _packet(sync, adapter):
    header, buffer = packet.pack(
        adapter.tensors,
        mode=sync.mode,
        base_fingerprint=sync.status.base_fingerprint,
        rank=adapter.rank,
    )
    return packet.seal(header, buffer).named(sync.config.policy, 99, 0), buffer


def _stage(replica, header, buffer):
    return replica.stage(OutgoingPacket(header, buffer))


def _rename(adapter, old, new):
    return Adapter(
        tensors={k.replace(old, new): v for k, v in adapter.tensors.items()}, rank=adapter.rank
    )


def _with(adapter, part, value):
    tensors = {k: v.clone() for k, v in adapter.tensors.items()}
    next(v for k, v in tensors.items() if part in k)[0, 0] = value
    return Adapter(tensors=tensors, rank=adapter.rank)


def _digest_mismatch(header, buffer, adapter):
    buffer = buffer.clone()
    buffer[7] ^= 1
    return header, buffer


def _repacked(change):
    def make(header, buffer, adapter):
        bad = change(adapter)
        found, data = packet.pack(
            bad.tensors, mode=header.mode, base_fingerprint=header.base_fingerprint, rank=bad.rank
        )
        return packet.seal(found, data).named(header.policy, header.version, 0), data

    return make


def _reheader(**changes):
    def make(header, buffer, adapter):
        return packet.seal(dataclasses.replace(header, **changes), buffer), buffer

    return make


def _wide(adapter):
    return Adapter(
        tensors={
            k: torch.cat([v, v], dim=1) if "lora_A" in k else v for k, v in adapter.tensors.items()
        },
        rank=adapter.rank,
    )


BAD_PACKETS = {
    "digest": (_digest_mismatch, errors.DigestMismatch),
    "nan in A": (_repacked(lambda a: _with(a, "lora_A", float("nan"))), errors.NonFiniteWeights),
    "inf in B": (_repacked(lambda a: _with(a, "lora_B", float("inf"))), errors.NonFiniteWeights),
    "1e19 in B": (_repacked(lambda a: _with(a, "lora_B", 1e19)), "weight_out_of_range"),
    "wrong base": (_reheader(base_fingerprint="0" * 32), errors.BaseMismatch),
    "protocol": (_reheader(protocol=PROTOCOL_VERSION + 1), errors.ProtocolMismatch),
    "unknown names": (_repacked(lambda a: _rename(a, "model.", "wrong.")), errors.UnknownModules),
    "A without B": (
        _repacked(
            lambda a: Adapter(
                tensors={k: v for k, v in a.tensors.items() if "lora_A" in k}, rank=a.rank
            )
        ),
        errors.UnknownModules,
    ),
    "shapes": (_repacked(_wide), errors.ShapeMismatch),
}


@MODES
@pytest.mark.parametrize("case", BAD_PACKETS)
def test_bad_packet_is_refused_and_the_served_policy_stays_exact(server, twin, mode, case):
    damage, expected = BAD_PACKETS[case]
    with sync_to(server, twin.directory, mode) as sync:
        twin.randomise(1)
        name, cases = sync.publish(twin.model).name, twin.clear_cases()
        adapter = twin.collector.collect()
        header, buffer = damage(*_packet(sync, adapter), adapter)
        replica = sync.fleet.replicas[0]
        with refused(expected) as caught:
            _stage(replica, header, buffer)
        assert len(caught.value.message) > 40  # says what was given and what to do
        assert_served(server, name, cases)
        assert list(server.client().status().served) == [name]
        replica.close()
        twin.randomise(2)
        assert_served(server, sync.publish(twin.model).name, twin.clear_cases())


def test_truncated_buffer_is_refused(server, twin):
    with sync_to(server, twin.directory, "merged", transport="http") as sync:
        twin.randomise(1)
        name, cases = sync.publish(twin.model).name, twin.clear_cases()
        header, buffer = _packet(sync, twin.collector.collect())
        with refused("truncated_packet", match="publish again"):
            _stage(sync.fleet.replicas[0], header, buffer[:-64])
        assert_served(server, name, cases)


def test_rank_above_the_slots_is_refused_in_adapter_mode_only(server, model_dir):
    wide = PeftTwin(model_dir("qwen3"), r=32)
    with (
        sync_to(server, wide.directory, "adapter") as sync,
        pytest.raises(errors.RankExceeded, match="--max-lora-rank 32"),
    ):
        sync.publish(random_adapter(wide, 1))
    with sync_to(server, wide.directory, "merged") as sync:
        wide.randomise(1)
        assert_served(server, sync.publish(wide.model).name, wide.clear_cases())


def test_dtype_that_the_slots_do_not_take_is_refused(server, twin):
    with sync_to(server, twin.directory, "adapter") as sync:
        adapter = random_adapter(twin, 1).to(torch.bfloat16)
        with refused("dtype_mismatch", match="slots take float32"):
            _stage(sync.fleet.replicas[0], *_packet(sync, adapter))


def test_trainer_on_another_base_is_told_before_anything_is_sent(server, tmp_path):
    other = make_model("qwen3", tmp_path / "other", seed=7)
    config = SyncConfig(mode="merged", token=server.token)
    with pytest.raises(errors.BaseMismatch, match="serve the directory"):
        WeightSync(server.url, base_model=other, config=config).open()


def test_bad_adapter_is_not_served(server, twin):
    with sync_to(server, twin.directory, "adapter") as sync:
        with pytest.raises(errors.NonFiniteWeights, match="diverged"):
            sync.publish(_with(random_adapter(twin, 1), "lora_B", float("nan")))
        assert server.client().status().served == {}


@pytest.mark.parametrize("token", ["wrong-token-wrong-token", ""])
def test_wrong_token_is_refused_on_every_route(server, token):
    client = VLLMClient(server.url, token=token)
    for action in ("status", "join", "joined", "heartbeat", "leave", "stage", "staged", "commit"):
        with pytest.raises(errors.BadToken, match="token_file"):
            client.control(action, None if action == "status" else {}, timeout_s=5)


def test_other_protocol_version_is_told_at_join(server):
    body = {
        "protocol": PROTOCOL_VERSION + 1,
        "policy": "p",
        "writer": "w",
        "transport": "http",
        "timeout_s": 5,
    }
    with pytest.raises(errors.ProtocolMismatch, match="same tink-rl release"):
        server.client().control("join", body, timeout_s=5)


def test_malformed_control_requests_are_answered_not_crashed(server):
    headers = {"authorization": f"Bearer {server.token}"}
    for body in (b"", b"[]", b"{", b'{"protocol": %d}' % PROTOCOL_VERSION, b"\xff"):
        for action in ("join", "stage", "commit", "drop"):
            response = httpx.post(f"{server.url}/tink/v1/{action}", content=body, headers=headers)
            assert response.status_code == 400, (action, body, response.text)
            assert response.json()["error"]["code"] == "bad_request"


def test_vllms_own_control_routes_stay_shut(server):
    for path in ("/collective_rpc", "/v1/load_lora_adapter", "/update_weights", "/pause"):
        assert httpx.post(f"{server.url}{path}", json={}).status_code == 404


def test_every_refusal_has_a_code_of_its_own_and_bad_packets_the_status_of_a_senders_fault():
    kinds = errors._all_subclasses(errors.TinkError)
    assert len({cls.code for cls in kinds}) == len(kinds)
    assert len(errors.by_code()) == sum(1 + len(vars(cls).get("codes", ())) for cls in kinds)
    assert all(400 <= status_of(code) < 600 for code in errors.by_code())
    assert all(400 <= status_of(kind) < 500 for _, kind in BAD_PACKETS.values())
