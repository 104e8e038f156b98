"""The wire format: round trips, digests, layout checks."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.refusals import refused
from tink_rl import errors
from tink_rl.policy import packet
from tink_rl.policy.adapter import check_packed
from tink_rl.types import PROTOCOL_VERSION, SyncMode

DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
TENSORS = st.dictionaries(
    st.text("abc.", min_size=1, max_size=8),
    st.tuples(st.lists(st.integers(1, 7), min_size=1, max_size=3), DTYPES),
    min_size=1,
    max_size=6,
)


def _pack(tensors):
    header, buffer = packet.pack(tensors, mode=SyncMode.MERGED, base_fingerprint="f" * 32, rank=8)
    return packet.seal(header, buffer), buffer


def _example():
    return _pack({"a": torch.arange(6.0).view(2, 3), "b": torch.ones(5)})


def _check_bytes(header, buffer):
    hasher = packet.Hasher(header)
    hasher.update(buffer)
    hasher.check(header)


@settings(max_examples=40, deadline=None)
@given(TENSORS)
def test_packed_tensors_come_back_bit_for_bit_as_views(spec):
    tensors = {name: torch.randn(shape).to(dtype) for name, (shape, dtype) in spec.items()}
    header, buffer = _pack(tensors)
    header = packet.PacketHeader.from_json(header.to_json())
    _check_bytes(header, buffer)
    found = packet.unpack(header, buffer)
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype
        assert found[name].untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_flipped_bit_changes_the_digest(data):
    header, buffer = _example()
    position = data.draw(st.integers(0, buffer.numel() - 1))
    buffer[position] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(errors.DigestMismatch, match="publish again"):
        _check_bytes(header, buffer)


def test_digest_is_that_of_the_weights_not_of_the_name():
    header, buffer = _example()
    assert packet.digest_of(header.named("other", 7, 3), buffer) == header.digest
    assert packet.digest_of(dataclasses.replace(header, rank=4), buffer) != header.digest


def test_truncated_buffer_is_told_from_damage():
    header, buffer = _example()
    with refused("truncated_packet", match="announced"):
        _check_bytes(header, buffer[:-1])


def _broken(**changes):
    return {**json.loads(_example()[0].to_json()), **changes}


@pytest.mark.parametrize(
    "data",
    [
        [],
        {"protocol": PROTOCOL_VERSION},
        _broken(tensors=[]),
        _broken(mode="both"),
        _broken(rank=-1),
        _broken(num_bytes=1),
        _broken(tensors=[{"name": "a", "shape": [-2], "dtype": "float32", "offset": 0}]),
        _broken(tensors=[{"name": "a", "shape": [2], "dtype": "int8", "offset": 0}]),
        _broken(tensors=[{"name": "a", "shape": [2], "dtype": "float32", "offset": 3}]),
        _broken(tensors=[{"name": "a", "shape": [True], "dtype": "float32", "offset": 0}]),
        _broken(tensors=[{"name": "a", "shape": [2], "dtype": "float32", "offset": 0}] * 2),
    ],
)
def test_malformed_header_is_refused(data):
    with pytest.raises(errors.BadRequest):
        packet.PacketHeader.from_json(json.dumps(data))


def test_other_protocol_version_says_so():
    with pytest.raises(errors.ProtocolMismatch, match="same tink-rl release"):
        packet.PacketHeader.from_json(json.dumps(_broken(protocol=PROTOCOL_VERSION + 1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("value", "error"),
    [
        (float("nan"), errors.NonFiniteWeights),
        (float("-inf"), errors.NonFiniteWeights),
        (-2e4, "weight_out_of_range"),
    ],
)
def test_bad_value_anywhere_in_a_packet_names_its_tensor(dtype, value, error):
    tensors = {name: torch.ones(3, 5).to(dtype) for name in ("a", "b", "c")}
    tensors["b"][2, 4] = value
    header, buffer = _pack(tensors)
    with refused(error, match="'b'"):
        check_packed(header, buffer)


def test_good_values_pass_in_one_dtype_and_in_several():
    check_packed(*_example())
    check_packed(*_pack({"a": torch.ones(3), "b": torch.ones(3).bfloat16()}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_are_told_from_equal_numbers(dtype):
    packed = torch.tensor([[1.0, float("nan"), 0.0], [2.0, 3.0, 4.0]], dtype=dtype)
    assert packet.same_bits(packed, packed.clone())
    assert packet.same_bits(packed, packed.T.contiguous().T)  # however it lies in memory
    for changed in (-0.0, 1e-30):
        other = packed.clone()
        other[0, 2] = changed
        assert not packet.same_bits(packed, other)
