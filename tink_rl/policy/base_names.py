"""Which tensor of a checkpoint a tensor of the live base is, and where in it the elements lie.

transformers renames, and holds some tensors otherwise than the checkpoint does (all experts of a layer
in one). Its own conversion, run backwards on tensors without data, says which names come of a live
tensor; since it only cuts, a part's offset and strides say which elements. So a rank that holds a flat
range of a live tensor knows which bytes of which file tensors those are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from tink_rl.policy.fingerprint import CheckpointTensor
from tink_rl.policy.peft_names import BaseModel

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A tensor of the checkpoint, and what of the live base it is compared with."""

    stored: str
    """Name in the checkpoint."""
    live: tuple[str, ...]
    """Names in memory; several where the checkpoint holds them as one."""
    shape: Shape
    """Of the live side, in the checkpoint's layout."""
    begin: int | None
    """First element in the flat live tensor; None where they do not lie in one piece."""

    def assembled(self, base: BaseModel, wholes: list[torch.Tensor]) -> torch.Tensor:
        """The live side out of its whole tensors: what the checkpoint's tensor has to equal."""
        if self.live == (self.stored,):
            return wholes[0]
        found = _revert(base, dict(zip(self.live, wholes, strict=True)))
        return found[self.stored]


class _KeepViews(TorchFunctionMode):
    """Lets a conversion cut without a copy, so that offsets and strides tell what was cut."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.Tensor.contiguous, torch.Tensor.clone):
            return args[0]
        return func(*args, **(kwargs or {}))


def _revert(base: BaseModel, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    from transformers.core_model_loading import revert_weight_conversion

    found: dict[str, torch.Tensor] = revert_weight_conversion(base, dict(tensors))
    return found


def match_names(
    base: BaseModel,
    live: Mapping[str, Shape],
    index: Mapping[str, CheckpointTensor],
) -> list[Pair]:
    """The pairs of `base` and the checkpoint of `index`, in the live model's order.

    Args:
        base: The transformers model, for its conversions.
        live: Whole shapes by name in memory.
        index: The checkpoint.
    """
    pairs: list[Pair] = []
    whole_only: dict[frozenset[str], list[str]] = {}
    """Names in the checkpoint -> live names that only together make them."""
    for name, shape in live.items():
        if name in index:
            pairs.append(Pair(stored=name, live=(name,), shape=shape, begin=0))
            continue
        parts = _parts_of(base, name, shape)
        if parts and all(part.stored in index and _fits(part, index) for part in parts):
            pairs += parts
        elif parts and all(part.stored in index for part in parts):
            whole_only.setdefault(frozenset(part.stored for part in parts), []).append(name)
    for names in whole_only.values():
        pairs += _together(base, names, live)
    return pairs


def _fits(part: Pair, index: Mapping[str, CheckpointTensor]) -> bool:
    return part.shape == tuple(index[part.stored].shape)


def _parts_of(base: BaseModel, name: str, shape: Shape) -> list[Pair]:
    """What comes of one live tensor, in the checkpoint's names; empty where transformers knows none."""
    meta = torch.empty(shape, device="meta")
    with _KeepViews():
        try:
            found = _revert(base, {name: meta})
        except (ValueError, RuntimeError, KeyError):  # needs others beside it, or other shapes
            return []
    return [
        Pair(stored=stored, live=(name,), shape=tuple(part.shape), begin=_begin(meta, part))
        for stored, part in found.items()
    ]


def _begin(whole: torch.Tensor, part: torch.Tensor) -> int | None:
    is_view = part is whole or part.untyped_storage()._cdata == whole.untyped_storage()._cdata
    return int(part.storage_offset()) if is_view and part.is_contiguous() else None


def _together(base: BaseModel, names: list[str], live: Mapping[str, Shape]) -> Iterator[Pair]:
    """Pairs of live tensors that the checkpoint holds as one (or that changed their shape)."""
    found = _revert(base, {name: torch.empty(live[name], device="meta") for name in names})
    for stored, part in found.items():
        yield Pair(stored=stored, live=tuple(names), shape=tuple(part.shape), begin=None)
