"""Where a GRPO step goes, beside TRL's own CPU route: `python -m benchmarks.step vllm 8`.

A process of its own, because the routes want the cores differently: TRL without vLLM gets both.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

from tink_rl import placement
from tink_rl.training.ratio import RATIO

NUM_STEPS = 14
NUM_WARM_UP = 4
RATIO_SLACK = 0.05
"""Of the mean importance ratio from 1: both sides compute in fp32."""


def measure() -> dict[str, Any]:
    """Median seconds of a step by route and completion length, each in a fresh process."""
    results: dict[str, Any] = {}
    for tokens in (8, 64):
        for route in ("vllm", "trl"):
            print(f"step: {route}, {tokens} tokens a completion", flush=True)
            command = [sys.executable, "-m", "benchmarks.step", route, str(tokens)]
            done = subprocess.run(
                command, capture_output=True, text=True, env=_unpinned(), preexec_fn=_all_cores
            )
            if done.returncode:
                raise SystemExit(f"{' '.join(command[1:])} failed:\n{done.stderr[-3000:]}")
            results.setdefault(f"{tokens} tokens", {})[route] = json.loads(
                done.stdout.splitlines()[-1]
            )
    return results


def _unpinned() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}


def _all_cores() -> None:
    # `benchmarks.run` pinned itself; each route places itself.
    os.sched_setaffinity(0, placement.CORES)


def _varied_reward(completions: list[str], **_: Any) -> list[float]:
    """Differs within every group: equal rewards have no gradient, and nothing would be published."""
    return [float(sum(map(ord, text)) % 7) for text in completions]


def _timed(trainer: Any) -> list[dict[str, float]]:
    """Seconds of each step of `trainer`, from one's end to the next one's, and of its parts; same for all."""
    from transformers import TrainerCallback

    rows: list[dict[str, float]] = []
    parts: dict[str, float] = {}

    def timed(name: str, work: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return work(*args, **kwargs)
            finally:
                parts[name] = parts.get(name, 0.0) + time.perf_counter() - start

        return run

    class Steps(TrainerCallback):
        def __init__(self) -> None:
            self.last = self.optimizer = 0.0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.last = time.perf_counter()

        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            self.optimizer = time.perf_counter()

        def on_optimizer_step(self, *_: Any, **__: Any) -> None:
            parts["optimizer"] = time.perf_counter() - self.optimizer

        def on_step_end(self, *_: Any, **__: Any) -> None:
            now = time.perf_counter()
            rows.append({"step": now - self.last, **parts})
            parts.clear()
            self.last = now

    trainer.compute_loss = timed("forward", trainer.compute_loss)
    trainer.accelerator.backward = timed("backward", trainer.accelerator.backward)
    trainer.add_callback(Steps())  # the last one: a step ends when its policy is served
    return rows


def _run(route: str, tokens: int) -> dict[str, float]:
    from contextlib import ExitStack

    from peft import LoraConfig
    from transformers import AutoTokenizer
    from trl import GRPOConfig
    from trl import GRPOTrainer as PlainTrainer

    import tink_rl
    from recipes.tasks import load_task
    from recipes.tiny_base import ensure_tiny_base

    base = str(ensure_tiny_base())
    task = load_task("digits")
    # min_tokens would forbid the end token to vLLM's sampler; ignoring it leaves the distribution alone.
    exactly = {"ignore_eos": True} if route == "vllm" else {"min_new_tokens": tokens}
    with ExitStack() as stack:
        shared: dict[str, Any] = {
            "model": base,
            "reward_funcs": _varied_reward,
            "args": GRPOConfig(
                output_dir=stack.enter_context(tempfile.TemporaryDirectory()),
                use_cpu=True,
                bf16=False,
                per_device_train_batch_size=128,
                num_generations=8,
                max_completion_length=tokens,
                max_steps=NUM_STEPS,
                learning_rate=1e-6,
                generation_kwargs=exactly,
                logging_steps=1,
                report_to=[],
                save_strategy="no",
                disable_tqdm=True,
                model_init_kwargs={"dtype": "float32"},
            ),
            "train_dataset": task.train,
            "processing_class": AutoTokenizer.from_pretrained(base),
            "peft_config": LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
        }
        if route == "trl":
            trainer: Any = PlainTrainer(**shared)
        else:
            server = tink_rl.VLLMServer(
                base, mode="merged", dtype="float32", shared_with_trainer=True
            )
            stack.enter_context(server)
            sync = tink_rl.SyncConfig(token=server.token)
            trainer = tink_rl.GRPOTrainer(**shared, servers=server.url, sync=sync)
        rows = _timed(trainer)
        trainer.train()
    history = [r for r in trainer.state.log_history if "reward" in r]
    check_learns(history)
    for row, logged in zip(rows, history, strict=True):
        for part, key in (("rollout", "rollout/seconds"), ("publish", "sync/seconds")):
            if key in logged:
                row[part] = logged[key]
        known = sum(seconds for part, seconds in row.items() if part != "step")
        row["rest" if route == "vllm" else "generation, rewards and the rest"] = row["step"] - known
    counted = rows[NUM_WARM_UP:]
    return {part: statistics.median(row[part] for row in counted) for part in counted[0]}


def check_learns(history: list[dict[str, Any]]) -> None:
    """Refuse to time a run of another kind: without a gradient, backward computes with denormal numbers.

    Raises:
        SystemExit: the mean importance ratio of a step is not near 1.
    """
    ratios = [row[RATIO] for row in history if RATIO in row]
    odd = [ratio for ratio in ratios if not abs(ratio - 1) <= RATIO_SLACK]
    if odd:
        raise SystemExit(
            f"{len(odd)} of {len(ratios)} steps have a mean importance ratio beyond 1 +- {RATIO_SLACK} "
            f"(such as {odd[0]:.3g}): this run does not learn as a user's does, and is not measured"
        )


if __name__ == "__main__":
    print(json.dumps(_run(sys.argv[1], int(sys.argv[2]))))
