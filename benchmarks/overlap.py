"""What sampling ahead buys (`python -m benchmarks.overlap [--quick | --placements]`), in twelve routes of one
run on the same cores, each in a process of its own; and costs in learning (`--learning`).

What is measured is written after every route. One that fails is reported, and the others are measured.
"""

from __future__ import annotations

import argparse
import json
import threading
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
ELSEWHERE_S, UNEVEN_S = 1.5, 1.0
"""Seconds of sampling, and of training, that are done elsewhere: of both halves of a step alike, and more
than this machine's server and trainer need for their tokens side by side."""
_FULL = Run(num_steps=22, num_warm_up=2)
_QUICK = Run(num_steps=4, num_warm_up=1, completions=32)
_QUICK_PATH = Path("runs/overlap_quick.json")
Found = dict[str, Any]
Keep = Callable[[Found], None]


class Parts:
    """Measured parts by name, printed and kept as they come; `failed` says which could not be."""

    def __init__(self, keep: Callable[[], None] = lambda: None) -> None:
        self.found: Found = {}
        self.failed: dict[str, str] = {}
        self._keep, self._lock = keep, threading.Lock()

    def add(self, name: str, measure: Callable[..., Found], *given: Any) -> None:
        """What `measure(*given)` gives, if it does not fail."""
        print(f"overlap: {name}", flush=True)
        with self._noting(name):
            found = measure(*given)
            print(f"  {name}: {_in_line(found)}", flush=True)
            with self._lock:
                self.found[name] = found
                self._keep()

    def add_on(self, server: str, measure: Callable[[], None]) -> None:
        """The parts that `measure` adds, or that there is no `server` to measure them on."""
        with self._noting(server):
            measure()

    @contextmanager
    def _noting(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001 - the other parts are still worth their minutes
            print(f"FAILED {name}\n{traceback.format_exc(limit=2)[-2500:]}", flush=True)
            with self._lock:
                self.failed[name] = f"{type(error).__name__}: {error}"
                self._keep()


def measure(keep: Keep, *, quick: bool = False) -> None:
    """Median seconds of a step and of its parts, by route; all that is found so far goes to `keep`."""
    parts = Parts(lambda: keep(_found(parts)))
    base, lengths = (_QUICK, (8,)) if quick else (_FULL, (8, 64))
    for tokens in lengths:
        parts.add(
            f"trl, {tokens} tokens", grpo_run.measure, replace(base, tokens=tokens, route="trl")
        )
    parts.add_on("server merged", lambda: _on_this_machine(parts, base, lengths))
    parts.add_on("server adapter", lambda: _uneven(parts, base))


def measure_placements(keep: Keep) -> None:
    """Where threads of server and trainer go, on short rows."""
    parts = Parts(lambda: keep(_found(parts)))
    for name in PLACEMENTS:
        parts.add_on(f"server {name}", lambda name=name: _placed(parts, name))


def _found(parts: Parts) -> Found:
    return {"steps": parts.found, "failed": parts.failed, "ratios": ratios(parts.found)}


def _placed(parts: Parts, name: str) -> None:
    with server_of("merged", PLACEMENTS[name]) as reached:
        run = replace(_FULL, **reached)
        routes: dict[str, tuple[Run, dict[str, str]]] = {
            "max_staleness=0": (run, {}),
            "max_staleness=0, spinning": (run, {"OMP_WAIT_POLICY": "active"}),
            "max_staleness=0, one thread": (run, {"OMP_NUM_THREADS": "1"}),
            "max_staleness=0, own cores": (replace(run, own_cores=True), {}),
            "max_staleness=1": (replace(run, max_staleness=1), {}),
            "max_staleness=1, nice, all cores": (
                replace(run, max_staleness=1, nice=10),
                {"TINK_PLACEMENT": "off"},
            ),
        }
        for route, (wanted, environment) in routes.items():
            parts.add(f"{route}, server {name}", grpo_run.measure, wanted, environment)


def _on_this_machine(parts: Parts, base: Run, lengths: tuple[int, ...]) -> None:
    """The routes on one server in merged mode."""
    with server_of("merged") as reached:
        for tokens in lengths:
            run = replace(base, tokens=tokens, **reached)
            for k in (0, 1):
                wanted = replace(run, max_staleness=k)
                parts.add(f"max_staleness={k}, {tokens} tokens", grpo_run.measure, wanted)
        # Each side alone on its half of the cores: what overlap is held against, and half as often is enough.
        alone = replace(run, own_cores=True, num_steps=(run.num_steps + run.num_warm_up) // 2)
        parts.add(f"each side alone, {tokens} tokens", grpo_run.measure, alone)
        # Few rows of many tokens: a probe's four tokens take their time there too, at the start of each run.
        few = replace(base, tokens=32, completions=32)
        even = replace(few, train_s=ELSEWHERE_S, own_cores=True, **reached)
        _elsewhere(parts, "sampler elsewhere", even, (0, 1), 0.0)


def _uneven(parts: Parts, base: Run) -> None:
    """In adapter mode: every other batch is sampled in half the time of training, those between in 3/2."""
    with server_of("adapter") as reached:
        few = replace(base, tokens=32, completions=16, mode="adapter")
        run = replace(few, train_s=UNEVEN_S, own_cores=True, **reached)
        _elsewhere(parts, "uneven sampler elsewhere", run, (0, 1, 2), 0.5)


def _elsewhere(parts: Parts, name: str, run: Run, stale: tuple[int, ...], spread: float) -> None:
    """A sampler that takes as long as training does, on no core of this machine's."""
    slow = SlowSampler(target=run.url, token_s=run.train_s / run.tokens, spread=spread)
    with running(slow) as url:
        for k in stale:
            wanted = replace(run, url=url, max_staleness=k)
            parts.add(f"max_staleness={k}, {name}", grpo_run.measure, wanted)


@contextmanager
def server_of(mode: str, environment: Mapping[str, str] | None = None) -> Iterator[dict[str, Any]]:
    """How a run reaches a server of the tiny base."""
    with VLLMServer(
        ensure_tiny_base(),
        mode=mode,
        dtype="float32",
        max_lora_rank=16,
        env=dict(environment or {}),
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
        for k in (0, 1):
            put(
                f"max_staleness={k} / TRL, {tokens} tokens",
                f"max_staleness={k}, {tokens} tokens",
                trl,
            )
        bound = _longer_side(found.get(f"each side alone, {tokens} tokens"))
        name = f"max_staleness=1 / max(sample, train + publish), {tokens} tokens"
        put(name, f"max_staleness=1, {tokens} tokens", bound)
    for where, stale in (("sampler elsewhere", (0, 1)), ("uneven sampler elsewhere", (0, 1, 2))):
        bound = _longer_side(found.get(f"max_staleness=0, {where}"))
        for k in stale:
            name = f"max_staleness={k} / max(sample, train + publish), {where}"
            put(name, f"max_staleness={k}, {where}", bound)
    return made


def _longer_side(alone: Mapping[str, float] | None) -> float | None:
    """Of a run in which the sides took turns: sampling, or all else."""
    return alone and max(alone["rollout"], alone["step"] - alone["rollout"])


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


def _in_line(parts: Mapping[str, Any]) -> str:
    numbers = {k: v for k, v in parts.items() if k != "step" and isinstance(v, (int, float))}
    return ", ".join(f"{name} {value:.3f}" for name, value in numbers.items())


def main() -> None:
    """Measure, print, write."""
    from benchmarks import learning
    from benchmarks.run import write  # it places this process when it is imported

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--quick", action="store_true", help="a rehearsal: few steps, nothing kept")
    what.add_argument("--learning", action="store_true", help="the table of seeds instead")
    what.add_argument("--placements", action="store_true", help="who computes where instead")
    arguments = parser.parse_args()
    flags = [f"--{name}" for name, given in vars(arguments).items() if given]
    source = {**provenance(), "command": " ".join(["python -m benchmarks.overlap", *flags])}
    last: Found = {}

    def keep(name: str, found: Found) -> None:
        last.update(found)
        if name == "quick":
            _QUICK_PATH.parent.mkdir(exist_ok=True)
            _QUICK_PATH.write_text(json.dumps(found, indent=1) + "\n")
        else:
            write(name, {**source, **found})

    if arguments.learning:
        learning.measure(
            lambda found: keep("overlap_learning", {"seed": list(learning.SEEDS), **found})
        )
        print(learning.render(last))
        return
    if arguments.placements:
        measure_placements(lambda found: keep("overlap_placements", found))
    else:
        name = "quick" if arguments.quick else "overlap"
        measure(lambda found: keep(name, found), quick=arguments.quick)
    print("\n".join(render(last)))


if __name__ == "__main__":
    main()
