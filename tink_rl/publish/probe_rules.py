"""How far trainer and server may differ in a probe: by what rounding explains, and never beyond a bound.

Honest arithmetic differs, and the more so the larger an adapter has grown; so a limit follows the noise
that the trainer measures on its own weights at the very version that is probed. A server cannot enlarge
that noise, and what it may excuse is bounded besides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

UNIT_ROUNDOFF = {
    "float32": 2.0**-24,
    "tf32": 2.0**-11,
    "float16": 2.0**-11,
    "bfloat16": 2.0**-8,
}
"""Largest relative error of rounding a number to the format (Higham, Accuracy and Stability, 2002)."""
AGREES = 1e-3
"""Nats. fp32 on both sides shows 1e-6 to 1e-4 on real and random models; more is not rounding there."""
_WARN_FACTOR, _FAIL_FACTOR = 3.0, 10.0
"""Of the measured noise. Seven random models of 2-32 layers, five adapter sizes each, in slots and merged:
pure bf16 against fp32 or autocast showed at most 1.6 times the noise that `precision.rounding` finds."""
_LARGEST_BASE_GAP = 1.0
"""Below fp32: twice what bf16 shows on real bases (0.1-0.5 nats; 0.05-0.25 on random ones of 8-60 layers)."""
_LARGEST_QUANTIZED_BASE_GAP = 2.0
"""A 4-bit base differs from the served one by its quantisation, which is not rounding of arithmetic."""
_LARGEST_EXACT_GAP = 0.05
"""fp32 on both sides: a thousand times its usual gap, whatever noise was measured."""
_LARGEST_GROWTH = 2.0
"""A version may be served this many times less exactly than the largest base gap (measured: 0.7-2.2)."""


def coarser(one: str, other: str) -> str:
    """The one of two formats that rounds more; one that is not known counts as bfloat16."""
    return max((one, other), key=unit_roundoff)


def unit_roundoff(name: str) -> float:
    """Of the format `name`; of bfloat16 if it is not known."""
    return UNIT_ROUNDOFF.get(name, UNIT_ROUNDOFF["bfloat16"])


def largest_base_gap(rounds_to: str, *, quantized: bool) -> float:
    """Nats by which trainer and server may differ on the base itself; beyond, it is another one."""
    if quantized:
        return _LARGEST_QUANTIZED_BASE_GAP
    return AGREES if rounds_to == "float32" else _LARGEST_BASE_GAP


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a gap means: up to `quiet` rounding; up to `fail` suspicious; beyond, another policy."""

    quiet: float
    fail: float


def limits(
    rounds_to: str,
    noise: float,
    *,
    base_gap: float = 0.0,
    quantized: bool = False,
    tolerance: float | None = None,
) -> Limits:
    """The limits of one probe.

    Args:
        rounds_to: The coarsest format in which either side computes.
        noise: By how much rounding to it moves the trainer's own logprobs at this version, in nats.
        base_gap: By how much trainer and server differed on the base; excuses nothing in fp32.
        quantized: The trainer's base is quantised.
        tolerance: The user's own limit, in place of all this.
    """
    if tolerance is not None:
        return Limits(quiet=tolerance, fail=tolerance)
    exact = rounds_to == "float32" and not quantized
    largest = (
        _LARGEST_EXACT_GAP
        if exact
        else _LARGEST_GROWTH * largest_base_gap(rounds_to, quantized=quantized)
    )
    explained = noise if exact else max(noise, base_gap)
    if math.isnan(explained):
        explained = 0.0
    quiet, fail = (
        min(max(AGREES, factor * explained), largest) for factor in (_WARN_FACTOR, _FAIL_FACTOR)
    )
    return Limits(quiet=quiet, fail=fail)


def largest_gap(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Largest |difference| of two rows of logprobs, 0 of none; NaN if any is."""
    gaps = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
    # max() would drop a NaN, and a NaN must fail the probe.
    return math.nan if any(math.isnan(gap) for gap in gaps) else max(gaps, default=0.0)


def share_applied(
    ours_BT: Sequence[Sequence[float]],
    theirs_BT: Sequence[Sequence[float]],
    base_BT: Sequence[Sequence[float]],
    noise: float,
) -> tuple[float, float]:
    """How much of the adapter's effect on these logprobs a server shows, and how surely it is not 1.

    The least-squares share, which uses every token where `largest_gap` uses one: 0 is the base, 2 twice
    the adapter.

    Args:
        ours_BT: The trainer's logprobs.
        theirs_BT: The server's.
        base_BT: The trainer's without the adapter.
        noise: Root mean square of what rounding does to `ours_BT`.

    Returns:
        The share, and by how many standard errors it differs from 1.
    """
    triples = [
        triple
        for rows in zip(ours_BT, theirs_BT, base_BT, strict=True)
        for triple in zip(*rows, strict=True)
    ]
    effect = math.fsum((ours - base) ** 2 for ours, _, base in triples)
    if not effect > 0.0 or not noise > 0.0:
        return 1.0, 0.0
    off = math.fsum((theirs - ours) * (ours - base) for ours, theirs, base in triples) / effect
    return 1.0 + off, abs(off) * math.sqrt(effect) / noise
