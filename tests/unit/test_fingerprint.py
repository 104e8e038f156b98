"""The base fingerprint: the same for the same files, another for any other base."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.adapters import write_adapter
from tests.hub_cache import cache_snapshot
from tests.tiny_models import make_model
from tink_rl.errors import ConfigError, TinkError
from tink_rl.policy.fingerprint import (
    base_fingerprint,
    checkpoint_index,
    read_checkpoint_tensor,
)
from tink_rl.policy.model_dir import local_model_dir
from tink_rl.serve_options import ServerOptions, check_options


@pytest.fixture
def base(model_dir, tmp_path):
    return shutil.copytree(model_dir("qwen3"), tmp_path / "base")


def test_copy_has_the_same_fingerprint_and_another_seed_another(base, model_dir, tmp_path):
    assert base_fingerprint(base) == base_fingerprint(model_dir("qwen3"))
    other = make_model("qwen3", tmp_path / "other", seed=1)
    assert base_fingerprint(other) != base_fingerprint(base)


def test_how_it_was_saved_does_not_count_but_what_it_computes_does(base):
    before = base_fingerprint(base)
    path = base / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "transformers_version": "1", "use_cache": False}))
    assert base_fingerprint(base) == before
    path.write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    assert base_fingerprint(base) != before


def test_index_reads_the_tensors_that_transformers_wrote(base):
    from transformers import AutoModelForCausalLM

    state = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).state_dict()
    for name, entry in checkpoint_index(base).items():
        assert torch.equal(read_checkpoint_tensor(entry), state[name])


def test_what_is_no_model_says_what_was_found(base, tmp_path):
    with pytest.raises(ConfigError, match="hf download"):
        local_model_dir("nobody/nothing")
    with pytest.raises(ConfigError, match=r"no model itself, its subfolders \['base'\] do"):
        checkpoint_index(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="safetensors"):
        checkpoint_index(tmp_path / "empty")
    with pytest.raises(ConfigError, match="made in memory"):
        checkpoint_index("")
    file = base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5])
    with pytest.raises(ConfigError, match="truncated"):
        base_fingerprint(base)
    file.write_bytes(b"\xff" * 8 + b"{}")
    with pytest.raises(ConfigError, match="not a safetensors"):
        base_fingerprint(base)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS.*git lfs pull"),
        (b"<html>404</html>", "a web page"),
        (bytes(4096), "begins with zeros"),
        (b"", "truncated"),
        (b"\x08" + bytes(7) + b"[1,2,3] ", "not one of safetensors"),
        (b"\x10" + bytes(7) + b'{"a": {"x": 1}} ', "not one of safetensors"),
        (b"\x08" + bytes(7) + b"\xff" * 8, "not one of safetensors"),
    ],
    ids=["lfs", "page", "zeros", "empty", "list", "entry", "bytes"],
)
def test_damaged_base_is_named_as_what_it_is_also_before_it_is_served(base, content, words):
    (base / "model.safetensors").write_bytes(content)
    with pytest.raises(ConfigError, match=words):
        base_fingerprint(base)
    with pytest.raises(ConfigError, match=words):
        check_options(ServerOptions(model=str(base), port=0))


def test_base_whose_end_is_missing_is_truncated_and_has_no_fingerprint(base):
    file = base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=r"is truncated \(\d+ bytes of \d+\)"):
        base_fingerprint(base)


@pytest.mark.parametrize("text", ["", "[]", '{"a": ', "\ufeff{}"])
def test_config_of_a_base_that_is_no_json_is_said(base, text):
    (base / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json is not a JSON object"):
        base_fingerprint(base)


# -- what else lies in the folder -------------------------------------------------------------------


def in_shards(directory, model_dir, name="shards"):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir("qwen3"), dtype=torch.float32)
    model.save_pretrained(directory / name, max_shard_size="300KB")
    return directory / name


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize(
    "beside",
    [
        "adapter_model.safetensors",
        "consolidated.safetensors",
        "consolidated-00001-of-00002.safetensors",
        "model.fp16.safetensors",
        "optimizer.safetensors",
        "model-00009-of-00009.safetensors",
    ],
)
def test_only_what_is_loaded_counts(beside, sharded, model_dir, tmp_path):
    base = in_shards(tmp_path, model_dir)
    if not sharded:
        base = shutil.copytree(model_dir("qwen3"), tmp_path / "single")
    save_file({"layers.0.attention.wq.weight": torch.ones(4, 4)}, base / beside)
    assert base_fingerprint(base) == base_fingerprint(model_dir("qwen3"))
    assert set(checkpoint_index(base)) == set(checkpoint_index(model_dir("qwen3")))


def test_single_file_beside_an_index_must_hold_the_same(model_dir, tmp_path):
    base = in_shards(tmp_path, model_dir)
    single = shutil.copy(model_dir("qwen3") / "model.safetensors", base)
    assert base_fingerprint(base) == base_fingerprint(model_dir("qwen3"))
    tensors = load_file(single)
    tensors["model.norm.weight"] += 1
    save_file(tensors, single, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="holds two models"):
        base_fingerprint(base)


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ('{"weight_map": {"a": "model-00001-of-00001.safetensors"}}', "1 are not there"),
        ('{"weight_map": {}}', "names 0 files"),
        ('{"weight_map": ["a"]}', "no weight_map"),
        ("{}", "no weight_map"),
        ("", "no weight_map"),
    ],
)
def test_damaged_index_is_said(index, words, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ConfigError, match=words):
        checkpoint_index(tmp_path)


def test_adapter_given_as_a_base_is_named_so(tmp_path):
    write_adapter(tmp_path / "adapter")
    with pytest.raises(ConfigError, match="is an adapter, not a base"):
        checkpoint_index(tmp_path / "adapter")


# -- the hub's cache --------------------------------------------------------------------------------


@pytest.fixture
def hub(model_dir, tmp_path, monkeypatch):
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    cache_snapshot(cache, "acme/tiny", model_dir("qwen3"), "main")
    other = make_model("qwen3", tmp_path / "v2", seed=1)
    commit = cache_snapshot(cache, "acme/tiny", other, "v2", "refs/pr/1").name
    return cache, other, commit


def test_revision_of_a_hub_id_is_its_own_base(hub, model_dir):
    cache, other, commit = hub
    assert base_fingerprint(local_model_dir("acme/tiny")) == base_fingerprint(model_dir("qwen3"))
    for revision in ("v2", commit, "refs/pr/1"):
        found = local_model_dir("acme/tiny", revision=revision, cache_dir=cache)
        assert base_fingerprint(found) == base_fingerprint(other)


def test_revision_that_is_not_cached_names_those_that_are(hub):
    cache, _, _ = hub
    words = r"revision 'v3'.*\(cached: main, refs/pr/1, v2\).*hf download acme/tiny --revision v3"
    with pytest.raises(ConfigError, match=words):
        local_model_dir("acme/tiny", revision="v3", cache_dir=cache)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("/nowhere/at/all", "give a directory that exists"),
        ("~/nowhere", "give a directory that exists"),
        ("C:\\models\\base", "give a directory that exists"),
        ("https://huggingface.co/acme/tiny/tree/main", "give the hub id, 'acme/tiny'"),
        ("acme/other", "hf download acme/other"),
    ],
)
def test_what_is_no_model_here_says_what_to_give(hub, model, words):
    for ask in (local_model_dir, lambda given: check_options(ServerOptions(model=given, port=0))):
        with pytest.raises(TinkError, match=words):
            ask(model)


def test_file_of_a_model_is_told_from_a_model(base):
    with pytest.raises(ConfigError, match=f"that is a file: give its directory, '{base}'"):
        local_model_dir(base / "model.safetensors")


def test_commit_in_short_is_answered_with_the_whole_one(hub):
    cache, _, commit = hub
    with pytest.raises(ConfigError, match=rf"\(cached: {commit}\)"):
        local_model_dir("acme/tiny", revision=commit[:7], cache_dir=cache)


def test_subfolder_of_a_repository_is_its_own_base(model_dir, tmp_path):
    shutil.copytree(model_dir("qwen3"), tmp_path / "repo" / "inner")
    cache_snapshot(tmp_path / "hub", "acme/many", tmp_path / "repo", "main")
    for model in (tmp_path / "repo", "acme/many"):
        found = local_model_dir(model, subfolder="inner", cache_dir=tmp_path / "hub")
        assert base_fingerprint(found) == base_fingerprint(model_dir("qwen3"))
    with pytest.raises(ConfigError, match=r"no subfolder 'outer'; it has \['inner'\]"):
        local_model_dir(tmp_path / "repo", subfolder="outer")
