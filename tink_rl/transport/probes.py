"""Whether the servers compute what the trainer computes: logprobs of a prompt, side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tink_rl import errors
from tink_rl.config import SyncConfig
from tink_rl.transport.fleet import Fleet

_NOISE_FACTOR = 3.0
"""An adapter may be served this many times less exactly than the base."""
_TOLERANCES = {"float32": 1e-3, "bfloat16": 0.15, "float16": 0.05}


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A prompt and the trainer's own logprobs of it under the policy that is being published."""

    prompt_ids: list[int]
    logprobs: list[float]
    """Of every token but the first, `[T - 1]`."""


class ProbeCheck:
    """Compares the servers with a probe, within a tolerance."""

    def __init__(self, fleet: Fleet, config: SyncConfig) -> None:
        self._fleet, self._config = fleet, config
        self.noise = 0.0
        """By how much trainer and server differ on the base; the tolerance allows for it."""

    def tolerance(self, dtype: str) -> float:
        """Largest |logprob difference| that a probe may show on servers that compute in `dtype`."""
        if self._config.probe_tolerance is not None:
            return self._config.probe_tolerance
        return max(_TOLERANCES.get(dtype, 0.15), _NOISE_FACTOR * self.noise)

    def gap(self, probe: Probe, name: str) -> float:
        """Largest |trainer - server| logprob of the probe prompt over all replicas and tokens."""
        gaps = self._fleet.each(
            lambda replica: largest_gap(
                probe.logprobs, replica.client.prompt_logprobs(probe.prompt_ids, name)
            )
        )
        return max(gaps)

    def check(self, probe: Probe, name: str, dtype: str) -> float:
        """The gap of `probe`.

        Raises:
            ProbeFailed: it exceeds the tolerance: the server does not serve what was trained.
        """
        gap, tolerance = self.gap(probe, name), self.tolerance(dtype)
        if not gap <= tolerance:
            raise errors.ProbeFailed(
                f"{name}: trainer and server differ by {gap:.3g} in a logprob of the probe prompt, "
                f"allowed is {tolerance:.3g}; the server does not serve the policy that is "
                "trained. Check its dtype and flags, or set SyncConfig(probe_tolerance=...)",
                gap=gap,
            )
        return gap


def largest_gap(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Largest |difference| of two rows of logprobs; NaN if any is."""
    gaps = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
    # max() would drop a NaN, and a NaN must fail the probe.
    return math.nan if any(math.isnan(gap) for gap in gaps) else max(gaps)
