"""The same learning run in one process and in two: `python -m benchmarks.processes [SEED ...]`.

`recipes/grpo.py` on `digits` as the demo runs it, 128 completions a step in every layout. What two
processes reach at the end is held against what one process reaches over the seeds.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.provenance import provenance
from recipes.demo import history_of, summarise
from recipes.tiny_base import ensure_tiny_base
from tink_rl import VLLMServer

_ROOT = Path(__file__).resolve().parents[1]
_BATCH = 128
LAYOUTS = {
    "one process": ("accelerate_configs/cpu.yaml", 1),
    "DDP": ("accelerate_configs/cpu_2proc.yaml", 2),
    "FSDP2": ("tests/multi/cpu_fsdp2.yaml", 2),
    "ZeRO-3": ("accelerate_configs/cpu_zero3.yaml", 2),
}
"""Configuration of accelerate, and processes."""
_LIMIT_S = 600


def measure(seeds: list[int]) -> dict[str, Any]:
    """What `summarise` says of each run, by layout, in the order of `seeds`; and seconds of training."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in LAYOUTS}
    with VLLMServer(
        ensure_tiny_base(), mode="merged", dtype="float32", shared_with_trainer=True
    ) as server:
        for seed in seeds:
            for name in LAYOUTS:
                found[name].append(_run(server, name, seed))
                print(f"seed {seed}, {name}: {found[name][-1]}", flush=True)
    return found


def _run(server: VLLMServer, name: str, seed: int) -> dict[str, float]:
    yaml, num_processes = LAYOUTS[name]
    out = Path("runs/processes") / f"{name.replace(' ', '-')}-{seed}"
    out.mkdir(parents=True, exist_ok=True)
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"),
        *("--config_file", str(_ROOT / yaml), str(_ROOT / "benchmarks/grpo_on_cpu.py")),
        *("--config", str(_ROOT / "recipes/configs/digits.yaml")),
        *("--per_device_train_batch_size", str(_BATCH // num_processes)),
        *("--vllm_server", server.url, "--token_file", str(server.token_file)),
        *("--policy", "digits", "--seed", str(seed), "--output_dir", str(out)),
    ]
    start = time.perf_counter()
    with (out / "train.log").open("w") as log:
        subprocess.run(
            command,
            stdout=log,
            stderr=log,
            env={**os.environ, "DS_ACCELERATOR": "cpu"},
            timeout=_LIMIT_S,
            check=True,
        )
    return {**summarise(history_of(out)), "train_seconds": time.perf_counter() - start}


def within(found: dict[str, list[dict[str, float]]]) -> dict[str, bool]:
    """Whether the mean of a layout's last rewards lies within the noise of one process.

    The noise: two standard deviations of the difference of two means over the seeds. One run's deviation
    is that of the runs of one process, or what chance does to the completions of five steps (binomial),
    if that is more: three runs may lie close together by luck.
    """
    alone = [run["reward_last5"] for run in found["one process"]]
    mean = statistics.mean(alone)
    by_chance = (mean * (1 - mean) / (5 * _BATCH)) ** 0.5
    deviation = max(by_chance, statistics.stdev(alone) if len(alone) > 1 else 0.0)
    noise = 2 * deviation * (2 / len(alone)) ** 0.5
    return {
        name: abs(statistics.mean(run["reward_last5"] for run in runs) - mean) <= noise
        for name, runs in found.items()
    }


def table(found: dict[str, list[dict[str, float]]]) -> str:
    """The runs as a Markdown table."""
    lines = [
        "| layout | reward, first 5 steps | last 5 steps | largest logprob gap | step (s) |",
        "|---|---|---|---|---|",
    ]
    for name, runs in found.items():
        columns = [
            ", ".join(f"{run[key]:.2f}" for run in runs)
            for key in ("reward_first5", "reward_last5")
        ]
        gap = max(run["max_logprob_gap"] for run in runs)
        step = statistics.median(run["step_seconds_median"] for run in runs)
        lines.append(f"| {name} | {columns[0]} | {columns[1]} | {gap:.1e} | {step:.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print, and write results/processes.json."""
    from benchmarks.run import write  # it pins this process when it is imported

    seeds = [int(word) for word in sys.argv[1:]] or [0, 1, 2]
    command = " ".join(["python", "-m", "benchmarks.processes", *sys.argv[1:]])
    source = {**provenance(), "command": command, "seed": seeds}
    found = measure(seeds)
    write("processes", {**source, "runs": found, "within_noise": within(found)})
    print(table(found), json.dumps(within(found)), sep="\n")


if __name__ == "__main__":
    main()
