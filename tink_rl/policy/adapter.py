"""The adapter as data: taken from a live PEFT model or a PEFT directory, and normalised.

Normalised means: each module's own scaling (`alpha/r`, rsLoRA's `alpha/sqrt(r)`, `alpha_pattern`,
`rank_pattern`) is folded into B, so that W + B·A is right for every module. vLLM ignores the patterns
in silence; here nothing is left for it to ignore.

Shapes: `lora_A` is `[R, in]`, `lora_B` is `[out, R]`; R may differ between modules.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tink_rl.errors import NonFiniteWeights, UnsupportedAdapter, WeightOutOfRange
from tink_rl.policy.packet import PacketHeader, unpack
from tink_rl.policy.peft_dir import PREFIX, open_peft_dir
from tink_rl.policy.support import check_supported

MAX_ABS_WEIGHT = 1e4
"""Largest magnitude of an adapter weight that is let through. Trained adapters stay below 10; a value
of 1e19 is finite, yet overflows in attention and corrupts other requests of the batch."""


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A normalised adapter.

    Example: `Adapter(tensors={"model.layers.0.self_attn.q_proj.lora_A.weight": [16, 128], ...},
    rank=16)`
    """

    tensors: dict[str, torch.Tensor]
    rank: int
    """Largest rank of any module."""

    @property
    def modules(self) -> list[str]:
        """Names of the adapted modules, sorted."""
        return sorted(
            {name.removesuffix(".lora_A.weight") for name in self.tensors if "lora_A" in name}
        )

    def to(self, dtype: torch.dtype) -> Adapter:
        """The same adapter in another dtype."""
        return Adapter(tensors={k: v.to(dtype) for k, v in self.tensors.items()}, rank=self.rank)


def check_values(tensors: Mapping[str, torch.Tensor], bound: float = MAX_ABS_WEIGHT) -> None:
    """Raise unless every value is finite and at most `bound` in magnitude.

    Raises:
        NonFiniteWeights: a NaN or infinity; names the tensor.
        WeightOutOfRange: a larger value; names the tensor.
    """
    if not tensors:
        return
    # aminmax() reads once, copies nothing and hands a NaN on: two numbers per tensor tell all cases apart.
    extremes = [torch.aminmax(tensor.detach()) for tensor in tensors.values()]
    magnitudes_N2 = torch.stack([torch.stack((-low, high)).float() for low, high in extremes])
    largest = magnitudes_N2.amax(dim=1).tolist()
    for name, value in zip(tensors, largest, strict=True):
        if not math.isfinite(value):
            raise NonFiniteWeights(
                f"tensor {name!r} holds NaN or infinity; training diverged: lower the learning rate "
                "or clip gradients, and resume from the last checkpoint",
                tensor=name,
            )
        if value > bound:
            raise WeightOutOfRange(
                f"tensor {name!r} holds {value:.3g}, allowed is a magnitude of {bound:g}; training "
                "diverged: lower the learning rate, and resume from the last checkpoint",
                tensor=name,
                given=value,
                expected=bound,
            )


def check_packed(header: PacketHeader, buffer: torch.Tensor, bound: float = MAX_ABS_WEIGHT) -> None:
    """`check_values` of a whole packet in one pass; the tensors are looked at only to name a culprit.

    Raises:
        NonFiniteWeights, WeightOutOfRange: as `check_values`.
    """
    dtypes = {spec.dtype for spec in header.tensors}
    if len(dtypes) == 1:
        low, high = torch.aminmax(buffer.view(getattr(torch, dtypes.pop())))
        if torch.maximum(-low, high).item() <= bound:  # False for a NaN
            return
    check_values(unpack(header, buffer), bound)


@dataclass(frozen=True, kw_only=True)
class _Module:
    """One adapted module of a live model."""

    name: str
    lora_a: torch.nn.Parameter
    lora_b: torch.nn.Parameter
    layer: Any


class AdapterCollector:
    """Takes the adapter from one live PEFT model, again and again.

    Construct it after PEFT wrapped the model; the walk over the modules happens once.
    """

    def __init__(self, model: Any, adapter_name: str | None = None) -> None:
        """Find the LoRA modules of `model` and check that they can be published.

        Raises:
            UnsupportedAdapter: not a PEFT model, or it uses a feature that cannot be expressed.
        """
        if not hasattr(model, "get_base_model"):
            raise UnsupportedAdapter(
                f"{type(model).__name__} is not a PEFT model; pass peft_config=LoraConfig(...) to the "
                "trainer, or wrap the model with get_peft_model"
            )
        self._name = adapter_name or _active_adapter(model)
        config = model.peft_config[self._name]
        check_supported(config.to_dict(), where=f"adapter {self._name!r}")
        self._modules = list(_find_modules(model, self._name))
        if not self._modules:
            raise UnsupportedAdapter(
                f"adapter {self._name!r} has no LoRA module; set target_modules"
            )
        self.rank = max(module.lora_a.shape[0] for module in self._modules)
        self.dropout = float(config.lora_dropout or 0.0)

    @torch.no_grad()
    def collect(self, dtype: torch.dtype = torch.float32, *, live: bool = False) -> Adapter:
        """The adapter as it is now, detached, in `dtype`; the scaling is applied in fp32.

        With `live`, tensors that need no conversion are views of the model's own: right for who packs
        them before the next optimizer step, and without a copy.

        Raises:
            UnsupportedAdapter: the adapter is merged into the base at this moment.
        """
        tensors = {}
        for module in self._modules:
            if module.layer.merged:
                raise UnsupportedAdapter(
                    f"{module.name} is merged into the base; call unmerge_adapter() before a publish"
                )
            scaling = float(module.layer.scaling[self._name])
            tensors[f"{module.name}.lora_A.weight"] = module.lora_a.detach().to(
                dtype, copy=not live
            )
            lora_b = module.lora_b.detach()
            if scaling != 1.0 or not live:
                lora_b = lora_b.float() * scaling
            tensors[f"{module.name}.lora_B.weight"] = lora_b.to(dtype)
        return Adapter(tensors=tensors, rank=self.rank)

    @torch.no_grad()
    def random_like(self, seed: int = 0, std: float = 0.02) -> Adapter:
        """An adapter of this shape that is nowhere zero: A ~ N(0, 1/in), B ~ N(0, std²); on the CPU.

        A fresh LoRA equals its base (B = 0), so only such a one can show that versions are applied.
        """
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for module in self._modules:
            a, b = module.lora_a, module.lora_b
            tensors[f"{module.name}.lora_A.weight"] = torch.randn(
                a.shape, generator=generator
            ) / math.sqrt(a.shape[1])
            tensors[f"{module.name}.lora_B.weight"] = (
                torch.randn(b.shape, generator=generator) * std
            )
        return Adapter(tensors=tensors, rank=self.rank)

    @contextmanager
    def swapped(self, adapter: Adapter) -> Iterator[None]:
        """Compute with `adapter` (normalised) inside the block; the own weights come back bit-exactly."""
        kept = [(m, m.lora_a.detach().clone(), m.lora_b.detach().clone()) for m in self._modules]
        try:
            with torch.no_grad():
                for module in self._modules:
                    scaling = float(module.layer.scaling[self._name])
                    module.lora_a.copy_(adapter.tensors[f"{module.name}.lora_A.weight"])
                    module.lora_b.copy_(adapter.tensors[f"{module.name}.lora_B.weight"] / scaling)
            yield
        finally:
            with torch.no_grad():
                for module, lora_a, lora_b in kept:
                    module.lora_a.copy_(lora_a)
                    module.lora_b.copy_(lora_b)


def from_peft_model(
    model: Any, adapter_name: str | None = None, dtype: torch.dtype = torch.float32
) -> Adapter:
    """The adapter of a live PEFT model; see `AdapterCollector`."""
    return AdapterCollector(model, adapter_name).collect(dtype)


def _active_adapter(model: Any) -> str:
    active = list(model.active_adapters)
    if len(active) != 1:
        raise UnsupportedAdapter(
            f"{len(active)} adapters are active ({active}), expected one; call set_adapter(NAME)"
        )
    return str(active[0])


def _find_modules(model: Any, adapter: str) -> Iterator[_Module]:
    for name, layer in model.named_modules():
        if adapter in (getattr(layer, "lora_embedding_A", None) or {}):
            raise UnsupportedAdapter(
                f"{name}: LoRA on an embedding; leave it out of target_modules"
            )
        if adapter not in (getattr(layer, "lora_A", None) or {}):
            continue
        short = name.removeprefix(PREFIX)
        if short.rpartition(".")[2] in ("lm_head", "embed_out"):
            raise UnsupportedAdapter(f"{short}: LoRA on the head; leave it out of target_modules")
        yield _Module(
            name=short,
            lora_a=layer.lora_A[adapter].weight,
            lora_b=layer.lora_B[adapter].weight,
            layer=layer,
        )


def from_peft_dir(path: str | Path, dtype: torch.dtype = torch.float32) -> Adapter:
    """The adapter of a PEFT directory (`adapter_config.json`, `adapter_model.safetensors`).

    Raises:
        AdapterPathMissing: no such directory.
        AdapterFilesInvalid: damaged, pickled, or tensors that do not fit the config.
        UnsupportedAdapter: it uses a feature that cannot be expressed.
    """
    tensors: dict[str, torch.Tensor] = {}
    with open_peft_dir(path) as source:
        for module in source.modules:
            lora_a, lora_b = source.read(module)
            tensors[f"{module.name}.lora_A.weight"] = lora_a.to(dtype)
            tensors[f"{module.name}.lora_B.weight"] = lora_b.to(dtype)
        source.check_unchanged()
        return Adapter(tensors=tensors, rank=source.rank)
