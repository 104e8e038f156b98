"""Export: the adapter's own bytes, a fold that is exact, a card that says what it is."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.policies import PeftTwin
from tests.refusals import refused
from tests.tiny_models import make_model, make_tokenizer
from tink_rl import errors
from tink_rl.cli import main
from tink_rl.policy.adapter import from_peft_dir
from tink_rl.tools.export import export, find_adapter

IDS = torch.tensor([[5, 6, 7, 8, 9]])


@pytest.fixture(scope="module")
def run_dir(model_dir, tmp_path_factory):
    """What a run leaves: adapter, version, log, summary."""
    twin = PeftTwin(model_dir("qwen3"))
    twin.randomise(3)
    directory = tmp_path_factory.mktemp("run")
    twin.model.save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    policy = {"policy": "math", "version": 7, "digest": "9f" * 32, "mode": "merged"}
    (directory / "tink_policy.json").write_text(json.dumps(policy))
    rows = [{"step": i, "reward": i / 10} for i in range(1, 11)]
    (directory / "trainer_state.json").write_text(json.dumps({"log_history": rows}))
    summary = {"heldout_before": 0.25, "heldout_after": 0.75}
    (directory / "summary.json").write_text(json.dumps(summary))
    return directory


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def reference(model_dir, run_dir):
    base = AutoModelForCausalLM.from_pretrained(model_dir("qwen3"), dtype=torch.float32)
    return PeftModel.from_pretrained(base, run_dir)


def test_fold_into_another_base_than_the_run_trained_on_is_refused(model_dir, run_dir, tmp_path):
    run = shutil.copytree(run_dir, tmp_path / "run")
    policy = {"policy": "math", "version": 7, "base_fingerprint": "e" * 64}
    (run / "tink_policy.json").write_text(json.dumps(policy))
    with pytest.raises(errors.BaseMismatch, match="trained on base eeeeeeeeeeee"):
        export(run, tmp_path / "out", merged=True, base=str(model_dir("qwen3")))
    assert not (tmp_path / "out").exists()


def test_adapter_keeps_its_bytes_and_peft_computes_the_same(model_dir, run_dir, tmp_path):
    export(run_dir, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {"README.md", "adapter_config.json", "tokenizer.json", "tink_policy.json"}
    assert "trainer_state.json" not in names
    file = "adapter_model.safetensors"
    assert (tmp_path / "out" / file).read_bytes() == (run_dir / file).read_bytes()
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(logits(loaded), logits(reference(model_dir, run_dir)))
    assert AutoTokenizer.from_pretrained(tmp_path / "out").encode("12") == [5, 6]


def test_merged_model_is_pefts_own_merge_bit_for_bit(model_dir, run_dir, tmp_path):
    export(run_dir, tmp_path / "out", merged=True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    expected = reference(model_dir, run_dir).merge_and_unload()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert torch.equal(logits(loaded), logits(expected))
    assert not (tmp_path / "out" / "adapter_config.json").exists()


def test_bf16_base_is_folded_in_fp32_and_rounded_once(run_dir, tmp_path):
    base = make_model("qwen3", tmp_path / "base")
    weights = {k: v.bfloat16() for k, v in load_file(base / "model.safetensors").items()}
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    export(run_dir, tmp_path / "out", merged=True, base=str(base))
    adapter = from_peft_dir(run_dir)
    written = load_file(tmp_path / "out" / "model.safetensors")
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        expected = weight
        if f"{module}.lora_A.weight" in adapter.tensors:
            a, b = (adapter.tensors[f"{module}.lora_{part}.weight"] for part in "AB")
            expected = (weight.float() + b @ a).bfloat16()
            assert not torch.equal(expected, weight)
        assert torch.equal(written[name], expected), name


WHOLE = {
    "DoRA": ("qwen3", {"use_dora": True}),
    "bias in lora_B": ("qwen2", {"lora_bias": True, "target_modules": ["q_proj", "k_proj"]}),
    "trained biases": ("qwen2", {"bias": "all", "target_modules": ["q_proj"]}),
    "trained modules": ("qwen3", {"modules_to_save": ["norm", "lm_head"]}),
    "trained tokens": ("qwen3", {"trainable_token_indices": [5, 6]}),
    "trained tokens, tied": ("qwen2", {"trainable_token_indices": [5, 6]}),
    "embedding": ("qwen3", {"target_modules": ["embed_tokens", "q_proj"]}),
    "head": ("qwen3", {"target_modules": ["lm_head", "q_proj"]}),
    "experts": (
        "qwen3_moe",
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]},
    ),
}


def trained(directory, settings):
    """A live PEFT model all of whose trained tensors have moved."""
    return moved(PeftTwin(directory, **settings).model)


def moved(model):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape, generator=generator) / 10
    return model


@pytest.mark.parametrize("name", WHOLE)
def test_merged_model_of_what_needs_whole_tensors_answers_as_peft_does(model_dir, tmp_path, name):
    shape, settings = WHOLE[name]
    base = model_dir(shape)
    before = (base / "model.safetensors").read_bytes()
    model = trained(base, settings)
    model.save_pretrained(tmp_path / "adapter")
    export(tmp_path / "adapter", tmp_path / "out", merged=True)
    written = load_file(tmp_path / "out" / "model.safetensors")
    old = load_file(base / "model.safetensors")
    assert {n: (t.shape, t.dtype) for n, t in written.items()} == {
        n: (t.shape, t.dtype) for n, t in old.items()
    }
    assert (base / "model.safetensors").read_bytes() == before
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    assert (logits(loaded) - logits(plain)).abs().max() > 0.01


def test_whole_tensors_of_a_sharded_bf16_base_are_merged_in_fp32_and_rounded_once(
    model_dir, tmp_path
):
    model = AutoModelForCausalLM.from_pretrained(model_dir("qwen3"), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "base", max_shard_size="150KB")
    twin = trained(tmp_path / "base", {"use_dora": True})  # its base holds the bf16 values in fp32
    twin.save_pretrained(tmp_path / "adapter")
    export(tmp_path / "adapter", tmp_path / "out", merged=True)
    names = sorted(path.name for path in (tmp_path / "base").glob("*.safetensors"))
    assert sorted(path.name for path in (tmp_path / "out").glob("*.safetensors")) == names
    expected = twin.merge_and_unload().state_dict()
    for file in names:
        for name, tensor in load_file(tmp_path / "out" / file).items():
            assert torch.equal(tensor, expected[name].bfloat16()), name


def test_adapter_whose_initialisation_changed_the_base_is_merged_only_as_converted(
    model_dir, tmp_path
):
    model = PeftTwin(model_dir("qwen3"), init_lora_weights="pissa").model
    model.save_pretrained(tmp_path / "initial")
    moved(model).save_pretrained(tmp_path / "adapter")
    with pytest.raises(errors.UnsupportedAdapter, match="path_initial_model_for_weight_conversion"):
        export(tmp_path / "adapter", tmp_path / "out", merged=True)
    assert not (tmp_path / "out").exists()
    converted = {"path_initial_model_for_weight_conversion": str(tmp_path / "initial")}
    model.save_pretrained(tmp_path / "converted", **converted)
    export(tmp_path / "converted", tmp_path / "out", merged=True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-3, atol=1e-3)


def test_sharded_base_stays_sharded(model_dir, run_dir, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(model_dir("qwen3"), dtype=torch.float32)
    model.save_pretrained(tmp_path / "base", max_shard_size="300KB")
    export(run_dir, tmp_path / "out", merged=True, base=str(tmp_path / "base"))
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 2
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    expected = reference(model_dir, run_dir).merge_and_unload()
    assert torch.equal(logits(loaded), logits(expected))


def test_card_says_version_digest_base_and_what_training_brought(run_dir, tmp_path):
    export(run_dir, tmp_path / "out", base="org/base")
    card = (tmp_path / "out" / "README.md").read_text()
    for text in (
        "base_model: org/base",
        "library_name: peft",
        "math@7",
        "9f9f",
        "| base model | org/base |",
    ):
        assert text in card
    assert "| held-out accuracy | 0.250 before, 0.750 after training |" in card
    assert "| training reward | 0.300 before, 0.800 after training |" in card
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/base"


def test_newest_checkpoint_is_taken_where_the_run_has_not_ended(run_dir, tmp_path):
    for step in (9, 10):
        shutil.copytree(run_dir, tmp_path / f"checkpoint-{step}")
    assert find_adapter(tmp_path).name == "checkpoint-10"


def test_what_cannot_be_exported_is_refused_and_leaves_nothing(model_dir, run_dir, tmp_path):
    with pytest.raises(errors.ConfigError, match="output_dir of a run"):
        export(tmp_path, tmp_path / "out")
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "file").write_text("mine")
    with pytest.raises(errors.ConfigError, match="not empty"):
        export(run_dir, taken)
    small = make_model(
        "qwen3", tmp_path / "small", num_hidden_layers=1, layer_types=["full_attention"]
    )
    with pytest.raises(errors.UnknownModules, match=r"layers\.1.*--base"):
        export(run_dir, tmp_path / "out", merged=True, base=str(small))
    moved(PeftTwin(model_dir("qwen3"), use_dora=True).model).save_pretrained(tmp_path / "dora")
    with pytest.raises(errors.UnknownModules, match=r"does not fit .*layers\.1.*--base"):
        export(tmp_path / "dora", tmp_path / "out", merged=True, base=str(small))
    with pytest.raises(errors.UnsupportedAdapter, match="alora_invocation_tokens"):
        config = json.loads((tmp_path / "dora" / "adapter_config.json").read_text())
        config["alora_invocation_tokens"] = [1, 2]
        (tmp_path / "dora" / "adapter_config.json").write_text(json.dumps(config))
        export(tmp_path / "dora", tmp_path / "out", merged=True)
    with pytest.raises(errors.ConfigError, match="hf download"):
        export(run_dir, tmp_path / "out", merged=True, base="org/absent")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dora", "small", "taken"]
    assert (taken / "file").read_text() == "mine"


def test_broken_weights_are_refused(run_dir, tmp_path):
    broken = shutil.copytree(run_dir, tmp_path / "broken")
    file = broken / "adapter_model.safetensors"
    save_file({k: torch.full_like(v, torch.inf) for k, v in load_file(file).items()}, file)
    with pytest.raises(errors.NonFiniteWeights):
        export(broken, tmp_path / "out")
    file.write_bytes(b"no tensors")
    with refused("adapter_corrupt", match="save the adapter again"):
        export(broken, tmp_path / "out")


def test_half_written_record_of_a_run_is_named(run_dir, tmp_path):
    broken = shutil.copytree(run_dir, tmp_path / "broken")
    (broken / "tink_policy.json").write_text('{"policy": ')
    with pytest.raises(errors.ConfigError, match=r"tink_policy\.json is not JSON"):
        export(broken, tmp_path / "out")


def test_command_writes_and_says_where(run_dir, tmp_path, capsys):
    assert main(["export", str(run_dir), "--output", str(tmp_path / "out"), "--merged"]) == 0
    said = capsys.readouterr().err
    assert "merged model math@7 written to" in said and "--base ORGANISATION/NAME" in said
    assert main(["export", str(run_dir), "--output", str(tmp_path / "out")]) == 1
    assert "not empty" in capsys.readouterr().err
