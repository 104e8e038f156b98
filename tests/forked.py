"""Children forked from a process that has imported torch: 4 s of processor time less than a start each.

For children whose imports are not what is tested; multiprocessing's fork server is that process.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

METHOD = "forkserver"
_IMPORTS = [
    "pytest",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "safetensors.torch",
    "blake3",
]
_context = multiprocessing.get_context(METHOD)
_context.set_forkserver_preload(_IMPORTS)


def run(
    command: list[str], *, input: bytes, env: dict[str, str], timeout: float, capture_output: bool
) -> subprocess.CompletedProcess[bytes]:
    """As `subprocess.run` of `python ... -m MODULE ARGUMENTS...`."""
    assert capture_output
    with tempfile.TemporaryDirectory() as folder:
        stdin, stdout, stderr = (Path(folder, name) for name in ("stdin", "stdout", "stderr"))
        stdin.write_bytes(input)
        child = _context.Process(target=_become, args=(folder, command, env))
        child.start()
        child.join(timeout)
        if child.exitcode is None:
            child.kill()
            child.join()
            raise subprocess.TimeoutExpired(command, timeout)
        output = stdout.read_bytes(), stderr.read_bytes()
        return subprocess.CompletedProcess(command, child.exitcode, *output)


def _become(folder: str, command: list[str], env: dict[str, str]) -> None:
    for number, (name, flags) in enumerate(
        (
            ("stdin", os.O_RDONLY),
            ("stdout", os.O_WRONLY | os.O_CREAT),
            ("stderr", os.O_WRONLY | os.O_CREAT),
        )
    ):
        os.dup2(os.open(os.path.join(folder, name), flags), number)
    sys.stdin = os.fdopen(0)
    os.environ.clear()
    os.environ.update(env)
    module, *arguments = command[command.index("-m") + 1 :]
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
