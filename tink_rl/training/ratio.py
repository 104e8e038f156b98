"""Whether the importance ratio leaves anything to learn from, whatever pulled it down.

TRL multiplies each token's loss by exp(trainer - sampler) of the token or of its sequence. Were the two
one distribution, the mean of these weights over samples would be 1 (A. Owen, Monte Carlo theory, methods
and examples, ch. 9.1); what is masked counts 0. So a mean of 0.1 says that nine tenths of the gradient are
gone, and a run that looks healthy learns next to nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

logger = logging.getLogger("tink_rl")

RATIO = "sampling/importance_sampling_ratio/mean"
"""TRL's name: after its truncation or masking."""
LOWEST_RATIO = 0.1
"""Mean of a step below which the gradient counts as lost."""
LEAST_ESS = 0.5
"""Effective share of a batch below which older rows cost more samples than they save time: sampling beside
training makes a step at most twice as fast."""
_DIFFERENCE = "sampling/sampling_logp_difference"


def consequence(ratio: float) -> str:
    """What a mean ratio below the lowest means, for a log and for a report."""
    return (
        f"mean importance ratio {ratio:.2g}: TRL multiplies the loss by the ratio, so next to nothing is "
        "learned. Compare sampling/sampling_logp_difference with `tink-rl doctor`'s dtypes; with long "
        "completions set vllm_importance_sampling_mode='token_truncate', or "
        "vllm_importance_sampling_correction=False"
    )


class RatioWatch:
    """Says so once, when a step's mean ratio is near 0."""

    def __init__(self) -> None:
        self._said = False

    def look(self, step: int, metrics: Mapping[str, Sequence[float]]) -> None:
        """The newest values in `metrics` belong to optimizer step `step`."""
        ratios = metrics.get(RATIO)
        if self._said or not ratios or not ratios[-1] < LOWEST_RATIO:
            return
        self._said = True
        gaps = [metrics.get(f"{_DIFFERENCE}/{kind}") or [0.0] for kind in ("mean", "max")]
        logger.warning(
            "step %d: %s. Trainer and sampler differ by %.2g nats a token in the mean, %.2g at most",
            step,
            consequence(ratios[-1]),
            gaps[0][-1],
            gaps[1][-1],
        )
