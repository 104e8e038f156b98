"""`recipes/grpo.py` as it is, under any of the process layouts that a CPU can run (see processes.py)."""

from __future__ import annotations

import sys
from pathlib import Path

# `accelerate launch benchmarks/grpo_on_cpu.py` puts benchmarks/ on the path, not the folder that holds it.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from recipes import grpo
from tests.multi import fsdp_on_cpu, zero3_on_cpu

if __name__ == "__main__":
    fsdp_on_cpu.enable()
    zero3_on_cpu.leave_kernel_uncompiled()
    grpo.main()
