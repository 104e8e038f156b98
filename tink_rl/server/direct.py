"""Folding in place on a GPU: one matrix product per projection, straight into the served weight.

vLLM's reload makes a layer anew and copies it over the old one, with the whole in fp32 between: nine times
the traffic and a millisecond of host time per layer. Where the served tensor is nothing but the checkpoint's
rows one below the other, `addmm(golden, B, A, out=rows)` does the same. That is checked, not assumed: by
kind, shape and storage at every fold, and bit by bit against the checkpoint at start. Everything else goes
through the reload.

Precision: a GPU multiplies bf16 exactly, adds golden and products in fp32 and rounds once. A and B are fp32
in the packet; each is split into two bf16 (`hi + lo`, 16 bits of mantissa), and `Bhi·Ahi + Bhi·Alo + Blo·Ahi`
is one product of three times the rank.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch

from tink_rl.server.golden_plan import local_numel
from tink_rl.server.modules import Layer, Shard

_DEVICES = ("cuda",)
"""Where a layer computes with the tensor that was loaded; elsewhere it may be packed."""
_DTYPES = (torch.bfloat16, torch.float32)
"""fp16 is not among them: the low parts of a small B lie among its subnormal numbers."""


class Golden(Protocol):
    """Where the base weights are."""

    def weight(self, shard: Shard) -> torch.Tensor:
        """This rank's part of the base weight `[rows, columns]`; not to be written to."""
        ...


def served_rows(layer: Layer) -> dict[str, torch.Tensor] | None:
    """The rows of the served weight that each projection is, or None: write this layer by reloading it."""
    from tink_rl.server.vllm_names import UnquantizedLinearMethod

    module: Any = layer.module
    weight = module._parameters.get("weight")
    if weight is None or type(getattr(module, "quant_method", None)) is not UnquantizedLinearMethod:
        return None
    if weight.device.type not in _DEVICES or weight.dtype not in _DTYPES or weight.ndim != 2:
        return None
    if not weight.is_contiguous() or weight.numel() != sum(local_numel(s) for s in layer.shards):
        return None
    found, start = {}, 0
    for shard in layer.shards:
        end = start + shard.rows.stop - shard.rows.start
        found[shard.name] = weight.data[start:end]
        if found[shard.name].shape[1] != shard.columns.stop - shard.columns.start:
            return None
        start = end
    return found


@torch.no_grad()
def same_as_golden(layer: Layer, golden: Golden) -> bool:
    """Whether the served rows are golden's, bit by bit. The base must be served.

    A loader that permutes or pads what it loads shows here.
    """
    rows = served_rows(layer)
    if rows is None:
        return False
    return all(
        torch.equal(rows[shard.name], golden.weight(shard).to(rows[shard.name].device))
        for shard in layer.shards
    )


@torch.no_grad()
def fold_in_place(
    layer: Layer,
    rows: Mapping[str, torch.Tensor],
    golden: Golden,
    tensors: Mapping[str, torch.Tensor],
) -> None:
    """Write golden + B·A of every projection of `layer` into `rows` (from `served_rows`)."""
    for shard in layer.shards:
        served, base = rows[shard.name], golden.weight(shard)
        lora_a = tensors.get(f"{shard.name}.lora_A.weight")
        if lora_a is None or base.device != served.device:
            base = served.copy_(base, non_blocking=True)
        if lora_a is not None:
            lora_b = tensors[f"{shard.name}.lora_B.weight"]
            a = lora_a[:, shard.columns].to(served.device, torch.float32)
            b = lora_b[shard.rows].to(served.device, torch.float32)
            b, a = factors(b, a, served.dtype)
            torch.addmm(base, b, a, out=served)


def factors(
    b: torch.Tensor, a: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """B `[out, r]` and A `[r, in]` in `dtype`, so that their product is that of the fp32 ones.

    In bf16 they get three times the rank.
    """
    if dtype == torch.float32:
        return b, a
    b_hi, a_hi = b.to(dtype), a.to(dtype)
    b_lo, a_lo = (b - b_hi).to(dtype), (a - a_hi).to(dtype)
    return torch.cat([b_hi, b_hi, b_lo], dim=1), torch.cat([a_hi, a_lo, a_hi])


@contextlib.contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Matrix products on a GPU add in fp32, and multiply fp32 as fp32, whatever the process has set."""
    if device.type not in _DEVICES:
        yield
        return
    matmul = torch.backends.cuda.matmul
    reduced, precision = (
        matmul.allow_bf16_reduced_precision_reduction,
        torch.get_float32_matmul_precision(),
    )
    matmul.allow_bf16_reduced_precision_reduction = False
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        matmul.allow_bf16_reduced_precision_reduction = reduced
