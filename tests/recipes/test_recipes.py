"""Recipes and command line, run as a user would."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cores import as_users_have_it
from tests.docs.commands import blocks
from tests.processes import marked_processes
from tink_rl.launch import group_members

pytestmark = [pytest.mark.recipe, pytest.mark.server, pytest.mark.home]
ROOT = Path(__file__).resolve().parents[2]
KEYS = {
    *("reward_first5", "reward_last5", "heldout_before", "heldout_after"),
    *("heldout_greedy_before", "heldout_greedy_after", "train_seconds", "step_seconds_median"),
    *("publish_seconds_median", "max_logprob_gap", "versions_published", "mode"),
}


@pytest.mark.long
@pytest.mark.timeout(1200)  # it may have to train the tiny base first
def test_demo_trains_publishes_and_writes_its_files(tmp_path):
    command = [sys.executable, "-m", "recipes.demo", "--max_steps", "12", "--output", str(tmp_path)]
    environment = {**as_users_have_it(os.environ), "TINK_TOKEN_FILE": str(tmp_path / "token")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert set(summary) >= KEYS
    # The fresh adapter, then one per step but the first: warm-up gives that one a learning rate of 0.
    assert summary["versions_published"] == 12 and summary["mode"] == "merged"
    assert summary["max_logprob_gap"] <= 1e-4
    assert summary["reward_last5"] > summary["reward_first5"]
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert "held-out, sampled" in done.stdout
    page = (tmp_path / "report.html").read_text()
    for figure in ("reward", "heldout", "sync_phases", "step_shares", "staleness"):
        assert f'id="{figure}"' in page


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_recipe_starts_and_stops_a_server_of_its_own(model_dir, tmp_path):
    [block] = [
        b
        for b in blocks()
        if b.page == "sampling_service.md"
        and b.mark.endswith("::test_recipe_starts_and_stops_a_server_of_its_own")
    ]
    words = shlex.split(block.commands[0])
    # Slots for a rank above the default, and a token of another server in the environment.
    words += ["--max_steps", "2", "--lora_r", "48", "--sync_mode", "adapter"]
    words += [
        "--model_name_or_path",
        str(model_dir("qwen2")),
    ]  # training the tiny base takes minutes
    environment = {
        **os.environ,
        "TINK_TOKEN": "of-another-server",
        "TINK_TOKEN_FILE": str(tmp_path / "token"),
        MARK: str(tmp_path),
    }
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            *words[2:],
            "--output_dir",
            str(tmp_path),
        ],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert json.loads((tmp_path / "tink_policy.json").read_text())["mode"] == "adapter"
    assert (tmp_path / "adapter_model.safetensors").is_file()
    assert marked_processes(MARK, str(tmp_path)) == []


MARK = "MARK_OF_RECIPE_TEST"


def _serve(model, *arguments, token):
    environment = {**os.environ, "TINK_TOKEN_FILE": str(token)}
    return subprocess.Popen(
        [sys.executable, "-m", "tink_rl.cli", "serve", str(model), *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=ROOT,
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_while_loading_leaves_nothing_behind(model_dir, tmp_path, number):
    process = _serve(model_dir("qwen3"), "--port", "0", token=tmp_path / "token")
    children = []
    deadline = time.monotonic() + 60
    while not children and time.monotonic() < deadline:
        children = _children(process.pid)
        time.sleep(0.1)
    time.sleep(3.0)
    process.send_signal(number)
    assert process.wait(60) == 0
    assert children and not any(group_members(child) for child in children)


def _children(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in path.read_text().split()] if path.exists() else []


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["./nowhere"], 4, "was not found"),
        (["MODEL", "--max-lora-rank", "17"], 5, "--max-lora-rank 32"),
        (["MODEL", "--mode", "everything"], 1, "merged, adapter, both"),
    ],
)
def test_wrong_start_is_one_line_and_an_exit_code(model_dir, tmp_path, arguments, code, text):
    line = [str(model_dir("qwen3")) if a == "MODEL" else a for a in arguments]
    process = _serve(line[0], "--port", "0", *line[1:], token=tmp_path / "token")
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert text in err and err.count("\n") == 1
