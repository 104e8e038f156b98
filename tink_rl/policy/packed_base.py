"""4-bit and 8-bit weights of bitsandbytes beside the tensor that they were quantised from.

A packed weight cannot be turned back, but quantising is deterministic: the file's tensor, quantised
with the layer's own settings on the layer's own device, must give the same bytes and statistics.
"""

from __future__ import annotations

from typing import Any

import torch

from tink_rl.policy.sharded import Sharding, sharding_of


def is_packed(tensor: torch.Tensor) -> bool:
    """Whether `tensor` is a weight that bitsandbytes packed."""
    return getattr(tensor, "quant_state", None) is not None or hasattr(tensor, "SCB")


@torch.no_grad()
def packed_difference(weight: Any, stored: torch.Tensor) -> float | None:
    """By how much `weight` differs from `stored` when that is packed alike; None: not at all.

    Args:
        weight: The live, packed weight.
        stored: The checkpoint's tensor: the matrix itself, or bytes that were packed before.

    Raises:
        NotImplementedError: it cannot be compared; says why.
    """
    if sharding_of(weight) is not Sharding.WHOLE:
        raise NotImplementedError("a packed weight that is sharded")
    if not stored.is_floating_point():
        same = torch.equal(weight.detach().reshape(-1).cpu(), stored.reshape(-1).view(weight.dtype))
        return None if same else torch.inf
    if getattr(weight, "quant_state", None) is None:
        return _difference_of_8_bit(weight, stored)
    return _difference_of_4_bit(weight, stored)


def _difference_of_4_bit(weight: Any, stored: torch.Tensor) -> float | None:
    import bitsandbytes.functional as bnb

    state, packed = weight.quant_state, weight.detach()
    again, wanted = bnb.quantize_4bit(
        stored.to(packed.device).to(state.dtype).contiguous(),
        blocksize=state.blocksize,
        compress_statistics=state.nested,
        quant_type=state.quant_type,
        quant_storage=packed.dtype,
    )
    if torch.equal(packed.reshape(-1), again.reshape(-1)) and _same_statistics(state, wanted):
        return None
    ours = bnb.dequantize_4bit(packed, state).float()
    return float((ours - bnb.dequantize_4bit(again, wanted).float()).abs().max())


def _same_statistics(ours: Any, theirs: Any) -> bool:
    if not torch.equal(ours.absmax, theirs.absmax):
        return False
    if not ours.nested:
        return True
    same_offset = bool(torch.equal(ours.offset.float(), theirs.offset.float()))
    return same_offset and bool(torch.equal(ours.state2.absmax, theirs.state2.absmax))


def _difference_of_8_bit(weight: Any, stored: torch.Tensor) -> float | None:
    import bitsandbytes.functional as bnb

    rows = weight.CB if getattr(weight, "CB", None) is not None else weight.detach()
    if weight.SCB is None or rows.dtype is not torch.int8:
        raise NotImplementedError("an 8-bit weight without its statistics")
    again, scales, _ = bnb.int8_vectorwise_quant(stored.to(rows.device).half().contiguous())
    if torch.equal(rows, again) and torch.equal(weight.SCB, scales):
        return None
    ours, theirs = (r.float() * s[:, None] / 127 for r, s in ((rows, weight.SCB), (again, scales)))
    return float((ours - theirs).abs().max())
