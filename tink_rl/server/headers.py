"""Whether a packet of A and B fits the served model, by its header alone: before a byte was sent."""

from __future__ import annotations

from collections.abc import Mapping

from tink_rl.errors import RankExceeded, ShapeMismatch, UnknownModules, UnsupportedAdapter
from tink_rl.policy.packet import PacketHeader
from tink_rl.server.modules import Shard
from tink_rl.server.names import Names, split
from tink_rl.types import SyncMode


def check_header(
    header: PacketHeader,
    names: Names,
    *,
    max_lora_rank: int,
    refused: Mapping[str, str] | None = None,
) -> None:
    """Raise unless every tensor of `header` fits a projection of the served model.

    Args:
        header: Of the packet.
        names: What the projections of the served model are called.
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
        module, part = split(spec.name)
        found.setdefault(module, {})[part] = spec.shape
    targets = {module: names.find(module) for module in found}
    unknown = sorted(module for module, shards in targets.items() if not shards)
    if unknown:
        raise UnknownModules(
            f"{len(unknown)} of {len(found)} modules of the adapter match nothing in the served "
            f"model, first {unknown[0]!r}; the model has names such as {names.example!r}: was "
            "the adapter trained on this base?",
            unknown=unknown[:10],
        )
    _check_once(targets)
    reasons = {
        module: why
        for module, shards in targets.items()
        for shard in shards
        if (why := (refused or {}).get(shard.name)) is not None
    }
    cannot = sorted(reasons)
    if cannot:
        raise UnsupportedAdapter(
            f"{len(cannot)} of {len(found)} modules of the adapter cannot be changed in mode "
            f"{header.mode.value!r}, first {cannot[0]!r}: {reasons[cannot[0]]}; leave them out of "
            "target_modules, or use another mode",
            modules=cannot[:10],
        )
    for module, parts in found.items():
        shape = (sum(shard.shape[0] for shard in targets[module]), targets[module][0].shape[1])
        _check_shapes(module, parts, shape, header.rank)


def _check_once(targets: Mapping[str, tuple[Shard, ...]]) -> None:
    by_shard: dict[str, str] = {}
    for module, shards in targets.items():
        for shard in shards:
            other = by_shard.setdefault(shard.name, module)
            if other != module:
                raise UnknownModules(
                    f"modules {other!r} and {module!r} of the adapter are the same in the served model, "
                    "which has one of them; save the adapter again from one model",
                    unknown=[module],
                )


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
