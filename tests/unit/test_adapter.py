"""The adapter as data: normalisation, files, refusals."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests.refusals import refused
from tink_rl import errors
from tink_rl.policy.adapter import AdapterCollector, check_values, from_peft_dir
from tink_rl.policy.support import unsupported_reasons

VARIANTS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"layers.1.mlp.up_proj": 32}},
}


@pytest.fixture(scope="module")
def base_dir(model_dir):
    return model_dir("qwen3")


def _peft(base_dir, **settings):
    base = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(**{"r": 8, "target_modules": "all-linear", **settings}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1)
    return model


@pytest.mark.parametrize("variant", VARIANTS)
def test_base_plus_b_times_a_equals_pefts_merged_weights(base_dir, variant):
    model = _peft(base_dir, **VARIANTS[variant])
    adapter = AdapterCollector(model).collect()
    weights = {k: v.clone() for k, v in model.get_base_model().state_dict().items()}
    merged = model.merge_and_unload().state_dict()
    for module in adapter.modules:
        a, b = (adapter.tensors[f"{module}.lora_{part}.weight"] for part in "AB")
        expected = weights[f"{module}.base_layer.weight"] + b @ a
        torch.testing.assert_close(merged[f"{module}.weight"], expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_directory_and_live_model_give_the_same_adapter(base_dir, variant, tmp_path):
    model = _peft(base_dir, **VARIANTS[variant])
    model.save_pretrained(tmp_path)
    live, saved = AdapterCollector(model).collect(), from_peft_dir(tmp_path)
    assert (live.rank, set(live.tensors)) == (saved.rank, set(saved.tensors))
    for name, tensor in live.tensors.items():
        torch.testing.assert_close(saved.tensors[name], tensor, atol=0, rtol=1e-6)


def test_swapped_weights_come_back_bit_exactly_even_after_an_exception(base_dir):
    model = _peft(base_dir)
    collector = AdapterCollector(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    synthetic = collector.random_like(1)
    with pytest.raises(KeyError), collector.swapped(synthetic):
        for name, tensor in collector.collect().tensors.items():
            torch.testing.assert_close(tensor, synthetic.tensors[name])
        raise KeyError
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True},
        {"bias": "all"},
        {"lora_bias": True},
        {"modules_to_save": ["lm_head"]},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "corda"},
        {"init_lora_weights": "loftq"},
        {"trainable_token_indices": [1]},
        {"layer_replication": [[0, 2]]},
        {"fan_in_fan_out": True},
        {"target_parameters": ["x"]},
        {"alora_invocation_tokens": [1]},
        {"use_qalora": True},
        {"a_field_of_a_newer_peft": True},
        {"peft_type": "LOHA"},
    ],
)
def test_what_cannot_be_expressed_is_refused_with_a_remedy(settings):
    reasons = unsupported_reasons({**LoraConfig(r=8).to_dict(), **settings})
    assert len(reasons) == 1 and len(reasons[0]) > 20


def test_every_field_of_pefts_config_is_accounted_for():
    assert unsupported_reasons(LoraConfig(r=8, lora_dropout=0.1, use_rslora=True).to_dict()) == []
    for field in dataclasses.fields(LoraConfig):
        reasons = unsupported_reasons({field.name: "set"})
        assert not reasons or "not known to this release" not in reasons[0], field.name


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_embedding_and_head_adapters_are_refused(base_dir, target):
    base = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=[target, "q_proj"]))
    with pytest.raises(errors.UnsupportedAdapter, match="target_modules"):
        AdapterCollector(model)


def test_merged_adapter_and_plain_model_are_refused(base_dir):
    model = _peft(base_dir)
    with pytest.raises(errors.UnsupportedAdapter, match="peft_config"):
        AdapterCollector(model.get_base_model())
    collector = AdapterCollector(model)
    model.merge_adapter()
    with pytest.raises(errors.UnsupportedAdapter, match="unmerge"):
        collector.collect()


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (float("nan"), errors.NonFiniteWeights),
        (float("-inf"), errors.NonFiniteWeights),
        (1e19, "weight_out_of_range"),
        (-1e5, "weight_out_of_range"),
    ],
)
def test_bad_values_are_refused_by_name(value, error):
    tensors = {"fine": torch.ones(3, 3), "bad": torch.ones(3, 3)}
    check_values(tensors)
    tensors["bad"][1, 2] = value
    with refused(error, match="'bad'"):
        check_values(tensors)


def _saved(base_dir, tmp_path):
    _peft(base_dir).save_pretrained(tmp_path)
    return tmp_path


def test_damaged_directories_are_refused(base_dir, tmp_path):
    directory = _saved(base_dir, tmp_path)
    weights = directory / "adapter_model.safetensors"
    data = weights.read_bytes()
    for size in (0, 7, 100, len(data) // 2, len(data) - 1):
        weights.write_bytes(data[:size])
        with pytest.raises(errors.AdapterFilesInvalid, match="copy it again"):
            from_peft_dir(directory)
    weights.unlink()
    (directory / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(errors.AdapterFilesInvalid, match="never opened"):
        from_peft_dir(directory)


@pytest.mark.parametrize(
    "changes", [{"r": 16}, {"r": 0}, {"r": "8"}, {"lora_alpha": float("nan")}, {"lora_alpha": 0}]
)
def test_config_that_does_not_fit_its_tensors_is_refused(base_dir, tmp_path, changes):
    directory = _saved(base_dir, tmp_path)
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(errors.AdapterFilesInvalid):
        from_peft_dir(directory)


def test_wrapper_of_torch_compile_is_no_part_of_a_modules_name(model_dir):
    base = AutoModelForCausalLM.from_pretrained(model_dir("qwen3"))
    base.model.layers[0].mlp = torch.compile(base.model.layers[0].mlp, backend="eager")
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["up_proj"]))
    for live in (model, torch.compile(model, backend="eager")):
        found = AdapterCollector(live).collect()
        assert found.modules == [f"model.layers.{i}.mlp.up_proj" for i in (0, 1)]
