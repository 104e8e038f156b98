"""vLLM's linear layers in one process without an engine, in the layout that they have on a GPU.

On a CPU vLLM packs a weight for oneDNN and empties the tensor; on a GPU the layer computes with the very
tensor that was loaded, and a captured graph knows its address. `as_on_gpu` makes these layers as there.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

WIDTH, HEADS, KV_HEADS, HEAD = 64, 4, 2, 16
QKV, GATE_UP, OUT = (
    "model.layers.0.qkv_proj",
    "model.layers.0.gate_up_proj",
    "model.layers.0.o_proj",
)
PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


class _NoCpu:
    """vLLM's platform, which says that it is no CPU."""

    def __init__(self, platform: Any) -> None:
        self._platform = platform

    def is_cpu(self) -> bool:
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._platform, name)


@contextlib.contextmanager
def as_on_gpu() -> Iterator[None]:
    """Linear layers keep their weights as they were loaded."""
    from vllm.model_executor.layers import linear

    platform = linear.current_platform
    linear.current_platform = _NoCpu(platform)  # type: ignore[assignment]
    try:
        yield
    finally:
        linear.current_platform = platform  # type: ignore[assignment]


@contextlib.contextmanager
def one_rank() -> Iterator[Any]:
    """vLLM's parallel state for one process; gives a `VllmConfig`."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state

    config = VllmConfig()
    with tempfile.TemporaryDirectory() as folder, set_current_vllm_config(config):
        parallel_state.init_distributed_environment(1, 0, f"file://{folder}/meet", 0, "gloo")
        parallel_state.initialize_model_parallel()
        try:
            yield config
        finally:
            parallel_state.destroy_model_parallel()
            parallel_state.destroy_distributed_environment()


class Block(nn.Module):
    """The linear layers of one attention block, with a bias on q, k and v."""

    packed_modules_mapping = PACKED

    def __init__(self, dtype: torch.dtype) -> None:
        from vllm.model_executor.layers.linear import (
            MergedColumnParallelLinear,
            QKVParallelLinear,
            RowParallelLinear,
        )

        super().__init__()
        layer = nn.Module()
        options: dict[str, Any] = {"params_dtype": dtype}
        layer.qkv_proj = QKVParallelLinear(WIDTH, HEAD, HEADS, KV_HEADS, bias=True, **options)
        layer.gate_up_proj = MergedColumnParallelLinear(WIDTH, [96, 96], bias=False, **options)
        layer.o_proj = RowParallelLinear(HEADS * HEAD, WIDTH, bias=False, **options)
        self.model = nn.Module()
        self.model.layers = nn.ModuleList([layer])


class DictGolden:
    """Golden weights that lie in a dict by the checkpoint's names."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        self.weights = weights

    def weight(self, shard: Any) -> torch.Tensor:
        """See `GoldenWeights.weight`."""
        return self.weights[shard.name][shard.rows, shard.columns]


def load(model: nn.Module, layers: Any, seed: int = 0) -> dict[str, torch.Tensor]:
    """Load random weights as vLLM does at start; by the checkpoint's names."""
    from vllm.model_executor.model_loader.reload import record_metadata_for_reloading

    record_metadata_for_reloading(model)
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in layers.values():
        module: Any = layer.module
        for shard in layer.shards:
            whole = torch.randn(shard.shape, generator=generator).to(module.weight.dtype)
            weights[shard.name] = whole
            extra = () if shard.shard_id is None else (shard.shard_id,)
            module.weight.weight_loader(module.weight, whole, *extra)
        if module.bias is not None:
            module.bias.data.normal_(generator=generator)
        module.quant_method.process_weights_after_loading(module)
    return weights


def adapter(layers: Any, *names: str, rank: int = 4, seed: int = 1) -> dict[str, torch.Tensor]:
    """A random packet for the projections whose name ends with one of `names`; in fp32."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in layers.values():
        for shard in layer.shards:
            if shard.name.endswith(names):
                out, width = shard.shape
                a, b = (
                    torch.randn(rank, width, generator=generator),
                    torch.randn(out, rank, generator=generator),
                )
                tensors[f"{shard.name}.lora_A.weight"] = a * 0.1
                tensors[f"{shard.name}.lora_B.weight"] = b * 0.1
    return tensors


def exact(
    layer: Any, weights: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor]
) -> torch.Tensor:
    """The fused weight that golden + B·A makes, in fp64."""
    parts = []
    for shard in layer.shards:
        whole = weights[shard.name].double()
        if f"{shard.name}.lora_A.weight" in tensors:
            a, b = (tensors[f"{shard.name}.lora_{x}.weight"].double() for x in "AB")
            whole = whole + b @ a
        parts.append(whole)
    return torch.cat(parts)


def expected(
    layer: Any, weights: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor]
) -> torch.Tensor:
    """`exact`, rounded once."""
    return exact(layer, weights, tensors).to(weights[layer.shards[0].name].dtype)


def magnitude(layer: Any, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """|B|·|A|, in fp64: what the errors of A and B are relative to."""
    zeros = {shard.name: torch.zeros(shard.shape) for shard in layer.shards}
    return exact(layer, zeros, {name: t.abs() for name, t in tensors.items()})
