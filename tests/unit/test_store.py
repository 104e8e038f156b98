"""The adapter store: what is refused (F14-F19), what is kept, and what a full disk does (F27)."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save

from tests.adapters import (
    BASE,
    CONFIG,
    PREFIX,
    SHAPES,
    WEIGHTS,
    config_of,
    tensors_of,
    write_adapter,
)
from tink_rl import errors
from tink_rl.policy import store as store_module
from tink_rl.policy.adapter import from_peft_dir
from tink_rl.policy.peft_dir import POLICY_FILE
from tink_rl.policy.shapes import BaseShapes
from tink_rl.policy.store import AdapterStore, default_store_dir

Q0 = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def store(tmp_path):
    return AdapterStore(tmp_path / "store")


@pytest.fixture
def source(tmp_path):
    return write_adapter(tmp_path / "adapter")


def _names(store):
    return sorted(os.listdir(store.root)) if store.root.is_dir() else []


def _assert_refused(store, source, error, match=None, base=BASE):
    with pytest.raises(errors.TinkError, match=match) as caught:
        store.add(source, base=base)
    assert type(caught.value) is error, caught.value
    assert caught.value.status == 422
    assert store.digests() == []
    assert not [name for name in _names(store) if name.startswith(".tmp")]
    return caught.value


# -- what is stored -------------------------------------------------------------------------------


def test_stored_copy_is_a_plain_directory_with_every_scaling_folded_in(store, source):
    stored = store.add(source, base=BASE)
    assert sorted(os.listdir(stored.path)) == [CONFIG, WEIGHTS]
    config = json.loads((stored.path / CONFIG).read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (4, 4, False)
    assert "rank_pattern" not in config and "alpha_pattern" not in config
    given, kept = tensors_of(), load_file(stored.path / WEIGHTS)
    for name, tensor in given.items():
        scale = 2.0 if "lora_B" in name else 1.0
        torch.testing.assert_close(kept[name], tensor * scale, atol=0, rtol=0)
    assert (stored.rank, stored.dtype, stored.modules) == (4, "F32", tuple(sorted(SHAPES)))
    assert stored.num_bytes == (stored.path / WEIGHTS).stat().st_size
    assert store.open(stored.digest) == stored.path and store.digests() == [stored.digest]


def test_store_is_private(store, source):
    stored = store.add(source)
    assert store.root.stat().st_mode & 0o077 == 0
    assert stored.path.stat().st_mode & 0o077 == 0


def test_store_that_others_can_write_is_refused(store, source):
    store.root.mkdir(mode=0o700)
    store.root.chmod(0o777)
    with pytest.raises(errors.ConfigError, match="chmod 700"):
        store.add(source)


def test_same_weights_have_one_digest_however_they_were_saved(store, tmp_path):
    tensors = tensors_of()
    plain = store.add(write_adapter(tmp_path / "a"))
    folded = {k: v * 2 if "lora_B" in k else v for k, v in tensors.items()}
    other = write_adapter(tmp_path / "b", config=config_of(lora_alpha=4), tensors=folded)
    short = {k.removeprefix(PREFIX): v for k, v in reversed(tensors.items())}
    assert store.add(other).digest == plain.digest
    assert store.add(write_adapter(tmp_path / "c", tensors=short)).digest == plain.digest
    assert store.add(write_adapter(tmp_path / "d", seed=1)).digest != plain.digest
    assert len(store.digests()) == 2


def test_modules_of_lower_rank_are_filled_with_zeros(store, tmp_path):
    tensors = tensors_of()
    for name, tensor in tensors_of(rank=2, shapes={Q0: SHAPES[Q0]}).items():
        tensors[name] = tensor
    config = config_of(rank_pattern={"layers.0.self_attn.q_proj": 2}, alpha_pattern={Q0: 6})
    stored = store.add(write_adapter(tmp_path / "a", config=config, tensors=tensors), base=BASE)
    kept = load_file(stored.path / WEIGHTS)
    a, b = (kept[f"{PREFIX}{Q0}.lora_{part}.weight"] for part in "AB")
    assert a.shape == (4, 16) and b.shape == (24, 4) and not a[2:].any() and not b[:, 2:].any()
    given_a, given_b = (tensors[f"{PREFIX}{Q0}.lora_{part}.weight"] for part in "AB")
    torch.testing.assert_close(b @ a, 3.0 * given_b @ given_a)


def test_half_precision_is_taken_exactly_and_subnormals_become_zero(store, tmp_path):
    tensors = {name: tensor.bfloat16() for name, tensor in tensors_of().items()}
    stored = store.add(
        write_adapter(tmp_path / "a", tensors=tensors, config=config_of(lora_alpha=4))
    )
    kept = load_file(stored.path / WEIGHTS)
    assert stored.dtype == "BF16"
    assert all(torch.equal(kept[name], tensor.float()) for name, tensor in tensors.items())
    flood = {name: torch.full_like(tensor, 1e-40) for name, tensor in tensors_of().items()}
    stored = store.add(write_adapter(tmp_path / "b", tensors=flood))
    assert not any(tensor.any() for tensor in load_file(stored.path / WEIGHTS).values())


def test_source_may_vanish_or_change_afterwards(store, source):
    stored = store.add(source)
    before = {k: v.clone() for k, v in store.read(stored.digest).tensors.items()}
    write_adapter(source, seed=9)
    (source / CONFIG).chmod(0)
    shutil.rmtree(source)
    after = store.read(stored.digest).tensors
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())


def test_source_that_is_written_to_meanwhile_is_refused(store, source, monkeypatch):
    def touch_first(adapter, module):
        os.utime(source / WEIGHTS, ns=(1, 1))
        return padded(adapter, module)

    padded = store_module._padded
    monkeypatch.setattr(store_module, "_padded", touch_first)
    _assert_refused(store, source, errors.AdapterCorrupt, "written to while")


def test_damage_in_the_store_is_found_when_it_is_read(store, source):
    stored = store.add(source)
    with open(stored.path / WEIGHTS, "r+b") as file:
        file.seek(-3, os.SEEK_END)
        byte = file.read(1)
        file.seek(-3, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(errors.StoreDamaged, match="hash"):
        store.read(stored.digest)
    (stored.path / WEIGHTS).unlink()
    with pytest.raises(errors.StoreDamaged, match="register the adapter again"):
        store.read(stored.digest)


@pytest.mark.parametrize("digest", ["0" * 64, "", "..", "../store", "A" * 64, "0" * 63 + "\n"])
def test_what_is_not_stored_is_unknown(store, source, digest):
    store.add(source)
    with pytest.raises(errors.UnknownVersion, match="register it again"):
        store.open(digest)
    store.remove(digest)
    assert len(store.digests()) == 1


def test_gc_keeps_what_is_named_and_what_is_young(store, tmp_path):
    first, second, third = (
        store.add(write_adapter(tmp_path / str(i), seed=i)).digest for i in range(3)
    )
    assert store.gc([first]) == []
    for digest in (first, second, third):
        os.utime(store.root / digest, (1, 1))
    store.add(tmp_path / "1")  # young again: somebody is about to register it
    assert store.gc([first]) == [third]
    assert store.gc([first], min_age_s=-1) == [second]
    store.remove(first)
    assert store.digests() == [] and AdapterStore(tmp_path / "absent").gc([]) == []


def test_default_directory_is_named_by_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("TINK_STORE_DIR", str(tmp_path / "here"))
    assert AdapterStore().root == tmp_path / "here"
    monkeypatch.delenv("TINK_STORE_DIR")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert default_store_dir() == tmp_path / "tink_rl" / "adapters"


def test_importing_store_and_registry_loads_no_torch():
    code = (
        "import sys, tink_rl.policy.store, tink_rl.policy.registry, tink_rl.policy.shapes\n"
        "print('torch' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "False"


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
    _assert_refused(store, source, errors.AdapterCorrupt, "copy it again")


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
    _assert_refused(store, source, errors.AdapterCorrupt, "copy it again")


_MEASURED = """
import sys, torch
from tink_rl.errors import TinkError
from tink_rl.policy.store import AdapterStore
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
        ({"r": 8}, errors.RankMismatch),
        ({"r": 2}, errors.RankMismatch),
        ({"rank_pattern": {"q_proj": 2}}, errors.RankMismatch),
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
    ids=lambda value: json.dumps(value)[:50] if isinstance(value, dict) else value.code,
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


def test_config_of_more_than_64_kib_is_refused(store, tmp_path):
    config = json.dumps(config_of(revision="x" * (64 << 10)))
    _assert_refused(store, write_adapter(tmp_path / "a", config=config), errors.AdapterTooLarge)


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
    patterns = {f"a{i}": 1 for i in range(3000)}
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
        ({}, errors.AdapterIncomplete),
        (_without("lora_B"), errors.AdapterIncomplete),
        (_without("lora_A"), errors.AdapterIncomplete),
        (_renamed("model.layers.0", "wrong.layers.0"), errors.UnknownModules),
        (_renamed("q_proj", "z_proj"), errors.UnknownModules),
        (_renamed("layers.1", "layers.7"), errors.UnknownModules),
        (_renamed("base_model.model.model", "base_model.model"), errors.UnknownModules),
        (_renamed("lora_A.weight", "lora_A.default.weight"), errors.UnsupportedAdapter),
        (_renamed(Q0, "lm_head"), errors.UnsupportedAdapter),
        (_renamed(Q0, "model.embed_tokens"), errors.UnsupportedAdapter),
        (_plus(base_model__model__lm_head__weight=torch.ones(2, 2)), errors.UnsupportedAdapter),
        (_plus(x__lora_B__bias=torch.ones(2)), errors.UnsupportedAdapter),
        (_plus(lora_A__weight=torch.ones(4, 2)), errors.UnsupportedAdapter),
        (
            {**tensors_of(), "x" * 300 + ".lora_A.weight": torch.ones(1, 1)},
            errors.UnsupportedAdapter,
        ),
        ({**tensors_of(), f"{Q0}.lora_A.weight": torch.ones(4, 16)}, errors.AdapterCorrupt),
        (tensors_of(shapes=SMALLER), errors.BaseMismatch),
        (tensors_of(shapes=LARGER), errors.BaseMismatch),
        (_changed(lambda t: t[:, :3].contiguous()), errors.RankMismatch),
        (_changed(lambda t: t.reshape(-1)), errors.ShapeMismatch),
        (_changed(lambda t: t[:0].contiguous()), errors.ShapeMismatch),
        (_changed(lambda t: t.double()), errors.DtypeMismatch),
        (_changed(lambda t: t.to(torch.int8)), errors.DtypeMismatch),
        (_changed(lambda t: t.bool()), errors.DtypeMismatch),
        (_changed(lambda t: t.to(torch.float8_e4m3fn)), errors.DtypeMismatch),
        (_filled(float("nan")), errors.NonFiniteWeights),
        (_filled(float("inf")), errors.NonFiniteWeights),
        (_filled(float("-inf")), errors.NonFiniteWeights),
        (_filled(1e19), errors.WeightOutOfRange),
        (_filled(-1e19), errors.WeightOutOfRange),
        (_filled(9e3), errors.WeightOutOfRange),  # in range by itself, not with its scaling of 2
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
    _assert_refused(store, _says(source, " " * 70_000), errors.AdapterTooLarge)


def test_rank_above_the_servers_slots_is_refused(store, source):
    with pytest.raises(errors.RankExceeded, match="at most 2"):
        store.add(source, max_rank=2)
    assert store.add(source, max_rank=4).rank == 4


def test_small_file_that_grows_huge_by_its_ranks_is_refused(store, tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "MAX_STORED_BYTES", 1000)
    _assert_refused(store, write_adapter(tmp_path / "a"), errors.AdapterTooLarge, "lower rank")


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
    _assert_refused(store, source, errors.PickleRefused, f"tink-rl convert {source}")
    assert not marker.exists()


_AUDITED = """
import sys, torch
from tink_rl.policy.store import AdapterStore
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


# -- many at once, and what a crash leaves --------------------------------------------------------


def test_twenty_threads_that_add_the_same_adapter_make_one_copy(store, source):
    with ThreadPoolExecutor(20) as pool:
        digests = {s.digest for s in pool.map(lambda _: store.add(source), range(20))}
    assert store.digests() == sorted(digests) and len(digests) == 1
    assert not [name for name in _names(store) if name.startswith(".tmp")]


def test_many_processes_add_remove_and_collect_without_breaking_a_copy(store, tmp_path):
    for seed in range(3):
        write_adapter(tmp_path / str(seed), seed=seed)
    code = (
        "import sys\nfrom tink_rl.policy.store import AdapterStore\n"
        "store = AdapterStore(sys.argv[1])\n"
        "for i in range(12):\n"
        "    store.read(store.add(f'{sys.argv[2]}/{i % 3}').digest)\n"
        "    store.clean(); store.gc([])\n"
    )
    command = [sys.executable, "-c", code, str(store.root), str(tmp_path)]
    children = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    for child in children:
        assert child.communicate(timeout=120)[1] == "" and child.returncode == 0
    assert len(store.digests()) == 3
    assert not [name for name in _names(store) if name.startswith(".tmp")]


def test_copies_of_dead_writers_are_cleaned_and_those_under_way_are_not(store, source):
    store.add(source)
    (store.root / ".tmp-dead").mkdir()
    (store.root / ".tmp-dead" / WEIGHTS).write_bytes(b"half")
    with store._temporary() as under_way:
        assert store.clean() == 1
        assert under_way.is_dir()
    (store.root / ".tmp-dead").mkdir()
    AdapterStore(store.root).add(source)  # a new process cleans up before its first copy
    assert not [name for name in _names(store) if name.startswith(".tmp")]


def test_lock_that_a_stuck_process_holds_ends_in_an_error(store, source, monkeypatch):
    import fcntl

    store.add(source)
    monkeypatch.setattr(store_module, "_LOCK_S", 0.05)
    with open(store.root / ".lock") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(errors.DeadlineExceeded, match="fuser"):
            store.add(source)


# -- a disk that is full or read-only (F27) -------------------------------------------------------


@pytest.mark.parametrize("call", ["fsync", "rename"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
def test_failed_write_leaves_the_store_as_it_was(
    store, source, tmp_path, monkeypatch, call, number
):
    kept = store.add(write_adapter(tmp_path / "other", seed=1))

    def fail(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(store_module.os, call, fail)
        with pytest.raises(errors.StorageFull, match="TINK_STORE_DIR") as caught:
            store.add(source)
    assert caught.value.status == 507 and isinstance(caught.value, OSError)
    assert store.digests() == [kept.digest]
    assert not [name for name in _names(store) if name.startswith(".tmp")]
    assert store.read(kept.digest).rank == 4
    assert store.read(store.add(source).digest).rank == 4


@pytest.mark.parametrize("root", ["/proc/self/store", "{file}/store", "/sys/store"])
def test_store_that_cannot_be_made_says_so(source, root):
    store = AdapterStore(root.replace("{file}", str(source / CONFIG)))
    with pytest.raises(errors.StorageFull, match="TINK_STORE_DIR"):
        store.add(source)


_FILLED = """
import os, resource, sys
from pathlib import Path
from tests.adapters import SHAPES, tensors_of, write_adapter
from tink_rl.errors import StorageFull
from tink_rl.policy.store import AdapterStore

root, sources, limit = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
big = {name: (6000, 4000) for name in SHAPES}
def source(seed):
    return write_adapter(sources / str(seed), tensors=tensors_of(seed=seed, shapes=big))
store = AdapterStore(root)
kept = [store.add(source(0)).digest]
paths = [source(seed) for seed in range(1, 2 if limit else 20)]
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
for path in paths:
    try:
        kept.append(store.add(path).digest)
    except StorageFull as error:
        assert error.status == 507
        break
else:
    raise SystemExit("the disk never became full")
assert store.digests() == sorted(kept), "a version is lost or half there"
assert not [n for n in os.listdir(root) if n.startswith(".tmp")], "a copy was left"
assert all(store.read(digest).rank == 4 for digest in kept)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
if not limit:
    assert store.gc(kept[1:], min_age_s=-1) == kept[:1]
assert store.read(store.add(path).digest).rank == 4
print("held", len(kept))
"""


def _tmpfs_allowed(tmp_path):
    command = f"mount -t tmpfs -o size=2m none {tmp_path}"
    return (
        shutil.which("unshare") is not None
        and subprocess.run(["unshare", "-rm", "sh", "-c", command], capture_output=True).returncode
        == 0
    )


def test_full_disk_is_survived_and_space_mends_it(tmp_path):
    """On a real file system of 2 MB where this machine lets us mount one, else by a limit of file size."""
    disk, sources = tmp_path / "disk", tmp_path / "sources"
    disk.mkdir()
    mounted = _tmpfs_allowed(disk)
    arguments = [sys.executable, "-c", _FILLED, str(disk / "s"), str(sources)]
    if mounted:
        script = f'mount -t tmpfs -o size=2m none {disk} && exec "$@"'
        command = ["unshare", "-rm", "sh", "-c", script, "sh", *arguments, "0"]
    else:
        command = [*arguments, "200000"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.split()[1]) >= 1


def test_file_size_limit_is_said_as_a_full_store(tmp_path):
    sources = tmp_path / "sources"
    command = [sys.executable, "-c", _FILLED, str(tmp_path / "s"), str(sources), "200000"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


# -- the property: what PEFT computes is W + B·A of what is stored --------------------------------


class _Base(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.config = {"model_type": "custom"}
        self.prepare_inputs_for_generation = None  # PEFT looks for it in a causal model
        self.q_proj = torch.nn.Linear(6, 10, bias=False)
        self.layers = torch.nn.ModuleList(
            torch.nn.ModuleDict({"up": torch.nn.Linear(10, 6), "q_proj": torch.nn.Linear(6, 10)})
            for _ in range(2)
        )


RANKS = st.integers(1, 5)
ALPHAS = st.one_of(st.integers(1, 64), st.floats(0.25, 64))
KEYS = st.sampled_from(
    ["q_proj", "up", "layers.1.up", "layers.0.q_proj", "^q_proj", r"layers\.1.*"]
)
# PEFT sorts the keys when it saves, so that overlapping ranks are read back wrongly by itself.
APART = st.sampled_from(["layers.1.up", "layers.0.q_proj", "^q_proj"])


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    rank=RANKS,
    alpha=ALPHAS,
    rslora=st.booleans(),
    ranks=st.dictionaries(APART, RANKS, max_size=3),
    alphas=st.dictionaries(KEYS, ALPHAS, max_size=3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 99),
)
def test_what_peft_computes_is_base_plus_b_times_a_of_what_is_stored(
    tmp_path_factory, rank, alpha, rslora, ranks, alphas, dtype, seed
):
    from peft import LoraConfig, PeftModel, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        use_rslora=rslora,
        rank_pattern=ranks,
        alpha_pattern=alphas,
        target_modules=["q_proj", "up"],
    )
    model = get_peft_model(_Base(), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter).to(dtype)
    folder = tmp_path_factory.mktemp("peft")
    model.save_pretrained(folder / "adapter")
    stored = AdapterStore(folder / "store").add(folder / "adapter")
    adapter = from_peft_dir(stored.path)
    again = PeftModel.from_pretrained(_Base(), stored.path)
    saved = PeftModel.from_pretrained(_Base(), folder / "adapter")
    layers, reloaded = dict(saved.named_modules()), dict(again.named_modules())
    assert len(stored.modules) == 5
    for module in stored.modules:
        layer = layers[f"base_model.model.{module}"]
        a, b = (p["default"].weight.float() for p in (layer.lora_A, layer.lora_B))
        expected = (b @ a) * layer.scaling["default"]
        kept_a, kept_b = (adapter.tensors[f"{module}.lora_{part}.weight"] for part in "AB")
        torch.testing.assert_close(kept_b @ kept_a, expected, rtol=1e-5, atol=1e-4)
        delta = reloaded[f"base_model.model.{module}"].get_delta_weight("default")
        torch.testing.assert_close(delta, kept_b @ kept_a, rtol=1e-6, atol=1e-5)
    shutil.rmtree(folder)
