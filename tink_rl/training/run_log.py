"""What a run says of itself while it goes on: `metrics.jsonl`, and where the time of a step went.

`trainer_state.json` is written with checkpoints only; a line per logged step in the run's own folder
lets `tink-rl report` look at a run that has not saved yet.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from tink_rl.training import metrics
from tink_rl.training.trl_names import Arguments, RolloutTrainer, State
from tink_rl.types import METRICS_FILE, PolicyVersion

_MAX_ERROR = 500


class RunLog(TrainerCallback):
    """Appends every logged row to `metrics.jsonl`, and adds time shares and staleness to the rows.

    Add it after the callback that publishes: a step ends when its policy is served.
    """

    def __init__(self, trainer: RolloutTrainer) -> None:
        """Store, and have `trainer.train` say how it failed; no callback is told that.

        `trainer` has `policy_link` and `vllm_generation`.
        """
        self._trainer = trainer
        self._under_way = False
        trainer.train = self._recording_failure(trainer.train)
        self._step_start = 0.0
        self._num_records = 0
        self._sampling_s = 0.0
        self._version = 0

    # -- the rows ---------------------------------------------------------------------------------

    def on_train_begin(self, args: Arguments, state: State, control: object, **_: object) -> None:
        """Start the file; a resumed run keeps the rows up to its checkpoint."""
        self._mark_step()
        if not state.is_world_process_zero:
            return
        path = Path(args.output_dir) / METRICS_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = _rows_until(path, state.global_step) if state.global_step else []
        begin = {"event": "begin", "step": state.global_step, "max_steps": state.max_steps}
        _write(path, [*kept, begin | {"time": time.time()}], append=False)
        self._under_way = True

    def on_log(
        self,
        args: Arguments,
        state: State,
        control: object,
        logs: dict[str, float] | None = None,
        **_: object,
    ) -> None:
        """One line per logged row."""
        if state.is_world_process_zero and logs:
            row = {**logs, "step": state.global_step, "time": time.time()}
            _write(Path(args.output_dir) / METRICS_FILE, [row])

    def on_train_end(self, args: Arguments, state: State, control: object, **_: object) -> None:
        """Say that the run is over."""
        self._end(args, state)

    def _end(self, args: Arguments, state: State, **more: str) -> None:
        if self._under_way:
            row = {"event": "end", "step": state.global_step, **more, "time": time.time()}
            _write(Path(args.output_dir) / METRICS_FILE, [row])
        self._under_way = False

    def _recording_failure(self, train: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(train)
        def recording(*args: object, **kwargs: object) -> Any:
            try:
                return train(*args, **kwargs)
            except BaseException as error:  # an interrupted run has ended too
                text = f"{type(error).__name__}: {error}"[:_MAX_ERROR]
                with suppress(OSError):  # a full disk must not hide what happened
                    self._end(self._trainer.args, self._trainer.state, error=text)
                raise

        return recording

    # -- the time of a step -----------------------------------------------------------------------

    def on_step_begin(self, args: Arguments, state: State, control: object, **_: object) -> None:
        """Remember which version the step trains on top of."""
        current = self._trainer.policy_link.sync.current
        self._version = current.version if current is not None else 0

    def on_step_end(self, args: Arguments, state: State, control: object, **_: object) -> None:
        """Add `share/*` (of the step's seconds) and `rollout/staleness` (in versions)."""
        if not state.is_world_process_zero:
            return
        generation, records = self._trainer.vllm_generation, self._trainer.policy_link.records
        total = time.perf_counter() - self._step_start
        sampling = generation.total_seconds - self._sampling_s
        syncing = sum(record.seconds for record in records[self._num_records :])
        found = {
            "share/sampling": sampling / total,
            "share/syncing": syncing / total,
            "share/training": max(0.0, total - sampling - syncing) / total,
        }
        sampled = PolicyVersion.find(generation.last_trained_model)
        if sampled is not None:
            found["rollout/staleness"] = float(self._version - sampled.version)
        metrics.add(self._trainer._metrics["train"], found)
        self._mark_step()

    def _mark_step(self) -> None:
        self._step_start = time.perf_counter()
        self._num_records = len(self._trainer.policy_link.records)
        self._sampling_s = self._trainer.vllm_generation.total_seconds


def _rows_until(path: Path, step: int) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    return [row for row in rows if row["step"] <= step and row.get("event") != "end"]


def _write(path: Path, rows: list[dict[str, Any]], *, append: bool = True) -> None:
    with path.open("a" if append else "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
