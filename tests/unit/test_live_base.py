"""A trainer's base beside the checkpoint: every planted change is named, no honest run is refused."""

from __future__ import annotations

import json
import logging
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from tests.tiny_models import make_model
from tink_rl import errors
from tink_rl.policy import live_base, live_settings
from tink_rl.policy.fingerprint import checkpoint_index
from tink_rl.policy.live_check import changed_weights, check_frozen, check_live_base

NORM, UP = "model.layers.1.input_layernorm.weight", "model.layers.1.mlp.up_proj.weight"
EMBEDDING, EXPERTS = "model.embed_tokens.weight", "model.layers.1.mlp.experts.gate_up_proj"
FOUR_BIT = {
    "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "fp4, twice": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True),
    "8 bit": BitsAndBytesConfig(load_in_8bit=True),
}


def load(directory, **settings):
    return AutoModelForCausalLM.from_pretrained(directory, **{"dtype": torch.float32, **settings})


def adapted(base, **lora):
    return get_peft_model(base, LoraConfig(**{"r": 4, "target_modules": "all-linear", **lora}))


def check(model, directory, **given):
    check_live_base(model, str(directory), **given)


def refused(model, directory, **given):
    """The error, which must name a way out."""
    with pytest.raises(errors.BaseMismatch) as caught:
        check(model, directory, **given)
    assert "NEW_DIR" in caught.value.message or "tokenizer" in caught.value.message
    return caught.value


@torch.no_grad()
def plant(base, name, change):
    change(dict(live_base.base_tensors(base))[name])


# -- planted changes --------------------------------------------------------------------------------

PLANTED = {
    "a thousandth of one tensor": ("qwen3", UP, lambda w: w.mul_(1.001), UP),
    "one element": ("qwen3", UP, lambda w: w[3, 4].mul_(1.001), UP),
    "one norm": ("qwen3", NORM, lambda w: w.mul_(1.001), NORM),
    "one row of the embedding": ("qwen3", EMBEDDING, lambda w: w[17].normal_(), EMBEDDING),
    "one row of a tied embedding": ("qwen2", EMBEDDING, lambda w: w[17].mul_(1.01), EMBEDDING),
    "a bias": ("qwen2", "model.layers.0.self_attn.k_proj.bias", lambda b: b[0].add_(1), None),
    "a NaN": ("qwen3", UP, lambda w: w[0, 0].fill_(torch.nan), UP),
    "one expert": (
        "qwen3_moe",
        EXPERTS,
        lambda w: w[3, 70].mul_(1.001),
        "model.layers.1.mlp.experts.3.up_proj.weight",
    ),
    "the router": ("qwen3_moe", "model.layers.0.mlp.gate.weight", lambda w: w[0, 0].add_(1), None),
}


@pytest.mark.parametrize("adapt_first", [False, True], ids=["before the LoRA", "under the LoRA"])
@pytest.mark.parametrize("case", PLANTED)
def test_planted_change_is_refused_by_name(model_dir, case, adapt_first):
    shape, name, change, stored = PLANTED[case]
    base = load(model_dir(shape))
    if not adapt_first:
        plant(base, name, change)
    model = adapted(base)
    if adapt_first:
        plant(model.get_base_model(), name, change)
    error = refused(model, model_dir(shape))
    assert error.details["tensor"] == (stored or name)
    assert error.details["num_tensors"] == 1 and error.details["max_abs"] > 0
    assert "differs by up to" in error.message


def test_how_far_off_is_said_with_element_row_and_number_of_tensors(model_dir):
    base = load(model_dir("qwen3"))
    plant(base, EMBEDDING, lambda w: w[17, 3:5].add_(0.5))
    plant(base, NORM, lambda w: w.add_(1))
    message = refused(adapted(base), model_dir("qwen3")).message
    assert "up to 0.5 in 2 of 8192 elements, first in row 17 (and 1 more tensors)" in message


def test_weights_of_another_directory_under_the_same_name_are_refused(model_dir, tmp_path):
    other = make_model("qwen3", tmp_path / "other", seed=7)
    base = load(model_dir("qwen3"))
    base.load_state_dict(load(other).state_dict())
    assert base.name_or_path == str(model_dir("qwen3"))
    assert refused(adapted(base), model_dir("qwen3")).details["num_tensors"] > 10


@pytest.mark.parametrize("way", ["merge_and_unload", "merge_adapter"])
def test_tuned_adapter_that_was_merged_in_memory_is_refused(model_dir, way):
    tuned = adapted(load(model_dir("qwen3")), target_modules=["q_proj"], init_lora_weights=False)
    merged = getattr(tuned, way)()
    model = tuned if merged is None else adapted(merged)
    error = refused(model, model_dir("qwen3"))
    assert error.details["tensors"] == [
        f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)
    ]


def test_resized_vocabulary_is_refused_with_both_numbers_of_rows(model_dir):
    base = load(model_dir("qwen3"))
    base.resize_token_embeddings(68)
    error = refused(adapted(base), model_dir("qwen3"))
    assert error.details["tensor"] == EMBEDDING
    assert "68 rows, in the checkpoint 64" in error.message


CUT = {
    "a layer": lambda m: setattr(m.model, "layers", m.model.layers[:1]),
    "a norm": lambda m: setattr(m.model.layers[0].self_attn, "q_norm", torch.nn.Identity()),
    "a bias that the checkpoint has not": lambda m: setattr(
        m.model.layers[0].self_attn.q_proj, "bias", torch.nn.Parameter(torch.zeros(128))
    ),
}


@pytest.mark.parametrize("case", CUT)
def test_tensor_that_only_one_side_has_is_refused(model_dir, case):
    base = load(model_dir("qwen3"))
    CUT[case](base)
    assert "only" in refused(adapted(base), model_dir("qwen3")).message


def test_head_that_was_untied_in_memory_is_refused(model_dir):
    base = load(model_dir("qwen2"))
    base.lm_head.weight = torch.nn.Parameter(base.lm_head.weight.detach() * 1.01)
    error = refused(adapted(base), model_dir("qwen2"))
    assert error.details["tensor"] == "lm_head.weight"


def test_trained_base_beside_an_adapter_that_travels_alone_is_refused(model_dir):
    model = adapted(load(model_dir("qwen3")))
    check_frozen(model)
    model.get_base_model().get_parameter(NORM).requires_grad_(True)
    with pytest.raises(errors.UnsupportedAdapter, match=f"1 tensors .* {NORM}.*modules_to_save"):
        check_frozen(model)


# -- settings ---------------------------------------------------------------------------------------

SETTINGS = {
    "config.rms_norm_eps": lambda m: setattr(m.config, "rms_norm_eps", 1e-3),
    "model.norm.variance_epsilon": lambda m: setattr(m.model.norm, "variance_epsilon", 1e-3),
    "model.layers.0.self_attn.scaling": lambda m: setattr(
        m.model.layers[0].self_attn, "scaling", 1.0
    ),
    "model.rotary_emb.inv_freq": lambda m: m.model.rotary_emb.inv_freq.mul_(0.5),
    "config.rope_parameters.rope_theta": lambda m: m.config.rope_parameters.update(rope_theta=5e5),
    "config.hidden_act": lambda m: setattr(m.config, "hidden_act", "gelu"),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_setting_that_was_changed_in_memory_is_refused_by_name(model_dir, setting):
    model = adapted(load(model_dir("qwen3")))
    SETTINGS[setting](model.get_base_model())
    assert refused(model, model_dir("qwen3")).details["setting"] == setting


@pytest.mark.parametrize(
    "changed",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
        {"rms_norm_eps": 1e-5},
    ],
)
def test_setting_that_was_given_when_loading_is_refused(model_dir, changed):
    model = adapted(load(model_dir("qwen3"), **changed))
    assert next(iter(changed)) in refused(model, model_dir("qwen3")).details["setting"]


def test_table_that_only_the_config_says_is_compared_also_outside_of_rope(model_dir):
    model = adapted(load(model_dir("gemma3")))
    check(model, model_dir("gemma3"))
    model.get_base_model().model.embed_tokens.embed_scale.mul_(1.5)
    setting = refused(model, model_dir("gemma3")).details["setting"]
    assert setting == "model.embed_tokens.embed_scale"


def test_model_that_cannot_be_built_again_is_said(model_dir, monkeypatch, caplog):
    model = adapted(load(model_dir("qwen3")))

    def broken(*_, **__):
        raise KeyError("remote code")

    monkeypatch.setattr(type(model.get_base_model()), "__init__", broken)
    check(model, model_dir("qwen3"))
    assert "cannot be built again from its config ('remote code')" in caplog.text


def test_dropout_is_no_setting_of_the_served_model():
    assert not list(live_settings._of_numbers("d", torch.nn.Dropout(0.0), torch.nn.Dropout(0.1)))


def test_head_beside_a_tied_embedding_in_the_file_is_not_read(model_dir, tmp_path):
    directory = shutil.copytree(model_dir("qwen2"), tmp_path / "copy")
    tensors = load_file(directory / "model.safetensors")
    tensors["lm_head.weight"] = torch.zeros(64, 128)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    check(adapted(load(directory)), directory)


# -- tokens -----------------------------------------------------------------------------------------


def tokenizer_of(directory):
    return AutoTokenizer.from_pretrained(directory)


def test_token_for_which_the_base_has_no_row_is_refused(model_dir):
    model, tokenizer = adapted(load(model_dir("qwen3"))), tokenizer_of(model_dir("qwen3"))
    check(model, model_dir("qwen3"), tokenizer=tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>"]})
    error = refused(model, model_dir("qwen3"), tokenizer=tokenizer)
    assert "'<think>' as id 64" in error.message and "64 rows" in error.message


def test_tokenizer_of_another_model_is_refused(model_dir, tmp_path):
    data = json.loads((model_dir("qwen3") / "tokenizer.json").read_text())
    vocabulary = data["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    for file in model_dir("qwen3").glob("*token*"):
        shutil.copy(file, tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    error = refused(
        adapted(load(model_dir("qwen3"))), model_dir("qwen3"), tokenizer=tokenizer_of(tmp_path)
    )
    assert "2 of 64 tokens have another id" in error.message


def test_added_token_in_a_padded_row_is_told_and_not_refused(tmp_path, caplog):
    padded = make_model("qwen3", tmp_path / "padded", vocab_size=80)
    tokenizer = tokenizer_of(padded)
    tokenizer.add_tokens(["<think>"])
    check(adapted(load(padded)), padded, tokenizer=tokenizer)
    assert "1 tokens that the served checkpoint's has not, first '<think>' (id 64)" in caplog.text


def test_checkpoint_without_a_tokenizer_is_said(model_dir, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="tink_rl")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(model_dir("qwen3") / name, tmp_path)
    model = adapted(load(tmp_path))
    check(model, tmp_path, tokenizer=tokenizer_of(model_dir("qwen3")))
    assert "no tokenizer lies in" in caplog.text


# -- honest runs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", ["qwen3", "qwen2", "llama", "gemma3", "qwen3_moe"])
def test_honest_base_passes_in_every_dtype(model_dir, caplog, shape, dtype):
    model = adapted(load(model_dir(shape), dtype=dtype))
    before = torch.random.get_rng_state()
    check(model, model_dir(shape), tokenizer=tokenizer_of(model_dir(shape)))
    assert torch.equal(before, torch.random.get_rng_state())  # the run samples as before
    assert not caplog.records


HONEST = {
    "eager attention": lambda d: adapted(load(d, attn_implementation="eager")),
    "gradient checkpointing": lambda d: _checkpointing(adapted(load(d))),
    "compiled": lambda d: _compiled(adapted(load(d))),
    "compiled layers": lambda d: _compiled_layers(adapted(load(d))),
    "moved to bfloat16 later": lambda d: adapted(load(d)).to(torch.bfloat16),
    "trained norms": lambda d: adapted(load(d), modules_to_save=["norm"]),
    "token rows": lambda d: adapted(load(d), trainable_token_indices=[3, 5]),
    "LoRA on the embedding": lambda d: adapted(load(d), target_modules=["embed_tokens", "q_proj"]),
    "DoRA": lambda d: adapted(load(d), use_dora=True),
    "EVA's kin": lambda d: adapted(load(d), init_lora_weights="gaussian"),
    "dropout while training": lambda d: adapted(load(d, attention_dropout=0.1)).train(),
    "a pad token": lambda d: _with(adapted(load(d)), "pad_token_id", 2),
    "a note in the config": lambda d: _with(adapted(load(d)), "my_note", "run 3"),
    "no cache": lambda d: _with(adapted(load(d)), "use_cache", False),
    "kept frozen": lambda d: adapted(load(d)).eval(),
}


def _checkpointing(model):
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    return model.train()


def _compiled(model):
    model.base_model.model = torch.compile(model.base_model.model, backend="eager")
    return model


def _compiled_layers(model):
    layers = model.get_base_model().model.layers
    for i, layer in enumerate(layers):
        layers[i] = torch.compile(layer, backend="eager")
    return model


def _with(model, key, value):
    setattr(model.config, key, value)
    return model


@pytest.mark.parametrize("case", HONEST)
def test_honest_model_passes(model_dir, case, caplog):
    check(HONEST[case](model_dir("qwen3")), model_dir("qwen3"))
    assert "cannot be built again" not in caplog.text


def test_tuned_adapter_that_is_trained_on_passes_and_so_does_a_second_one(model_dir, tmp_path):
    adapted(load(model_dir("qwen3")), init_lora_weights=False).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(load(model_dir("qwen3")), tmp_path, is_trainable=True)
    model.load_adapter(tmp_path, adapter_name="ref")
    check(model, model_dir("qwen3"))


def test_trained_tensors_of_the_base_may_differ_as_a_resumed_run_s_do(model_dir):
    model = adapted(load(model_dir("qwen2")), bias="all")
    plant(model.get_base_model(), "model.layers.0.self_attn.k_proj.bias", lambda b: b.add_(1))
    check(model, model_dir("qwen2"))


def test_copies_of_other_layouts_pass(model_dir, tmp_path):
    load(model_dir("qwen3")).save_pretrained(tmp_path / "shards", max_shard_size="200kB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    check(adapted(load(tmp_path / "shards")), tmp_path / "shards")


def test_values_that_were_rounded_on_the_way_are_told_and_not_refused(model_dir, caplog):
    model = adapted(load(model_dir("qwen3"), dtype=torch.bfloat16)).to(torch.float32)
    check(model, model_dir("qwen3"))
    assert "rounded to bfloat16" in caplog.text


@pytest.mark.parametrize("kind", FOUR_BIT)
def test_quantised_base_is_compared_by_quantising_the_checkpoint_alike(model_dir, kind, caplog):
    model = adapted(load(model_dir("qwen3"), quantization_config=FOUR_BIT[kind]))
    check(model, model_dir("qwen3"))
    assert "could not be compared" not in caplog.text
    weight = model.get_base_model().model.layers[1].mlp.up_proj.base_layer.weight
    weight.data.view(torch.uint8).view(-1)[100] ^= 3
    assert refused(model, model_dir("qwen3")).details["tensor"] == UP


def test_what_cannot_be_compared_is_said_in_one_line(model_dir, caplog):
    model = adapted(load(model_dir("qwen3"), quantization_config=FOUR_BIT["8 bit"]))
    for layer in model.get_base_model().model.layers:
        layer.mlp.up_proj.base_layer.weight.SCB = None
    check(model, model_dir("qwen3"))
    assert "2 tensors of the trainer's base could not be compared" in caplog.text


# -- on purpose -------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_initialisation_that_changes_the_base_is_allowed_its_modules_and_no_others(model_dir, init):
    model = adapted(load(model_dir("qwen3")), init_lora_weights=init, target_modules=["q_proj"])
    assert changed_weights(model) == {f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)}
    check(model, model_dir("qwen3"))
    plant(model.get_base_model(), NORM, lambda w: w.mul_(1.001))
    assert refused(model, model_dir("qwen3")).details["tensor"] == NORM


def test_ordinary_initialisation_allows_nothing(model_dir):
    model = adapted(load(model_dir("qwen3")))
    assert changed_weights(model) == set()


def test_text_model_of_a_checkpoint_with_towers_passes_and_a_missing_layer_does_not(model_dir):
    index = dict(checkpoint_index(model_dir("qwen3")))
    some = index[NORM]
    index["model.visual.blocks.0.norm.weight"] = some
    base = load(model_dir("qwen3"))
    live_base.compare_base(
        base.eval().requires_grad_(False), index, where="d", saved_as=("Qwen3VL",)
    )
    with pytest.raises(errors.BaseMismatch, match=r"visual.*in the checkpoint only"):
        live_base.compare_base(base, index, where="d", saved_as=("Qwen3ForCausalLM",))
    index["model.layers.2.norm.weight"] = some
    with pytest.raises(errors.BaseMismatch, match=r"layers\.2.*in the checkpoint only"):
        live_base.compare_base(base, index, where="d", saved_as=("Qwen3VL",))


# -- cost -------------------------------------------------------------------------------------------


class _Allocations(TorchDispatchMode):
    """The largest tensor that was made while it was on."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        inputs = {a.untyped_storage()._cdata for a in args if isinstance(a, torch.Tensor)}
        for tensor in found if isinstance(found, (tuple, list)) else [found]:
            is_real = isinstance(tensor, torch.Tensor) and not tensor.is_meta
            if is_real and tensor.untyped_storage()._cdata not in inputs:
                self.largest = max(self.largest, tensor.numel())
        return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_comparison_makes_nothing_larger_than_a_chunk(model_dir, monkeypatch, dtype):
    monkeypatch.setattr(live_base, "_CHUNK", 500)
    model = adapted(load(model_dir("qwen3_moe"), dtype=dtype))
    index = checkpoint_index(model_dir("qwen3_moe"))
    with _Allocations() as made:
        live_base.compare_base(model.get_base_model(), index, where="d", saved_as=())
    assert made.largest <= 500


def test_long_comparison_says_how_far_it_is(model_dir, monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="tink_rl")
    monkeypatch.setattr(live_base, "_SAY_EVERY_S", -1.0)
    check(adapted(load(model_dir("qwen3"))), model_dir("qwen3"))
    assert "comparing the trainer's base with the checkpoint: 0.0 of 0.0 GB" in caplog.text
