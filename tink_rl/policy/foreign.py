"""Directories, configs and files that are none of PEFT's or safetensors, named as what they are. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.")
_BEGINNINGS: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "is a pointer of Git LFS and not the file; `git lfs pull` there, or `hf "
     "download` the repository"),
    (b"<!DOCTYPE", "is a web page, such as a login or an error; download the file again"),
    (b"<html", "is a web page, such as a login or an error; download the file again"),
    (b"GGUF", "is in llama.cpp's GGUF format; save it as safetensors with save_pretrained()"),
    (b"PK\x03\x04", "is a pickle of torch.save() (or a zip) under another name; save it as safetensors with "
     "save_pretrained()"),
    (b"\x80\x02\x8a\x0a", "is a pickle under another name; save it as safetensors with save_pretrained()"),
)  # fmt: skip


def what_a_file_is(beginning: bytes) -> str | None:
    """What a file is that should be safetensors, by its first 32 bytes, and the way out; None: not known."""
    for mark, says in _BEGINNINGS:
        if beginning.lstrip()[: len(mark)].lower() == mark.lower():
            return says
    if len(beginning) == 32 and not any(beginning):
        return "begins with zeros: it was never written to its end; copy it again"
    return None


def foreign_config(config: Mapping[str, Any]) -> str | None:
    """What wrote an `adapter_config.json` that is not PEFT's, and the way out; None if PEFT did."""
    if config.get("peft_type") is None and {"lora_parameters", "fine_tune_type"} & set(config):
        return (
            "is the config of mlx_lm.lora, in MLX's format; `mlx_lm.fuse` writes a whole model, which can "
            "be served as a base, or train with PEFT"
        )
    return None


def what_is_there(names: Iterable[str]) -> str | None:
    """What a directory without an adapter holds, by the names in it, and what to do; None: not known."""
    found = sorted(names)
    if "adapters.safetensors" in found or "adapters.npz" in found:
        return (
            "holds an adapter in MLX's format; `mlx_lm.fuse` writes a whole model, which can be served as "
            "a base"
        )
    if any(name.startswith("adapter_") and name.endswith(".pt") for name in found):
        return (
            "holds an adapter in torchtune's own format; its FullModelHFCheckpointer writes PEFT's files "
            "into epoch_N/: give that folder"
        )
    if any(name.startswith(("global_step", "pytorch_model_fsdp", "__0_0")) for name in found):
        return (
            "holds the sharded state of DeepSpeed or FSDP, no adapter; save the adapter itself with "
            "Trainer.save_model() or save_pretrained()"
        )
    if "config.json" in found and any(name.endswith(".safetensors") for name in found):
        return "is a whole model, no adapter; serve it as a base with `tink-rl serve`"
    return None


def what_else_is_there(names: Iterable[str]) -> str | None:
    """Which other files of weights a directory with PEFT's config holds, and what to do; None: none."""
    found = [name for name in sorted(names) if name.endswith(_WEIGHTS)]
    if not found:
        return None
    shown = ", ".join(found[:4]) + (", ..." if found[4:] else "")
    if any(_SHARD.search(name) for name in found):
        return (
            f"holds shards ({shown}), which no reader of PEFT joins; save the adapter again with PEFT's "
            "save_pretrained(), which writes one adapter_model.safetensors"
        )
    return (
        f"has no adapter_model.safetensors, but {shown}; if that is the adapter, give it this name (of a "
        "pickle: adapter_model.bin, and `tink-rl convert`), else save it with PEFT's save_pretrained()"
    )
