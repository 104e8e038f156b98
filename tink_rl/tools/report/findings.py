"""What stands out in a run, and what to do about it. Pure: rows in, sentences out."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from tink_rl.tools.report.run import Run
from tink_rl.training.ratio import LEAST_ESS, LOWEST_RATIO, RATIO, consequence

_GAP_WARNING = 0.2
_SYNC_SHARE_WARNING = 0.25
_CLIPPED_WARNING = 0.2
_NO_SPREAD_WARNING = 0.8
_WINDOW = 5


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One sentence; `good` says whether it is a reason to be content or to look closer."""

    good: bool
    text: str


def _problem(text: str) -> list[Finding]:
    return [Finding(good=False, text=text)]


def _good(text: str) -> list[Finding]:
    return [Finding(good=True, text=text)]


def find(run: Run) -> list[Finding]:
    """What a reader should know first, problems first."""
    found = [
        *_values(run),
        *_ratio(run),
        *_offpolicy(run),
        *_gap(run),
        *_spread(run),
        *_clipped(run),
        *_sync(run),
        *_reward(run),
    ]
    return sorted(found, key=lambda finding: finding.good)


def first_and_last(values: list[float]) -> tuple[float, float] | None:
    """Mean of the first and of the last few values; None below two."""
    if len(values) < 2:
        return None
    width = min(_WINDOW, len(values) // 2)
    return statistics.mean(values[:width]), statistics.mean(values[-width:])


def _values(run: Run) -> list[Finding]:
    broken = [
        int(row["step"])
        for row in run.steps
        if any(
            isinstance(row.get(k), float) and not math.isfinite(row[k]) for k in ("loss", "reward")
        )
    ]
    if not broken:
        return []
    return _problem(
        f"Loss or reward is not finite at step {broken[0]} ({len(broken)} steps in all): lower the "
        "learning rate and resume from a checkpoint before it."
    )


def _gap(run: Run) -> list[Finding]:
    gaps = run.values("rollout/logprob_gap")
    if not gaps:
        return []
    worst = max(gaps)
    if worst > _GAP_WARNING:
        return _problem(
            f"Trainer and server differ by up to {worst:.2g} in a logprob: the importance ratio carries "
            "that. Compare dtypes with `tink-rl doctor URL`, or use adapter mode."
        )
    return _good(
        f"The server sampled the policy that was trained: logprobs differ by at most {worst:.1e}."
    )


def _ratio(run: Run) -> list[Finding]:
    steps, ratios = run.series(RATIO)
    low = [(step, value) for step, value in zip(steps, ratios, strict=True) if value < LOWEST_RATIO]
    if not low:
        return []
    step, ratio = min(low, key=lambda found: found[1])
    return _problem(f"At step {step} (and {len(low) - 1} more), {consequence(ratio)}.")


def _offpolicy(run: Run) -> list[Finding]:
    shares = run.values("offpolicy/ess")
    low = [share for share in shares if share < LEAST_ESS]
    if not low:
        return []
    return _problem(
        f"In {len(low)} of {len(shares)} steps the importance weights left less than {LEAST_ESS:.0%} of the "
        f"batch (once {min(low):.0%}): lower the learning rate or max_staleness, or set "
        "vllm_importance_sampling_mode='token_truncate'."
    )


def _spread(run: Run) -> list[Finding]:
    flat = run.values("frac_reward_zero_std")[-_WINDOW:]
    if not flat or statistics.mean(flat) <= _NO_SPREAD_WARNING:
        return []
    return _problem(
        f"In {statistics.mean(flat):.0%} of the last groups all completions got the same reward, which "
        "teaches nothing: harder (or easier) problems, or more generations per prompt."
    )


def _clipped(run: Run) -> list[Finding]:
    clipped = run.values("completions/clipped_ratio")[-_WINDOW:]
    if not clipped or statistics.mean(clipped) <= _CLIPPED_WARNING:
        return []
    return _problem(
        f"{statistics.mean(clipped):.0%} of the last completions were cut at max_completion_length: "
        "raise it, or reward short answers."
    )


def _sync(run: Run) -> list[Finding]:
    shares = run.values("share/syncing")
    if not shares:
        return []
    share = statistics.median(shares)
    if share > _SYNC_SHARE_WARNING:
        return _problem(
            f"Publishing takes {share:.0%} of a step (median): the phases below say which part; a "
            "smaller rank, a faster link, or fewer steps per publish."
        )
    return _good(f"Publishing takes {share:.0%} of a step (median).")


def _reward(run: Run) -> list[Finding]:
    ends = first_and_last(run.values("reward"))
    if ends is None or len(run.values("reward")) < 2 * _WINDOW:
        return []
    first, last = ends
    if last > first:
        return _good(f"The reward rose from {first:.3g} to {last:.3g}.")
    return _problem(f"The reward went from {first:.3g} to {last:.3g}: it did not rise.")
