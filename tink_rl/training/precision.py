"""How exactly a forward pass is computed: without autocast and TF32, or as if it were rounded to a dtype.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from tink_rl.policy.peft_names import PeftModel
from tink_rl.publish.probe_rules import coarser, unit_roundoff


@contextmanager
def full_precision(model: PeftModel) -> Iterator[list[str]]:
    """Inside, a forward of `model` runs without autocast and TF32; yields what autocast it stood under.

    A trainer's `forward` enters autocast by itself, so that it can be left only inside of it: where the
    PEFT model calls its base. The list is filled by the forward.
    """
    found: list[str] = []
    inner = model.get_base_model()
    stack = ExitStack()

    def leave_autocast(module: torch.nn.Module, args: object) -> None:
        device = next(module.parameters()).device.type
        if torch.is_autocast_enabled(device):
            found.append(str(torch.get_autocast_dtype(device)).removeprefix("torch."))
        stack.enter_context(torch.autocast(device, enabled=False))

    def come_back(module: torch.nn.Module, args: object, output: object) -> None:
        stack.close()

    before = inner.register_forward_pre_hook(leave_autocast)
    after = inner.register_forward_hook(come_back, always_call=True)
    try:
        with stack, _without_tf32():
            yield found
    finally:
        before.remove()
        after.remove()


@contextmanager
def _without_tf32() -> Iterator[None]:
    backends: Any = torch.backends
    matmuls = (backends.cuda.matmul, backends.mkldnn.matmul)
    kept = [matmul.fp32_precision for matmul in matmuls]
    try:
        for matmul in matmuls:
            matmul.fp32_precision = "ieee"
        yield
    finally:
        for matmul, precision in zip(matmuls, kept, strict=True):
            matmul.fp32_precision = precision


@contextmanager
def noting_dtype(model: PeftModel) -> Iterator[list[str]]:
    """The coarsest format in which a module of `model` answers, once a forward has run."""
    found: list[str] = []

    def note(module: torch.nn.Module, args: object, output: object) -> None:
        if isinstance(output, torch.Tensor) and output.is_floating_point():
            name = str(output.dtype).removeprefix("torch.")
            found[:] = [coarser(name, *found) if found else name]

    with _after_every_module(model, note):
        yield found


@contextmanager
def rounding(model: PeftModel, dtype: str, seed: int = 0) -> Iterator[None]:
    """Inside, what each module of `model` answers is moved at random as if it had been rounded to `dtype`.

    Monte Carlo arithmetic (Parker 1997): how far results scatter is what rounding does to them *at these
    weights*, whatever the arithmetic was. The global random state is left alone.
    """
    unit = unit_roundoff(dtype)
    generators: dict[torch.device, torch.Generator] = {}

    def move(module: torch.nn.Module, args: object, output: object) -> Any:
        if not (isinstance(output, torch.Tensor) and output.is_floating_point()):
            return None
        device = output.device
        if device not in generators:
            generators[device] = torch.Generator(device).manual_seed(seed)
        noise = torch.empty(output.shape, device=device).uniform_(
            -unit, unit, generator=generators[device]
        )
        return (output * (1 + noise)).to(output.dtype)

    with _after_every_module(model, move):
        yield


@contextmanager
def _after_every_module(model: PeftModel, hook: Callable[..., Any]) -> Iterator[None]:
    handles = [module.register_forward_hook(hook) for module in model.modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
