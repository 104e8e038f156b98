"""The main job in one command: `make demo` (or `python -m recipes.demo --seed 0 --mode auto`).

Trains the tiny base (once), starts vLLM, measures the base on held-out problems through the server,
trains by GRPO through `accelerate launch recipes/grpo.py`, measures the last version the same way,
and writes `runs/demo/summary.json`, `runs/demo/demo.png` and the page `runs/demo/report.html`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from recipes.evaluate import accuracy
from recipes.tasks import load_task
from recipes.tiny_base import ensure_tiny_base
from tink_rl import VLLMClient, VLLMServer
from tink_rl.cli import Heartbeat, show_wait
from tink_rl.gpus import exact_dtype, has_gpu
from tink_rl.serve_options import ServerOptions
from tink_rl.tools.report import write_report

_ROOT = Path(__file__).resolve().parents[1]
_POLICY = "digits"
_PRECISION = {
    "float32": ["--mixed_precision", "no"],
    "bfloat16": ["--mixed_precision", "bf16", "--bf16", "true"],
    "float16": ["--mixed_precision", "fp16", "--fp16", "true"],
}
"""On a GPU: accelerate's flag and the trainer's, by the dtype of the base."""


def main() -> None:
    """Run the demo; exits with the trainer's code if training fails."""
    arguments = _parse()
    run = arguments.output
    run.mkdir(parents=True, exist_ok=True)
    base = ensure_tiny_base()
    start = time.perf_counter()
    print("starting vLLM (about 40 s on two cores)", flush=True)
    options = server_options(base, arguments, on_gpu=has_gpu())
    with VLLMServer(options=options, on_wait=show_wait) as server:
        if server.memory_line:
            print(server.memory_line, flush=True)
        print(f"vLLM is up after {time.perf_counter() - start:.0f} s at {server.url}", flush=True)
        summary = _train_and_measure(server, base, arguments)
    history = history_of(run)
    summary |= summarise(history)
    (run / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    plot(history, run / "demo.png")
    write_report(run)
    _explain(summary, run)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mode", default="auto", choices=("auto", "merged", "adapter"))
    parser.add_argument("--max_staleness", type=int, default=0, help="1: sample while training")
    parser.add_argument("--max_steps", type=int, default=0, help="0: as in digits.yaml")
    parser.add_argument("--output", type=Path, default=Path("runs/demo"))
    return parser.parse_args()


def server_options(base: Path, arguments: argparse.Namespace, *, on_gpu: bool) -> ServerOptions:
    """The demo's server: everything that `--mode` may take, as exact as the device serves it."""
    mode = "both" if arguments.mode == "auto" else arguments.mode
    return ServerOptions(
        model=str(base),
        mode=mode,
        dtype=exact_dtype(mode, on_gpu=on_gpu),
        max_lora_rank=16,
        max_loras=max(4, arguments.max_staleness + 2),
        shared_with_trainer=True,
        log_file=str(arguments.output / "vllm.log"),
    )


def _train_and_measure(
    server: VLLMServer, base: Path, arguments: argparse.Namespace
) -> dict[str, Any]:
    from transformers import AutoTokenizer

    task = load_task("digits", seed=arguments.seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    with server.client() as client:
        before = _measure(client, task, tokenizer, str(base))
        print(
            f"base: held-out accuracy {before[0]:.2f} sampled, {before[1]:.2f} greedy", flush=True
        )
        start = time.perf_counter()
        _launch_training(server, arguments)
        seconds = time.perf_counter() - start
        last = json.loads((arguments.output / "tink_policy.json").read_text())
        after = _measure(client, task, tokenizer, f"{_POLICY}@{last['version']}")
    return {
        "heldout_before": before[0],
        "heldout_after": after[0],
        "heldout_greedy_before": before[1],
        "heldout_greedy_after": after[1],
        "train_seconds": seconds,
        "versions_published": last["version"],
        "mode": last["mode"],
        "seed": arguments.seed,
    }


def _measure(client: VLLMClient, task: Any, tokenizer: Any, model: str) -> tuple[float, float]:
    sampled, greedy = (
        accuracy(client, task, tokenizer, model=model, temperature=temperature)
        for temperature in (1.0, 0.0)
    )
    return sampled, greedy


def training_command(
    options: ServerOptions, token_file: Path, arguments: argparse.Namespace, *, on_gpu: bool
) -> list[str]:
    """What trains against that server: on its device, and in its dtype."""
    config, precision = ("gpu", _PRECISION[options.dtype]) if on_gpu else ("cpu", [])
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch"),
        *("--config_file", str(_ROOT / f"accelerate_configs/{config}.yaml"), *precision[:2]),
        *(str(_ROOT / "recipes/grpo.py"), "--config", str(_ROOT / "recipes/configs/digits.yaml")),
        *("--vllm_server", options.url, "--token_file", str(token_file)),
        *("--policy", _POLICY, "--sync_mode", arguments.mode),
        *("--seed", str(arguments.seed), "--output_dir", str(arguments.output)),
    ]
    if arguments.max_staleness:
        command += ["--max_staleness", str(arguments.max_staleness)]
    if arguments.max_steps:
        command += ["--max_steps", str(arguments.max_steps)]
    if on_gpu:  # digits.yaml is for CPUs
        command += ["--use_cpu", "false", "--dtype", options.dtype, *precision[2:]]
    return command


def _launch_training(server: VLLMServer, arguments: argparse.Namespace) -> None:
    assert server.token_file is not None
    command = training_command(server.options, server.token_file, arguments, on_gpu=has_gpu())
    print(f"$ accelerate launch {' '.join(command[3:])}", flush=True)
    with (arguments.output / "train.log").open("w") as log:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=Path.cwd()
        )
        assert process.stdout is not None
        with Heartbeat("trainer", "importing TRL") as heartbeat:
            for line in process.stdout:
                log.write(line)
                if _show(line):
                    heartbeat.said("training")
    if process.wait():
        raise SystemExit(f"training failed; its output is in {arguments.output / 'train.log'}")


def _show(line: str) -> bool:
    """One short line for every tenth step, and whatever tink_rl says; whether anything was shown."""
    if "tink_rl" in line or "Error" in line:
        print(f"  {line.rstrip()[:200]}", flush=True)
        return True
    if not line.startswith("{'loss'"):
        return False
    row = dict(part.split("': '") for part in line.strip("{}' \n").split("', '"))
    version = int(float(row["rollout/policy_version"]))
    if version % 10 != 1:
        return False
    print(
        f"  policy@{version:<3} reward {float(row['reward']):.2f}  "
        f"publish {1e3 * float(row['sync/seconds']):.0f} ms  "
        f"rollout {float(row['rollout/tokens_per_second']):.0f} tokens/s  "
        f"step {float(row['step_seconds']):.2f} s",
        flush=True,
    )
    return True


def history_of(run: Path) -> list[dict[str, float]]:
    """The logged rows of the training steps that ended in `run`."""
    state = json.loads((run / "trainer_state.json").read_text())
    return [row for row in state["log_history"] if "reward" in row]


def summarise(history: list[dict[str, float]]) -> dict[str, float]:
    """What the summary says of the training steps."""
    rewards = [row["reward"] for row in history]
    return {
        "reward_first5": statistics.mean(rewards[:5]),
        "reward_last5": statistics.mean(rewards[-5:]),
        "step_seconds_median": statistics.median(row["step_seconds"] for row in history),
        "publish_seconds_median": statistics.median(row["sync/seconds"] for row in history),
        "max_logprob_gap": max(row["rollout/logprob_gap"] for row in history),
        "max_age": max(row.get("offpolicy/age_max", 0.0) for row in history),
    }


def plot(history: list[dict[str, float]], path: Path) -> None:
    """Reward, publish time and tokens per second by step, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps = [row["step"] for row in history]
    panels = (
        ("reward", "reward (exact answers)", 1.0),
        ("sync/seconds", "publish (ms)", 1e3),
        ("rollout/tokens_per_second", "rollout (tokens/s)", 1.0),
    )
    figure, axes = plt.subplots(len(panels), 1, sharex=True, figsize=(8, 8))
    for axis, (key, label, scale) in zip(axes, panels, strict=True):
        axis.plot(steps, [scale * row[key] for row in history], linewidth=1.5)
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[-1].set_xlabel("optimizer step")
    figure.suptitle("GRPO with LoRA, rollouts from vLLM")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _explain(s: dict[str, Any], run: Path) -> None:
    sampled = (
        f"one at most {s['max_age']:.0f} versions older than the policy"
        if s["max_age"]
        else "the policy"
    )
    lines = (
        "",
        "A 4-layer model learned to sort four digits by reinforcement learning, on this machine, in "
        f"{s['train_seconds']:.0f} s.",
        f"{s['versions_published']} policy versions were published into a running vLLM server "
        f"({s['mode']} mode).",
        f"  training reward     {s['reward_first5']:.2f} (first 5 steps) -> {s['reward_last5']:.2f} (last 5)",
        f"  held-out, sampled   {s['heldout_before']:.2f} (base) -> {s['heldout_after']:.2f} (last version)",
        f"  held-out, greedy    {s['heldout_greedy_before']:.2f} (base) -> "
        f"{s['heldout_greedy_after']:.2f} (last version)",
        f"  one step            {s['step_seconds_median']:.2f} s, of which publishing "
        f"{1e3 * s['publish_seconds_median']:.0f} ms (medians)",
        f"Trainer and sampler differ by at most {s['max_logprob_gap']:.1e} in a logprob: the server "
        f"sampled {sampled} that was trained, at every step.",
        f"Report: {run / 'report.html'}   Plot: {run / 'demo.png'}   Figures: {run / 'summary.json'}",
        f"Logs: {run / 'train.log'}, {run / 'vllm.log'}",
    )
    print("\n".join(lines))


if __name__ == "__main__":
    main()
