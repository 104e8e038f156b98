"""Every byte of a served checkpoint counts, where trainer and server do not read the very same files."""

from __future__ import annotations

import asyncio
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.fake_vllm import FakeVLLM
from tink_rl import SyncConfig, VLLMClient, WeightSync, errors
from tink_rl.policy.content import ContentDigest, files_identity
from tink_rl.policy.fingerprint import base_fingerprint, checkpoint_index
from tink_rl.protocol import BaseAnswer, Empty
from tink_rl.publish import base_content
from tink_rl.server.content import ServedContent

EMBEDDING = "model.embed_tokens.weight"
UNSAMPLED_ROW = 8
"""No sample of the fingerprint lies in it."""


@pytest.fixture
def copy(model_dir, tmp_path):
    return shutil.copytree(model_dir("qwen3"), tmp_path / "copy")


def change_one_row(directory):
    """Another row in the embedding, and the same fingerprint."""
    before = base_fingerprint(directory)
    tensors = load_file(directory / "model.safetensors")
    tensors[EMBEDDING] = tensors[EMBEDDING].clone()
    tensors[EMBEDDING][UNSAMPLED_ROW] += 1.0
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    assert base_fingerprint(directory) == before


def sync_of(fake, base):
    client = VLLMClient("http://fake", token="t" * 20, transport=fake.transport())
    return WeightSync(client, base_model=base, config=SyncConfig(mode="adapter"))


def test_same_files_are_not_looked_into(model_dir):
    fake = FakeVLLM(str(model_dir("qwen3")))
    sync_of(fake, model_dir("qwen3")).open()
    assert fake.count("/tink/v1/base") == 0


def test_copy_with_the_same_bytes_passes_and_was_read_by_both_sides(model_dir, copy):
    fake = FakeVLLM(str(copy))
    sync_of(fake, model_dir("qwen3")).open()
    assert fake.count("/tink/v1/base") == 1


def test_served_copy_of_which_one_row_differs_is_refused_by_name(model_dir, copy):
    change_one_row(copy)
    sync = sync_of(FakeVLLM(str(copy)), model_dir("qwen3"))
    with pytest.raises(errors.BaseMismatch, match=r"embed_tokens\.weight differs, and 1 of 25"):
        sync.open()


def test_files_that_were_changed_after_the_server_loaded_them_are_told(model_dir, copy):
    content = ServedContent(str(copy))
    change_one_row(copy)
    os.utime(copy / "model.safetensors", ns=(1, 1))
    content._digest.wait()
    with pytest.raises(errors.BaseMismatch, match=r"changed after .*restart the server"):
        asyncio.run(content.ask(Empty()))


def test_truncated_checkpoint_is_an_error_on_either_side(model_dir, copy):
    sync = sync_of(FakeVLLM(str(copy)), copy)
    content = ServedContent(str(copy))
    index = checkpoint_index(copy)
    os.truncate(copy / "model.safetensors", 100_000)
    with pytest.raises(OSError, match="truncated"):
        ContentDigest(index).wait()
    assert sync is not None
    with pytest.raises(errors.ConfigError, match="cannot be read"):
        while asyncio.run(content.ask(Empty())).tensors is None:
            pass


def test_server_that_stands_still_is_given_up(monkeypatch):
    monkeypatch.setattr(base_content, "_STALLED_S", -1.0)

    class Stuck:
        url, client = "http://stuck", None

        def ask(self, *_, **__):
            return BaseAnswer(tensors=None, num_done=3, num_bytes=9)

    stuck = Stuck()
    stuck.client = stuck
    with pytest.raises(errors.RequestTimeout, match="stood at"):
        base_content._digests_of(stuck)


def test_digests_depend_on_the_tensors_and_not_on_how_they_are_cut(model_dir, tmp_path):
    whole = ContentDigest(checkpoint_index(model_dir("qwen3"))).wait()
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir("qwen3"), dtype=torch.float32)
    model.save_pretrained(tmp_path, max_shard_size="200kB")
    assert ContentDigest(checkpoint_index(tmp_path)).wait() == whole


def test_identity_is_of_the_files_and_their_state(model_dir, copy):
    index = checkpoint_index(copy)
    first = files_identity(index)
    assert first == files_identity(index) != files_identity(checkpoint_index(model_dir("qwen3")))
    os.utime(copy / "model.safetensors", ns=(1, 1))
    assert files_identity(index) != first
    (copy / "model.safetensors").unlink()
    assert files_identity(index) is None
