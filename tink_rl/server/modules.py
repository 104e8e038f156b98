"""From the names of a PEFT adapter to the layers of the served model.

vLLM fuses projections: `q_proj`, `k_proj` and `v_proj` are three shards of one `qkv_proj`. This module
says, for every linear layer of the served model, which names of the checkpoint it holds, of which
full (unsharded) shapes, and which rows and columns of them lie on this rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from tink_rl.errors import RankExceeded, ShapeMismatch, UnknownModules, UnsupportedAdapter
from tink_rl.policy.packet import PacketHeader
from tink_rl.types import SyncMode

_QKV = ("q", "k", "v")


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One projection of the checkpoint inside a layer of vLLM."""

    name: str
    """Module name in the checkpoint and in PEFT: `model.layers.0.self_attn.q_proj`."""
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


def unwrap(module: nn.Module) -> nn.Module:
    """The linear layer itself, where vLLM wrapped it for its LoRA slots."""
    inner = getattr(module, "base_layer", None)
    return inner if isinstance(inner, nn.Module) else module


def linear_layers(model: nn.Module) -> dict[str, Layer]:
    """Every linear layer of `model` that an adapter can target, by name.

    Layers inside wrappers are named as if they were not wrapped. Layers whose fused order is not
    known (no entry in `packed_modules_mapping`) are left out, so that a packet for them is refused.
    """
    from tink_rl.server.vllm_names import LinearBase

    packed: Mapping[str, list[str]] = getattr(model, "packed_modules_mapping", None) or {}
    found = {}
    for name, module in model.named_modules():
        if name.endswith(".base_layer") or not isinstance(unwrap(module), LinearBase):
            continue
        shards = _shards(name, unwrap(module), packed)
        if shards:
            found[name] = Layer(name=name, module=unwrap(module), shards=shards)
    return found


def _shards(name: str, module: Any, packed: Mapping[str, list[str]]) -> tuple[Shard, ...]:
    from tink_rl.server.vllm_names import MergedColumnParallelLinear

    parent, _, last = name.rpartition(".")
    if not isinstance(module, MergedColumnParallelLinear) and not _is_qkv(module):
        return (_shard(name, name, module, None, module.output_size),)
    names = packed.get(last, [])
    if len(names) != len(module.output_sizes):
        return ()
    ids: list[Any] = list(_QKV) if _is_qkv(module) else list(range(len(names)))
    return tuple(
        _shard(f"{parent}.{part}", name, module, shard_id, size)
        for part, shard_id, size in zip(names, ids, _full_sizes(module), strict=True)
    )


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


def by_checkpoint_name(layers: Mapping[str, Layer]) -> dict[str, Shard]:
    """Every projection by its name in the checkpoint."""
    return {shard.name: shard for layer in layers.values() for shard in layer.shards}


def check_header(
    header: PacketHeader,
    shards: Mapping[str, Shard],
    *,
    max_lora_rank: int,
    refused: Mapping[str, str] | None = None,
) -> None:
    """Raise unless every tensor of `header` fits a projection of the served model.

    Args:
        header: Of the packet.
        shards: Every projection by its name.
        max_lora_rank: Of the server's slots.
        refused: Projections that this mode cannot change here, and why.

    Raises:
        RankExceeded: adapter mode, and the rank does not fit the slots.
        UnsupportedAdapter: a projection cannot be changed in this mode.
        UnknownModules: a name matches nothing, or an A has no B.
        ShapeMismatch: a shape does not fit.
    """
    if header.mode is SyncMode.ADAPTER and header.rank > max_lora_rank:
        raise RankExceeded(
            f"the adapter has rank {header.rank}, the server's slots take {max_lora_rank}; restart "
            f"the server with --max-lora-rank {header.rank} or more, or use --mode merged",
            given=header.rank,
            expected=max_lora_rank,
        )
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for spec in header.tensors:
        module, part = _split(spec.name)
        found.setdefault(module, {})[part] = spec.shape
    unknown = sorted(set(found) - set(shards))
    if unknown:
        raise UnknownModules(
            f"{len(unknown)} of {len(found)} modules of the adapter match nothing in the served "
            f"model, first {unknown[0]!r}; the model has names such as {sorted(shards)[0]!r}: was "
            "the adapter trained on this base?",
            unknown=unknown[:10],
        )
    cannot = sorted(set(found) & set(refused or {}))
    if refused and cannot:
        raise UnsupportedAdapter(
            f"{len(cannot)} of {len(found)} modules of the adapter cannot be changed in mode "
            f"{header.mode.value!r}, first {cannot[0]!r}: {refused[cannot[0]]}; leave them out of "
            "target_modules, or use another mode",
            modules=cannot[:10],
        )
    for module, parts in found.items():
        _check_shapes(module, parts, shards[module].shape, header.rank)


def _split(name: str) -> tuple[str, str]:
    module, _, part = name.removesuffix(".weight").rpartition(".")
    if part not in ("lora_A", "lora_B") or not name.endswith(".weight"):
        raise UnknownModules(f"tensor {name!r}: expected MODULE.lora_A.weight or .lora_B.weight")
    return module, part


def _check_shapes(
    module: str, parts: dict[str, tuple[int, ...]], shape: tuple[int, int], max_rank: int
) -> None:
    if set(parts) != {"lora_A", "lora_B"}:
        raise UnknownModules(f"module {module!r} has {sorted(parts)}, expected lora_A and lora_B")
    rank = parts["lora_A"][0]
    expected = {"lora_A": (rank, shape[1]), "lora_B": (shape[0], rank)}
    if parts != expected or not 0 < rank <= max_rank:
        raise ShapeMismatch(
            f"module {module!r} got {parts}, the served layer of shape {list(shape)} takes "
            f"{expected} with a rank of at most {max_rank}; was the adapter trained on this base?",
            module=module,
        )
