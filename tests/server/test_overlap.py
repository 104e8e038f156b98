"""`max_staleness`: the next rollouts are sampled while this step trains, by the version current then."""

from __future__ import annotations

import threading
import time

import pytest

from tests.trainers import PROMPTS, make_trainer, rows, settings
from tink_rl import WeightSync, errors
from tink_rl.publish.packets import PacketTransfer
from tink_rl.training.rollouts import read_rollouts
from tink_rl.types import ROLLOUT_FILE

pytestmark = [pytest.mark.server, pytest.mark.home]


def nothing_is_left(server):
    """No thread that samples ahead, and no request on the server; within seconds."""
    deadline = time.monotonic() + 10.0
    with server.client() as client:
        while time.monotonic() < deadline:
            threads = [t.name for t in threading.enumerate() if t.name.startswith("tink-ahead")]
            if not threads and client.status().running == 0:
                return True
            time.sleep(0.05)
    return False


def ages_of(path):
    """Of each step the number of updates that its rows' version lacks."""
    found = {}
    first = None
    for row in read_rollouts(path / ROLLOUT_FILE):
        if row["phase"] == "eval":
            continue
        first = row["version"] if first is None else first
        found.setdefault(row["step"], set()).add(row["step"] - (row["version"] - first))
    return found


@pytest.mark.parametrize(("mode", "k"), [("merged", 1), ("adapter", 2)])
def test_rows_are_as_old_as_said(server, model_dir, tmp_path, mode, k):
    trainer = make_trainer(
        server, model_dir, tmp_path, sync=settings(server, mode=mode, max_staleness=k), max_steps=5
    )
    trainer.train()
    assert ages_of(tmp_path) == {step: {min(step, k)} for step in range(5)}
    assert [row["overlap/hit_share"] for row in rows(trainer)] == [0.0, 1.0, 1.0, 1.0, 1.0]
    assert nothing_is_left(server)


def rollouts_of(path):
    return [
        {key: value for key, value in row.items() if key not in ("version", "digest")}
        for row in read_rollouts(path / ROLLOUT_FILE)
    ]


def test_rows_sampled_ahead_are_those_that_the_version_gives_at_its_turn(
    server, model_dir, tmp_path
):
    for k in (0, 1):  # the policy stays what it is, so its age changes nothing
        sync = settings(server, mode="adapter", max_staleness=k)
        make_trainer(
            server, model_dir, tmp_path / str(k), sync=sync, max_steps=3, learning_rate=0.0
        ).train()
    assert rollouts_of(tmp_path / "0") == rollouts_of(tmp_path / "1")


def test_resumed_run_samples_the_first_rows_again_and_goes_on_as_before(
    server, model_dir, tmp_path, caplog
):
    caplog.set_level("INFO", "tink_rl")
    sync = settings(server, mode="adapter", max_staleness=1)
    whole = make_trainer(
        server, model_dir, tmp_path, sync=sync, save_strategy="steps", save_steps=2
    )
    whole.train()
    before = list(read_rollouts(tmp_path / ROLLOUT_FILE))
    again = make_trainer(server, model_dir, tmp_path, sync=sync, max_steps=4)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    after = list(read_rollouts(tmp_path / ROLLOUT_FILE))
    assert "resumed at step 2: a checkpoint holds no rollouts" in caplog.text
    assert [row for row in after if row["step"] < 2] == [row for row in before if row["step"] < 2]

    def asked(rows):
        return [(row["step"], row["prompt"], row["turns"][0]["seed"]) for row in rows]

    assert asked(after) == asked(before)  # the same place in the data, and the same seeds
    resumed = again.policy_link.records[0].version
    ages = {r["step"]: r["step"] - 2 - (r["version"] - resumed) for r in after if r["step"] >= 2}
    assert ages == {2: 0, 3: 1}


def test_interrupted_run_leaves_no_request_no_thread_and_no_lease(server, model_dir, tmp_path):
    calls = []

    def interrupts(completions, **_):
        calls.append(len(completions))
        if len(calls) == 2:  # the next rows are being sampled
            raise KeyboardInterrupt
        return [1.0] * len(completions)

    trainer = make_trainer(
        server,
        model_dir,
        tmp_path,
        sync=settings(server, mode="merged", max_staleness=1),
        extra={"reward_funcs": interrupts},
        max_completion_length=200,
        generation_kwargs={"ignore_eos": True},
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert nothing_is_left(server)
    with WeightSync(
        server.url, base_model=model_dir("qwen3"), config=settings(server, lease_wait_s=0.0)
    ):
        pass  # the lease is free


def test_publish_that_fails_once_does_not_disturb_what_is_sampled_ahead(
    server, model_dir, tmp_path, monkeypatch
):
    trainer = make_trainer(
        server, model_dir, tmp_path, sync=settings(server, mode="adapter", max_staleness=1)
    )
    stage, failed = PacketTransfer.stage, []

    def once(transfer):
        if len(trainer.policy_link.records) == 2 and not failed:
            failed.append(transfer.version)
            raise errors.ChannelLost("injected")
        stage(transfer)

    monkeypatch.setattr(PacketTransfer, "stage", once)
    trainer.train()
    assert failed and [row["overlap/hit_share"] for row in rows(trainer)] == [0.0, 1.0, 1.0, 1.0]
    assert ages_of(tmp_path) == {0: {0}, 1: {1}, 2: {1}, 3: {1}}


def test_evaluation_in_the_middle_and_a_data_set_that_ends_cost_time_only(
    server, model_dir, tmp_path
):
    trainer = make_trainer(
        server,
        model_dir,
        tmp_path,
        sync=settings(server, mode="merged", max_staleness=1),
        max_steps=4,
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=16,
        extra={"eval_dataset": PROMPTS.select(range(4))},
    )
    trainer.train_dataset = PROMPTS.select(range(8))  # an epoch of two steps
    trainer.train()
    assert [row["overlap/hit_share"] for row in rows(trainer)] == [0.0, 1.0, 0.0, 1.0]
    evaluated = {
        (row["step"], row["version"])
        for row in read_rollouts(tmp_path / ROLLOUT_FILE)
        if row["phase"] == "eval"
    }
    first = trainer.policy_link.records[0].version
    assert evaluated == {(step, first + step) for step in (1, 2, 3, 4)}
