"""`accelerate launch` of tests/multi/run.py, and what its ranks wrote."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 240


def launch(yaml, job, out):
    """Run the job under the YAML, a path in the repository; `(exit code, facts by rank, output)`.

    Ends the whole group of processes if it does not end by itself: a hang fails the test.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / "job.json"
    path.write_text(json.dumps({**job, "out": str(out)}))
    environment = {
        **os.environ,
        **{"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        **{"TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"},
    }
    line = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    # Time for the other ranks to raise the reason too, before the launcher ends them.
    line += ["--monitor_interval", "5"]
    line += ["--config_file", str(ROOT / yaml), str(ROOT / "tests/multi/run.py"), str(path)]
    with (out / "output.log").open("w") as log:
        process = subprocess.Popen(
            line, stdout=log, stderr=log, env=environment, start_new_session=True, cwd=out
        )
        try:
            code = process.wait(timeout=LIMIT_S)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    ranks = {
        int(file.stem.removeprefix("rank")): json.loads(file.read_text())
        for file in out.glob("rank*.json")
    }
    return code, ranks, (out / "output.log").read_text()
