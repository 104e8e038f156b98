"""Directories and configs of adapters that are not PEFT's, named as what they are. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


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
