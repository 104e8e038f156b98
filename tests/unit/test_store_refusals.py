"""What the adapter store refuses: files, configs, tensors and pickles (F14-F19)."""

from __future__ import annotations

import dataclasses
import json
import pickle
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from tests.adapters import (
    BASE,
    CONFIG,
    PREFIX,
    SHAPES,
    WEIGHTS,
    config_of,
    names_in,
    tensors_of,
    write_adapter,
)
from tests.refusals import code_of
from tink_rl import errors
from tink_rl.adapters import normalised
from tink_rl.adapters.store import AdapterStore
from tink_rl.policy.peft_dir import MAX_CONFIG_BYTES, POLICY_FILE
from tink_rl.policy.shapes import BaseShapes

Q0 = "model.layers.0.self_attn.q_proj"


def _assert_refused(store, source, error, match=None, base=BASE):
    with pytest.raises(errors.TinkError, match=match) as caught:
        store.add(source, base=base)
    assert caught.value.code == code_of(error), caught.value
    assert caught.value.status == 422
    assert store.digests() == []
    assert not [name for name in names_in(store) if name.startswith(".tmp")]
    return caught.value


# -- what is refused: files (F14) -----------------------------------------------------------------


def _header_length(path):
    return struct.unpack("<Q", path.read_bytes()[:8])[0]


@pytest.mark.parametrize("cut", ["0", "7", "8", "header-1", "header", "half", "len-1"])
def test_truncated_weights_are_refused(store, source, cut):
    path = source / WEIGHTS
    data, header = path.read_bytes(), 8 + _header_length(path)
    sizes = {
        "header-1": header - 1,
        "header": header,
        "half": len(data) // 2,
        "len-1": len(data) - 1,
    }
    path.write_bytes(data[: sizes[cut] if cut in sizes else int(cut)])
    _assert_refused(store, source, "adapter_corrupt", "copy it again")


def _with_header(entries, size=16):
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + bytes(size)


ENTRY = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    "data",
    [
        struct.pack("<Q", 2 << 30) + b"{}",
        struct.pack("<Q", 2**64 - 1) + b"{}",
        _with_header(b"not json"),
        _with_header(b"\xff\xfe"),
        _with_header(b"[" * 100_000),
        _with_header([1]),
        _with_header({"a": 1}),
        _with_header({"a": {**ENTRY, "dtype": "F31"}}),
        _with_header({"a": {**ENTRY, "dtype": ["F32"]}}),
        _with_header({"a": {**ENTRY, "shape": [4, 4]}}),
        _with_header({"a": {**ENTRY, "shape": [-2, -2]}}),
        _with_header({"a": {**ENTRY, "shape": [2**40, 2**40]}}),
        _with_header({"a": {**ENTRY, "shape": [True, 4]}}),
        _with_header({"a": {**ENTRY, "shape": "22"}}),
        _with_header({"a": {**ENTRY, "data_offsets": [0]}}),
        _with_header({"a": {**ENTRY, "data_offsets": [16, 0]}}),
        _with_header({"a": {**ENTRY, "data_offsets": [1, 17]}}, 17),
        _with_header({"a": ENTRY, "b": ENTRY}),
        _with_header({"a": ENTRY}, 17),
        _with_header(
            b'{"a":' + json.dumps(ENTRY).encode() + b',"a":' + json.dumps(ENTRY).encode() + b"}"
        ),
    ],
    ids=lambda data: repr(data[8:50]),
)
def test_header_that_does_not_describe_its_bytes_is_refused(store, source, data):
    (source / WEIGHTS).write_bytes(data)
    _assert_refused(store, source, "adapter_corrupt", "copy it again")


_MEASURED = """
import sys
from tink_rl.errors import TinkError
from tink_rl.adapters.store import AdapterStore
def peak():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1])
before = peak()
try:
    AdapterStore(sys.argv[1]).add(sys.argv[2])
except TinkError as error:
    print(error.code, peak() - before)
"""


@pytest.mark.parametrize("header", [2 << 30, 10])
def test_huge_damaged_file_costs_no_memory(store, source, header):
    with open(source / WEIGHTS, "wb") as file:
        file.write(struct.pack("<Q", header) + b"{}" + b" " * 8)
        file.truncate(500 << 20)
    result = subprocess.run(
        [sys.executable, "-c", _MEASURED, str(store.root), str(source)],
        capture_output=True,
        text=True,
        check=True,
    )
    code, grown_kib = result.stdout.split()
    assert code == "adapter_corrupt" and int(grown_kib) < 50 << 10


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    which=st.sampled_from([CONFIG, WEIGHTS]),
    where=st.floats(0, 1),
    length=st.integers(0, 40),
    new=st.binary(max_size=40),
)
def test_whatever_the_bytes_are_only_our_errors_come_out(
    tmp_path_factory, which, where, length, new
):
    folder = tmp_path_factory.mktemp("fuzz")
    source = write_adapter(folder / "adapter")
    data = bytearray((source / which).read_bytes())
    # Half of the changes near the beginning: that is where the structure of a weights file is.
    start = int(where * where * len(data))
    data[start : start + length] = new
    (source / which).write_bytes(data)
    store = AdapterStore(folder / "store")
    try:
        stored = store.add(source, base=BASE)
    except errors.TinkError as error:
        assert error.status == 422 and store.digests() == []
    else:
        assert all(torch.isfinite(t).all() for t in store.read(stored.digest).tensors.values())
    shutil.rmtree(folder)


# -- what is refused: the config (F15) ------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"r": 8}, "rank_mismatch"),
        ({"r": 2}, "rank_mismatch"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_mismatch"),
        ({"r": 513}, errors.RankExceeded),
        ({"r": 10**9}, errors.RankExceeded),
        ({"rank_pattern": {"q_proj": 4096}}, errors.RankExceeded),
        ({"r": 0}, errors.AdapterConfigInvalid),
        ({"r": -1}, errors.AdapterConfigInvalid),
        ({"r": "8"}, errors.AdapterConfigInvalid),
        ({"r": True}, errors.AdapterConfigInvalid),
        ({"r": 4.0}, errors.AdapterConfigInvalid),
        ({"r": None}, errors.AdapterConfigInvalid),
        ({"r": [4]}, errors.AdapterConfigInvalid),
        ({"rank_pattern": {"q_proj": "4"}}, errors.AdapterConfigInvalid),
        ({"rank_pattern": ["q_proj"]}, errors.AdapterConfigInvalid),
        ({"rank_pattern": {"(a+)+b": 4}}, errors.AdapterConfigInvalid),
        ({"rank_pattern": {"[": 4}}, errors.AdapterConfigInvalid),
        ({"lora_alpha": 0}, errors.AdapterConfigInvalid),
        ({"lora_alpha": -8}, errors.AdapterConfigInvalid),
        ({"lora_alpha": 1e30}, errors.AdapterConfigInvalid),
        ({"lora_alpha": 10**400}, errors.AdapterConfigInvalid),
        ({"lora_alpha": "8"}, errors.AdapterConfigInvalid),
        ({"lora_alpha": False}, errors.AdapterConfigInvalid),
        ({"alpha_pattern": {"q_proj": 0}}, errors.AdapterConfigInvalid),
        ({"use_rslora": "yes"}, errors.AdapterConfigInvalid),
        ({"use_dora": True}, errors.UnsupportedAdapter),
        ({"modules_to_save": ["lm_head"]}, errors.UnsupportedAdapter),
        ({"bias": "all"}, errors.UnsupportedAdapter),
        ({"lora_bias": True}, errors.UnsupportedAdapter),
        ({"peft_type": "IA3"}, errors.UnsupportedAdapter),
        ({"peft_type": {"a": 1}}, errors.UnsupportedAdapter),
        ({"init_lora_weights": "pissa"}, errors.UnsupportedAdapter),
        ({"a_field_of_the_future": True}, errors.UnsupportedAdapter),
    ],
    ids=lambda value: json.dumps(value)[:50] if isinstance(value, dict) else code_of(value),
)
def test_config_that_cannot_be_served_right_is_refused(store, tmp_path, changes, error):
    source = write_adapter(tmp_path / "a", config=config_of(**changes))
    assert len(str(_assert_refused(store, source, error))) > 40


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        '{"r": 4',
        '{"r": 4, "lora_alpha": NaN}',
        '{"r": 4, "lora_alpha": Infinity}',
        '{"r": 4, "lora_alpha": -Infinity}',
        '{"r": 4, "lora_alpha": 1e999}',
        '{"r": 4, "r": 4, "lora_alpha": 8}',
        '{"r": 4, "lora_alpha": 8, "x": {"a": 1, "a": 2}}',
        "[" * 60_000,
        '{"r": ' + "9" * 5000 + "}",
        "\ufeff{}",
    ],
    ids=lambda text: ascii(text)[:40],
)
def test_config_that_is_no_strict_json_is_refused(store, tmp_path, text):
    _assert_refused(store, write_adapter(tmp_path / "a", config=text), errors.AdapterConfigInvalid)


def test_config_above_the_limit_is_refused_as_a_limit(store, tmp_path):
    config = json.dumps(config_of(revision="x" * MAX_CONFIG_BYTES))
    source = write_adapter(tmp_path / "a", config=config)
    _assert_refused(
        store, source, "adapter_too_large", "at most 8388608 are read; name the modules"
    )


def test_missing_files_and_directories_are_said(store, source, tmp_path):
    (source / WEIGHTS).unlink()
    _assert_refused(store, source, errors.AdapterFilesInvalid, "save_pretrained")
    (source / CONFIG).unlink()
    _assert_refused(store, source, errors.AdapterConfigInvalid, "save_pretrained")
    absent = tmp_path / "absent"
    error = _assert_refused(store, absent, errors.AdapterPathMissing)
    assert isinstance(error, ValueError) and str(error).startswith(
        f"LoRA path does not exist: {absent}"
    )


def test_many_patterns_are_refused_rather_than_matched_for_minutes(store, tmp_path):
    shapes = {f"model.layers.{i}.self_attn.q_proj": (1, 1) for i in range(2500)}
    patterns = {f"a{i}.*": 1 for i in range(3000)}
    config = config_of(1, rank_pattern=patterns)
    source = write_adapter(tmp_path / "a", config=config, tensors=tensors_of(1, shapes=shapes))
    _assert_refused(store, source, errors.AdapterConfigInvalid, "too many", base=None)


# -- what is refused: names, shapes, values (F16-F18) ---------------------------------------------


def _renamed(old, new):
    return {name.replace(old, new): tensor for name, tensor in tensors_of().items()}


def _plus(**extra):
    return {**tensors_of(), **{k.replace("__", "."): v for k, v in extra.items()}}


def _without(part):
    return {k: v for k, v in tensors_of().items() if not (Q0 in k and part in k)}


def _changed(change):
    tensors = tensors_of()
    name = f"{PREFIX}{Q0}.lora_B.weight"
    tensors[name] = change(tensors[name])
    return tensors


def _filled(value):
    def change(tensor):
        tensor[1, 2] = value
        return tensor

    return _changed(change)


SMALLER = {name: (rows // 2, columns // 2) for name, (rows, columns) in SHAPES.items()}
LARGER = {name: (rows * 2, columns * 2) for name, (rows, columns) in SHAPES.items()}


@pytest.mark.parametrize(
    ("tensors", "error"),
    [
        ({}, "adapter_incomplete"),
        (_without("lora_B"), "adapter_incomplete"),
        (_without("lora_A"), "adapter_incomplete"),
        (_renamed("model.layers.0", "wrong.layers.0"), errors.UnknownModules),
        (_renamed("q_proj", "z_proj"), errors.UnknownModules),
        (_renamed("layers.1", "layers.7"), errors.UnknownModules),
        (_renamed("base_model.model.model", "base_model.model"), errors.UnknownModules),
        (_renamed(Q0, "lm_head"), errors.UnsupportedAdapter),
        (_renamed(Q0, "model.embed_tokens"), errors.UnsupportedAdapter),
        (_plus(base_model__model__lm_head__weight=torch.ones(2, 2)), errors.UnsupportedAdapter),
        (_plus(x__lora_B__bias=torch.ones(2)), errors.UnsupportedAdapter),
        (_plus(lora_A__weight=torch.ones(4, 2)), errors.UnsupportedAdapter),
        (
            {**tensors_of(), "x" * 300 + ".lora_A.weight": torch.ones(1, 1)},
            errors.UnsupportedAdapter,
        ),
        ({**tensors_of(), f"{Q0}.lora_A.weight": torch.ones(4, 16)}, "adapter_corrupt"),
        (tensors_of(shapes=SMALLER), errors.BaseMismatch),
        (tensors_of(shapes=LARGER), errors.BaseMismatch),
        (_changed(lambda t: t[:, :3].contiguous()), "rank_mismatch"),
        (_changed(lambda t: t.reshape(-1)), errors.ShapeMismatch),
        (_changed(lambda t: t[:0].contiguous()), errors.ShapeMismatch),
        (_changed(lambda t: t.double()), "dtype_mismatch"),
        (_changed(lambda t: t.to(torch.int8)), "dtype_mismatch"),
        (_changed(lambda t: t.bool()), "dtype_mismatch"),
        (_changed(lambda t: t.to(torch.float8_e4m3fn)), "dtype_mismatch"),
        (_filled(float("nan")), errors.NonFiniteWeights),
        (_filled(float("inf")), errors.NonFiniteWeights),
        (_filled(float("-inf")), errors.NonFiniteWeights),
        (_filled(1e19), "weight_out_of_range"),
        (_filled(-1e19), "weight_out_of_range"),
        (_filled(9e3), "weight_out_of_range"),  # in range by itself, not with its scaling of 2
        (_filled(3e38), errors.NonFiniteWeights),  # overflows with its scaling
    ],
)
def test_tensors_that_do_not_fit_or_would_harm_are_refused(store, tmp_path, tensors, error):
    source = write_adapter(tmp_path / "a", tensors=tensors)
    assert len(str(_assert_refused(store, source, error))) > 40


def _says(source, text):
    (source / POLICY_FILE).write_text(text)
    return source


def test_adapter_that_says_it_was_trained_on_another_base_of_these_shapes_is_refused(store, source):
    base = dataclasses.replace(BASE, fingerprint="f" * 64)
    _says(source, json.dumps({"base_fingerprint": "e" * 64}))
    _assert_refused(
        store, source, errors.BaseMismatch, match="trained on base eeeeeeeeeeee", base=base
    )
    for said in ({"base_fingerprint": "f" * 64}, {"policy": "math"}):
        assert store.add(_says(source, json.dumps(said)), base=base).digest


@pytest.mark.parametrize("text", ["[]", "{", '{"base_fingerprint": 3}', '{"a": NaN}'])
def test_malformed_word_about_the_base_is_refused(store, source, text):
    _assert_refused(store, _says(source, text), errors.AdapterConfigInvalid)


def test_huge_word_about_the_base_is_refused(store, source):
    _assert_refused(store, _says(source, " " * 70_000), "adapter_too_large")


def test_rank_above_the_servers_slots_is_refused(store, source):
    with pytest.raises(errors.RankExceeded, match="at most 2"):
        store.add(source, max_rank=2)
    assert store.add(source, max_rank=4).rank == 4


def test_small_file_that_grows_huge_by_its_ranks_is_refused(store, tmp_path, monkeypatch):
    monkeypatch.setattr(normalised, "MAX_STORED_BYTES", 1000)
    _assert_refused(store, write_adapter(tmp_path / "a"), "adapter_too_large", "lower rank")


def test_shapes_of_a_base_come_from_its_checkpoint(model_dir):
    for shape in ("qwen3", "qwen2"):
        found = BaseShapes.from_model_dir(model_dir(shape)).shapes
        assert found["model.layers.1.self_attn.k_proj"] == (64, 128)
        assert found["model.layers.0.mlp.down_proj"] == (128, 192)
        assert len(found) == 14 and not any("lm_head" in n or "embed" in n for n in found)


def test_packed_base_checks_names_but_not_shapes(tmp_path):
    packed = {
        "model.layers.0.q_proj.qweight": torch.zeros(2, 24, dtype=torch.int32),
        "model.layers.0.o_proj.weight": torch.zeros(192, 1, dtype=torch.uint8),
        "model.norm.weight": torch.zeros(16),
    }
    (tmp_path / "model.safetensors").write_bytes(save(packed))
    base = BaseShapes.from_model_dir(tmp_path)
    assert base.shapes == {"model.layers.0.q_proj": None, "model.layers.0.o_proj": None}
    base.check({"model.layers.0.q_proj": (16, 16)}, where="here")
    with pytest.raises(errors.UnknownModules):
        base.check({"model.norm": (16, 16)}, where="here")


def test_text_layers_of_an_image_model_are_known_by_their_saved_and_their_live_names(tmp_path):
    saved = {"language_model.model.layers.0.self_attn.q_proj.weight": torch.zeros(24, 16)}
    (tmp_path / "model.safetensors").write_bytes(save(saved))
    (tmp_path / "config.json").write_text("{}")
    base = BaseShapes.from_model_dir(tmp_path)
    base.check({"model.language_model.layers.0.self_attn.q_proj": (24, 16)}, where="here")
    with pytest.raises(errors.UnknownModules):  # vLLM would ignore these in silence
        base.check({"model.layers.0.self_attn.q_proj": (24, 16)}, where="here")


def test_stock_vllm_reads_what_peft_computes_though_it_ignores_patterns(store, tmp_path):
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    tensors = tensors_of() | tensors_of(rank=2, shapes={Q0: SHAPES[Q0]})
    config = config_of(
        use_rslora=True, rank_pattern={Q0: 2}, alpha_pattern={"layers.1.self_attn.q_proj": 3}
    )
    stored = store.add(write_adapter(tmp_path / "a", config=config, tensors=tensors), base=BASE)
    helper = PEFTHelper.from_local_dir(str(stored.path), 256)
    loaded = LoRAModel.from_local_checkpoint(
        str(stored.path), {"q_proj", "down_proj"}, helper, lora_model_id=1, device="cpu"
    )
    assert helper.vllm_lora_scaling_factor == 1.0 and set(loaded.loras) == set(SHAPES)
    scalings = dict.fromkeys(SHAPES, 8 / 4**0.5)
    scalings |= {Q0: 8 / 2**0.5, "model.layers.1.self_attn.q_proj": 3 / 4**0.5}
    for name, scaling in scalings.items():
        a, b = (tensors[f"{PREFIX}{name}.lora_{part}.weight"] for part in "AB")
        layer = loaded.loras[name]
        torch.testing.assert_close(layer.lora_b @ layer.lora_a, scaling * b @ a)


# -- pickles (F19) --------------------------------------------------------------------------------


class Payload:
    """Writes a marker when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
def test_only_a_pickle_is_refused_with_the_command_that_converts_it(store, source, tmp_path, name):
    marker = tmp_path / "payload-ran"
    (source / WEIGHTS).unlink()
    (source / name).write_bytes(pickle.dumps(Payload(marker)))
    _assert_refused(store, source, "pickle_refused", f"tink-rl convert {source}")
    assert not marker.exists()


_AUDITED = """
import sys
from tink_rl.adapters.store import AdapterStore
events = []
def hook(event, args):
    if event == "open" or event.startswith("pickle"):
        events.append(f"{event} {args[0]}" if args else event)
sys.addaudithook(hook)
AdapterStore(sys.argv[1]).add(sys.argv[2])
print("\\n".join(events))
"""


def test_pickle_beside_safetensors_is_never_opened(store, source, tmp_path):
    marker = tmp_path / "payload-ran"
    (source / "adapter_model.bin").write_bytes(pickle.dumps(Payload(marker)))
    result = subprocess.run(
        [sys.executable, "-c", _AUDITED, str(store.root), str(source)],
        capture_output=True,
        text=True,
        check=True,
    )
    events = result.stdout.splitlines()
    assert f"open {WEIGHTS}" in events
    assert not [e for e in events if "adapter_model.bin" in e or e.startswith("pickle")]
    assert not marker.exists() and len(store.digests()) == 1
