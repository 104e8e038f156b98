"""`accelerate launch` of a script of ours, and what its ranks wrote."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from tests import warm_server

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 240


def launch(yaml, job, out):
    """Run the job under the YAML, a path in the repository; `(exit code, facts by rank, output)`."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "job.json"
    path.write_text(json.dumps({**job, "out": str(out)}))
    # Time for the other ranks to raise the reason too, before the launcher ends them.
    words = ["--monitor_interval", "5", str(ROOT / "tests/multi/run.py"), str(path)]
    code, output = accelerate(yaml, words, out)
    ranks = {
        int(file.stem.removeprefix("rank")): json.loads(file.read_text())
        for file in out.glob("rank*.json")
    }
    return code, ranks, output


def accelerate(yaml, words, out):
    """`run` of `accelerate launch` under the YAML, with `words`: options, the script and its own."""
    line = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    line += ["--config_file", str(ROOT / yaml), *words]
    # FSDP2 and DeepSpeed read the environment as they are imported.
    return run(line, out, is_plain=Path(yaml).stem in ("cpu", "cpu_2proc"))


def run(line, out, *, is_plain=True, **variables):
    """Run a command of Python in the folder `out`; its exit code (None: it hung) and its output.

    Forked where it `is_plain`. Ends the whole group of processes if it does not end by itself.
    """
    environment = {
        **os.environ,
        **{"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        **{"TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1", **variables},
    }
    log = out / "output.log"
    log.touch()
    if is_plain and warm_server.CAN_FORK:
        process = warm_server.start(line, environment, str(log), kind="training", cwd=str(out))
    else:
        with log.open("w") as stream:
            process = subprocess.Popen(
                line, stdout=stream, stderr=stream, env=environment, start_new_session=True, cwd=out
            )
    code = None
    try:
        code = process.wait(timeout=LIMIT_S)
    finally:
        if code is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(timeout=LIMIT_S)
    return code, log.read_text()
