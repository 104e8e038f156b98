"""Golden weights: the untouched base weights that every merged version is folded from.

They are read from the checkpoint, never from the served tensors: on a CPU those are packed, and
folding in place would drift. Each rank keeps its own rows and columns only.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch

from tink_rl.errors import ConfigError, GoldenDoesNotFit
from tink_rl.policy.fingerprint import CheckpointTensor, checkpoint_index, read_checkpoint_tensor
from tink_rl.server.modules import Layer, Shard

logger = logging.getLogger("tink_rl.server")
_GIB = 2**30
_HOST_SHARE = 0.5
_DEVICE_SHARE = 0.8
TIERS = ("auto", "device", "host", "file")


class GoldenWeights:
    """The base weights of all linear layers of this rank, kept on one tier.

    Tiers: `device` (beside the served weights), `host` (pinned where there is a GPU), `file` (read
    again at every fold; only if asked for).
    """

    def __init__(
        self,
        model_dir: str,
        layers: Mapping[str, Layer],
        *,
        dtype: torch.dtype,
        device: torch.device,
        tier: str,
        budget_gib: float | None,
    ) -> None:
        """Plan; nothing is read yet but the checkpoint's headers.

        Raises:
            ConfigError: a layer's weight is not in the checkpoint, or `tier` is unknown.
            GoldenDoesNotFit: the weights exceed the budget.
        """
        self._dtype, self._device = dtype, device
        self._index = _entries(checkpoint_index(model_dir), layers)
        self._kept: dict[str, torch.Tensor] = {}
        shards = [shard for layer in layers.values() for shard in layer.shards]
        self.num_bytes = sum(_local_numel(shard) for shard in shards) * dtype.itemsize
        self.tier, self.budget_bytes = _choose_tier(tier, self.num_bytes, budget_gib, device)
        self._shards = shards

    def load(self) -> None:
        """Read what the tier keeps in memory."""
        if self.tier == "file":
            return
        for shard in self._shards:
            tensor = self._read(shard)
            if self.tier == "device":
                tensor = tensor.to(self._device)
            elif self._device.type == "cuda":
                tensor = tensor.pin_memory()
            self._kept[shard.name] = tensor

    def weight(self, shard: Shard) -> torch.Tensor:
        """This rank's part of the base weight `[rows, columns]`; not to be written to."""
        kept = self._kept.get(shard.name)
        return self._read(shard) if kept is None else kept

    def describe(self) -> dict[str, Any]:
        """Tier, bytes and budget, for the start-up line and the status."""
        return {"tier": self.tier, "bytes": self.num_bytes, "budget_bytes": self.budget_bytes}

    def _read(self, shard: Shard) -> torch.Tensor:
        whole = read_checkpoint_tensor(self._index[shard.name])
        return whole[shard.rows, shard.columns].to(self._dtype).clone()


def _entries(
    index: Mapping[str, CheckpointTensor], layers: Mapping[str, Layer]
) -> dict[str, CheckpointTensor]:
    entries = {}
    for layer in layers.values():
        for shard in layer.shards:
            entry = index.get(f"{shard.name}.weight")
            if entry is None or tuple(entry.shape) != shard.shape:
                raise ConfigError(
                    f"merged mode: the checkpoint holds {shard.name}.weight as "
                    f"{None if entry is None else list(entry.shape)}, the served layer wants "
                    f"{list(shard.shape)}; this model's layout is not supported: --mode adapter"
                )
            entries[shard.name] = entry
    return entries


def _local_numel(shard: Shard) -> int:
    rows, columns = shard.rows, shard.columns
    return int((rows.stop - rows.start) * (columns.stop - columns.start))


def _choose_tier(
    tier: str, num_bytes: int, budget_gib: float | None, device: torch.device
) -> tuple[str, int]:
    if tier not in TIERS:
        raise ConfigError(f"golden tier {tier!r}: expected one of {', '.join(TIERS)}")
    if tier == "file":
        return tier, 0
    budgets = {"host": _host_budget(), "device": _device_budget(device)}
    if budget_gib is not None:
        budgets = dict.fromkeys(budgets, int(budget_gib * _GIB))
    wanted = (
        [tier] if tier != "auto" else (["device", "host"] if device.type == "cuda" else ["host"])
    )
    for candidate in wanted:
        if num_bytes <= budgets[candidate]:
            return candidate, budgets[candidate]
    raise GoldenDoesNotFit(
        f"golden_does_not_fit: the golden weights of merged mode need {num_bytes / _GIB:.3f} GiB per "
        f"worker, the budget is {budgets[wanted[-1]] / _GIB:.3f} GiB ({wanted[-1]}); raise "
        "--golden-budget-gib, or use --mode adapter, or --golden-tier file (slow)",
        needed=num_bytes,
        budget=budgets[wanted[-1]],
    )


def _host_budget() -> int:
    import psutil

    return int(psutil.virtual_memory().available * _HOST_SHARE)


def _device_budget(device: torch.device) -> int:
    if device.type != "cuda":
        return _host_budget()
    return int(torch.cuda.mem_get_info(device)[0] * _DEVICE_SHARE)
