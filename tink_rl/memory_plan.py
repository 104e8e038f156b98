"""Who takes what of a device: weights, golden weights, LoRA slots, KV cache, trainer. Pure, but `read_shape`.

Sizes follow from shapes; what vLLM needs beside them it measures itself at start, so that part is "about".
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tink_rl.errors import ConfigError
from tink_rl.gpus import Gpu
from tink_rl.policy.fingerprint import checkpoint_index
from tink_rl.policy.model_dir import local_model_dir

SHARED_SHARE, ALONE_SHARE = 0.45, 0.92
"""Of a GPU, the server's: what `tink-rl serve` leaves a trainer, and vLLM's own default."""
HOST_SHARE = 0.5
"""Of the CPU's free memory, what golden weights may take."""
RESERVE_BYTES = 2 * 2**30
"""Left free on a GPU that holds golden weights: vLLM's profiling run does not see every allocation."""
_ITEMSIZE = {"float32": 4, "float": 4, "bfloat16": 2, "float16": 2, "half": 2}
_GIB = 2**30
_MAX_PLANNED_TOKENS = 4096
_ENGINE_BYTES = 3 * _GIB // 2
"""vLLM's activations, CUDA graphs and context: 1-2 GiB for dense models of up to 70B on one GPU."""
_CONTEXT_BYTES = 500_000_000
"""CUDA context and libraries of the trainer's process."""
_FOLD_ITEM_BYTES = 9
"""Temporaries of a fold, per element of the largest fused layer: fp32 sums, casts, loader copies."""
_ADAPTER_STATE_BYTES = 16
"""Per parameter of the adapter in the trainer: fp32 value, gradient, two moments of Adam."""
_KEPT_BYTES = 6
"""Per input and output of the linear layers of the one layer that gradient checkpointing computes again:
saved under bf16 autocast with LoRA (2.75, counted), and the gradients of those."""


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What the plan needs to know of a model.

    Example: `ModelShape(max_positions=32768, num_layers=28, num_kv_heads=2, head_dim=128,
    hidden_size=1536, dtype="bfloat16", num_weights=1_543_714_304, linear_shapes=[(1536, 1536), ...])`
    """

    max_positions: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    dtype: str
    num_weights: int
    linear_shapes: list[tuple[int, int]]
    """Of the linear layers inside the decoder, (out, in): what golden weights and slots cover."""


@dataclass(frozen=True, kw_only=True)
class ServePlan:
    """The settings of `tink-rl serve` that decide about memory."""

    mode: str = "both"
    """`merged`, `adapter` or `both`, each with full mode beside it, or `full` alone."""
    max_lora_rank: int = 32
    max_loras: int = 4
    max_model_len: int | None = None
    """None: the model's; at most 4096 are planned with."""
    dtype: str = "auto"
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float | None = None
    """Share of the GPU; None: 0.45 where a trainer shares it, else vLLM's default (0.92)."""
    shared_with_trainer: bool = True
    """A trainer runs on the same machine: leave it cores, or its share of one GPU (and the golden
    weights out of that)."""
    golden_tier: str = "auto"

    @property
    def alone(self) -> bool:
        """Whether no trainer runs beside it."""
        return not self.shared_with_trainer

    @property
    def share(self) -> float:
        """The server's part of each of its GPUs."""
        if self.gpu_memory_utilization is not None:
            return self.gpu_memory_utilization
        return ALONE_SHARE if self.alone else SHARED_SHARE


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes per worker; the trainer's for one process that holds the whole base, in the served dtype."""

    weights: int
    golden: int
    fold_peak: int
    """Temporaries of a fold on a GPU, kept by the server's allocator afterwards."""
    slots: int
    kv_per_token: int
    max_tokens: int
    """Prompt and completion of one sequence."""
    trainer_fixed: int
    """Base, and the adapter with its gradients and optimizer state."""
    trainer_per_token: int
    """About; of a batch's prompts and completions, with TRL's gradient checkpointing."""

    @property
    def fixed(self) -> int:
        """All that a server on a CPU holds but the KV cache."""
        return self.weights + self.golden + self.slots


@dataclass(frozen=True, kw_only=True)
class GpuSplit:
    """One GPU, divided. `server = weights + slots + kv_cache + engine` (vLLM's own)."""

    total: int
    server: int
    kv_cache: int
    """Negative: the weights alone are more than the server's part."""
    golden_tier: str
    """`device`, `host`, `file`, or "" without merged mode."""
    golden_on_gpu: int
    left: int
    """For a trainer on the same GPU; on a GPU of the server's own, what stays free."""


def split_gpu(plan: MemoryPlan, serve: ServePlan, total: int) -> GpuSplit:
    """Divide a GPU of `total` bytes. Golden weights never come out of a trainer's part by themselves."""
    server = int(total * serve.share)
    free = total - server - (0 if serve.alone else _CONTEXT_BYTES)
    tier = choose_golden_tier(plan, serve, free)
    on_gpu = plan.golden if tier == "device" else 0
    return GpuSplit(
        total=total,
        server=server,
        kv_cache=server - plan.weights - plan.slots - _ENGINE_BYTES,
        golden_tier=tier,
        golden_on_gpu=on_gpu,
        left=free - on_gpu - plan.fold_peak,
    )


def choose_golden_tier(plan: MemoryPlan, serve: ServePlan, free: int) -> str:
    """Where `auto` puts golden weights on a machine with a GPU of which `free` bytes are nobody's."""
    if not plan.golden:
        return ""
    if serve.golden_tier != "auto":
        return serve.golden_tier
    fits = plan.golden + plan.fold_peak <= free - RESERVE_BYTES
    return "device" if serve.alone and fits else "host"


def plan_memory(shape: ModelShape, serve: ServePlan) -> MemoryPlan:
    """What each worker will hold, and a trainer of the same base."""
    # vLLM's `auto` holds what the checkpoint holds, and a float32 one in 16 bits
    size = 2 if serve.dtype == "auto" else _ITEMSIZE.get(serve.dtype, 2)
    workers = serve.tensor_parallel_size
    linear = sum(math.prod(pair) for pair in shape.linear_shapes)
    through = sum(sum(pair) for pair in shape.linear_shapes)
    kv_heads = max(1, shape.num_kv_heads // workers)
    merged, slots = serve.mode in ("merged", "both"), serve.mode in ("adapter", "both")
    # gate and up are one layer in vLLM, and the largest
    largest = 2 * max((math.prod(pair) for pair in shape.linear_shapes), default=0)
    kept = _KEPT_BYTES * through // max(1, shape.num_layers)
    return MemoryPlan(
        weights=shape.num_weights * size // workers,
        golden=linear * size // workers if merged else 0,
        fold_peak=_FOLD_ITEM_BYTES * largest // workers if merged else 0,
        slots=serve.max_loras * serve.max_lora_rank * through * size if slots else 0,
        kv_per_token=2 * shape.num_layers * kv_heads * shape.head_dim * size,
        max_tokens=serve.max_model_len or min(shape.max_positions, _MAX_PLANNED_TOKENS),
        trainer_fixed=size * shape.num_weights
        + serve.max_lora_rank * through * _ADAPTER_STATE_BYTES,
        trainer_per_token=2 * shape.num_layers * shape.hidden_size + kept,
    )


def gpu_line(plan: MemoryPlan, serve: ServePlan, gpus: list[Gpu]) -> str:
    """Who takes what of the server's GPUs, in one line; "" if they are not known."""
    if len(gpus) < serve.tensor_parallel_size:
        return ""
    gpu = min(gpus[: serve.tensor_parallel_size], key=lambda gpu: gpu.total_bytes)
    split = split_gpu(plan, serve, gpu.total_bytes)
    parts = [f"weights {_gib(plan.weights)}"]
    parts += [f"slots {_gib(plan.slots)}"] if plan.slots else []
    parts += [
        f"KV cache {_gib(max(0, split.kv_cache))}",
        f"vLLM itself about {_gib(_ENGINE_BYTES)}",
    ]
    who = f"GPU {gpu.index} ({gpu.name}, {_gib(gpu.total_bytes)})"
    if serve.tensor_parallel_size > 1:
        who = f"each of {serve.tensor_parallel_size} GPUs ({gpu.name}, {_gib(gpu.total_bytes)})"
    text = f"{who}: server {_gib(split.server)} = {' + '.join(parts)}"
    if plan.golden:
        text += f"; golden weights {_gib(plan.golden)} {_WHERE[split.golden_tier]}"
    if serve.alone:
        return f"{text}; {_gib(max(0, split.left))} stay free (--alone: no trainer on this GPU)"
    text += f"; trainer {_gib(max(0, split.left))}"
    if len(gpus) > serve.tensor_parallel_size:
        text += f"; {len(gpus)} GPUs are visible: --alone takes a whole one, with the trainer on another"
    return text


_WHERE = {"device": "on the GPU", "host": "in the CPU's memory", "file": "read from the file"}


def _gib(num_bytes: int) -> str:
    return (
        f"{num_bytes / _GIB:.1f} GiB" if num_bytes > _GIB / 20 else f"{num_bytes / 2**20:.0f} MiB"
    )


# -- the shape of a model -----------------------------------------------------------------------------


def read_shape(model: str | Path, *, revision: str | None = None) -> ModelShape:
    """The shape of a model directory or hub id; of one that is not cached, the Hub's headers only.

    Raises:
        ConfigError: not a model, or not in safetensors.
    """
    try:
        directory = local_model_dir(model, revision=revision)
    except ConfigError:
        if str(model).count("/") != 1 or Path(model).parent.is_dir():
            raise
        return _shape_on_the_hub(str(model), revision)
    index = checkpoint_index(directory)
    config = json.loads((directory / "config.json").read_text())
    return shape_of(config, {name: tuple(entry.shape) for name, entry in index.items()}.items())


def _shape_on_the_hub(model: str, revision: str | None) -> ModelShape:
    import httpx
    from huggingface_hub import get_safetensors_metadata, hf_hub_download
    from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError

    try:
        config = json.loads(
            Path(hf_hub_download(model, "config.json", revision=revision)).read_text()
        )
        files = get_safetensors_metadata(model, revision=revision).files_metadata.values()
    except (OSError, httpx.HTTPError, NotASafetensorsRepoError, SafetensorsParsingError) as error:
        raise ConfigError(
            f"model {model!r}: neither a directory nor in the local hub cache, and the Hub says "
            f"{str(error).splitlines()[0][:200]!r}; check the id, or `hf download {model}` first"
        ) from error
    named = [(name, tuple(t.shape)) for file in files for name, t in file.tensors.items()]
    return shape_of(config, named)


def shape_of(config: dict[str, Any], tensors: Iterable[tuple[str, tuple[int, ...]]]) -> ModelShape:
    """The shape that a config and the checkpoint's tensors, by name and shape, describe."""
    text = {**config, **(config.get("text_config") or {})}
    heads = int(text["num_attention_heads"])
    named = list(tensors)
    return ModelShape(
        max_positions=int(text.get("max_position_embeddings") or _MAX_PLANNED_TOKENS),
        num_layers=int(text["num_hidden_layers"]),
        num_kv_heads=int(text.get("num_key_value_heads") or heads),
        head_dim=int(text.get("head_dim") or text["hidden_size"] // heads),
        hidden_size=int(text["hidden_size"]),
        dtype=str(text.get("dtype") or text.get("torch_dtype") or "float32"),
        num_weights=sum(math.prod(shape) for _, shape in named),
        linear_shapes=[
            (shape[0], shape[1])
            for name, shape in named
            if len(shape) == 2 and ".layers." in name and name.endswith(".weight")
        ],
    )


def cpu_kv_gib() -> float:
    """What the KV cache gets on a CPU: 1 GiB by `tink-rl serve`, unless vLLM's variable says otherwise."""
    return float(os.environ.get("VLLM_CPU_KVCACHE_SPACE") or 1.0)
