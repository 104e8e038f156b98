"""What the launcher assumes of vLLM's and TRL's sources for GPUs, which are in the CPU wheel too."""

from __future__ import annotations

import ast
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests import vllm_sources
from tink_rl import memory_plan

VLLM = vllm_sources.folder() or pytest.importorskip("vllm")


def asserted(function, name):
    """The dtypes that `assert NAME.dtype in [...]` of a function allows."""
    for node in ast.walk(function):
        test = node.test if isinstance(node, ast.Assert) else None
        is_in = isinstance(test, ast.Compare) and isinstance(test.ops[0], ast.In)
        if is_in and ast.unparse(test.left) == f"{name}.dtype":
            yield {ast.unparse(e) for e in test.comparators[0].elts}


@pytest.mark.parametrize(
    ("file", "function", "names"),
    [
        ("lora_shrink_op.py", "_lora_shrink", ("inputs", "weight")),
        ("lora_expand_op.py", "_lora_expand", ("weight",)),
    ],
)
def test_vllms_kernels_for_slots_still_take_16_bits_only(file, function, names):
    tree = ast.parse((VLLM / "lora/ops/triton_ops" / file).read_text())
    [found] = [n for n in ast.walk(tree) if getattr(n, "name", "") == function]
    for name in names:
        assert list(asserted(found, name)) == [{"torch.float16", "torch.bfloat16"}]


def test_vllms_own_share_of_a_gpu_is_the_one_that_is_planned():
    tree = ast.parse((VLLM / "config/cache.py").read_text())
    [share] = [
        keyword.value.value
        for node in ast.walk(tree)
        if isinstance(node, ast.AnnAssign)
        and ast.unparse(node.target) == "gpu_memory_utilization"
        and isinstance(node.value, ast.Call)
        for keyword in node.value.keywords
        if keyword.arg == "default"
    ]
    assert share == memory_plan.ALONE_SHARE


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("v1/engine/core.py", "Initializing a V1 LLM engine"),
        ("v1/worker/gpu/model_runner.py", "Graph capturing finished"),
        ("v1/worker/gpu/cudagraph_utils.py", "Capturing CUDA graphs"),
        ("v1/worker/gpu/model_runner.py", "Loading model from scratch"),
        ("v1/worker/gpu_worker.py", "Available KV cache memory"),
        ("v1/core/kv_cache_utils.py", "KV cache size: %s tokens"),
        ("compilation/backends.py", "for vLLM's torch.compile"),
        ("compilation/backends.py", "Dynamo bytecode transform"),
        ("compilation/backends.py", "Compiling a graph for"),
        ("compilation/monitor.py", "torch.compile took"),
        ("model_executor/model_loader/weight_utils.py", "checkpoint shards"),
    ],
)
def test_words_of_the_log_that_tell_a_stage_are_still_written(file, text):
    assert text in (VLLM / file).read_text()


def test_trl_still_spreads_a_base_over_all_gpus_unless_it_is_told_otherwise():
    trl = Path(find_spec("trl").submodule_search_locations[0])
    source = (trl / "trainer/utils.py").read_text()
    assert (
        'kwargs["device_map"] = None if PartialState().device.type in ("cpu", "mps") else "auto"'
        in source
    )


def test_trl_scores_completions_without_whole_logits():
    """What lets the plan count activations only: [tokens, vocabulary] is never there."""
    trl = Path(find_spec("trl").submodule_search_locations[0])
    for name in ("grpo_trainer.py", "rloo_trainer.py"):
        source = (trl / "trainer" / name).read_text()
        assert "fused_lm_head=True" in source and "add_fused_lm_head(" in source
