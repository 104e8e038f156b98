"""Parameters that no process holds whole: FSDP2's DTensors and DeepSpeed ZeRO-3's partitions.

Reading or writing one is a collective: every rank must do it, with the same parameters in the same
order. Only the parameters that are asked for are gathered, so that an adapter costs an adapter's memory
and not its base's.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Any

import torch

from tink_rl.errors import ConfigError


class Sharding(StrEnum):
    """How a parameter is spread over the ranks."""

    WHOLE = "whole"
    DTENSOR = "dtensor"
    """FSDP2 (`fully_shard`)."""
    ZERO3 = "zero3"
    """DeepSpeed, `zero_stage: 3`."""


def sharding_of(parameter: torch.Tensor) -> Sharding:
    """How this parameter is spread at this moment."""
    if hasattr(parameter, "ds_id"):
        return Sharding.ZERO3
    return Sharding.DTENSOR if hasattr(parameter, "full_tensor") else Sharding.WHOLE


def refuse_flat_parameters(model: Any) -> None:
    """Raise if FSDP1 wraps `model`: it hides the adapter in flat parameters.

    Raises:
        ConfigError: `fsdp_version: 1`.
    """
    if any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules()):
        raise ConfigError(
            "the model is wrapped by FSDP1, which flattens adapter and base into one parameter; set "
            "fsdp_version: 2, as accelerate_configs/fsdp2.yaml does"
        )


def reshard(model: Any) -> None:
    """Let every FSDP2 module hold its shards again: after a forward the root keeps whole tensors."""
    if not hasattr(model, "reshard"):
        return  # accelerate makes the root a unit too
    for module in model.modules():
        if hasattr(module, "reshard") and hasattr(module, "unshard"):
            module.reshard()


@torch.no_grad()
def read_whole(parameters: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The whole value of each parameter, detached. Every rank must call it.

    What was whole is the parameter's own memory; what was sharded is a copy.
    """
    partitioned = [p for p in parameters if sharding_of(p) is Sharding.ZERO3]
    if partitioned:
        return _read_zero3(parameters, partitioned)
    # A DTensor knows its mesh; full_tensor() gathers it there.
    return [
        p.full_tensor().detach() if sharding_of(p) is Sharding.DTENSOR else p.detach()  # type: ignore[attr-defined]
        for p in parameters
    ]


def _read_zero3(
    parameters: Sequence[torch.Tensor], partitioned: list[torch.Tensor]
) -> list[torch.Tensor]:
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned):
        # They are emptied again at the end of the block.
        return [p.detach().clone() for p in parameters]


@torch.no_grad()
def write_whole(parameters: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
    """Set each parameter to the whole value, in place. Every rank must call it, with the same values."""
    partitioned = [p for p in parameters if sharding_of(p) is Sharding.ZERO3]
    if partitioned:
        _write_zero3(parameters, values, partitioned)
        return
    for parameter, value in zip(parameters, values, strict=True):
        if sharding_of(parameter) is Sharding.DTENSOR:
            _write_dtensor(parameter, value)
        else:
            parameter.copy_(value)


def _write_dtensor(parameter: Any, value: torch.Tensor) -> None:
    from torch.distributed.tensor import distribute_tensor

    local = value.to(parameter.device, parameter.dtype)
    # Every rank has the whole value: it cuts its own shard, nothing is sent.
    shard = distribute_tensor(
        local, parameter.device_mesh, parameter.placements, src_data_rank=None
    )
    parameter.to_local().copy_(shard.to_local())


def _write_zero3(
    parameters: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    partitioned: list[torch.Tensor],
) -> None:
    import deepspeed

    # At the end of the block rank 0's values are sent to all, which cut their partitions from them.
    with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0):
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)
