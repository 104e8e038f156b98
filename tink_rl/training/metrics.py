"""How a value joins those of the steps before it in one logged row.

Trainers average what they log (`logging_steps` steps to a row), and not everything is a mean: a version is
the last one, "the largest gap" the largest of all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping

_LAST = frozenset({"sync/policy_version", "sync/bytes_total", "rollout/policy_version"})
_LARGEST = frozenset(
    {
        *("sync/probe_gap", "rollout/logprob_gap", "rollout/sequence_logprob_gap"),
        *("offpolicy/age_max", "offpolicy/numerics_gap"),
    }
)


def add(metrics: MutableMapping[str, list[float]], found: Mapping[str, float]) -> None:
    """Add `found` to the values that the next row is the mean of, so that the row says what it should."""
    for key, value in found.items():
        values = metrics.setdefault(key, [])
        if key in _LAST:
            values[:] = [value]
        elif key in _LARGEST:
            values[:] = [_larger(values[0], value) if values else value]
        else:
            values.append(value)


def _larger(one: float, other: float) -> float:
    """The larger of two; NaN if either is."""
    return other if math.isnan(other) else max(one, other)
