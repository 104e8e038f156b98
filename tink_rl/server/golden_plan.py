"""Where golden weights are kept, decided before a byte of them is read.

`auto` never takes a GPU's memory that somebody else counts on: beside a trainer what vLLM leaves free is
the trainer's, so golden weights lie in host memory. On a GPU of the server's own they lie beside the served
weights if a fold then still leaves vLLM its reserve.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from tink_rl.errors import ConfigError, ModeUnavailable
from tink_rl.memory_plan import HOST_SHARE, RESERVE_BYTES
from tink_rl.server.modules import Layer, Shard

GIB = 2**30
_HOST_RESERVE_BYTES = GIB
TIERS = ("auto", "device", "host", "file")


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What one worker may use, measured at start. Example: 80 GB card, alone, 400 GB of RAM, TP 8."""

    device: str
    """`cuda`."""
    device_free: int
    """Bytes free on the worker's GPU after vLLM took its own; 0 without a GPU."""
    host_available: int
    """Bytes of host memory that this worker may count on: its part of what is available."""
    shared_with_trainer: bool
    """Whether a trainer counts on what is free on the GPU."""


@dataclass(frozen=True, kw_only=True)
class GoldenNeed:
    """What one worker's golden weights take."""

    num_bytes: int
    """Of the weights themselves."""
    fold_bytes: int
    """On the device, for a moment, while the largest layer is folded."""


@dataclass(frozen=True, kw_only=True)
class GoldenPlan:
    """A tier and its budget."""

    tier: str
    budget_bytes: int
    reason: str
    """One clause for the log."""


def measure(device: torch.device, *, shared_with_trainer: bool, num_workers: int) -> Memory:
    """Look at the memory of this machine; `num_workers` of them do so at the same time."""
    import psutil

    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
    return Memory(
        device=device.type,
        device_free=int(free),
        host_available=int(psutil.virtual_memory().available) // num_workers,
        shared_with_trainer=shared_with_trainer,
    )


def need(
    layers: Iterable[Layer], dtype: torch.dtype, *, without_copy: Iterable[str] = ()
) -> GoldenNeed:
    """What golden weights of `layers` take in `dtype`.

    Args:
        layers: The layers that can be folded.
        dtype: That of the served weights.
        without_copy: Names of the layers that are folded in place (`direct.py`).
    """
    in_place = set(without_copy)
    num_bytes = fold_bytes = 0
    for layer in layers:
        sizes = [local_numel(shard) for shard in layer.shards]
        num_bytes += sum(sizes) * dtype.itemsize
        if layer.name not in in_place:
            # All projections wait for the last one, each in its full shape, then the layer is made anew;
            # beside them one projection in fp32, as it was and as it becomes, and its rounded copy.
            waiting = sum(shard.shape[0] * shard.shape[1] for shard in layer.shards)
            copies = (waiting + sum(sizes)) * dtype.itemsize + max(sizes) * (8 + dtype.itemsize)
            fold_bytes = max(fold_bytes, copies)
    return GoldenNeed(num_bytes=num_bytes, fold_bytes=fold_bytes)


def local_numel(shard: Shard) -> int:
    """Number of elements of a projection that lie on this rank."""
    rows, columns = shard.rows, shard.columns
    return int((rows.stop - rows.start) * (columns.stop - columns.start))


def plan(tier: str, wanted: GoldenNeed, memory: Memory, budget_gib: float | None) -> GoldenPlan:
    """The tier that golden weights go to, within the least of what was measured and what was given.

    Raises:
        ConfigError: `tier` is unknown.
        ModeUnavailable: they fit nowhere that was asked for.
    """
    if tier not in TIERS:
        raise ConfigError(f"golden tier {tier!r}: expected one of {', '.join(TIERS)}")
    if tier == "file":
        return GoldenPlan(tier=tier, budget_bytes=0, reason="asked for")
    has_gpu = memory.device == "cuda"
    given = None if budget_gib is None else int(budget_gib * GIB)
    budgets = {"host": _host_budget(memory, given)}
    budgets["device"] = _device_budget(memory, wanted, given) if has_gpu else budgets["host"]
    if tier != "auto":
        tiers, reason = [tier], "asked for"
    elif not has_gpu:
        tiers, reason = ["host"], "no GPU"
    elif memory.shared_with_trainer:
        tiers, reason = ["host"], "the GPU's free memory is the trainer's"
    else:
        tiers, reason = ["device", "host"], "the GPU is this server's own"
    for candidate in tiers:
        if wanted.num_bytes <= budgets[candidate]:
            if candidate != tiers[0]:
                reason = f"{tiers[0]} had {max(0, budgets[tiers[0]]) / GIB:.1f} GiB for them"
            return GoldenPlan(tier=candidate, budget_bytes=budgets[candidate], reason=reason)
    raise does_not_fit(wanted.num_bytes, budgets[tiers[-1]], tiers[-1])


def _host_budget(memory: Memory, given: int | None) -> int:
    if given is None:
        return int(memory.host_available * HOST_SHARE)
    return min(given, max(0, memory.host_available - _HOST_RESERVE_BYTES))


def _device_budget(memory: Memory, wanted: GoldenNeed, given: int | None) -> int:
    left = memory.device_free - RESERVE_BYTES - wanted.fold_bytes
    return max(0, left if given is None else min(given, left))


def does_not_fit(num_bytes: int, budget: int, tier: str) -> ModeUnavailable:
    """The refusal, with the settings that help."""
    return ModeUnavailable(
        f"golden_does_not_fit: the golden weights of merged mode need {num_bytes / GIB:.3f} GiB per "
        f"worker, the budget is {budget / GIB:.3f} GiB ({tier}); raise --golden-budget-gib if the memory "
        "is there, or use --mode adapter, or --golden-tier file (slow)",
        needed=num_bytes,
        budget=budget,
        code="golden_does_not_fit",
    )
