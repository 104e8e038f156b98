"""What serving a model will take: weights, golden weights, LoRA slots, KV cache. Reads headers only."""

from __future__ import annotations

import json
import math
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tink_rl import placement
from tink_rl.doctor.finding import Finding, blocker, bytes_text, note, ok, warning
from tink_rl.policy.fingerprint import checkpoint_index
from tink_rl.policy.model_dir import local_model_dir

_ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
_GIB = 2**30
_CPU_KV_GIB = 1.0
"""What `tink-rl serve` gives the KV cache on a CPU, unless VLLM_CPU_KVCACHE_SPACE says otherwise."""
_MAX_PLANNED_TOKENS = 4096
_SHARED_GPU, _ALONE_GPU = 0.45, 0.9


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What the plan needs to know of a model.

    Example: `ModelShape(max_positions=32768, num_layers=28, num_kv_heads=2, head_dim=128,
    dtype="bfloat16", num_weights=1_543_714_304, linear_shapes=[(1536, 1536), ...])`
    """

    max_positions: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    num_weights: int
    linear_shapes: list[tuple[int, int]]
    """Of the linear layers inside the decoder, (out, in): what golden weights and slots cover."""


@dataclass(frozen=True, kw_only=True)
class ServePlan:
    """The settings of `tink-rl serve` that decide about memory."""

    mode: str = "both"
    max_lora_rank: int = 32
    max_loras: int = 4
    max_model_len: int | None = None
    """None: the model's, but at most 4096."""
    dtype: str = "auto"
    tensor_parallel_size: int = 1
    alone: bool = False


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes per worker."""

    weights: int
    golden: int
    slots: int
    kv_per_token: int
    max_tokens: int
    """Prompt and completion of one sequence."""

    @property
    def fixed(self) -> int:
        """All but the KV cache."""
        return self.weights + self.golden + self.slots


def read_shape(model: str | Path) -> ModelShape:
    """The shape of a model directory (or cached hub id).

    Raises:
        ConfigError: not a model, or not in safetensors.
    """
    directory = local_model_dir(model)
    index = checkpoint_index(directory)
    config: dict[str, Any] = json.loads((directory / "config.json").read_text())
    text = {**config, **(config.get("text_config") or {})}
    heads = int(text["num_attention_heads"])
    return ModelShape(
        max_positions=int(text.get("max_position_embeddings") or _MAX_PLANNED_TOKENS),
        num_layers=int(text["num_hidden_layers"]),
        num_kv_heads=int(text.get("num_key_value_heads") or heads),
        head_dim=int(text.get("head_dim") or text["hidden_size"] // heads),
        dtype=str(text.get("dtype") or text.get("torch_dtype") or "float32"),
        num_weights=sum(math.prod(entry.shape) for entry in index.values()),
        linear_shapes=[
            (entry.shape[0], entry.shape[1])
            for name, entry in index.items()
            if len(entry.shape) == 2 and ".layers." in name and name.endswith(".weight")
        ],
    )


def plan_memory(shape: ModelShape, serve: ServePlan) -> MemoryPlan:
    """What each worker will hold. Pure."""
    dtype = shape.dtype if serve.dtype == "auto" else serve.dtype
    size, workers = _ITEMSIZE.get(dtype, 2), serve.tensor_parallel_size
    linear = sum(math.prod(pair) for pair in shape.linear_shapes)
    adapter = serve.max_lora_rank * sum(sum(pair) for pair in shape.linear_shapes)
    kv_heads = max(1, shape.num_kv_heads // workers)
    return MemoryPlan(
        weights=shape.num_weights * size // workers,
        golden=linear * size // workers if serve.mode in ("merged", "both") else 0,
        slots=serve.max_loras * adapter * size if serve.mode in ("adapter", "both") else 0,
        kv_per_token=2 * shape.num_layers * kv_heads * shape.head_dim * size,
        max_tokens=serve.max_model_len or min(shape.max_positions, _MAX_PLANNED_TOKENS),
    )


def check_memory(model: str, serve: ServePlan) -> list[Finding]:
    """The plan for `model` on this machine, and whether it fits.

    Raises:
        ConfigError: not a model, or not in safetensors.
    """
    plan = plan_memory(read_shape(model), serve)
    on_gpu = placement.has_gpu()
    available = _gpu_memory(serve) if on_gpu else _cpu_memory()
    return [*describe(plan, serve), judge(plan, available=available, on_gpu=on_gpu)]


def describe(plan: MemoryPlan, serve: ServePlan) -> list[Finding]:
    """One line per part of the plan."""
    slots = f"{serve.max_loras} slots of rank {serve.max_lora_rank}: {bytes_text(plan.slots)}"
    one = bytes_text(plan.kv_per_token * plan.max_tokens)
    parts = [f"weights: {bytes_text(plan.weights)}"]
    parts += [f"golden weights (merged mode): {bytes_text(plan.golden)}"] if plan.golden else []
    parts += [slots] if plan.slots else []
    parts.append(f"KV cache: {bytes_text(plan.kv_per_token)} a token, {one} for {plan.max_tokens}")
    return [note("memory plan", part) for part in parts]


def judge(plan: MemoryPlan, *, available: int, on_gpu: bool) -> Finding:
    """Whether the plan fits into `available` bytes, and what to leave out if it does not. Pure."""
    kv_needed = plan.kv_per_token * plan.max_tokens
    kv_space = int(_cpu_kv_gib() * _GIB) if not on_gpu else max(0, available - plan.fixed)
    needed = plan.fixed + (kv_needed if on_gpu else kv_space)
    text = f"{bytes_text(needed)} needed, {bytes_text(available)} available"
    if needed > available:
        return blocker("memory plan", f"does not fit: {text}", _smaller(plan, needed - available))
    if kv_space < kv_needed:
        space = bytes_text(kv_space)
        return blocker(
            "memory plan",
            f"one sequence of {plan.max_tokens} tokens needs {bytes_text(kv_needed)} of KV cache, "
            f"there are {space}",
            f"VLLM_CPU_KVCACHE_SPACE={math.ceil(kv_needed / _GIB)}, or a smaller --max-model-len",
        )
    sequences = kv_space // max(1, kv_needed)
    text += f"; {sequences} sequences of {plan.max_tokens} tokens at once"
    if sequences < 4:
        return warning(
            "memory plan", f"fits: {text}", "a smaller --max-model-len runs more at once"
        )
    return ok("memory plan", f"fits: {text}")


def _smaller(plan: MemoryPlan, excess: int) -> str:
    if plan.golden >= excess and plan.slots:
        return f"tink-rl serve MODEL --mode adapter (saves {bytes_text(plan.golden)})"
    if plan.golden >= excess:
        return "tink-rl serve MODEL --golden-tier file (slow), or --mode adapter"
    if plan.slots >= excess:
        return "a smaller --max-lora-rank or --max-loras"
    return "a smaller model, --dtype bfloat16, or --tensor-parallel-size over more devices"


def _cpu_kv_gib() -> float:
    return float(os.environ.get("VLLM_CPU_KVCACHE_SPACE") or _CPU_KV_GIB)


def _cpu_memory() -> int:
    import psutil

    return int(psutil.virtual_memory().available)


def _gpu_memory(serve: ServePlan) -> int:
    """What the server may take of the smallest visible GPU."""
    line = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    found = subprocess.run(line, capture_output=True, text=True, timeout=30, check=True).stdout
    total = min(int(row) for row in found.split()) * 2**20
    return int(total * (_ALONE_GPU if serve.alone else _SHARED_GPU))
