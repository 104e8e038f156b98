"""What a run left behind, or has written so far, as plain data."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from tink_rl.errors import ConfigError
from tink_rl.policy.peft_dir import POLICY_FILE
from tink_rl.types import METRICS_FILE, ROLLOUT_FILE

STATE_FILE = "trainer_state.json"
SUMMARY_FILE = "summary.json"
_SAMPLES_PER_VERSION = 6
_SILENT_S = 300.0
_USUAL_PAUSES = 10
_SILENT_AT_FIRST_S = 3600.0

Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One completion of the rollout log.

    Example: `Sample(version=3, prompt="4173=", completion="1347", reward=1.0)`
    """

    version: int
    prompt: str
    completion: str
    reward: float | None


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run as far as its files tell it."""

    directory: Path
    steps: list[dict[str, Any]]
    """Logged training rows, one per step, in order."""
    evaluations: list[dict[str, Any]]
    """Rows with `eval_*` keys."""
    max_steps: int | None
    finished: bool
    """It is over, well or not."""
    updated: float
    """When the newest of its files was written (seconds since 1970)."""
    summary: dict[str, Any] = field(default_factory=dict)
    policy: dict[str, Any] = field(default_factory=dict)
    samples: dict[int, list[Sample]] = field(default_factory=dict)
    """By version; a few of each."""
    rewards: dict[int, float] = field(default_factory=dict)
    """By version: mean over all of its logged training completions."""
    error: str | None = None
    """What it ended with, if it failed and could say so."""

    @property
    def patience_s(self) -> float:
        """Seconds without news after which a run that is not over may have stopped.

        Five minutes, or ten of its usual pauses; an hour as long as no pause is known.
        """
        times = [row["time"] for row in self.steps if _is_number(row.get("time"))]
        pauses = [after - before for before, after in itertools.pairwise(times)]
        if not pauses:
            return _SILENT_AT_FIRST_S
        return max(_SILENT_S, _USUAL_PAUSES * float(statistics.median(pauses)))

    @property
    def last_step(self) -> int:
        """The newest step that was logged; 0 before the first."""
        return int(self.steps[-1]["step"]) if self.steps else 0

    def series(self, key: str, scale: float = 1.0) -> tuple[list[int], list[float]]:
        """Steps and values of the rows that hold `key`."""
        found = [row for row in self.steps if _is_number(row.get(key))]
        return [int(row["step"]) for row in found], [scale * float(row[key]) for row in found]

    def values(self, key: str) -> list[float]:
        """The finite values of `key`, in order."""
        return [value for value in self.series(key)[1] if math.isfinite(value)]


def load_run(directory: str | Path) -> Run:
    """Read a run directory; unfinished last lines of files that are being written are left out.

    Raises:
        ConfigError: no such directory, or none of the files that a run writes.
    """
    path = Path(directory)
    if not path.is_dir():
        raise ConfigError(f"run directory {str(directory)!r} does not exist; give an output_dir")
    rows, source, max_steps, end = _read_log(path)
    if not rows and source is None:
        raise ConfigError(
            f"{path} holds neither {METRICS_FILE} nor {STATE_FILE} (nor a checkpoint with one); give "
            "the output_dir of a run"
        )
    by_step: dict[int, dict[str, Any]] = {}
    evaluations = []
    for row in rows:
        step = int(row.get("step", 0))
        if any(key.startswith("eval_") for key in row):
            evaluations.append(row)
        elif "loss" in row or "reward" in row or "learning_rate" in row:
            by_step[step] = row  # a step that was done again after a resume counts once
    samples, rewards = _read_samples(path / ROLLOUT_FILE)
    watched = [source, path / ROLLOUT_FILE, path / SUMMARY_FILE]
    return Run(
        directory=path,
        steps=[by_step[step] for step in sorted(by_step)],
        evaluations=evaluations,
        max_steps=max_steps,
        finished=end is not None,
        error=(end or {}).get("error"),
        updated=max(p.stat().st_mtime for p in watched if p is not None and p.exists()),
        summary=_read_json(path / SUMMARY_FILE),
        policy=_read_json(path / POLICY_FILE),
        samples=samples,
        rewards=rewards,
    )


def _read_log(path: Path) -> tuple[list[dict[str, Any]], Path | None, int | None, Row | None]:
    """Rows, the file that they come from, the planned number of steps, and how it ended, if it did."""
    metrics, state_file = path / METRICS_FILE, path / STATE_FILE
    if metrics.is_file():
        rows = list(_json_lines(metrics))
        events = {row["event"]: row for row in rows if "event" in row}
        max_steps = events.get("begin", {}).get("max_steps")
        plain = [row for row in rows if "event" not in row]
        return plain, metrics, max_steps, events.get("end")
    finished = state_file.is_file()
    if not finished:
        checkpoints = path.glob(f"checkpoint-*/{STATE_FILE}")
        newest = max(checkpoints, key=lambda p: p.stat().st_mtime, default=None)
        if newest is None:
            return [], None, None, None
        state_file = newest
    state = _read_json(state_file)
    return (
        list(state.get("log_history", [])),
        state_file,
        state.get("max_steps"),
        {} if finished else None,
    )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(
            f"{path} is not JSON ({error}); is it being written? try again"
        ) from error
    return data if isinstance(data, dict) else {}


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Every whole line; the last one may be half written."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                if line.endswith("\n"):
                    raise ConfigError(
                        f"{path} holds a line that is not JSON: {line[:80]!r}"
                    ) from None
                continue
            if isinstance(row, dict):
                yield row


def _read_samples(path: Path) -> tuple[dict[int, list[Sample]], dict[int, float]]:
    """A few completions of every version, the first of different prompts, and its mean reward."""
    found: dict[int, list[Sample]] = {}
    sums: dict[int, tuple[float, int]] = {}
    for row in _json_lines(path) if path.is_file() else ():
        if row.get("version") is None or row.get("phase", "train") != "train":
            continue
        version, reward, prompt = int(row["version"]), row.get("reward"), str(row.get("prompt", ""))
        if _is_number(reward):
            total, count = sums.get(version, (0.0, 0))
            sums[version] = (total + float(reward), count + 1)
        kept = found.setdefault(version, [])
        if len(kept) < _SAMPLES_PER_VERSION and all(s.prompt != prompt for s in kept):
            kept.append(
                Sample(
                    version=version,
                    prompt=prompt,
                    completion=str(row.get("completion", "")),
                    reward=float(reward) if _is_number(reward) else None,
                )
            )
    return found, {version: total / count for version, (total, count) in sums.items()}


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
