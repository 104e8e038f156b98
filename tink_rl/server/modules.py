"""From the names of a PEFT adapter to the layers of the served model.

vLLM fuses projections: `q_proj`, `k_proj` and `v_proj` are three shards of one `qkv_proj`. This module
says, for every linear layer of the served model, which projections it holds, of which full (unsharded)
shapes, and which rows and columns of them lie on this rank. What trainers and checkpoints call them is in
`names.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

_QKV = ("q", "k", "v")


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One projection inside a layer of vLLM."""

    name: str
    """As vLLM would call its module, were it not fused: `model.layers.0.self_attn.q_proj`. Parts that only
    ever come fused are numbered: `model.layers.0.self_attn.qkv_proj.q`."""
    layer: str
    """Module name in vLLM: `model.layers.0.self_attn.qkv_proj`."""
    shard_id: str | int | None
    """What the layer's weight loader calls it; None for a layer of one projection."""
    shape: tuple[int, int]
    """`[out, in]` of the whole projection, over all ranks."""
    rows: slice
    """Rows of it that lie on this rank."""
    columns: slice
    """Columns of it that lie on this rank."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One linear layer of vLLM with all its projections, in fused order."""

    name: str
    module: nn.Module
    shards: tuple[Shard, ...]
    comes_fused: bool = False
    """Whether its projections have no names of their own: slots take all of them as one."""
    has_slots: bool = False
    """Whether vLLM wrapped it for its LoRA slots."""
    has_own_loader: bool = False
    """Whether the model loads its weight by a function of its own, as state space layers do."""

    def rows_of(self) -> list[tuple[Shard, slice]]:
        """Each projection, and its rows where all of them come as one."""
        found, start = [], 0
        for shard in self.shards:
            found.append((shard, slice(start, start + shard.shape[0])))
            start += shard.shape[0]
        return found


def unwrap(module: nn.Module) -> nn.Module:
    """The linear layer itself, where vLLM wrapped it for its LoRA slots."""
    inner = getattr(module, "base_layer", None)
    return inner if isinstance(inner, nn.Module) else module


def linear_layers(model: nn.Module) -> dict[str, Layer]:
    """Every linear layer of `model` that an adapter can target, by name.

    Layers inside wrappers are named as if they were not wrapped. Where `packed_modules_mapping` does not
    name the projections of a fused layer, they are known to come as one.
    """
    from tink_rl.server.vllm_names import LinearBase

    packed: Mapping[str, list[str]] = getattr(model, "packed_modules_mapping", None) or {}
    found = {}
    for name, module in model.named_modules():
        if name.endswith(".base_layer") or not isinstance(unwrap(module), LinearBase):
            continue
        layer = _layer(name, unwrap(module), packed)
        found[name] = replace(layer, has_slots=unwrap(module) is not module)
    return found


def _layer(name: str, module: Any, packed: Mapping[str, list[str]]) -> Layer:
    from tink_rl.server.vllm_names import MergedColumnParallelLinear

    is_fused = isinstance(module, MergedColumnParallelLinear) or _is_qkv(module)
    own = _has_own_loader(module)
    if not is_fused or own:
        shard = _shard(name, name, module, None, module.output_size)
        return Layer(name=name, module=module, shards=(shard,), has_own_loader=own)
    parent, _, last = name.rpartition(".")
    sizes = _full_sizes(module)
    ids: list[Any] = list(_QKV) if _is_qkv(module) else list(range(len(sizes)))
    parts = packed.get(last, [])
    comes_fused = len(parts) != len(sizes)
    names = [f"{name}.{i}" for i in ids] if comes_fused else [f"{parent}.{part}" for part in parts]
    shards = tuple(
        _shard(part, name, module, shard_id, size)
        for part, shard_id, size in zip(names, ids, sizes, strict=True)
    )
    return Layer(name=name, module=module, shards=shards, comes_fused=comes_fused)


def _has_own_loader(module: nn.Module) -> bool:
    """Before the first reload: that puts a loader of its own around every layer's."""
    from tink_rl.server.vllm_names import get_layerwise_info

    recorded: Any = get_layerwise_info(module).restore_metadata[0].get("weight")
    weight = module._parameters.get("weight") if recorded is None else recorded
    loader = getattr(weight, "weight_loader", None)
    return loader is not None and not getattr(loader, "__name__", "").startswith("weight_loader")


def _is_qkv(module: Any) -> bool:
    from tink_rl.server.vllm_names import QKVParallelLinear

    return isinstance(module, QKVParallelLinear)


def _full_sizes(module: Any) -> list[int]:
    if not _is_qkv(module):
        return list(module.output_sizes)
    # `output_sizes` of a QKV layer counts replicated kv heads; the checkpoint holds each once.
    return [
        module.total_num_heads * module.head_size,
        module.total_num_kv_heads * module.head_size,
        module.total_num_kv_heads * module.v_head_size,
    ]


def _shard(name: str, layer: str, module: Any, shard_id: Any, out: int) -> Shard:
    from tink_rl.server.vllm_names import RowParallelLinear

    rank, size = getattr(module, "tp_rank", 0), getattr(module, "tp_size", 1)
    rows, columns = slice(0, out), slice(0, module.input_size)
    if isinstance(module, RowParallelLinear):
        columns = _part(module.input_size, rank, size)
    elif size > 1 and hasattr(module, "output_size_per_partition"):
        replicas = module.num_kv_head_replicas if shard_id in ("k", "v") else 1
        rows = _part(out, rank // replicas, size // replicas)
    return Shard(
        name=name,
        layer=layer,
        shard_id=shard_id,
        shape=(out, module.input_size),
        rows=rows,
        columns=columns,
    )


def _part(length: int, rank: int, size: int) -> slice:
    step = length // size
    return slice(rank * step, (rank + 1) * step)
