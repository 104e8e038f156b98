"""One GRPO run of the benchmarks, timed, in a process of its own, for routes want the cores differently.

`python -m benchmarks.grpo_run '{"route": "vllm", "tokens": 8}'` prints its figures as a line of JSON.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tink_rl import placement
from tink_rl.training.ratio import RATIO

RATIO_SLACK = 0.05
"""Of the mean importance ratio from 1: both sides compute in fp32."""
_LIMIT_S = 600
_LOGGED = {
    "rollout": "rollout/seconds",
    "publish": "sync/seconds",
    "waiting for rows": "overlap/idle_trainer_s",
    "share of rows sampled ahead": "overlap/hit_share",
}
_DIGITS = Path(__file__).resolve().parents[1] / "recipes/configs/digits.yaml"


@dataclass(frozen=True, kw_only=True)
class Run:
    """What to run. Example: `Run(tokens=64, url="http://127.0.0.1:8000", token_file="runs/token")`"""

    route: str = "vllm"
    """Or `trl`: TRL's own, `use_vllm=False`."""
    tokens: int = 8
    """Of each completion, exactly."""
    completions: int = 128
    """Of a step, in groups of 8."""
    num_steps: int = 14
    num_warm_up: int = 4
    """Steps at first that are not counted."""
    url: str = ""
    """Of the server; empty: starts one in merged mode."""
    token_file: str | None = None
    mode: str = "auto"
    max_staleness: int = 0
    own_cores: bool = False
    """Keep to the cores beside vLLM's also where max_staleness would not."""
    nice: int = 0
    """How far the trainer stands back where others want its cores."""
    train_s: float = 0.0
    """What a step's training takes at least, asleep for what is left: it is done elsewhere."""
    learns: bool = False
    """Train as the demo does, to its end, instead of timing steps whose reward is noise."""
    seed: int = 0


def measure(run: Run, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The figures of `run`, in a fresh process on all cores of this machine.

    Raises:
        RuntimeError: it failed; with the end of what it said.
        TimeoutExpired: it hung.
    """
    command = [sys.executable, "-m", "benchmarks.grpo_run", json.dumps(asdict(run))]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=_LIMIT_S,
        env={k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
        | dict(environment or {}),
        # The benchmark may have pinned itself; each run places itself.
        preexec_fn=lambda: os.sched_setaffinity(0, placement.CORES),
    )
    if done.returncode:
        raise RuntimeError(f"{run} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


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


def main() -> None:
    """Run what the argument says; print its figures."""
    run = Run(**json.loads(sys.argv[1]))
    os.nice(run.nice)
    if run.route == "vllm":
        placement.let_threads_sleep()  # as recipes do; TRL's own route has torch's defaults
    if run.own_cores:
        placement.place_trainer(max_staleness=1)
    with ExitStack() as stack:
        trainer = _trainer(run, stack)
        rows = _timed(trainer, run.train_s)
        trainer.train()
    history = [row for row in trainer.state.log_history if "reward" in row]
    print(json.dumps(_rewards(history) if run.learns else _medians(run, rows, history)))


def _rewards(history: list[dict[str, Any]]) -> dict[str, Any]:
    return {"rewards": [row["reward"] for row in history]}


def _medians(
    run: Run, rows: list[dict[str, float]], history: list[dict[str, Any]]
) -> dict[str, float]:
    check_learns(history)
    rest = "rest" if run.route == "vllm" else "generation, rewards and the rest"
    # Ahead, sampling takes its seconds beside the others, and the trainer waits for what is left of them.
    of_the_step = "overlap/idle_trainer_s" if run.max_staleness else "rollout/seconds"
    for row, logged in zip(rows, history, strict=True):
        parts = {part: s for part, s in row.items() if part not in ("step", "trainer's cpu")}
        spent = sum(parts.values()) + sum(logged.get(k, 0.0) for k in (of_the_step, "sync/seconds"))
        row |= {name: logged[key] for name, key in _LOGGED.items() if key in logged}
        row[rest] = row["step"] - spent
    counted = rows[run.num_warm_up :]
    return {part: statistics.median(row.get(part, 0.0) for row in counted) for part in counted[-1]}


def _trainer(run: Run, stack: ExitStack) -> Any:
    from peft import LoraConfig
    from transformers import AutoTokenizer
    from trl import GRPOTrainer as PlainTrainer

    import tink_rl
    from recipes.tasks import load_task
    from recipes.tiny_base import ensure_tiny_base

    base = str(ensure_tiny_base())
    task = load_task("digits", seed=run.seed)
    shared: dict[str, Any] = {
        "model": base,
        "reward_funcs": task.reward if run.learns else _varied_reward,
        "args": _config(run, stack.enter_context(tempfile.TemporaryDirectory())),
        "train_dataset": task.train,
        "processing_class": AutoTokenizer.from_pretrained(base),
        "peft_config": LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
    }
    if run.route == "trl":
        return PlainTrainer(**shared)
    url, token_file = run.url, run.token_file
    if not url:
        server = tink_rl.VLLMServer(base, mode="merged", dtype="float32", shared_with_trainer=True)
        stack.enter_context(server)
        url, token_file = server.url, str(server.token_file)
    sync = tink_rl.SyncConfig(token_file=token_file, mode=run.mode, max_staleness=run.max_staleness)
    return tink_rl.GRPOTrainer(**shared, servers=url, sync=sync)


def _config(run: Run, directory: str) -> Any:
    from trl import GRPOConfig

    shared: dict[str, Any] = {
        "output_dir": directory,
        "seed": run.seed,
        "model_init_kwargs": {"dtype": "float32"},
    }
    if run.learns:
        import yaml

        digits = yaml.safe_load(_DIGITS.read_text())
        del digits["task"]
        return GRPOConfig(**{**digits, **shared, "report_to": []})
    # min_tokens would forbid the end token to vLLM's sampler; ignoring it leaves the distribution alone.
    exactly = {"ignore_eos": True} if run.route == "vllm" else {"min_new_tokens": run.tokens}
    return GRPOConfig(
        **shared,
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=run.completions,
        num_generations=8,
        max_completion_length=run.tokens,
        max_steps=run.num_steps,
        learning_rate=1e-6,
        generation_kwargs=exactly,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )


def _varied_reward(completions: list[str], **_: Any) -> list[float]:
    """Differs within every group: equal rewards have no gradient, and nothing would be published."""
    return [float(sum(map(ord, text)) % 7) for text in completions]


def _timed(trainer: Any, train_s: float) -> list[dict[str, float]]:
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

    def backward(*args: Any, **kwargs: Any) -> None:
        start = time.perf_counter()
        work(*args, **kwargs)
        spent = parts.get("old logprobs", 0.0) + parts["forward"] + time.perf_counter() - start
        time.sleep(max(0.0, train_s - spent))

    def score(model: Any, *args: Any, **kwargs: Any) -> Any:
        # TRL scores a batch for its importance ratio without a gradient; its loss has one.
        return (old if not torch.is_grad_enabled() else logprobs)(model, *args, **kwargs)

    class Steps(TrainerCallback):
        def __init__(self) -> None:
            self.last = self.optimizer = self.cpu = 0.0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.last, self.cpu = time.perf_counter(), time.process_time()

        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            self.optimizer = time.perf_counter()

        def on_optimizer_step(self, *_: Any, **__: Any) -> None:
            parts["optimizer"] = time.perf_counter() - self.optimizer

        def on_step_end(self, *_: Any, **__: Any) -> None:
            now, cpu = time.perf_counter(), time.process_time()
            rows.append({"step": now - self.last, "trainer's cpu": cpu - self.cpu, **parts})
            parts.clear()
            self.last, self.cpu = now, cpu

    import torch

    trainer.compute_loss = timed("forward", trainer.compute_loss)
    work, trainer.accelerator.backward = trainer.accelerator.backward, timed("backward", backward)
    logprobs = trainer._get_per_token_logps_and_entropies
    old, trainer._get_per_token_logps_and_entropies = timed("old logprobs", logprobs), score
    trainer.add_callback(Steps())  # the last one: a step ends when its policy is served
    return rows


if __name__ == "__main__":
    main()
