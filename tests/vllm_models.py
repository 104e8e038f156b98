"""vLLM's own models in this process, without an engine: what a fold makes of one, layer by layer."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn


@contextlib.contextmanager
def loaded(directory: Path) -> Iterator[Any]:
    """vLLM's model of `directory` in fp32, with its config; leaves nothing behind in vLLM."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model

    environment = dict(os.environ)
    options: dict[str, Any] = {"dtype": "float32", "max_model_len": 256, "enforce_eager": True}
    try:
        with _looked_at_here(), tempfile.TemporaryDirectory() as folder:
            config = EngineArgs(model=str(directory), **options).create_engine_config()
            with set_current_vllm_config(config):
                parallel_state.init_distributed_environment(
                    1, 0, f"file://{folder}/meet", 0, "gloo"
                )
                parallel_state.initialize_model_parallel()
                try:
                    yield SimpleNamespace(model=get_model(vllm_config=config), config=config)
                finally:
                    parallel_state.destroy_model_parallel()
                    parallel_state.destroy_distributed_environment()
    finally:
        os.environ.clear()
        os.environ.update(environment)


@contextlib.contextmanager
def _looked_at_here() -> Iterator[None]:
    """vLLM imports a model's class in a child to ask what it can do, which takes ten seconds; here it does so
    in this process."""
    from vllm.model_executor.models import registry

    lazy: Any = registry._LazyRegisteredModel
    before = lazy.inspect_model_cls
    lazy.inspect_model_cls = lambda self: registry._ModelInfo.from_model_cls(self.load_model_cls())
    try:
        yield
    finally:
        lazy.inspect_model_cls = before


def products(model: nn.Module) -> dict[str, torch.Tensor]:
    """What every linear layer makes of the same numbers, by name; convolutions in their clothes aside."""
    from vllm.model_executor.layers.linear import LinearBase

    found = {}
    for name, module in model.named_modules():
        if isinstance(module, LinearBase) and "conv" not in name.rpartition(".")[2]:
            x = torch.randn(3, module.input_size, generator=torch.Generator().manual_seed(1))
            method: Any = module.quant_method
            found[name] = method.apply(module, x, None)
    return found


def others(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all tensors that are no linear layer's: norms, states, convolutions, and what attention
    makes of its layers' weights."""
    linear = set(products(model))
    return {
        name: tensor.detach().clone()
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
        if name.rpartition(".")[0] not in linear
    }
