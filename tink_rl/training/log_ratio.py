"""What lies between the policy that is trained and the one that sampled, in figures.

log(trainer now / sampler) of a token is the sum of two parts: *policy*, log(trainer now / trainer then),
and *numerics*, log(trainer then / sampler), where "then" is the version that sampled it. The first is
staleness; the second is the rounding of two programs that compute the same weights, or another policy.

Letters in names: B rows of a rank's batch, S those of them that are looked at, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tink_rl.training.rollouts import RolloutBatch


@dataclass(frozen=True, kw_only=True)
class Logprobs:
    """Of one batch: by token [B, T], or [B, 1] where the trainer compares whole sequences (RLOO)."""

    now: torch.Tensor
    """The trainer's, under the version that it holds."""
    sampler: torch.Tensor
    mask: torch.Tensor
    """What was sampled and has a logprob on both sides."""
    is_sequence: bool
    weights: torch.Tensor | None = None
    """[W]: what the loss is multiplied by, by token or by sequence as TRL's mode says."""

    @classmethod
    def of(cls, batch: RolloutBatch, output: dict[str, Any]) -> Logprobs | None:
        """Those of what TRL scored; None where it has none (distillation)."""
        if "old_logps" in output:
            return cls._of_sequences(batch, output)
        if "old_per_token_logps" not in output or "sampling_per_token_logps" not in output:
            return None
        now, sampler = output["old_per_token_logps"], output["sampling_per_token_logps"]
        mask = _token_mask(output)
        weights = output.get("importance_sampling_ratio")
        if weights is not None:
            counted = mask if weights.shape == mask.shape else mask.any(dim=1, keepdim=True)
            weights = weights[counted]
        known = mask & ~torch.isnan(now - sampler)
        return cls(now=now, sampler=sampler, mask=known, is_sequence=False, weights=weights)

    @classmethod
    def _of_sequences(cls, batch: RolloutBatch, output: dict[str, Any]) -> Logprobs:
        now = output["old_logps"][:, None]
        told = [math.nan if t[0].logprobs is None else sum(t[0].logprobs) for t in batch.turns]
        sampler = now.new_tensor(told)[:, None]
        mask = _token_mask(output).any(dim=1, keepdim=True) & ~torch.isnan(now - sampler)
        return cls(now=now, sampler=sampler, mask=mask, is_sequence=True)

    def comparable(self, then_ST: torch.Tensor, mask_ST: torch.Tensor) -> torch.Tensor:
        """Logprobs of tokens, as these here are: of tokens, or their sum."""
        return (then_ST * mask_ST).sum(dim=1, keepdim=True) if self.is_sequence else then_ST


def _token_mask(output: dict[str, Any]) -> torch.Tensor:
    mask: torch.Tensor = output["completion_mask"].bool()
    return mask & output["tool_mask"].bool() if "tool_mask" in output else mask


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What one rank found; plain numbers, to be gathered."""

    numerics: float | None = None
    """Mean square of the numerics part; None: no logprob to compare."""
    largest: float | None = None
    """Largest |numerics part|."""
    policy_kl: float | None = None
    weights: tuple[float, float, int, int] = field(default=(0.0, 0.0, 0, 0))
    """Sum, sum of squares, number, and number of those that TRL's cap made 0."""


def split(found: Logprobs, rows: Sequence[int], then: torch.Tensor | None) -> Parts:
    """The parts of the log-ratio of `rows`, scored under the version that sampled them.

    Args:
        found: Of the batch.
        rows: Which of its rows are looked at.
        then: Their logprobs under that version; None: it is the one that the trainer holds.
    """
    index = list(rows)
    mask = found.mask[index]
    now, sampler = (x[index][mask].double() for x in (found.now, found.sampler))
    scored = now if then is None else then[mask].double()
    if not mask.any():
        return Parts(weights=_sums(found.weights))
    return Parts(
        numerics=float((scored - sampler).square().mean()),
        largest=float((scored - sampler).abs().max()),
        policy_kl=float(k3(now - scored).mean()),
        weights=_sums(found.weights),
    )


def k3(log_ratio: torch.Tensor) -> torch.Tensor:
    """r - 1 - log r of each ratio r = p(x) / q(x), x drawn from q: its mean estimates KL(q, p).

    Unbiased and never negative: J. Schulman, Approximating KL Divergence, 2020,
    http://joschu.net/blog/kl-approx.html.
    """
    return torch.expm1(log_ratio) - log_ratio


def _sums(weights: torch.Tensor | None) -> tuple[float, float, int, int]:
    if weights is None:
        return 0.0, 0.0, 0, 0
    w = weights.double()
    return float(w.sum()), float(w.square().sum()), w.numel(), int((w == 0).sum())


def pooled(parts: Sequence[Parts], *, is_sequence: bool) -> dict[str, float]:
    """The metrics of all ranks: root mean square, mean divergence, and shares of all weights.

    Also the logprob gap under its name of runs without older rows, where no policy part can be in it.
    """
    squares = [p.numerics for p in parts if p.numerics is not None]
    divergences = [p.policy_kl for p in parts if p.policy_kl is not None]
    total, of_squares, number, masked = (
        sum(x) for x in zip(*(p.weights for p in parts), strict=True)
    )
    found = {}
    if squares:
        found["offpolicy/numerics_gap"] = math.sqrt(sum(squares) / len(squares))
        gap = "rollout/sequence_logprob_gap" if is_sequence else "rollout/logprob_gap"
        found[gap] = max(p.largest for p in parts if p.largest is not None)
        found["offpolicy/policy_kl"] = sum(divergences) / len(divergences)
    if number:
        found["offpolicy/ess"] = effective_share(total, of_squares, number)
        found["offpolicy/masked_share"] = masked / number
    return found


def effective_share(total: float, of_squares: float, number: float) -> float:
    """Kish's effective sample size (sum w)^2 / sum w^2, as a share of the number of weights.

    L. Kish, Survey Sampling, 1965; A. Owen, Monte Carlo theory, methods and examples, ch. 9.3. 0 where
    every weight is 0.
    """
    return total**2 / (number * of_squares) if of_squares else 0.0
