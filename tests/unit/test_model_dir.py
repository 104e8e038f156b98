"""Which directory a base is: what a live model was loaded from, what a run remembers of it."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.hub_cache import cache_snapshot
from tests.policies import PeftTwin
from tests.tiny_models import make_model
from tink_rl.policy.fingerprint import base_fingerprint
from tink_rl.policy.model_dir import loaded_from, place_in_hub
from tink_rl.sampling.server_view import ServerView, served_base
from tink_rl.tools.export import export


@pytest.fixture
def hub(model_dir, tmp_path, monkeypatch):
    """`acme/tiny` with main and v2, `acme/many` with a model in `inner`, all cached."""
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    cache_snapshot(cache, "acme/tiny", model_dir("qwen3"), "main")
    other = make_model("qwen3", tmp_path / "other", seed=1)
    shutil.copytree(other, tmp_path / "many" / "inner")
    cache_snapshot(cache, "acme/many", tmp_path / "many", "main")
    return SimpleNamespace(
        cache=cache, v2=cache_snapshot(cache, "acme/tiny", other, "v2"), other=other
    )


@pytest.mark.parametrize(
    ("name", "asked", "is_other"),
    [
        ("acme/tiny", {}, False),
        ("acme/tiny", {"revision": "main"}, False),
        ("acme/tiny", {"revision": "v2"}, True),
        ("acme/many", {"subfolder": "inner"}, True),
    ],
)
@pytest.mark.parametrize("told", [True, False])
def test_fingerprint_is_of_what_the_trainer_loaded(hub, model_dir, name, asked, is_other, told):
    model = AutoModelForCausalLM.from_pretrained(name, cache_dir=hub.cache, **asked)
    found = loaded_from(model, asked if told else None)
    expected = hub.other if is_other else model_dir("qwen3")
    assert base_fingerprint(found) == base_fingerprint(expected)


def test_cache_of_ones_own_is_where_the_trainer_found_it(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    asked = {"revision": "v2", "cache_dir": str(hub.cache)}
    model = AutoModelForCausalLM.from_pretrained("acme/tiny", **asked)
    assert loaded_from(model, asked) == str(hub.v2)


def test_directory_is_itself_and_a_model_made_in_memory_is_none(hub, model_dir):
    model = AutoModelForCausalLM.from_pretrained(model_dir("qwen3"))
    assert loaded_from(model) == str(model_dir("qwen3"))
    assert loaded_from(type(model)(model.config)) == str(model_dir("qwen3"))
    assert loaded_from(SimpleNamespace()) == ""


def test_place_in_the_hub_says_commit_and_subfolder(hub, tmp_path):
    assert place_in_hub(hub.v2) == {"base_revision": hub.v2.name, "base_subfolder": ""}
    assert place_in_hub(hub.v2 / "inner")["base_subfolder"] == "inner"
    assert place_in_hub(tmp_path) == {}


def test_merged_export_folds_into_the_revision_that_was_trained_on(hub, tmp_path):
    twin = PeftTwin(hub.other, target_modules=["q_proj"])
    twin.model.save_pretrained(tmp_path / "run")
    path = tmp_path / "run" / "adapter_config.json"
    config = json.loads(path.read_text()) | {"base_model_name_or_path": "acme/tiny"}
    path.write_text(json.dumps(config))
    said = {"base_fingerprint": base_fingerprint(hub.other), **place_in_hub(hub.v2)}
    (tmp_path / "run" / "tink_policy.json").write_text(json.dumps(said))
    done = export(tmp_path / "run", tmp_path / "out", merged=True)
    written, base = (load_file(d / "model.safetensors") for d in (done.path, hub.other))
    assert set(written) == set(base) and done.base == "acme/tiny"
    export(tmp_path / "run", tmp_path / "again", merged=True, base="acme/tiny", revision="v2")


def test_worker_reads_the_revision_that_is_served(hub):
    status = SimpleNamespace(base_revision=hub.v2.name, base_fingerprint="f" * 32)
    view = ServerView(plugin=True, base="pol", root="acme/tiny", max_model_len=64, status=status)
    assert served_base(view, None).directory == hub.v2
