"""Golden weights: the untouched base weights that every merged version is folded from.

They are read from the checkpoint, never from the served tensors: on a CPU those are packed, and
folding in place would drift. Each rank keeps its own rows and columns only, in one piece of memory:
a pinned tensor each would be rounded up to a power of two, which for 7B is twice the bytes.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tink_rl.errors import ConfigError
from tink_rl.policy.fingerprint import CheckpointTensor, read_checkpoint_tensor
from tink_rl.server import golden_plan
from tink_rl.server.golden_plan import GIB, GoldenNeed, GoldenPlan, Memory
from tink_rl.server.modules import Layer, Shard
from tink_rl.server.names import Names

logger = logging.getLogger("tink_rl.server")
_ALIGN_BYTES = 256
"""Of each projection in the slab: what a GPU's matrix kernels read fastest."""


@dataclass(frozen=True, kw_only=True)
class Stored:
    """Where the checkpoint holds a projection."""

    entry: CheckpointTensor
    first_row: int = 0
    """Of it, in a tensor that holds several."""


class GoldenWeights:
    """The base weights of all linear layers of this rank, kept on one tier.

    Tiers: `device` (beside the served weights), `host` (pinned where there is a GPU), `file` (read
    again at every fold; only if asked for).
    """

    def __init__(
        self,
        index: Mapping[str, Stored],
        layers: Mapping[str, Layer],
        *,
        dtype: torch.dtype,
        device: torch.device,
        memory: Memory,
        wanted: GoldenNeed,
        tier: str = "auto",
        budget_gib: float | None = None,
    ) -> None:
        """Plan; nothing is read yet.

        Args:
            index: Where the checkpoint holds every projection of `layers` (`foldable`).
            layers: The layers that can be folded.
            dtype: That of the served weights.
            device: Where they are served.
            memory: What was measured.
            wanted: What they take (`golden_plan.need`).
            tier: One of `golden_plan.TIERS`.
            budget_gib: At most so much, if given.

        Raises:
            ConfigError: `tier` is unknown.
            ModeUnavailable: the weights exceed the budget.
        """
        self._dtype, self._device, self._index = dtype, device, index
        self._memory, self._wanted, self._budget_gib = memory, wanted, budget_gib
        self._auto = tier == "auto"
        self.plan: GoldenPlan = golden_plan.plan(tier, wanted, memory, budget_gib)
        self._shards = [shard for layer in layers.values() for shard in layer.shards]
        self._kept: dict[str, torch.Tensor] = {}
        self._pinned = False

    def load(self) -> None:
        """Read what the tier keeps in memory.

        A GPU that has less memory than was measured a moment ago: `auto` takes the host's instead.

        Raises:
            ModeUnavailable: it was asked for that tier, or the host does not have the memory either.
        """
        if self.plan.tier == "file":
            return
        try:
            self._read_all()
        except torch.OutOfMemoryError as error:
            self._kept = {}
            needed, budget = self._wanted.num_bytes, self.plan.budget_bytes
            if not self._auto or self.plan.tier == "host":
                raise golden_plan.does_not_fit(needed, budget, self.plan.tier) from error
            logger.warning("tink_rl: golden weights go to the host, not the GPU: %s", error)
            self.plan = golden_plan.plan("host", self._wanted, self._memory, self._budget_gib)
            self._read_all()

    def _read_all(self) -> None:
        on_device = self.plan.tier == "device"
        slab, self._kept = self._slab(self._device if on_device else torch.device("cpu"))
        self._pinned = self._device.type == "cuda" and not on_device and _pin(slab)
        for shard in self._shards:
            self._kept[shard.name].copy_(self._read(shard))

    def _slab(self, device: torch.device) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Memory for all projections on `device`, and each one's part of it."""
        step = _ALIGN_BYTES // self._dtype.itemsize
        starts, end = [], 0
        for shard in self._shards:
            starts.append(end)
            end += -(-golden_plan.local_numel(shard) // step) * step
        slab = torch.empty(end, dtype=self._dtype, device=device)
        views = {}
        for shard, start in zip(self._shards, starts, strict=True):
            part = slab[start : start + golden_plan.local_numel(shard)]
            views[shard.name] = part.view(shard.rows.stop - shard.rows.start, -1)
        return slab, views

    def weight(self, shard: Shard) -> torch.Tensor:
        """This rank's part of the base weight `[rows, columns]`; not to be written to."""
        kept = self._kept.get(shard.name)
        return self._read(shard) if kept is None else kept

    def describe(self) -> dict[str, Any]:
        """Tier, bytes and budget, for the start-up line and the status."""
        return {
            "tier": self.plan.tier,
            "bytes": self._wanted.num_bytes,
            "budget_bytes": self.plan.budget_bytes,
            "reason": self.plan.reason,
            "pinned": self._pinned,
        }

    def _read(self, shard: Shard) -> torch.Tensor:
        stored = self._index[shard.name]
        whole = read_checkpoint_tensor(stored.entry)[stored.first_row :]
        return whole[shard.rows, shard.columns].to(self._dtype).clone()


def _pin(slab: torch.Tensor) -> bool:
    """Let the GPU read `slab` at the speed of the bus; whether the system allows it.

    Registering pins exactly these bytes; torch's own pinned memory is handed out in powers of two.
    """
    cuda: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    failed = int(cuda.cudaHostRegister(slab.data_ptr(), slab.numel() * slab.itemsize, 0))
    if failed:
        logger.warning(
            "tink_rl: %.1f GiB of golden weights cannot be pinned (CUDA error %d); folds read them at "
            "a fraction of the bus's speed. Raise the limit of locked memory (ulimit -l)",
            slab.numel() * slab.itemsize / GIB,
            failed,
        )
    return not failed


def foldable(
    index: Mapping[str, CheckpointTensor], layers: Mapping[str, Layer], names: Names
) -> tuple[dict[str, Stored], dict[str, Layer], dict[str, str]]:
    """Which layers the checkpoint holds as the served model does, projection by projection or fused.

    Layers whose weight has another shape there (a convolution that vLLM serves as a linear layer), or that
    the model's loader changes on the way, cannot be folded; they stay at the base.

    Returns:
        Where the checkpoint holds each projection, the layers that can be folded, and of the other
        projections why not.

    Raises:
        ConfigError: nothing is left.
    """
    entries: dict[str, Stored] = {}
    kept: dict[str, Layer] = {}
    reasons: dict[str, str] = {}
    held = _by_projections(index, names)
    for name, layer in layers.items():
        stored, why = _stored(layer, held)
        if why:
            reasons.update((shard.name, why) for shard in layer.shards)
        else:
            kept[name] = layer
            entries.update(stored)
    if not kept:
        raise ConfigError(
            "merged mode: the checkpoint holds no linear layer of this model under the name and in the "
            f"shape that vLLM serves ({next(iter(reasons.values()), 'it has none')}); use --mode adapter"
        )
    if reasons:
        logger.warning(
            "tink_rl: %d of %d projections cannot be folded and stay at the base, such as %s: %s",
            len(reasons),
            len(reasons) + len(entries),
            min(reasons),
            reasons[min(reasons)],
        )
    return entries, kept, reasons


def _by_projections(
    index: Mapping[str, CheckpointTensor], names: Names
) -> dict[tuple[str, ...], CheckpointTensor]:
    """The weights of the checkpoint, by the names of the projections that each holds."""
    found = {}
    for name, entry in index.items():
        if name.endswith(".weight") and (shards := names.find(name.removesuffix(".weight"))):
            found[tuple(shard.name for shard in shards)] = entry
    return found


def _stored(
    layer: Layer, held: Mapping[tuple[str, ...], CheckpointTensor]
) -> tuple[dict[str, Stored], str]:
    """Where the checkpoint holds the projections of `layer`; or why it cannot be folded."""
    if layer.has_own_loader and getattr(layer.module, "tp_size", 1) > 1:
        return {}, f"the model cuts {layer.name} for its ranks in a way of its own"
    fused = held.get(tuple(shard.name for shard in layer.shards))
    found = {}
    for shard, rows in layer.rows_of():
        entry = held.get((shard.name,)) if fused is None else fused
        shape = shard.shape if fused is None else (layer.rows_of()[-1][1].stop, shard.shape[1])
        if entry is None:
            return {}, f"the checkpoint has no {shard.name}.weight"
        if tuple(entry.shape) != shape:
            return {}, (
                f"the checkpoint holds {shard.name}.weight as {list(entry.shape)}, the served layer wants "
                f"{list(shape)}"
            )
        found[shard.name] = Stored(entry=entry, first_row=0 if fused is None else rows.start)
    return found, ""
