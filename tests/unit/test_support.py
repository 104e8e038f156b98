"""The support table decides and documents: one list, every row, one sentence why."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests.fakes import status
from tink_rl import errors
from tink_rl.policy.adapter import AdapterCollector
from tink_rl.policy.collect import FullCollector, collector_for
from tink_rl.policy.support import ALL, FEATURES, TIED, WHOLE, Needs, needs, table
from tink_rl.publish.modes import choose_mode
from tink_rl.types import SyncMode

DORA = needs({"peft_type": "LORA", "use_dora": True})


def load(directory):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def test_docs_hold_the_table_that_decides():
    page = Path(__file__).parents[2] / "docs" / "modes.md"
    assert table() in page.read_text(), "python -m tink_rl.policy.support writes it"
    assert len(FEATURES) >= 20
    assert len({f.name for f in FEATURES}) == len(FEATURES)


@pytest.mark.parametrize(
    ("facts", "modes"),
    [
        ({}, ALL),
        ({"use_rslora": True, "rank_pattern": {"q": 2}}, ALL),
        ({"use_dora": True}, WHOLE),
        ({"init_lora_weights": "pissa_niter_4"}, ALL),
        ({"init_lora_weights": "loftq"}, WHOLE),
        ({"model.quantized": True}, ALL),
        ({"model.embedding": True}, WHOLE),
        ({"model.embedding": True, TIED: True}, ()),
        ({"peft_type": "LOHA"}, WHOLE),
        ({"peft_type": "PROMPT_TUNING"}, ()),
        ({"init_lora_weights": "a-new-one"}, ()),
        ({"a_field_of_a_newer_peft": True}, ()),
    ],
)
def test_needs_are_the_modes_that_express_everything(facts, modes):
    found = needs({"peft_type": "LORA", **facts})
    assert found.modes == modes
    assert bool(found.refused) == (modes == ())
    assert all(len(reason) > 20 for reason in found.refused)
    assert bool(found.because) == (modes != ALL and not found.refused) or found.refused


@pytest.mark.parametrize(
    ("wanted", "server", "needed", "mode", "why"),
    [
        ("auto", {}, Needs(), SyncMode.MERGED, "one policy"),
        ("auto", {"served": {"other@3": "d"}}, Needs(), SyncMode.ADAPTER, "1 other policies"),
        ("auto", {"modes": ("adapter", "full")}, Needs(), SyncMode.ADAPTER, "offers adapter"),
        ("auto", {"modes": ("full",)}, Needs(), SyncMode.FULL, "offers full"),
        ("auto", {"modes": ("merged", "full")}, DORA, SyncMode.FULL, "DoRA"),
        ("full", {"modes": ("merged", "full")}, Needs(), SyncMode.FULL, "asked for"),
        ("auto", {}, Needs(rank=999), SyncMode.MERGED, "rank 999 is above"),
        ("auto", {"modes": ("adapter", "full")}, Needs(rank=999), SyncMode.FULL, "rank 999"),
        # It refuses the rank itself, with the remedy.
        ("auto", {"modes": ("adapter",)}, Needs(rank=999), SyncMode.ADAPTER, "offers adapter"),
    ],
)
def test_auto_says_what_it_took_and_why(wanted, server, needed, mode, why):
    choice = choose_mode(wanted, status(**server), needed, policy="mine")
    assert choice.mode is mode and why in choice.reason


def test_mode_that_cannot_express_the_adapter_is_refused():
    with pytest.raises(errors.UnsupportedAdapter, match="mode='full'"):
        choose_mode("adapter", status(), DORA)
    with pytest.raises(errors.ModeUnavailable, match=r"DoRA .* needs mode full.*--mode full"):
        choose_mode("auto", status(("adapter", "merged")), DORA)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_initialisation_that_changed_the_base_travels_as_a_delta_of_twice_the_rank(model_dir, init):
    directory = model_dir("qwen3")
    original = load(directory).state_dict()
    model = get_peft_model(load(directory), LoraConfig(r=4, init_lora_weights=init))
    collector = collector_for(model, directory)
    assert isinstance(collector, AdapterCollector) and collector.rank == 8
    found = collector.collect()
    for module in found.modules:  # untrained, so it is the base again
        delta = found.tensors[f"{module}.lora_B.weight"] @ found.tensors[f"{module}.lora_A.weight"]
        assert float(delta.abs().max()) < 1e-5 * float(original[f"{module}.weight"].norm())
    merged = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter += torch.randn_like(parameter) * 0.1
    found = collector.collect()
    merged = model.merge_and_unload().state_dict()
    for module in found.modules:
        delta = found.tensors[f"{module}.lora_B.weight"] @ found.tensors[f"{module}.lora_A.weight"]
        torch.testing.assert_close(
            original[f"{module}.weight"] + delta, merged[f"{module}.weight"], rtol=0, atol=1e-5
        )


def test_changed_base_without_its_original_or_not_low_rank_is_told(model_dir):
    directory = model_dir("qwen3")
    model = get_peft_model(load(directory), LoraConfig(r=4, init_lora_weights="pissa"))
    unknown = collector_for(model)
    assert isinstance(unknown, FullCollector) and unknown.needs.modes == WHOLE
    assert "original is not known" in unknown.needs.because[0]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("q_proj.base_layer.weight"):
                parameter += torch.randn_like(parameter)
    collector = collector_for(model, directory)
    assert isinstance(collector, FullCollector)
    assert collector.needs.modes == WHOLE and "more than rank 4" in collector.needs.because[0]


def test_whole_collector_swaps_and_gives_back_bit_for_bit(model_dir):
    model = get_peft_model(
        load(model_dir("qwen3")), LoraConfig(r=4, use_dora=True, modules_to_save=["norm"])
    )
    collector = collector_for(model)
    assert isinstance(collector, FullCollector)
    before = {k: v.detach().clone() for k, v in model.named_parameters()}
    plain, noisy = collector.collect(), collector.random_like(seed=1)
    first = plain.digest()
    assert noisy.digest() != first and plain.digest() == first
    with collector.swapped(noisy):
        changed = {k for k, v in model.named_parameters() if not torch.equal(v, before[k])}
    assert {k.split(".")[-2] for k in changed} >= {"default"}
    assert all(torch.equal(v, before[k]) for k, v in model.named_parameters())
    assert any("modules_to_save" in k for k in changed)
