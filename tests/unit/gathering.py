"""What each rank of `test_sharded.py` does; imports little, because every rank pays for it."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from tink_rl.policy import sharded

CASES = {
    "rows": ((4,), [Shard(0)]),
    "rows, every row twice": ((2, 2), [Replicate(), Shard(0)]),
    "columns": ((4,), [Shard(1)]),
    "rows and columns": ((2, 2), [Shard(0), Shard(1)]),
}
SHAPES = [(8, 6), (5, 6), (1, 6), (97, 4), (16, 4, 4)]
"""Rows that four ranks hold alike, that they do not, and that some hold none of."""


def read_on(rank: int, num_ranks: int, store: str) -> None:
    """Read a mixture of tensors on every rank, and compare each with what was cut."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, num_ranks), rank=rank, world_size=num_ranks
    )
    for name, (mesh_shape, placements) in CASES.items():
        mesh = init_device_mesh("cpu", mesh_shape)
        wholes = [
            torch.randn(shape, generator=torch.Generator().manual_seed(i)).to(dtype)
            for i, shape in enumerate(SHAPES)
            for dtype in (torch.float32, torch.bfloat16)
        ]
        cut = [distribute_tensor(whole, mesh, placements) for whole in wholes]
        plain = torch.full((3,), float(rank))
        *found, same = sharded.read_whole([*cut, plain])
        for whole, read in zip(wholes, found, strict=True):
            assert type(read) is torch.Tensor and read.dtype == whole.dtype
            assert torch.equal(read, whole), (name, whole.shape)
        assert same.data_ptr() == plain.data_ptr()
        for whole, shard in zip(wholes, cut, strict=True):
            _assert_own_part(whole, shard, is_one_piece="columns" not in name)
    dist.destroy_process_group()


def _assert_own_part(whole: torch.Tensor, shard: torch.Tensor, *, is_one_piece: bool) -> None:
    assert sharded.whole_shape(shard) == tuple(whole.shape)
    own = sharded.own_part(shard)
    assert (own is not None) == is_one_piece
    if own is not None:
        part, begin = own
        assert torch.equal(part, whole.reshape(-1)[begin : begin + part.numel()])
