"""Families of models, held without a server: what a fold serves is vLLM's model of the merged checkpoint."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel

pytest.importorskip("vllm", reason="the server extra is not installed")
from tests import families, vllm_models
from tests.families import BY_SHAPE, FAMILIES, PAGE
from tests.policies import PeftTwin
from tests.tiny_models import make_model
from tink_rl.policy.fingerprint import checkpoint_index
from tink_rl.server import golden_plan, modules
from tink_rl.server.derived import Derived
from tink_rl.server.folding import Folder
from tink_rl.server.golden import GoldenWeights, foldable
from tink_rl.server.layout import trace_layout
from tink_rl.server.names import Names

CPU = torch.device("cpu")
KINDS = ("phi3", "glm4", "falcon_h1")
"""One of each kind of naming; `make test-long` has the rest."""


def folder_of(served, directory):
    """A folder for `served`, prepared as a worker does, and what its layers are called."""
    layers, index = modules.linear_layers(served.model), checkpoint_index(directory)
    names = Names(served.model, layers, trace_layout(served.model, index).placed)
    entries, kept, reasons = foldable(index, layers, names)
    golden = GoldenWeights(
        entries,
        kept,
        dtype=torch.float32,
        device=CPU,
        memory=golden_plan.measure(CPU, shared_with_trainer=True, num_workers=1),
        wanted=golden_plan.need(kept.values(), torch.float32),
    )
    golden.load()
    derived = Derived(served.model, torch.float32)
    derived.check()
    folder = Folder(kept, golden, vllm_config=served.config, device=CPU, derived=derived)
    return SimpleNamespace(folder=folder, names=names, reasons=reasons)


def _folded():
    for family in FAMILIES:
        if family.folded:
            marks = () if family.shape in KINDS else pytest.mark.long
            yield pytest.param(family.shape, marks=marks)


@pytest.mark.parametrize("family", list(_folded()))
def test_fold_serves_the_merged_checkpoint_and_touches_nothing_else(family, tmp_path):
    base, merged = make_model(family, tmp_path / "base"), tmp_path / "merged"
    targets = BY_SHAPE[family].targets
    twin = PeftTwin(base, target_modules=targets if targets == "all-linear" else list(targets))
    twin.randomise(3)
    tensors = dict(twin.collector.collect().tensors)
    assert isinstance(twin.model, PeftModel)
    twin.model.merge_and_unload().save_pretrained(merged)
    with vllm_models.loaded(merged) as served:
        expected = vllm_models.products(served.model)
        derived = vllm_models.others(served.model)
    with vllm_models.loaded(base) as served:
        rig = folder_of(served, base)
        assert all(rig.names.find(name.rsplit(".", 2)[0]) for name in tensors)
        before, rest = vllm_models.products(served.model), vllm_models.others(served.model)
        rig.folder.fold(rig.names.cut(tensors))
        now = vllm_models.products(served.model)
        assert any(not torch.equal(now[name], before[name]) for name in now)
        for name, product in now.items():
            torch.testing.assert_close(product, expected[name], rtol=1e-4, atol=1e-4)
        moved = set()
        for name, tensor in vllm_models.others(served.model).items():
            torch.testing.assert_close(tensor, derived[name], rtol=1e-4, atol=1e-4)
            moved |= set() if torch.equal(tensor, rest[name]) else {name.rpartition(".")[2]}
        assert moved == ({"W_UV", "W_UK_T"} if "kv_b_proj" in targets else set())
        rig.folder.fold({})
        assert all(torch.equal(x, before[n]) for n, x in vllm_models.products(served.model).items())
        assert all(torch.equal(x, rest[n]) for n, x in vllm_models.others(served.model).items())
        assert all("conv" in name for name in rig.reasons), rig.reasons


def test_layers_of_several_ranks_are_folded_after_the_loader_was_followed(tmp_path):
    base = make_model("qwen3", tmp_path / "base")
    with vllm_models.loaded(base) as served:
        layers, index = modules.linear_layers(served.model), checkpoint_index(base)
        names = Names(served.model, layers, trace_layout(served.model, index).placed)
        for layer in layers.values():
            layer.module.tp_size = 2
        _, kept, reasons = foldable(index, layers, names)
        assert kept == layers and not reasons


def test_page_is_made_from_the_list():
    text = PAGE.read_text()
    assert families.page(text) == text, "run python -m tests.families"


def test_every_mark_of_the_list_is_one_that_a_test_walks():
    assert set(KINDS) <= {family.shape for family in FAMILIES if family.folded}
    for family in FAMILIES:
        assert set(family.served) <= set(families.MODES)
        assert family.served or family.folded, family.name
