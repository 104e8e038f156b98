"""The base fingerprint: the same for the same files, another for any other base."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from tests.tiny_models import make_model
from tink_rl.errors import ConfigError
from tink_rl.policy.fingerprint import (
    base_fingerprint,
    checkpoint_index,
    local_model_dir,
    read_checkpoint_tensor,
)


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
    with pytest.raises(ConfigError, match="safetensors"):
        checkpoint_index(tmp_path)
    file = base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5])
    with pytest.raises(ConfigError, match="truncated"):
        base_fingerprint(base)
    file.write_bytes(b"\xff" * 8 + b"{}")
    with pytest.raises(ConfigError, match="not a safetensors"):
        base_fingerprint(base)
