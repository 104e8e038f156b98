"""What sampling ahead buys (`python -m benchmarks.overlap [--quick]`) and costs in learning (`--learning`).

Every route in one run on the same cores, each in a process of its own. A part that fails is reported, and
the rest is measured and written all the same.
"""

from __future__ import annotations

import argparse
import json
import statistics
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import grpo_run
from benchmarks.grpo_run import Run
from benchmarks.provenance import provenance
from benchmarks.slow_sampler import SlowSampler, running
from recipes.tiny_base import ensure_tiny_base
from tink_rl import VLLMServer, placement

PLACEMENTS: dict[str, dict[str, str]] = {
    "asleep": {},
    "awake": {"TINK_SERVER_WAITS_ASLEEP": "engine"},
    "all cores": {"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, placement.CORES))},
}
"""The server's environment: as `tink-rl serve` has it (vLLM's worker on its cores, waiting asleep); the
worker spinning there, for a trainer that keeps to the others; the worker on every core."""
SEEDS = (0, 1, 2)
HELD, OVER = 0.9, 5
"""Learned: the mean reward of so many steps reaches this."""
_FULL = Run(num_steps=24, num_warm_up=4)
_QUICK = Run(num_steps=4, num_warm_up=1, completions=32)
_QUICK_PATH = Path("runs/overlap_quick.json")
Found = dict[str, Any]


class _Parts:
    """Measured parts by name, printed as they come; `failed` says which could not be."""

    def __init__(self) -> None:
        self.found: Found = {}
        self.failed: dict[str, str] = {}

    def add(self, name: str, measure: Callable[..., Found], *given: Any) -> Found | None:
        """What `measure(*given)` gives, or None if it fails."""
        print(f"overlap: {name}", flush=True)
        try:
            found = self.found[name] = measure(*given)
        except Exception as error:  # noqa: BLE001 - the other parts are still worth their minutes
            self.failed[name] = f"{type(error).__name__}: {error}"
            print(f"FAILED {name}\n{traceback.format_exc(limit=2)[-2500:]}", flush=True)
            return None
        print(f"  {_in_line(found)}", flush=True)
        return found


def measure(*, quick: bool = False) -> Found:
    """Median seconds of a step and of its parts, by route."""
    parts, base = _Parts(), _QUICK if quick else _FULL
    lengths = (8,) if quick else (8, 64)
    for tokens in lengths:
        run = replace(base, tokens=tokens)
        parts.add(f"trl, {tokens} tokens", grpo_run.measure, replace(run, route="trl"))
    for name in ("asleep",) if quick else PLACEMENTS:
        # Where the server's threads go is compared on short rows: long ones would take another half hour.
        measured = lengths if name == "asleep" else lengths[:1]
        parts.add(f"server {name}", _placed, parts, base, measured, name)
    parts.add("server adapter", _uneven, parts, base)
    return {"steps": parts.found, "failed": parts.failed, "ratios": ratios(parts.found)}


def _placed(parts: _Parts, base: Run, lengths: tuple[int, ...], name: str) -> Found:
    """The routes on one server in merged mode."""
    with _server("merged", PLACEMENTS[name]) as reached:
        for tokens in lengths:
            run = replace(base, tokens=tokens, **reached)
            routes: dict[str, tuple[Run, dict[str, str]]] = {"max_staleness=0": (run, {})}
            if name != "all cores":
                routes |= {
                    "max_staleness=0, spinning": (run, {"OMP_WAIT_POLICY": "active"}),
                    "max_staleness=0, one thread": (run, {"OMP_NUM_THREADS": "1"}),
                    "max_staleness=0, own cores": (replace(run, own_cores=True), {}),
                    "max_staleness=1": (replace(run, max_staleness=1), {}),
                }
            for route, (wanted, environment) in routes.items():
                parts.add(
                    f"{route}, {tokens} tokens, server {name}",
                    grpo_run.measure,
                    wanted,
                    environment,
                )
        if name == "asleep":
            _elsewhere(parts, replace(base, tokens=lengths[-1], **reached))
    return {"routes": float(len(lengths))}


def _elsewhere(parts: _Parts, run: Run) -> None:
    """A sampler that takes as long as training and publishing, and no core of this machine's."""
    alone = parts.found.get(f"max_staleness=0, own cores, {run.tokens} tokens, server asleep")
    if alone is None:
        return
    train_s = alone["step"] - alone["rollout"]
    slow = SlowSampler(target=run.url, token_s=max(train_s, alone["rollout"]) / run.tokens)
    with running(slow) as url:
        for k in (0, 1):
            wanted = replace(run, url=url, max_staleness=k, own_cores=True)
            parts.add(
                f"max_staleness={k}, sampler elsewhere, {run.tokens} tokens",
                grpo_run.measure,
                wanted,
            )


def _uneven(parts: _Parts, base: Run) -> Found:
    """In adapter mode: every other batch is sampled in half the time of training, those between in 3/2."""
    with _server("adapter", {}) as reached:
        run = replace(base, tokens=8, completions=32, mode="adapter", **reached)
        alone = parts.add("adapter, 32 x 8 tokens", grpo_run.measure, run)
        if alone is None:
            return {"routes": 0.0}
        # Even the shorter half leaves this machine's server the time that it needs.
        even_s = 2.5 * alone["rollout"]
        train_s = max(0.0, even_s - (alone["step"] - alone["rollout"]))
        slow = SlowSampler(target=run.url, token_s=even_s / run.tokens, spread=0.5)
        with running(slow) as url:
            for k in (0, 1, 2):
                wanted = replace(run, url=url, max_staleness=k, train_s=train_s, own_cores=True)
                parts.add(
                    f"max_staleness={k}, uneven sampler elsewhere",
                    grpo_run.measure,
                    wanted,
                )
    return {"even_seconds": even_s}


@contextmanager
def _server(mode: str, environment: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """How a run reaches a server of the tiny base."""
    with VLLMServer(
        ensure_tiny_base(), mode=mode, dtype="float32", max_lora_rank=16, env=dict(environment)
    ) as server:
        yield {"url": server.url, "token_file": str(server.token_file)}


def ratios(found: Mapping[str, Any]) -> dict[str, float]:
    """Each route's step beside what it is held against, where both were measured."""
    made: dict[str, float] = {}

    def put(name: str, of: str, to: float | None) -> None:
        if of in found and to:
            made[name] = found[of]["step"] / to

    for tokens in (8, 64):
        trl = found.get(f"trl, {tokens} tokens", {}).get("step")
        alone = found.get(f"max_staleness=0, own cores, {tokens} tokens, server asleep")
        bound = alone and max(alone["rollout"], alone["step"] - alone["rollout"])
        for k in (0, 1):
            step = f"max_staleness={k}, {tokens} tokens, server asleep"
            put(f"max_staleness={k} / TRL, {tokens} tokens", step, trl)
        put(f"max_staleness=1 / max(sample, train + publish), {tokens} tokens", step, bound)
        for k in (0, 1):
            step = f"max_staleness={k}, sampler elsewhere, {tokens} tokens"
            put(
                f"max_staleness={k} / train + publish, sampler elsewhere, {tokens} tokens",
                step,
                bound,
            )
    even_s = found.get("server adapter", {}).get("even_seconds")
    for k in (0, 1, 2):
        step = f"max_staleness={k}, uneven sampler elsewhere"
        put(f"max_staleness={k} / mean of sampling = training, uneven", step, even_s)
    return made


# -- learning ---------------------------------------------------------------------------------------


def measure_learning() -> Found:
    """The demo's seeds under each staleness: reward at the end, samples until it was learned."""
    parts = _Parts()
    for mode, stale in (("merged", (0, 1)), ("adapter", (2,))):
        with _server(mode, {}) as reached:
            for k in stale:
                for seed in SEEDS:
                    run = Run(learns=True, max_staleness=k, seed=seed, mode=mode, **reached)
                    parts.add(
                        f"max_staleness={k}, seed {seed}",
                        _learned,
                        run,
                    )
    return {"learning": parts.found, "failed": parts.failed, "held": HELD, "over_steps": OVER}


def _learned(run: Run) -> Found:
    rewards = grpo_run.measure(run)["rewards"]
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


# -- shown ------------------------------------------------------------------------------------------


def render(found: Mapping[str, Any]) -> list[str]:
    """The section of RESULTS.md."""
    lines = ["", "## Sampling ahead (medians of a step, s)", "", "| route | step | where it goes |"]
    lines += ["|---|---|---|"]
    for name, parts in found["steps"].items():
        if "step" in parts:
            lines.append(f"| {name} | {parts['step']:.2f} | {_in_line(parts)} |")
    lines += ["", "| compared | |", "|---|---|"]
    lines += [f"| {name} | {ratio:.2f} |" for name, ratio in found["ratios"].items()]
    return lines + [
        f"\nNot measured: {name} ({text[:200]})" for name, text in found["failed"].items()
    ]


def render_learning(found: Mapping[str, Any]) -> str:
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


def _in_line(parts: Mapping[str, Any]) -> str:
    numbers = {k: v for k, v in parts.items() if k != "step" and isinstance(v, (int, float))}
    return ", ".join(f"{name} {value:.3f}" for name, value in numbers.items())


def main() -> None:
    """Measure, print, write."""
    from benchmarks.run import write  # it places this process when it is imported

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a rehearsal: few steps, nothing kept")
    parser.add_argument("--learning", action="store_true", help="the table of seeds instead")
    arguments = parser.parse_args()
    flags = [f"--{name}" for name, given in vars(arguments).items() if given]
    source = {**provenance(), "command": " ".join(["python -m benchmarks.overlap", *flags])}
    if arguments.learning:
        found = measure_learning()
        write("overlap_learning", {**source, "seed": list(SEEDS), **found})
        print(render_learning(found))
        return
    found = measure(quick=arguments.quick)
    if arguments.quick:
        _QUICK_PATH.parent.mkdir(exist_ok=True)
        _QUICK_PATH.write_text(json.dumps(found, indent=1) + "\n")
    else:
        write("overlap", {**source, **found})
    print("\n".join(render(found)))


if __name__ == "__main__":
    main()
