"""What vLLM's layerwise reload wants around it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def reloading(vllm_config: Any, device: torch.device) -> Iterator[None]:
    """vLLM's config is the current one, and tensors that are made lie on `device`.

    Where that is the default already, nothing says so again: torch would look at every call of it. Of
    200 folds of the tiny model on a CPU, half of them either way, those took 21.8 ms with, 18.5 without.
    """
    from tink_rl.server.vllm_names import set_current_vllm_config

    with contextlib.ExitStack() as stack:
        stack.enter_context(set_current_vllm_config(vllm_config))
        if torch.get_default_device() != device:
            stack.enter_context(device)
        yield
