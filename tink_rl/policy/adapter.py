"""The adapter as data: taken from a live PEFT model or a PEFT directory, and normalised.

Normalised means: each module's own scaling (`alpha/r`, rsLoRA's `alpha/sqrt(r)`, `alpha_pattern`,
`rank_pattern`) is folded into B, so that W + B·A is right for every module. vLLM ignores the patterns
in silence; here nothing is left for it to ignore.

Shapes: `lora_A` is `[R, in]`, `lora_B` is `[out, R]`; R may differ between modules.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tink_rl.errors import (
    AdapterFilesInvalid,
    NonFiniteWeights,
    UnsupportedAdapter,
    WeightOutOfRange,
)
from tink_rl.policy.sharded import Sharding, read_whole, sharding_of, write_whole
from tink_rl.policy.support import check_supported

MAX_ABS_WEIGHT = 1e4
"""Largest magnitude of an adapter weight that is let through. Trained adapters stay below 10; a value
of 1e19 is finite, yet overflows in attention and corrupts other requests of the batch."""
_PREFIX = "base_model.model."
_MAX_CONFIG_BYTES = 1 << 20


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


@dataclass(frozen=True, kw_only=True)
class _Module:
    """One adapted module of a live model."""

    name: str
    layer: Any
    adapter: str
    shape: tuple[int, int, int]
    """`(in, R, out)`: what a shard does not say."""

    # Looked up at each use: fully_shard puts other parameter objects in their place.
    @property
    def lora_a(self) -> torch.nn.Parameter:
        parameter: torch.nn.Parameter = self.layer.lora_A[self.adapter].weight
        return parameter

    @property
    def lora_b(self) -> torch.nn.Parameter:
        parameter: torch.nn.Parameter = self.layer.lora_B[self.adapter].weight
        return parameter

    @property
    def scaling(self) -> float:
        return float(self.layer.scaling[self.adapter])


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
        self.rank = max(module.shape[1] for module in self._modules)
        self.dropout = float(config.lora_dropout or 0.0)

    @property
    def sharding(self) -> Sharding:
        """How the ranks share the adapter now; unless WHOLE, `collect` and `swapped` are collectives."""
        return sharding_of(self._modules[0].lora_a)

    @property
    def _parameters(self) -> list[torch.nn.Parameter]:
        """A and B of each module, in turn."""
        return [parameter for m in self._modules for parameter in (m.lora_a, m.lora_b)]

    @torch.no_grad()
    def collect(self, dtype: torch.dtype = torch.float32, *, live: bool = False) -> Adapter:
        """The adapter as it is now, detached, in `dtype`; the scaling is applied in fp32.

        Of sharded parameters every rank must call it, and every rank gets the whole adapter.

        With `live`, tensors that need no conversion are views of the model's own: right for who packs
        them before the next optimizer step, and without a copy.

        Raises:
            UnsupportedAdapter: the adapter is merged into the base at this moment.
        """
        for module in self._modules:
            if module.layer.merged:
                raise UnsupportedAdapter(
                    f"{module.name} is merged into the base; call unmerge_adapter() before a publish"
                )
        whole = read_whole(self._parameters)
        tensors = {}
        for module, lora_a, lora_b in zip(self._modules, whole[::2], whole[1::2], strict=True):
            tensors[f"{module.name}.lora_A.weight"] = lora_a.to(dtype, copy=not live)
            if module.scaling != 1.0 or not live:
                lora_b = lora_b.float() * module.scaling
            tensors[f"{module.name}.lora_B.weight"] = lora_b.to(dtype)
        return Adapter(tensors=tensors, rank=self.rank)

    @torch.no_grad()
    def random_like(self, seed: int = 0, std: float = 0.02) -> Adapter:
        """An adapter of this shape that is nowhere zero: A ~ N(0, 1/in), B ~ N(0, std²); on the CPU.

        A fresh LoRA equals its base (B = 0), so only such a one can show that versions are applied.
        The same on every rank.
        """
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for module in self._modules:
            num_in, rank, num_out = module.shape
            a_RD = torch.randn((rank, num_in), generator=generator)
            tensors[f"{module.name}.lora_A.weight"] = a_RD / math.sqrt(num_in)
            b_DR = torch.randn((num_out, rank), generator=generator)
            tensors[f"{module.name}.lora_B.weight"] = b_DR * std
        return Adapter(tensors=tensors, rank=self.rank)

    @contextmanager
    def swapped(self, adapter: Adapter) -> Iterator[None]:
        """Compute with `adapter` (normalised) inside the block; the own weights come back bit-exactly.

        Of sharded parameters every rank must enter it, with the same adapter.
        """
        kept = [tensor.clone() for tensor in read_whole(self._parameters)]
        values = []
        for module in self._modules:
            values.append(adapter.tensors[f"{module.name}.lora_A.weight"])
            values.append(adapter.tensors[f"{module.name}.lora_B.weight"] / module.scaling)
        try:
            write_whole(self._parameters, values)
            yield
        finally:
            write_whole(self._parameters, kept)


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
        short = name.removeprefix(_PREFIX)
        if short.rpartition(".")[2] in ("lm_head", "embed_out"):
            raise UnsupportedAdapter(f"{short}: LoRA on the head; leave it out of target_modules")
        linear_a, linear_b = layer.lora_A[adapter], layer.lora_B[adapter]
        shape = (linear_a.in_features, linear_a.out_features, linear_b.out_features)
        yield _Module(name=short, layer=layer, adapter=adapter, shape=shape)


def from_peft_dir(path: str | Path, dtype: torch.dtype = torch.float32) -> Adapter:
    """The adapter of a PEFT directory (`adapter_config.json`, `adapter_model.safetensors`).

    Raises:
        AdapterFilesInvalid: missing, damaged, pickled, or tensors that do not fit the config.
        UnsupportedAdapter: it uses a feature that cannot be expressed.
    """
    directory = Path(path)
    config = _read_config(directory)
    check_supported(config, where=str(directory))
    raw = _read_tensors(directory)
    tensors: dict[str, torch.Tensor] = {}
    rank = 0
    for module in sorted({name.rpartition(".lora_")[0] for name in raw}):
        lora_a, lora_b = (raw.get(f"{module}.lora_{part}.weight") for part in "AB")
        if lora_a is None or lora_b is None:
            raise AdapterFilesInvalid(
                f"{directory}: {module} lacks lora_A or lora_B; save it again"
            )
        expected = _pattern(config, "rank_pattern", module, int(config["r"]))
        if not (lora_a.ndim == lora_b.ndim == 2 and lora_a.shape[0] == lora_b.shape[1] == expected):
            raise AdapterFilesInvalid(
                f"{directory}: {module} has A {list(lora_a.shape)} and B {list(lora_b.shape)}, its "
                f"config says rank {expected}; save it again"
            )
        alpha = _pattern(config, "alpha_pattern", module, config["lora_alpha"])
        scaling = alpha / (math.sqrt(expected) if config.get("use_rslora") else expected)
        tensors[f"{module}.lora_A.weight"] = lora_a.to(dtype)
        tensors[f"{module}.lora_B.weight"] = (lora_b.float() * scaling).to(dtype)
        rank = max(rank, expected)
    return Adapter(tensors=tensors, rank=rank)


def _pattern(config: Mapping[str, Any], field: str, module: str, default: Any) -> Any:
    # peft's own matching (peft.utils.other.get_pattern_key): the key as a regex suffix of the name.
    for key, value in (config.get(field) or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / "adapter_config.json"
    if not path.is_file():
        raise AdapterFilesInvalid(
            f"{directory} has no adapter_config.json; expected a PEFT directory"
        )
    text = path.read_bytes()[: _MAX_CONFIG_BYTES + 1]
    try:
        config = json.loads(text, parse_constant=_refuse_constant)
    except ValueError as error:
        raise AdapterFilesInvalid(f"{path} is not strict JSON: {error}") from error
    found: dict[str, Any] = config if isinstance(config, dict) else {}
    rank, alpha = found.get("r"), found.get("lora_alpha")
    if type(rank) is not int or rank < 1 or not _positive(alpha):
        raise AdapterFilesInvalid(f"{path}: r={rank!r}, lora_alpha={alpha!r}; expected numbers > 0")
    return found


def _positive(value: Any) -> bool:
    return type(value) in (int, float) and value > 0


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON number")


def _read_tensors(directory: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = directory / "adapter_model.safetensors"
    if not path.is_file():
        hint = ""
        if (directory / "adapter_model.bin").is_file():
            hint = (
                "; adapter_model.bin is a pickle, which can run code and is never opened: save it again "
                "with PEFT's save_pretrained(..., safe_serialization=True)"
            )
        raise AdapterFilesInvalid(f"{directory} has no adapter_model.safetensors{hint}")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise AdapterFilesInvalid(f"{path} cannot be read: {error}; copy it again") from error
    if not tensors:
        raise AdapterFilesInvalid(f"{path} holds no tensor; save the adapter again")
    found = {}
    for name, tensor in tensors.items():
        short = name.removeprefix(_PREFIX)
        if not short.endswith((".lora_A.weight", ".lora_B.weight")) or short.startswith("lm_head."):
            raise UnsupportedAdapter(f"{path}: tensor {name!r} is no LoRA of a linear layer")
        found[short] = tensor
    return found
