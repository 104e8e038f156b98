"""What a report reads: whole runs, running ones, and files that are being written."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tink_rl.errors import ConfigError
from tink_rl.tools.report.findings import find
from tink_rl.tools.report.run import Run, load_run
from tink_rl.training.ratio import RATIO

DEMO_RUN = Path(__file__).parent / "demo_run"


@pytest.fixture
def run_dir(tmp_path):
    return Path(shutil.copytree(DEMO_RUN, tmp_path / "demo"))


def a_run(**columns):
    """A run of rows with these columns."""
    length = len(next(iter(columns.values())))
    rows = [
        {"step": i + 1, "loss": 0.0, **{k.replace("__", "/"): v[i] for k, v in columns.items()}}
        for i in range(length)
    ]
    return Run(
        directory=Path("run"),
        steps=rows,
        evaluations=[],
        max_steps=None,
        finished=True,
        updated=0.0,
    )


def test_finished_run_has_its_rows_summary_and_policy(run_dir):
    run = load_run(run_dir)
    assert run.finished and run.max_steps == 80 and len(run.steps) == 40
    assert run.policy["version"] == 80
    assert run.summary["heldout_after"] > run.summary["heldout_before"]
    assert run.values("reward")[-1] > run.values("reward")[0]


def test_running_run_is_read_up_to_its_last_whole_line(run_dir):
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines()[:11]
    path.write_text("\n".join(lines) + '\n{"reward": 0.7, "st')
    run = load_run(run_dir)
    assert not run.finished and run.last_step == 20 and len(run.steps) == 10


def test_damaged_line_in_the_middle_is_named(run_dir):
    path = run_dir / "metrics.jsonl"
    path.write_text("{broken\n" + path.read_text())
    with pytest.raises(ConfigError, match="broken"):
        load_run(run_dir)


def test_run_of_another_trainer_is_read_from_its_newest_checkpoint_then_from_its_end(tmp_path):
    for step in (1, 2):
        checkpoint = tmp_path / f"checkpoint-{step}"
        checkpoint.mkdir()
        rows = [{"step": i, "loss": 1.0, "reward": 0.1 * i} for i in range(1, step + 1)]
        (checkpoint / "trainer_state.json").write_text(
            json.dumps({"log_history": rows, "max_steps": 9})
        )
    assert (load_run(tmp_path).last_step, load_run(tmp_path).finished) == (2, False)
    shutil.copy(tmp_path / "checkpoint-1" / "trainer_state.json", tmp_path)
    assert (load_run(tmp_path).last_step, load_run(tmp_path).finished) == (1, True)


@pytest.mark.parametrize(
    ("times", "patience_s"),
    [([], 3600), ([10], 3600), ([0, 2, 4], 300), ([0, 60, 120, 90_000, 90_060], 600)],
)
def test_patience_with_a_silent_run_follows_its_usual_pause(times, patience_s):
    steps = a_run(time=times).steps if times else []
    assert replace(a_run(time=[0]), steps=steps).patience_s == patience_s


def test_step_that_was_done_again_after_a_resume_counts_once(tmp_path):
    rows = [{"step": s, "loss": 0.0, "reward": r} for s, r in ((1, 0.1), (2, 0.2), (2, 0.3))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert load_run(tmp_path).values("reward") == [0.1, 0.3]


def test_samples_are_a_few_different_prompts_of_each_version(run_dir):
    rows = [
        {"version": v, "prompt": f"{p}=", "completion": "x", "reward": float(p < 5), "phase": phase}
        for v in (1, 2)
        for p in range(20)
        for phase in ("train", "train", "eval")
    ]
    (run_dir / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = load_run(run_dir)
    samples = run.samples
    assert run.rewards == {1: 0.25, 2: 0.25}
    assert sorted(samples) == [1, 2]
    assert len(samples[1]) == len({sample.prompt for sample in samples[1]}) == 6


@pytest.mark.parametrize("make", [lambda p: p / "nowhere", lambda p: p])
def test_directory_without_a_run_is_refused(tmp_path, make):
    with pytest.raises(ConfigError, match="output_dir"):
        load_run(make(tmp_path))


@pytest.mark.parametrize(
    ("columns", "good", "text"),
    [
        ({"reward": [0.1, math.nan]}, False, "not finite at step 2"),
        ({"rollout__logprob_gap": [1e-6, 0.5]}, False, "up to 0.5 in a logprob"),
        (
            {RATIO.replace("/", "__"): [1.0, 5e-18, 0.0]},
            False,
            "At step 3 (and 1 more), mean importance",
        ),
        (
            {"offpolicy__ess": [0.9, 0.4, 0.3]},
            False,
            "In 2 of 3 steps the importance weights left less",
        ),
        ({"rollout__logprob_gap": [1e-6, 2e-6]}, True, "at most 2.0e-06"),
        ({"frac_reward_zero_std": [0.9, 1.0]}, False, "95% of the last groups"),
        ({"completions__clipped_ratio": [0.5, 0.5]}, False, "50% of the last completions"),
        ({"share__syncing": [0.4, 0.4]}, False, "takes 40% of a step"),
        ({"share__syncing": [0.1, 0.1]}, True, "takes 10% of a step"),
        ({"reward": [0.1] * 5 + [0.9] * 5}, True, "rose from 0.1 to 0.9"),
        ({"reward": [0.9] * 5 + [0.1] * 5}, False, "did not rise"),
    ],
)
def test_what_stands_out_is_said(columns, good, text):
    findings = find(a_run(**columns))
    assert [(f.good, text in f.text) for f in findings] == [(good, True)]


def test_unremarkable_rows_are_not_remarked_on():
    quiet = a_run(frac_reward_zero_std=[0.1, 0.2], completions__clipped_ratio=[0.0, 0.1])
    assert find(quiet) == []
