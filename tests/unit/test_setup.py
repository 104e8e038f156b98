"""`make setup` with stand-ins for Python and nvidia-smi: what it says of a GPU, before and after."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def set_up(tmp_path):
    """Run `make setup` for a kind of machine; what it prints and its exit code."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".venv").mkdir()

    def program(path, text):
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)

    def run(*, extra, driver="580.65.06", allocates=True):
        program(tmp_path / "nvidia-smi", f"echo {driver}")
        fails = "" if allocates else "*torch.zeros*) echo 'driver too old' >&2; exit 1;;"
        program(tmp_path / "python", f'echo "$@" >> calls\ncase "$*" in {fails} esac')
        done = subprocess.run(
            ["make", "develop", f"EXTRA={extra}", "PY=./python"],
            cwd=tmp_path,
            env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            timeout=60,
        )
        calls = (tmp_path / "calls").read_text()
        return done.returncode, done.stdout, calls, (tmp_path / ".venv/.done").exists()

    return run


def test_gpu_that_allocates_is_set_up(set_up):
    code, said, calls, is_done = set_up(extra="gpu")
    assert code == 0 and is_done and "12 GB of wheels" in said and "driver" not in said
    assert "[train,worker,gpu]\n" in calls and "torch.zeros" in calls
    assert calls.index("torch.zeros") < calls.index("[dev,docs]")


def test_driver_that_is_too_old_is_told_before_gigabytes_are_fetched(set_up):
    code, said, _, is_done = set_up(extra="gpu", driver="535.104", allocates=False)
    assert said.index("driver is 535.104") < said.index("driver too old")
    assert code != 0 and not is_done and "make EXTRA=cpu" in said


def test_cpu_is_set_up_without_asking_for_a_gpu(set_up):
    code, said, calls, is_done = set_up(extra="cpu")
    assert code == 0 and is_done and "3 minutes" in said
    assert "torch.zeros" not in calls and "[dev,docs]\n" in calls
    assert calls.index("[train,worker,cpu]\n") < calls.index("megatron-core")
