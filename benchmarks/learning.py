"""What sampling ahead costs in learning: the demo's seeds under each `max_staleness`, to their end.

`python -m benchmarks.overlap --learning`. Nothing here is timed, and which version samples a row depends on
no clock: so the runs on two servers go side by side, each on a core, which takes half as long.
"""

from __future__ import annotations

import statistics
import threading
from collections.abc import Mapping
from functools import partial
from typing import Any

from benchmarks import grpo_run
from benchmarks.grpo_run import Run
from benchmarks.overlap import Found, Keep, Parts, server_of
from recipes.tiny_base import ensure_tiny_base
from tink_rl import placement

SEEDS = (0, 1, 2)
HELD, OVER = 0.9, 5
"""Learned: the mean reward of so many steps reaches this."""
_SERVERS = (("merged", (0, 1)), ("adapter", (2,)))
"""Mode of each, and what `max_staleness` its runs have."""
_UNPINNED = {"TINK_PLACEMENT": "off", "OMP_NUM_THREADS": "1"}


def measure(keep: Keep) -> None:
    """By staleness and seed the reward at the end and the samples until it was learned, to `keep`."""
    parts = Parts(
        lambda: keep(
            {"learning": parts.found, "failed": parts.failed, "held": HELD, "over_steps": OVER}
        )
    )
    ensure_tiny_base()  # once, not by each side
    sides = []
    for i, (mode, stale) in enumerate(_SERVERS):
        work = partial(_runs, parts, mode, stale, placement.CORES[i % len(placement.CORES)])
        # A daemon: who stops the benchmark need not wait for the runs that are left.
        side = threading.Thread(target=parts.add_on, args=(f"server {mode}", work), daemon=True)
        side.start()
        sides.append(side)
    for side in sides:
        side.join()


def _runs(parts: Parts, mode: str, stale: tuple[int, ...], core: int) -> None:
    with server_of(mode, {"VLLM_CPU_OMP_THREADS_BIND": str(core)}) as reached:
        for k in stale:
            for seed in SEEDS:
                run = Run(learns=True, max_staleness=k, seed=seed, mode=mode, **reached)
                parts.add(f"max_staleness={k}, seed {seed}", _learned, run)


def _learned(run: Run) -> Found:
    rewards = grpo_run.measure(run, _UNPINNED)["rewards"]
    return {
        "reward_last5": statistics.mean(rewards[-5:]),
        "samples_to_hold": samples_to_hold(rewards, run.completions),
        "rewards": rewards,
    }


def samples_to_hold(rewards: list[float], per_step: int) -> int | None:
    """Samples until the mean of `OVER` steps in a row first reached `HELD`; None: it never did."""
    for end in range(OVER, len(rewards) + 1):
        if statistics.mean(rewards[end - OVER : end]) >= HELD:
            return end * per_step
    return None


def render(found: Mapping[str, Any]) -> str:
    """A row for each staleness, its seeds side by side."""
    lines = [
        f"| max_staleness | reward, last 5 steps | samples until {HELD} over {OVER} steps |",
        "|---|---|---|",
    ]
    for k in (0, 1, 2):
        runs = [found["learning"].get(f"max_staleness={k}, seed {seed}") for seed in SEEDS]
        rewards = ", ".join(f"{run['reward_last5']:.3f}" for run in runs if run)
        samples = ", ".join(str(run["samples_to_hold"]) for run in runs if run)
        lines.append(f"| {k} | {rewards} | {samples} |")
    return "\n".join(lines)
