"""PEFT directories made by hand: right ones, and ones that are wrong in a single way."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tink_rl.adapters.store import AdapterStore
from tink_rl.policy.shapes import BaseShapes

SHAPES = {
    "model.layers.0.self_attn.q_proj": (24, 16),
    "model.layers.0.mlp.down_proj": (16, 32),
    "model.layers.1.self_attn.q_proj": (24, 16),
}
BASE = BaseShapes(name="the-base", shapes=SHAPES)
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."


def config_of(rank: int = 4, **changes: Any) -> dict[str, Any]:
    """What PEFT writes, in short."""
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": ["q_proj", "down_proj"],
        "bias": "none",
    }
    return {**config, **changes}


def tensors_of(
    rank: int = 4, seed: int = 0, shapes: dict[str, tuple[int, int]] | None = None
) -> dict[str, torch.Tensor]:
    """A and B of every module, of a size that changes answers."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, (rows, columns) in (shapes or SHAPES).items():
        a, b = (
            torch.randn(size, generator=generator) / 10 for size in ((rank, columns), (rows, rank))
        )
        found[f"{PREFIX}{name}.lora_A.weight"] = a
        found[f"{PREFIX}{name}.lora_B.weight"] = b
    return found


def write_adapter(
    directory: Path,
    *,
    seed: int = 0,
    config: Any = None,
    tensors: dict[str, torch.Tensor] | None = None,
) -> Path:
    """A PEFT directory; `config` and `tensors` replace the right ones."""
    directory.mkdir(parents=True, exist_ok=True)
    text = (
        config if isinstance(config, str) else json.dumps(config_of() if config is None else config)
    )
    (directory / CONFIG).write_text(text)
    save_file(tensors_of(seed=seed) if tensors is None else tensors, directory / WEIGHTS)
    return directory


def names_in(store: AdapterStore) -> list[str]:
    """What lies in the store's directory."""
    return sorted(os.listdir(store.root)) if store.root.is_dir() else []
