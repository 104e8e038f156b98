"""The adapter store: what is kept, under which digest, and that PEFT computes the same from it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

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
from tests.refusals import refused
from tink_rl import errors
from tink_rl.adapters import normalised
from tink_rl.adapters.store import AdapterStore, default_store_dir
from tink_rl.policy.adapter import from_peft_dir

Q0 = "model.layers.0.self_attn.q_proj"


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

    padded = normalised._padded
    monkeypatch.setattr(normalised, "_padded", touch_first)
    with refused("adapter_corrupt", match="written to while"):
        store.add(source)
    assert store.digests() == []


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
        "import sys, tink_rl.adapters.store, tink_rl.adapters.registry, tink_rl.policy.shapes\n"
        "print('torch' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "False"


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
