"""metrics.jsonl: complete while the run goes on, cut back on resume; time shares add up."""

from __future__ import annotations

import json
from collections import defaultdict
from types import SimpleNamespace

import pytest

from tink_rl.training.run_log import RunLog
from tink_rl.types import METRICS_FILE


def make_trainer(version=3):
    return SimpleNamespace(
        policy_link=SimpleNamespace(
            records=[], sync=SimpleNamespace(current=SimpleNamespace(version=version))
        ),
        vllm_generation=SimpleNamespace(
            total_seconds=0.0, last_trained_model=f"policy@{version - 1}"
        ),
        _metrics={"train": defaultdict(list)},
        train=lambda: None,
    )


def state(step, main=True):
    return SimpleNamespace(global_step=step, max_steps=9, is_world_process_zero=main)


def rows_in(directory):
    return [json.loads(line) for line in (directory / METRICS_FILE).read_text().splitlines()]


def test_every_logged_row_is_on_disk_at_once(tmp_path):
    log, args = RunLog(make_trainer()), SimpleNamespace(output_dir=str(tmp_path / "run"))
    log.on_train_begin(args, state(0), None)
    log.on_log(args, state(1), None, logs={"reward": 0.5})
    begin, row = rows_in(tmp_path / "run")
    assert (begin["event"], begin["max_steps"]) == ("begin", 9)
    assert (row["step"], row["reward"]) == (1, 0.5)
    log.on_train_end(args, state(1), None)
    assert rows_in(tmp_path / "run")[-1]["event"] == "end"


def test_resumed_run_keeps_rows_up_to_its_checkpoint_and_a_fresh_run_none(tmp_path):
    log, args = RunLog(make_trainer()), SimpleNamespace(output_dir=str(tmp_path))
    log.on_train_begin(args, state(0), None)
    for step in (1, 2, 3):
        log.on_log(args, state(step), None, logs={"reward": step})
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"reward": 4, "st')  # killed while it wrote
    log.on_train_begin(args, state(2), None)
    assert [row["step"] for row in rows_in(tmp_path)] == [0, 1, 2, 2]
    log.on_train_begin(args, state(0), None)
    assert len(rows_in(tmp_path)) == 1


def fail_after_a_step(directory, main=True):
    trainer = make_trainer()
    trainer.args, trainer.state = SimpleNamespace(output_dir=str(directory)), state(2, main)

    def train():
        trainer.log.on_train_begin(trainer.args, state(0, main), None)
        trainer.log.on_log(trainer.args, state(1, main), None, logs={"reward": 1})
        raise MemoryError("no memory left")

    trainer.train = train
    trainer.log = RunLog(trainer)
    with pytest.raises(MemoryError, match="no memory left"):
        trainer.train()


def test_run_that_fails_says_so_once_and_the_error_goes_on(tmp_path):
    fail_after_a_step(tmp_path)
    *_, row, end = rows_in(tmp_path)
    assert (row["step"], "event" in row) == (1, False)
    assert (end["event"], end["step"], end["error"]) == ("end", 2, "MemoryError: no memory left")


def test_failure_on_another_rank_is_not_written_there(tmp_path):
    fail_after_a_step(tmp_path, main=False)
    assert list(tmp_path.iterdir()) == []


def test_failure_before_the_run_began_leaves_the_former_runs_file_alone(tmp_path):
    former = tmp_path / METRICS_FILE
    former.write_text('{"event": "end", "step": 9}\n')
    trainer = make_trainer()
    trainer.args, trainer.state = SimpleNamespace(output_dir=str(tmp_path)), state(0)
    trainer.train = lambda: 1 / 0
    RunLog(trainer)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert former.read_text() == '{"event": "end", "step": 9}\n'


def test_other_ranks_write_nothing(tmp_path):
    log, args = RunLog(make_trainer()), SimpleNamespace(output_dir=str(tmp_path))
    log.on_train_begin(args, state(0, main=False), None)
    log.on_log(args, state(1, main=False), None, logs={"reward": 1})
    assert list(tmp_path.iterdir()) == []


def test_shares_of_a_step_add_up_and_staleness_counts_versions():
    trainer = make_trainer(version=3)
    log = RunLog(trainer)
    log.on_train_begin(None, state(0, main=False), None)
    log.on_step_begin(None, state(0), None)
    log._step_start -= 1.0
    trainer.vllm_generation.total_seconds += 0.25
    trainer.policy_link.records.append(SimpleNamespace(seconds=0.125))
    log.on_step_end(None, state(1), None)
    metrics = trainer._metrics["train"]
    shares = [metrics[f"share/{name}"][0] for name in ("sampling", "syncing", "training")]
    assert sum(shares) == pytest.approx(1.0)
    assert shares[0] == pytest.approx(2 * shares[1])
    assert metrics["rollout/staleness"] == [1.0]
