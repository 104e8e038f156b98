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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tink_rl.errors import NonFiniteWeights, UnsupportedAdapter
from tink_rl.policy.fingerprint import CheckpointTensor, read_checkpoint_tensor
from tink_rl.policy.packet import PacketHeader, unpack
from tink_rl.policy.peft_dir import open_peft_dir
from tink_rl.policy.peft_names import PeftModel
from tink_rl.policy.shapes import BaseShapes
from tink_rl.policy.sharded import Sharding, read_whole, reshard, sharding_of, write_whole
from tink_rl.policy.support import changes_base, check_supported, model_facts, needs
from tink_rl.policy.tensor_names import without_wrappers

_LOW_RANK_REST = 1e-5
"""Share of a weight's norm by which the base may differ from checkpoint + low-rank change: rounding."""
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
        NonFiniteWeights: a NaN, infinity or a larger value; names the tensor.
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
            raise NonFiniteWeights(
                f"tensor {name!r} holds {value:.3g}, allowed is a magnitude of {bound:g}; training "
                "diverged: lower the learning rate, and resume from the last checkpoint",
                tensor=name,
                given=value,
                expected=bound,
                code="weight_out_of_range",
            )


def check_packed(header: PacketHeader, buffer: torch.Tensor, bound: float = MAX_ABS_WEIGHT) -> None:
    """`check_values` of a whole packet in one pass; the tensors are looked at only to name a culprit.

    Raises:
        NonFiniteWeights: as `check_values`.
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

    def __init__(
        self,
        model: PeftModel,
        adapter_name: str | None = None,
        *,
        base: Mapping[str, CheckpointTensor] | None = None,
    ) -> None:
        """Find the LoRA modules of `model` and check that they can be published.

        Args:
            model: A live PEFT model.
            adapter_name: Which adapter; None: the active one.
            base: The original base's checkpoint, for an initialisation that changed the base (PiSSA,
                OLoRA, ...): what it changed is added to the adapter, whose rank doubles.

        Raises:
            UnsupportedAdapter: not a PEFT model, or A and B do not say all of it.
            BaseChangeIsNotLowRank: they cannot, even with what the initialisation changed.
        """
        if not hasattr(model, "get_base_model"):
            raise UnsupportedAdapter(
                f"{type(model).__name__} is not a PEFT model; pass peft_config=LoraConfig(...) to the "
                "trainer, or wrap the model with get_peft_model"
            )
        self._model = model
        self._name = adapter_name or active_adapter(model)
        config = model.peft_config[self._name]
        facts = model_facts(model, self._name)
        moved = changes_base(facts)
        if moved and base is not None:
            facts = {**facts, "init_lora_weights": True}
        check_supported(facts, where=f"adapter {self._name!r}")
        self._modules = list(_find_modules(model, self._name))
        if not self._modules:
            raise UnsupportedAdapter(
                f"adapter {self._name!r} has no LoRA module; set target_modules"
            )
        self._moved = _base_changes(self._modules, base) if moved and base is not None else {}
        """What the initialisation changed in the base, as A and B, by module."""
        self.rank = max(
            module.shape[1] + (self._moved[module.name][0].shape[0] if self._moved else 0)
            for module in self._modules
        )
        self.needs = replace(needs(facts), rank=self.rank)
        self.dropout = float(config.lora_dropout or 0.0)

    def sharding(self) -> Sharding:
        """How the ranks share the adapter; unless WHOLE, `collect` and `swapped` are collectives.

        Lets every FSDP2 module hold its shards again.
        """
        reshard(self._model)
        return sharding_of(self._modules[0].lora_a)

    def _resharded_parameters(self) -> list[torch.nn.Parameter]:
        """A and B of each module, in turn; lets every FSDP2 module hold its shards again."""
        reshard(self._model)
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
        whole = read_whole(self._resharded_parameters())
        tensors = {}
        for module, lora_a, lora_b in zip(self._modules, whole[::2], whole[1::2], strict=True):
            tensors[f"{module.name}.lora_A.weight"] = lora_a.to(dtype, copy=not live)
            if module.scaling != 1.0 or not live:
                lora_b = lora_b.float() * module.scaling
            tensors[f"{module.name}.lora_B.weight"] = lora_b.to(dtype)
        return self._with_base_changes(tensors)

    def _with_base_changes(self, tensors: dict[str, torch.Tensor]) -> Adapter:
        for module, extras in self._moved.items():
            for part, extra, dim in zip("AB", extras, (0, 1), strict=True):
                name = f"{module}.lora_{part}.weight"
                tensors[name] = torch.cat([tensors[name], extra.to(tensors[name])], dim=dim)
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
        return self._with_base_changes(tensors)

    @contextmanager
    def swapped(self, adapter: Any) -> Iterator[None]:
        """Compute with `adapter` (normalised) inside the block; the own weights come back bit-exactly.

        Of sharded parameters every rank must enter it, with the same adapter.
        """
        kept = [tensor.clone() for tensor in read_whole(self._resharded_parameters())]
        values = []
        for module in self._modules:
            rank = module.shape[1]  # what follows is in the base already
            lora_a = adapter.tensors[f"{module.name}.lora_A.weight"][:rank]
            lora_b = adapter.tensors[f"{module.name}.lora_B.weight"][:, :rank]
            values += [lora_a, lora_b / module.scaling]
        try:
            write_whole(self._resharded_parameters(), values)
            yield
        finally:
            write_whole(self._resharded_parameters(), kept)


class BaseChangeIsNotLowRank(ValueError):
    """The initialisation changed the base by more than a low-rank delta."""


def _base_changes(
    modules: list[_Module], base: Mapping[str, CheckpointTensor]
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A `[R, in]` and B `[out, R]` with B·A = live base - checkpoint, by module.

    Raises:
        BaseChangeIsNotLowRank: for some module there are none of the adapter's rank.
    """
    found = {}
    for module in modules:
        # Under ZeRO-3 the base is partitioned as soon as it is loaded; every rank is here.
        live = read_whole([module.layer.get_base_layer().weight])[0].float().cpu()
        entry = base.get(f"{module.name}.weight")
        if entry is None or tuple(entry.shape) != tuple(live.shape):
            raise UnsupportedAdapter(
                f"{module.name}.weight is not in the base's checkpoint as {list(live.shape)}; was the "
                "adapter initialised on another base?"
            )
        change = live - read_checkpoint_tensor(entry).float()
        rank = min(module.shape[1], *change.shape)
        u_OR, s_R, v_IR = torch.svd_lowrank(change, q=min(rank + 8, *change.shape), niter=4)
        root_R = s_R[:rank].sqrt()
        lora_b, lora_a = u_OR[:, :rank] * root_R, (v_IR[:, :rank] * root_R).T.contiguous()
        rest = float((change - lora_b @ lora_a).norm())
        if rest > _LOW_RANK_REST * float(live.norm()):
            raise BaseChangeIsNotLowRank(
                f"{module.name}: the initialisation changed the base by more than rank {rank}"
            )
        found[module.name] = (lora_a, lora_b)
    return found


def active_adapter(model: PeftModel) -> str:
    """Name of the one active adapter.

    Raises:
        UnsupportedAdapter: there is not exactly one.
    """
    active = list(model.active_adapters)
    if len(active) != 1:
        raise UnsupportedAdapter(
            f"{len(active)} adapters are active ({active}), expected one; call set_adapter(NAME)"
        )
    return str(active[0])


def _find_modules(model: PeftModel, adapter: str) -> Iterator[_Module]:
    for name, layer in model.named_modules():
        if adapter in (getattr(layer, "lora_embedding_A", None) or {}):
            raise UnsupportedAdapter(
                f"{name}: LoRA on an embedding; leave it out of target_modules"
            )
        if adapter not in (getattr(layer, "lora_A", None) or {}):
            continue
        short = without_wrappers(name, set())
        if short.rpartition(".")[2] in ("lm_head", "embed_out"):
            raise UnsupportedAdapter(f"{short}: LoRA on the head; leave it out of target_modules")
        linear_a, linear_b = layer.lora_A[adapter], layer.lora_B[adapter]
        shape = (linear_a.in_features, linear_a.out_features, linear_b.out_features)
        yield _Module(name=short, layer=layer, adapter=adapter, shape=shape)


def from_peft_dir(
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    *,
    base: BaseShapes | None = None,
    as_written: bool = False,
) -> Adapter:
    """The adapter of a PEFT directory, or of a run's; `base` and `as_written` as `open_peft_dir` takes them.

    Raises:
        AdapterPathMissing: no such directory.
        AdapterFilesInvalid: damaged, pickled, or tensors that do not fit the config.
        UnsupportedAdapter: it uses a feature that cannot be expressed.
    """
    tensors: dict[str, torch.Tensor] = {}
    with open_peft_dir(path, base=base, as_written=as_written) as source:
        for module in source.modules:
            lora_a, lora_b = source.read(module)
            tensors[f"{module.name}.lora_A.weight"] = lora_a.to(dtype)
            tensors[f"{module.name}.lora_B.weight"] = lora_b.to(dtype)
        source.check_unchanged()
        return Adapter(tensors=tensors, rank=source.rank)
