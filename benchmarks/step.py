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
from typing import Any

from tink_rl import placement

NUM_STEPS = 14
NUM_WARM_UP = 4


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
    exactly = {"min_tokens": tokens} if route == "vllm" else {"min_new_tokens": tokens}
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
        trainer.train()
    history = [r for r in trainer.state.log_history if "reward" in r][NUM_WARM_UP:]

    def median(key: str) -> float:
        return statistics.median(row[key] for row in history)

    if route == "trl":
        return {"step": median("step_time")}
    step, rollout, publish = (
        median("step_seconds"),
        median("rollout/seconds"),
        median("sync/seconds"),
    )
    return {
        "step": step,
        "rollout": rollout,
        "publish": publish,
        "held": median("sync/held_seconds"),
        "rest (forward, backward, optimizer, rewards)": step - rollout - publish,
    }


if __name__ == "__main__":
    if sys.argv[1] == "vllm":
        placement.apply_to_trainer(placement.plan_here())  # before torch is imported
    print(json.dumps(_run(sys.argv[1], int(sys.argv[2]))))
