"""Row by row through the support table: PEFT's greedy tokens, or an error with a remedy."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from peft import (
    HRAConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from transformers import AutoModelForCausalLM

from tests.policies import PeftTwin, assert_served, sync_to
from tests.tiny_models import VOCAB
from tink_rl import errors
from tink_rl.policy.collect import collector_for
from tink_rl.policy.support import ALL, FEATURES, needs
from tink_rl.training.probe import Prober

pytestmark = pytest.mark.server
LINEAR = ["q_proj", "v_proj", "up_proj", "down_proj"]


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": LINEAR, **settings})


# Name of the row -> shape, and the configs that stand for it (or what makes the model).
SUPPORTED: dict[str, tuple[str, list[Any]]] = {
    "LoRA on linear layers": ("qwen3", [lora(target_modules="all-linear")]),
    "rsLoRA": ("qwen3", [lora(use_rslora=True)]),
    "Rank per module": ("qwen3", [lora(rank_pattern={"q_proj": 2, "layers.1.mlp.up_proj": 7})]),
    "Alpha per module": ("qwen3", [lora(alpha_pattern={"q_proj": 32, "down_proj": 2})]),
    "Some layers only": ("qwen3", [lora(layers_to_transform=[1])]),
    "Dropout": ("qwen3", [lora(lora_dropout=0.3)]),
    "Gaussian, orthogonal or EVA initialisation": (
        "qwen3",
        [lora(init_lora_weights="gaussian"), lora(init_lora_weights="orthogonal")],
    ),
    "PiSSA": ("qwen3", [lora(init_lora_weights="pissa"), lora(init_lora_weights="pissa_niter_4")]),
    "OLoRA": ("qwen3", [lora(init_lora_weights="olora")]),
    "CorDA": ("qwen3", ["corda"]),
    "LoRA-GA": ("qwen3", ["lora_ga"]),
    "LoftQ": ("qwen3", ["loftq"]),
    "QLoRA": ("qwen3", ["qlora"]),
    "DoRA": ("qwen3", [lora(use_dora=True), lora(use_dora=True, use_rslora=True)]),
    "Bias in lora_B": ("qwen2", [lora(lora_bias=True, target_modules=["q_proj", "v_proj"])]),
    "Trained biases": ("qwen2", [lora(bias="all"), lora(bias="lora_only")]),
    "Trained modules": (
        "qwen3",
        [
            lora(modules_to_save=["norm", "input_layernorm"]),
            lora(modules_to_save=["embed_tokens", "lm_head"]),
        ],
    ),
    "Trained token embeddings": ("qwen3", [lora(trainable_token_indices=[5, 9, 30])]),
    "LoRA on the embedding": ("qwen3", [lora(target_modules=["q_proj", "embed_tokens"])]),
    "LoRA on the head": ("qwen3", [lora(target_modules=["q_proj", "lm_head"])]),
    "LoRA on MoE experts": (
        "qwen3_moe",
        [
            lora(
                target_modules=["q_proj"],
                target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            )
        ],
    ),
    "LoHa, LoKr, IA3, OFT, VeRA, HRA": (
        "qwen3",
        [
            LoHaConfig(r=4, target_modules=LINEAR),
            LoKrConfig(r=4, target_modules=LINEAR),
            IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
            OFTConfig(target_modules=["q_proj", "o_proj"], oft_block_size=32, r=0),
            VeraConfig(r=8, target_modules=["q_proj", "o_proj"]),
            HRAConfig(r=4, target_modules=LINEAR),
        ],
    ),
}  # fmt: skip
# The same rows on a tied base, where that is another matter.
TIED_TOO = {
    "tokens, tied": lora(trainable_token_indices=[5, 9, 30]),
    "DoRA, tied": lora(use_dora=True),
}
REFUSED: dict[str, tuple[str, Any]] = {
    "LoRA on a tied embedding or head": ("qwen2", lora(target_modules=["q_proj", "embed_tokens"])),
    "Prompt learning and every other kind": (
        "qwen3",
        PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    ),
    "AdaLoRA": ("", {"peft_type": "ADALORA"}),
    "Replicated layers": ("", {"layer_replication": [[0, 2], [1, 2]]}),
    "Transposed weights (GPT-2's Conv1D)": ("", {"fan_in_fan_out": True}),
    "Activated LoRA": ("qwen3", lora(alora_invocation_tokens=[5, 6], task_type="CAUSAL_LM")),
    "QALoRA": ("", {"use_qalora": True}),
    "MonteCLoRA": ("", {"monteclora_config": {"x": 1}}),
    "Block-diagonal LoRA": ("", {"use_bdlora": {"x": 1}}),
    "Arrow": ("", {"arrow_config": {"x": 1}}),
    "KaSA": ("", {"kasa_config": {"x": 1}}),
    "VeLoRA": ("", {"velora_config": {"x": 1}}),
    "Megatron's parallel layers": ("", {"megatron_config": {"x": 1}}),
    "Unknown initialisations": ("", {"init_lora_weights": "a-new-one"}),
}


def test_every_row_is_walked():
    assert {f.name for f in FEATURES if f.modes} == set(SUPPORTED)
    assert {f.name for f in FEATURES if not f.modes} == set(REFUSED)


def _base(directory):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def build(directory, config):
    """The PEFT model of a case, and the model that computes what must be served."""
    if config == "qlora":
        return _qlora(directory)
    model = {"corda": _corda, "lora_ga": _lora_ga, "loftq": _loftq}.get(
        config if isinstance(config, str) else "", lambda d: get_peft_model(_base(d), config)
    )(directory)
    return model, model


def _batches():
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, VOCAB, (8, 32), generator=generator) for _ in range(16)]


def _corda(directory):
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    base = _base(directory)
    config = lora(init_lora_weights="corda", corda_config=CordaConfig(corda_method="kpm"))

    @torch.no_grad()
    def run():
        for ids_BT in _batches():
            for ids_T in ids_BT:
                base(input_ids=ids_T[None])

    preprocess_corda(base, config, run_model=run)
    return get_peft_model(base, config)


def _lora_ga(directory):
    from peft.tuners.lora.config import LoraGAConfig
    from peft.tuners.lora.loraga import preprocess_loraga

    base = _base(directory)
    config = lora(init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())

    def step():
        for ids_BT in _batches()[:2]:
            base(input_ids=ids_BT, labels=ids_BT).loss.backward()

    preprocess_loraga(base, config, train_step=step)
    return get_peft_model(base, config)


def _loftq(directory):
    """What LoftQ leaves behind, without its solver (which needs scipy): a base on a grid of 16 values."""
    model = get_peft_model(_base(directory), lora())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("base_layer.weight"):
                step = parameter.abs().max() / 8
                parameter.copy_((parameter / step).round() * step)
    model.peft_config["default"].init_lora_weights = "loftq"
    return model


def _qlora(directory):
    from transformers import BitsAndBytesConfig

    four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    base = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, quantization_config=four_bit
    )
    trained, twin = get_peft_model(base, lora()), get_peft_model(_base(directory), lora())
    shake(trained, 1)
    state = {k: v for k, v in trained.state_dict().items() if "lora_" in k}
    twin.load_state_dict(state, strict=False)
    return trained, twin  # what is served is the adapter on the server's own base


def shake(model, seed):
    """Change everything that training would change, enough for the answers to differ."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                kept = 0.0 if "lora_A" in name or "lora_B" in name else 1.0
                parameter.mul_(kept).add_(noise * 0.1)


def telling_cases(directory, model):
    """Prompts that `model` answers clearly, and otherwise than the untouched base does."""
    probe = PeftTwin(directory)
    old, probe.model = probe.model, model.eval()
    generator = torch.Generator().manual_seed(5)
    prompts = torch.randint(3, VOCAB, (48, 7), generator=generator).tolist()
    answers = PeftTwin.greedy(probe, prompts)
    probe.model = old
    base = PeftTwin.greedy(probe, prompts, adapter=False)
    found = {
        tuple(prompt): tokens
        for prompt, (tokens, clear), (other, _) in zip(prompts, answers, base, strict=True)
        if clear and tokens != other
    }
    assert len(found) >= 2, f"{len(found)} of 48 prompts tell the adapter from the base"
    return dict(list(found.items())[:4])


def server_for(servers, shape):
    # vLLM's LoRA kernels for experts need Triton, which has no CPU build: such a server has no slots.
    return servers.get(shape, mode="full" if shape == "qwen3_moe" else "both")


def walk(servers, model_dir, shape, config, modes):
    server, directory = server_for(servers, shape), model_dir(shape)
    model, expected = build(directory, config)
    if expected is model:
        shake(model, 1)
    cases = telling_cases(directory, expected)
    for mode in modes:
        with sync_to(server, directory, mode.value, bucket_mib=0.2) as sync:
            record = sync.publish(model)
            assert record.mode == mode
            assert_served(server, record.name, cases)
            assert not sync.publish(model).published  # the same policy is not sent twice
    with sync_to(server, directory, "auto") as sync:
        assert sync.publish(model).mode in modes


@pytest.mark.parametrize(
    ("row", "shape", "number"),
    [(row, shape, i) for row, (shape, cases) in SUPPORTED.items() for i in range(len(cases))],
)
def test_supported_row_is_served_as_peft_computes_it(servers, model_dir, row, shape, number):
    feature = next(f for f in FEATURES if f.name == row)
    offered = server_for(servers, shape).client().status().modes
    modes = [mode for mode in feature.modes if mode in offered]
    assert modes
    walk(servers, model_dir, shape, SUPPORTED[row][1][number], modes)


@pytest.mark.parametrize("row", TIED_TOO)
@pytest.mark.parametrize("shape", ["qwen2"])
def test_supported_row_on_a_tied_base(servers, model_dir, shape, row):
    walk(servers, model_dir, shape, TIED_TOO[row], [mode for mode in ALL if mode == "full"])


@pytest.mark.parametrize("row", REFUSED)
def test_refused_row_says_what_to_do_instead(model_dir, row):
    shape, config = REFUSED[row]
    if isinstance(config, dict):  # a config that a tiny model cannot be built with
        reasons = needs({"peft_type": "LORA", **config}).refused
    else:
        model = get_peft_model(_base(model_dir(shape)), config)
        with pytest.raises(errors.UnsupportedAdapter) as caught:
            collector_for(model, model_dir(shape))
        reasons = (caught.value.message,)
    assert len(reasons) == 1 and len(reasons[0]) > 40


@pytest.mark.parametrize("shape", ["qwen2"])
def test_head_that_is_trained_apart_from_its_tied_embedding_is_refused(servers, model_dir, shape):
    server, directory = server_for(servers, shape), model_dir(shape)
    model = get_peft_model(_base(directory), lora(modules_to_save=["lm_head"]))
    shake(model, 1)
    with (
        sync_to(server, directory, "full") as sync,
        pytest.raises(errors.UnsupportedAdapter, match="tie_word_embeddings=False"),
    ):
        sync.publish(model)
    assert server.client().status().state == "ready"


def test_quantised_base_cannot_be_sent_whole(model_dir):
    model, _ = _qlora(model_dir("qwen3"))
    model.peft_config["default"].use_dora = True
    with pytest.raises(errors.UnsupportedAdapter, match="load the trainer's base unquantised"):
        collector_for(model, model_dir("qwen3"))


@pytest.mark.parametrize("case", ["dora", "trained norm", "loha"])
@pytest.mark.parametrize("shape", ["qwen3"])
def test_start_up_probe_tells_whether_whole_policies_are_applied(servers, model_dir, shape, case):
    configs = {
        "dora": lora(use_dora=True),
        "trained norm": lora(modules_to_save=["norm"]),
        "loha": LoHaConfig(r=4, target_modules=LINEAR),
    }
    server, directory = server_for(servers, shape), model_dir(shape)
    model = get_peft_model(_base(directory), configs[case])
    collector, prober = collector_for(model, directory), Prober(model, vocab_size=VOCAB)
    with sync_to(server, directory, "auto") as sync:
        assert sync.settle(collector.needs) == "full"
        before = {k: v.detach().clone() for k, v in model.named_parameters()}
        prober.self_test(sync, collector)
        assert all(torch.equal(v, before[k]) for k, v in model.named_parameters())
        assert sync.status.served == {} and sync.current is None
        record = prober.publish(sync, collector.collect())
        assert record.version >= 1 and record.probe_gap < 1e-3


@pytest.mark.parametrize("shape", ["qwen3"])
def test_quantised_trainer_is_told_what_its_base_costs(servers, model_dir, caplog, shape):
    server, directory = server_for(servers, shape), model_dir(shape)
    trained, _ = _qlora(directory)
    collector, prober = collector_for(trained, directory), Prober(trained, vocab_size=VOCAB)
    with sync_to(server, directory, "auto") as sync:
        sync.settle(collector.needs)
        # Tiny random weights suffer more from 4 bits than real ones, so much that no synthetic adapter
        # stands out; what is looked at here is that the cost was said before.
        with pytest.raises(errors.ProbeFailed, match="the probe would show nothing"):
            prober.self_test(sync, collector)
    assert re.search(r"base is quantised .* differ by [0-9.]+ nats", caplog.text)
