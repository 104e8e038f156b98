"""What serving a model will take, and whether this machine has it. Reads headers only."""

from __future__ import annotations

import math

from tink_rl import gpus
from tink_rl.gpus import Gpu
from tink_rl.memory_plan import (
    HOST_SHARE,
    GpuSplit,
    MemoryPlan,
    ServePlan,
    cpu_kv_gib,
    gpu_line,
    plan_memory,
    read_shape,
    split_gpu,
)
from tink_rl.tools.doctor.finding import Finding, blocker, bytes_text, note, ok, warning

_GIB = 2**30
_AREA = "memory plan"
_BATCH_SEQUENCES, _BATCH_TOKENS = 4, 1024
"""The smallest batch that a trainer is planned with: README's per_device_train_batch_size."""


def check_memory(model: str, serve: ServePlan) -> list[Finding]:
    """The plan for `model` on this machine, and whether it fits.

    Raises:
        ConfigError: not a model, or not in safetensors.
    """
    plan = plan_memory(read_shape(model), serve)
    if not gpus.has_gpu():
        return [*describe(plan, serve), judge_cpu(plan, available=_cpu_memory())]
    found = gpus.visible_gpus()
    return [*describe(plan, serve), *judge_gpus(plan, serve, found, host=_cpu_memory())]


def describe(plan: MemoryPlan, serve: ServePlan) -> list[Finding]:
    """One line per part of the plan."""
    slots = f"{serve.max_loras} slots of rank {serve.max_lora_rank}: {bytes_text(plan.slots)}"
    one = bytes_text(plan.kv_per_token * plan.max_tokens)
    parts = [f"weights: {bytes_text(plan.weights)}"]
    parts += [f"golden weights (merged mode): {bytes_text(plan.golden)}"] if plan.golden else []
    parts += [slots] if plan.slots else []
    parts.append(f"KV cache: {bytes_text(plan.kv_per_token)} a token, {one} for {plan.max_tokens}")
    return [note(_AREA, part) for part in parts]


# -- on a CPU ---------------------------------------------------------------------------------------


def judge_cpu(plan: MemoryPlan, *, available: int) -> Finding:
    """Whether the plan fits into `available` bytes, and what to leave out if it does not. Pure."""
    kv_needed = plan.kv_per_token * plan.max_tokens
    kv_space = int(cpu_kv_gib() * _GIB)
    needed = plan.fixed + kv_space
    text = f"{bytes_text(needed)} needed, {bytes_text(available)} available"
    if needed > available:
        return blocker(_AREA, f"does not fit: {text}", _smaller(plan, needed - available))
    if kv_space < kv_needed:
        return blocker(
            _AREA,
            f"one sequence of {plan.max_tokens} tokens needs {bytes_text(kv_needed)} of KV cache, "
            f"there are {bytes_text(kv_space)}",
            f"VLLM_CPU_KVCACHE_SPACE={math.ceil(kv_needed / _GIB)}, or a smaller --max-model-len",
        )
    return _fits(text, plan, kv_space)


def _fits(text: str, plan: MemoryPlan, kv_space: int) -> Finding:
    sequences = kv_space // max(1, plan.kv_per_token * plan.max_tokens)
    text += f"; {sequences} sequences of {plan.max_tokens} tokens at once"
    if sequences < 4:
        return warning(_AREA, f"fits: {text}", "a smaller --max-model-len runs more at once")
    return ok(_AREA, f"fits: {text}")


def _smaller(plan: MemoryPlan, excess: int) -> str:
    if plan.golden >= excess and plan.slots:
        return f"tink-rl serve MODEL --mode adapter (saves {bytes_text(plan.golden)})"
    if plan.golden >= excess:
        return "tink-rl serve MODEL --golden-tier file (slow), or --mode adapter"
    return _smaller_on_device(plan, excess)


def _smaller_on_device(plan: MemoryPlan, excess: int) -> str:
    if plan.slots >= excess:
        return "a smaller --max-lora-rank or --max-loras"
    return "a smaller model, --dtype bfloat16, or --tensor-parallel-size over more devices"


def _cpu_memory() -> int:
    import psutil

    return int(psutil.virtual_memory().available)


# -- on GPUs ----------------------------------------------------------------------------------------


def judge_gpus(plan: MemoryPlan, serve: ServePlan, found: list[Gpu], *, host: int) -> list[Finding]:
    """The server's, the golden weights' and the trainer's part, each with its remedy. Pure.

    Args:
        plan: Bytes per worker.
        serve: How the server will be started.
        found: The GPUs that it will see.
        host: Free bytes of the CPU's memory.
    """
    if len(found) < serve.tensor_parallel_size:
        text = f"nvidia-smi tells the memory of {len(found)} visible GPUs"
        fix = (
            f"let the server see {serve.tensor_parallel_size}; parts of a GPU (MIG) are not planned"
        )
        return [(blocker if found else warning)(_AREA, text, fix)]
    used = found[: serve.tensor_parallel_size]
    gpu = min(used, key=lambda gpu: gpu.total_bytes)
    split = split_gpu(plan, serve, gpu.total_bytes)
    findings = [note(_AREA, gpu_line(plan, serve, found)), _server(plan, serve, split)]
    findings += _busy(used, serve)
    findings += _golden(plan, serve, split, host)
    findings += [_trainer(plan, serve, split)] if not serve.alone else []
    if not all(gpu.has_bfloat16 for gpu in used):
        text = f"{gpu.name} computes no bfloat16"
        findings.append(
            warning(
                "gpu", text, "tink-rl serve MODEL --dtype half; the trainer with --fp16, not bf16"
            )
        )
    return findings


def _server(plan: MemoryPlan, serve: ServePlan, split: GpuSplit) -> Finding:
    missing = plan.kv_per_token * plan.max_tokens - split.kv_cache
    text = f"server: {bytes_text(split.server)} of {bytes_text(split.total)} ({serve.share:g})"
    if missing <= 0:
        return _fits(text, plan, split.kv_cache)
    one = f"one sequence of {plan.max_tokens} tokens is short of {bytes_text(missing)}"
    fix = _smaller_on_device(plan, missing)
    if not serve.alone:
        fix = f"the trainer on another GPU and --alone here; {fix}"
    return blocker(_AREA, f"does not fit: {text}, {one}", fix)


def _busy(used: list[Gpu], serve: ServePlan) -> list[Finding]:
    """vLLM does not start where less is free than its share."""
    return [
        blocker(
            _AREA,
            f"GPU {gpu.index}: {bytes_text(gpu.free_bytes)} of {bytes_text(gpu.total_bytes)} are free, "
            f"the server wants {bytes_text(serve.share * gpu.total_bytes)}",
            "start the server before the trainer; stop what nvidia-smi lists; or a smaller "
            "--gpu-memory-utilization",
        )
        for gpu in used
        if gpu.free_bytes < serve.share * gpu.total_bytes
    ]


def _golden(plan: MemoryPlan, serve: ServePlan, split: GpuSplit, host: int) -> list[Finding]:
    text = f"golden weights: {bytes_text(plan.golden)}"
    if split.golden_tier == "host":
        needed, budget = plan.golden * serve.tensor_parallel_size, int(HOST_SHARE * host)
        if needed > budget:
            text = f"{bytes_text(needed)} in the CPU's memory, {bytes_text(budget)} may be taken"
            what = f"does not fit: golden weights: {text}"
            return [blocker(_AREA, what, "--mode adapter, or --golden-tier file (slow)")]
        return [ok(_AREA, f"{text} in the CPU's memory, {bytes_text(budget)} may be taken")]
    if split.golden_tier == "device":
        if split.left < 0:
            return [
                blocker(_AREA, f"does not fit: {text} on the GPU", "--golden-tier host (or auto)")
            ]
        return [ok(_AREA, f"{text} on the GPU, beside vLLM's own share")]
    return []


def _trainer(plan: MemoryPlan, serve: ServePlan, split: GpuSplit) -> Finding:
    sequence = plan.trainer_per_token * _BATCH_TOKENS
    left = split.left - plan.trainer_fixed
    text = (
        f"trainer: {bytes_text(max(0, split.left))} left; base and adapter of rank "
        f"{serve.max_lora_rank} take {bytes_text(plan.trainer_fixed)}"
    )
    if left < _BATCH_SEQUENCES * sequence:
        fix = "the trainer on another GPU and --alone here; a smaller --gpu-memory-utilization; 4-bit base"
        return blocker(_AREA, f"{text}: a batch does not fit", fix)
    batch = 2 ** int(math.log2(left / sequence))
    return ok(_AREA, f"{text}, a batch of {batch} sequences of {_BATCH_TOKENS} tokens fits (about)")
