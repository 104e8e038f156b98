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
import torch.distributed as dist

from tink_rl.errors import ConfigError
from tink_rl.policy.peft_names import BaseModel


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


def refuse_flat_parameters(model: BaseModel) -> None:
    """Raise if FSDP1 wraps `model`: it hides the adapter in flat parameters.

    Raises:
        ConfigError: `fsdp_version: 1`.
    """
    if any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules()):
        raise ConfigError(
            "the model is wrapped by FSDP1, which flattens adapter and base into one parameter; set "
            "fsdp_version: 2, as accelerate_configs/fsdp2.yaml does"
        )


def reshard(model: BaseModel) -> None:
    """Let every FSDP2 module hold its shards again: after a forward the root keeps whole tensors."""
    if not hasattr(model, "reshard"):
        return  # accelerate makes the root a unit too
    for module in model.modules():
        if hasattr(module, "reshard") and hasattr(module, "unshard"):
            module.reshard()


def whole_shape(parameter: Any) -> tuple[int, ...]:
    """Shape of the whole parameter, of which this rank may hold a part, or packed values."""
    if sharding_of(parameter) is Sharding.ZERO3:
        return tuple(parameter.ds_shape)
    state = getattr(parameter, "quant_state", None)
    return tuple(state.shape if state is not None else parameter.shape)


def own_storages(model: BaseModel) -> list[torch.Tensor]:
    """What this rank holds of everything that is trained; a forward computes with what is written there.

    Lets every module hold its shards again: FSDP2's root, and ZeRO-3's small parameters, stay whole after
    a forward. Sends nothing, and is in the same order on every rank.
    """
    reshard(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    partitioned: list[Any] = [p for p in trained if sharding_of(p) is Sharding.ZERO3]
    if partitioned:
        partitioned[0].partition(param_list=partitioned)
    return [_own_storage(parameter) for parameter in trained]


def _own_storage(parameter: Any) -> torch.Tensor:
    sharding = sharding_of(parameter)
    if sharding is Sharding.ZERO3:
        own: torch.Tensor = parameter.ds_tensor
        return own.detach()
    local: torch.Tensor = parameter.to_local() if sharding is Sharding.DTENSOR else parameter
    return local.detach()


def own_part(parameter: Any) -> tuple[torch.Tensor, int] | None:
    """What this rank holds of a parameter, flat, and the index of its first element in the whole.

    None where it does not hold one piece of the flat whole (columns, several dimensions, another place);
    that is so on every rank, which then can read it whole together.
    """
    sharding = sharding_of(parameter)
    if sharding is Sharding.WHOLE:
        return parameter.detach().reshape(-1), 0
    if sharding is Sharding.ZERO3:
        return _own_partition(parameter)
    if all(placement.is_replicate() for placement in parameter.placements):
        return parameter.to_local().detach().reshape(-1), 0
    dim = _dim_that_cuts_rows(parameter.placements)
    if dim is None:
        return None
    rows, mesh = parameter.shape[0], parameter.device_mesh
    first = min(mesh.get_local_rank(dim) * -(-rows // mesh.size(dim)), rows)
    width = parameter.numel() // rows if rows else 0
    return parameter.to_local().detach().reshape(-1), first * width


def _own_partition(parameter: Any) -> tuple[torch.Tensor, int] | None:
    part = parameter.ds_tensor
    if not part.is_floating_point() or part.numel() == 0:
        return None  # quantised, or swapped out to a disk
    first = dist.get_rank(parameter.ds_process_group) * part.numel()
    num_own = max(0, min(part.numel(), parameter.ds_numel - first))  # the last ones are padded
    return part.detach().reshape(-1)[:num_own], min(first, parameter.ds_numel)


@torch.no_grad()
def read_whole(parameters: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The whole value of each parameter, detached. Every rank must call it.

    What was whole is the parameter's own memory; what was sharded is a copy.
    """
    partitioned = [p for p in parameters if sharding_of(p) is Sharding.ZERO3]
    if partitioned:
        return _read_zero3(parameters, partitioned)
    found = [p.detach() for p in parameters]
    spread = [i for i, p in enumerate(parameters) if sharding_of(p) is Sharding.DTENSOR]
    for i, whole in zip(spread, _read_dtensors([parameters[i] for i in spread]), strict=True):
        found[i] = whole
    return found


def _read_dtensors(parameters: Sequence[Any]) -> list[torch.Tensor]:
    """One all-gather for all that are cut by rows alike; full_tensor() for any other.

    An all-gather each costs its latency once a tensor: 28 of them took two processes on two cores 21 ms
    over gloo, one of all 1.4 ms.
    """
    alike: dict[Any, list[int]] = {}
    for i, p in enumerate(parameters):
        alike.setdefault((p.device_mesh, p.placements, p.dtype), []).append(i)
    found: dict[int, torch.Tensor] = {}
    for (mesh, placements, _), members in alike.items():
        dim = _dim_that_cuts_rows(placements)
        if dim is None:
            found |= {i: parameters[i].full_tensor().detach() for i in members}
        else:
            rows = _gather_rows([parameters[i] for i in members], mesh.get_group(dim))
            found |= dict(zip(members, rows, strict=True))
    return [found[i] for i in range(len(parameters))]


def _dim_that_cuts_rows(placements: Sequence[Any]) -> int | None:
    """The one dimension of the mesh that cuts dimension 0, where no other one cuts anything."""
    from torch.distributed.tensor import Shard

    cuts = [dim for dim, placement in enumerate(placements) if not placement.is_replicate()]
    # The type itself: a strided shard, as with tensor parallel, lays its rows out otherwise.
    is_rows = len(cuts) == 1 and type(placements[cuts[0]]) is Shard and placements[cuts[0]].dim == 0
    return cuts[0] if is_rows else None


def _gather_rows(parameters: Sequence[Any], group: dist.ProcessGroup) -> list[torch.Tensor]:
    """Whole values of DTensors of one dtype, whose rows `group` holds as `torch.chunk` cuts them."""
    num_ranks = dist.get_world_size(group)
    shards = []
    for p in parameters:
        local = p.to_local().detach()
        num_missing = -(-p.shape[0] // num_ranks) - local.shape[0]  # the last ranks may hold fewer
        padding = local.new_zeros(num_missing, *p.shape[1:])
        shards.append(torch.cat([local, padding]).flatten())
    mine = torch.cat(shards)
    gathered = mine.new_empty(num_ranks * len(mine))
    dist.all_gather_into_tensor(gathered, mine, group=group)
    parts = torch.split(gathered.view(num_ranks, -1), [len(s) for s in shards], dim=1)
    return [
        part.reshape(-1, *p.shape[1:])[: p.shape[0]]
        for part, p in zip(parts, parameters, strict=True)
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
