"""A base as people have it: a pinned revision of a hub id, under another name, with files beside it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.hub_cache import cache_snapshot
from tests.policies import sync_to
from tests.tiny_models import make_model
from tests.trainers import PROMPTS, config, lora, reward_noise, rows, settings
from tests.warm_server import make_server
from tink_rl import GRPOTrainer, errors
from tink_rl.policy.fingerprint import base_fingerprint

pytestmark = pytest.mark.server
KEY = "a-key-of-vllms-own"


def crowded(directory):
    """Two shards and an index, an adapter of an epoch folder, and the model in names of Mistral's."""
    make_model("qwen3", directory, seed=1)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model.save_pretrained(directory, max_shard_size="600KB")
    lora_a = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, 128)}
    save_file(lora_a, directory / "adapter_model.safetensors")
    wq = {"layers.0.attention.wq.weight": torch.ones(128, 128)}
    save_file(wq, directory / "consolidated.safetensors")
    assert len(list(directory.glob("model-*.safetensors"))) > 1
    return directory


@pytest.fixture(scope="module")
def hub(model_dir, tmp_path_factory):
    """`acme/tiny`: v2 is served, main holds other weights of the same shapes."""
    cache, v2 = Path(constants.HF_HUB_CACHE), crowded(tmp_path_factory.mktemp("hub") / "v2")
    cache_snapshot(cache, "acme/tiny", model_dir("qwen3"), "main")
    return SimpleNamespace(v2=v2, snapshot=cache_snapshot(cache, "acme/tiny", v2, "v2"))


@pytest.fixture(scope="module")
def pinned(hub, tmp_path_factory):
    server = make_server(
        "acme/tiny",
        revision="v2",
        mode="both",
        dtype="float32",
        max_model_len=96,
        max_lora_rank=16,
        token_file=str(tmp_path_factory.mktemp("pinned") / "token"),
        extra_args=("--served-model-name", "pol", "--api-key", KEY),
    )
    with server:
        yield server


def trainer_of(pinned, path, *, revision, lora_changes=None, **sync):
    return GRPOTrainer(
        model="acme/tiny",
        args=config(
            path, max_steps=2, model_init_kwargs={"dtype": "float32", "revision": revision}
        ),
        train_dataset=PROMPTS,
        reward_funcs=reward_noise,
        processing_class=AutoTokenizer.from_pretrained("acme/tiny", revision=revision),
        peft_config=lora(**(lora_changes or {})),
        servers=pinned.url,
        sync=settings(pinned, api_key=KEY, **sync),
    )


def test_server_says_which_commit_it_serves_and_offers_every_mode(pinned, hub):
    with pinned.client() as client:
        status = client.status()
    assert status.base_model == "pol" and status.base_revision == hub.snapshot.name
    assert status.base_fingerprint == base_fingerprint(hub.v2)
    assert set(status.modes) == {"adapter", "merged", "full"}


@pytest.mark.parametrize(
    ("mode", "lora_changes"), [("adapter", {}), ("merged", {}), ("full", {"use_dora": True})]
)
def test_pinned_revision_trains_in_every_mode(pinned, hub, tmp_path, mode, lora_changes):
    trainer = trainer_of(
        pinned, tmp_path, revision="v2", mode=mode, policy=mode, lora_changes=lora_changes
    )
    trainer.train()
    assert max(row["rollout/logprob_gap"] for row in rows(trainer)) <= 1e-4
    with sync_to(pinned, hub.v2, mode, policy=mode, api_key=KEY):
        pass  # drops what the run left served, which the next mode would add to


def test_another_revision_is_another_base(pinned, hub, tmp_path):
    trainer = trainer_of(pinned, tmp_path, revision="main")
    with pytest.raises(errors.BaseMismatch, match=rf"'pol' at {hub.snapshot.name[:12]}"):
        trainer.train()
