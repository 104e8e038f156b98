"""What takes the policy from a live PEFT model: as an adapter where A and B say all of it, else whole.

Both kinds of collector do the same four things for a trainer: `collect`, `random_like` and `swapped`
(for the start-up probe), and say what they need.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tink_rl.errors import UnsupportedAdapter
from tink_rl.policy.adapter import AdapterCollector, BaseChangeIsNotLowRank, active_adapter
from tink_rl.policy.fingerprint import checkpoint_index
from tink_rl.policy.peft_names import PeftModel
from tink_rl.policy.sharded import Sharding, sharding_of
from tink_rl.policy.support import WHOLE, Needs, changes_base, model_facts, needs
from tink_rl.types import SyncMode


@dataclass(frozen=True, kw_only=True)
class LiveModel:
    """A PEFT model whose tensors are taken, merged one module at a time, when they are sent."""

    model: PeftModel
    trained: Mapping[str, torch.Tensor]
    """Everything that a publish can differ by: adapter and trained parameters, live."""
    changed: Callable[[], AbstractContextManager[None]] = nullcontext
    """The model holds what is to be published inside this block."""

    def to(self, dtype: torch.dtype) -> LiveModel:
        """The same: its tensors are cast as they are sent."""
        return self

    def digest(self) -> str:
        """Of `trained`: equal digests mean equal policies, because nothing else is written to."""
        from blake3 import blake3

        hasher = blake3()
        with self.changed():
            for name, tensor in sorted(self.trained.items()):
                hasher.update(f"{name}|{tensor.dtype}|{list(tensor.shape)}|".encode())
                data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
                hasher.update(data.numpy().data)
        return str(hasher.hexdigest())


class FullCollector:
    """Takes whole tensors from one live PEFT model, again and again (`full` mode)."""

    def __init__(self, model: PeftModel, name: str, needed: Needs) -> None:
        """Find what training changes.

        Raises:
            UnsupportedAdapter: a quantised base, of which there is no whole tensor to send.
        """
        if getattr(model.get_base_model(), "is_quantized", False):
            raise UnsupportedAdapter(
                f"{', '.join(needed.because)} on a quantised base: its tensors cannot be sent whole; load "
                "the trainer's base unquantised"
            )
        self.needs = needed
        self.dropout = float(getattr(model.peft_config[name], "lora_dropout", 0.0) or 0.0)
        self._model = model
        self._trained = {
            key: parameter
            for key, parameter in model.named_parameters()
            if parameter.requires_grad or name in key.split(".")
        }

    def sharding(self) -> Sharding:
        """Always WHOLE: whole tensors are taken from a model that every process holds whole.

        Raises:
            UnsupportedAdapter: this one is sharded.
        """
        if any(sharding_of(p) is not Sharding.WHOLE for p in self._model.parameters()):
            raise UnsupportedAdapter(
                f"{', '.join(self.needs.because)} needs mode full, which takes whole tensors, and this "
                "model is sharded (FSDP2 or ZeRO-3); use accelerate_configs/ddp.yaml or zero2.yaml"
            )
        return Sharding.WHOLE

    def collect(self, dtype: torch.dtype = torch.float32, *, live: bool = True) -> LiveModel:
        """The model as it is when its tensors are sent."""
        return LiveModel(model=self._model, trained=self._trained)

    def random_like(self, seed: int = 0, std: float = 0.02) -> LiveModel:
        """This model with noise in everything that is trained, as long as it is being published.

        With `std` 0 every LoRA is switched off, and the rest is as it is.
        """
        return LiveModel(
            model=self._model,
            trained=self._trained,
            changed=lambda: self._noise(seed, std),
        )

    @contextmanager
    def swapped(self, synthetic: Any) -> Iterator[None]:
        """Compute with `synthetic` inside the block; the own weights come back bit-exactly."""
        with synthetic.changed():
            yield

    @contextmanager
    def _noise(self, seed: int, std: float) -> Iterator[None]:
        kept = {name: tensor.detach().clone() for name, tensor in self._trained.items()}
        generator = torch.Generator().manual_seed(seed)
        try:
            with torch.no_grad():
                for name, tensor in sorted(self._trained.items()):
                    tensor.copy_(_noisy(name, tensor, std, generator))
            yield
        finally:
            with torch.no_grad():
                for name, tensor in self._trained.items():
                    tensor.copy_(kept[name])


def _noisy(name: str, tensor: torch.Tensor, std: float, generator: torch.Generator) -> torch.Tensor:
    noise = torch.randn(tensor.shape, generator=generator)
    if "lora_A" in name or "lora_embedding_A" in name:
        return noise / math.sqrt(tensor.shape[-1])
    if "lora_B" in name or "lora_embedding_B" in name:
        return noise * std
    return tensor.detach().float().cpu() + noise * std


Collector = AdapterCollector | FullCollector


def collector_for(
    model: PeftModel, base_model: str | Path | None = None, adapter_name: str | None = None
) -> Collector:
    """The collector that `model` needs.

    Args:
        model: A live PEFT model.
        base_model: Directory of the original base; without it an adapter whose initialisation changed
            the base is taken whole.
        adapter_name: Which adapter; None: the active one.

    Raises:
        UnsupportedAdapter: not a PEFT model, or nothing can express it; with the remedy.
    """
    if not hasattr(model, "get_base_model"):
        return AdapterCollector(model)  # says what was expected
    name = adapter_name or active_adapter(model)
    facts = model_facts(model, name)
    needed = needs(facts)
    if needed.refused:
        raise UnsupportedAdapter(
            f"adapter {name!r} cannot be published: {'; '.join(needed.refused)}"
        )
    if SyncMode.ADAPTER not in needed.modes:
        return FullCollector(model, name, needed)
    index = checkpoint_index(base_model) if base_model and changes_base(facts) else None
    if changes_base(facts) and index is None:
        because = "an initialisation that changed the base, whose original is not known"
        return FullCollector(model, name, Needs(modes=WHOLE, because=(because,)))
    try:
        return AdapterCollector(model, name, base=index)
    except BaseChangeIsNotLowRank as error:
        return FullCollector(model, name, Needs(modes=WHOLE, because=(str(error),)))
