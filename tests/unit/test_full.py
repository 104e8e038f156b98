"""Whole tensors: out of models, adapters and streams, and the groups that must travel together."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tink_rl import errors
from tink_rl.policy.adapter import AdapterCollector
from tink_rl.policy.fingerprint import CheckpointTensor, checkpoint_index
from tink_rl.policy.full import full_source
from tink_rl.policy.packet import TensorSpec, specs_from_plan
from tink_rl.server.layout import Layout, _connected


def load(directory):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def groups_of(directory):
    """As the server says them: q, k, v together, gate and up together, others alone."""
    fused = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gu", "up_proj": "gu"}
    groups: dict[str, list[str]] = {}
    for name in checkpoint_index(directory):
        module, _, last = name.rpartition(".")[0].rpartition(".")
        groups.setdefault(f"{module}.{fused.get(last, last)}", []).append(name)
    return list(groups.values())


def peft_twin(directory, **lora):
    torch.manual_seed(0)
    settings = {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": False, **lora}
    return get_peft_model(load(directory), LoraConfig(**settings))


@pytest.mark.parametrize("shape", ["qwen3", "qwen2", "gemma3"])
def test_model_gives_every_tensor_of_its_checkpoint_once(model_dir, shape):
    directory = model_dir(shape)
    found = dict(full_source(load(directory), groups_of(directory)).pairs())
    assert set(found) == set(checkpoint_index(directory))  # a tied head is not sent twice


def test_plan_and_tensors_are_one(model_dir):
    directory = model_dir("qwen3")
    source = full_source(load(directory), groups_of(directory))
    plan = source.plan("float32")
    assert [(item["name"], tuple(item["shape"])) for item in plan] == [
        (name, tuple(tensor.shape)) for name, tensor in source.pairs()
    ]
    assert full_source(iter([]), []).plan("float32") is None


def test_model_that_is_not_the_served_one_is_refused(model_dir):
    directory = model_dir("qwen3")
    groups = groups_of(directory)
    with pytest.raises(errors.UnknownModules, match="is this the model"):
        full_source(load(directory).model, groups)
    with pytest.raises(errors.UnknownModules, match="lacks 1"):
        full_source(load(directory), [*groups, ["model.extra.weight"]])
    with pytest.raises(errors.UnsupportedAdapter, match="expected a model"):
        full_source(3, groups)


@pytest.mark.parametrize("wrap", [dict, iter], ids=["mapping", "stream"])
def test_tied_head_of_an_exporter_is_left_out_if_it_is_the_embedding(model_dir, wrap):
    directory = model_dir("qwen2")
    groups = groups_of(directory)
    tensors = dict(load(directory).named_parameters())
    embedding = tensors["model.embed_tokens.weight"]
    for pairs in ([*tensors.items(), ("lm_head.weight", embedding)],):
        found = dict(full_source(wrap(pairs), groups).pairs())
        assert list(found) == list(tensors)
    for order in (1, -1):
        pairs = [*tensors.items(), ("lm_head.weight", embedding + 1)][::order]
        with pytest.raises(errors.UnsupportedAdapter, match="ensure_weight_tying"):
            dict(full_source(wrap(pairs), groups).pairs())
    untied = groups_of(model_dir("qwen3"))
    assert dict(full_source(iter([("lm_head.weight", embedding)]), untied).pairs())


@pytest.mark.parametrize("kind", ["peft", "adapter"])
def test_adapter_gives_whole_groups_of_what_it_changes_and_touches_nothing(model_dir, kind):
    directory = model_dir("qwen3")
    model = peft_twin(directory, use_rslora=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    given = model if kind == "peft" else AdapterCollector(model).collect()
    found = dict(full_source(given, groups_of(directory), checkpoint_index(directory)).pairs())
    assert {name.split(".")[-2] for name in found} == {"q_proj", "k_proj", "v_proj"}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    merged = model.merge_and_unload().state_dict()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, merged[name], rtol=0, atol=1e-6)
    assert not torch.equal(
        found["model.layers.0.self_attn.q_proj.weight"],
        before["base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"],
    )


def test_merge_happens_in_fp32_whatever_the_models_dtype(model_dir):
    directory = model_dir("qwen3")
    model = peft_twin(directory).to(torch.bfloat16)
    name = "model.layers.0.self_attn.q_proj"
    layer = model.get_submodule(f"base_model.model.{name}")
    found = dict(full_source(model, groups_of(directory)).pairs())[f"{name}.weight"]
    a, b = layer.lora_A["default"].weight.float(), layer.lora_B["default"].weight.float()
    exact = layer.base_layer.weight.float() + layer.scaling["default"] * b @ a
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-6)


def test_model_that_is_merged_in_place_is_refused(model_dir):
    directory = model_dir("qwen3")
    model = peft_twin(directory)
    model.merge_adapter()
    with pytest.raises(errors.UnsupportedAdapter, match="unmerge_adapter"):
        full_source(model, groups_of(directory))


def layout():
    touched = {
        "q": {"m.qkv.base_layer"},
        "k": {"m.qkv.base_layer"},
        "n": {"m.norm"},
        "unused": set(),
    }
    index = {
        name: CheckpointTensor(name=name, file=None, dtype="F32", shape=(4, 2), begin=0, end=32)
        for name in touched
    }
    return Layout(index, _connected(touched))


def test_tensors_that_share_a_module_are_one_group():
    found = layout()
    assert found.describe() == [["k", "q"], ["n"]]
    assert found.by_module["m.qkv"].names == {"q", "k"}
    chained = {g.key: g.names for g in _connected({"a": {"x", "y"}, "b": {"y", "z"}, "c": {"w"}})}
    assert sorted(map(sorted, chained.values())) == [["a", "b"], ["c"]]
    with pytest.raises(errors.ConfigError, match="no weight loader"):
        list(_connected({"a": set()}))


def test_layout_refuses_what_is_not_the_checkpoint():
    def spec(name, shape=(4, 2)):
        return TensorSpec(name=name, shape=shape, dtype="float32", offset=0)

    found = layout()
    found.check([spec("q"), spec("unused")])
    with pytest.raises(errors.UnknownModules, match="first 'x'"):
        found.check([spec("q"), spec("x")])
    with pytest.raises(errors.ShapeMismatch, match=r"\[2, 4\]"):
        found.check([spec("q", (2, 4))])
    found.check_whole(["n", "q", "k"])
    with pytest.raises(errors.IncompleteGroup, match="without \\['k'\\]"):
        found.check_whole(["q", "n"])


@pytest.mark.parametrize(
    "plan",
    [
        [{"name": "a", "shape": [2]}],
        [{"name": "a", "shape": [2], "dtype": "int8"}],
        [{"name": "a", "shape": [2], "dtype": "float32"}] * 2,
        3,
    ],
)
def test_malformed_plan_is_refused(plan):
    with pytest.raises(errors.BadRequest):
        specs_from_plan(plan)
