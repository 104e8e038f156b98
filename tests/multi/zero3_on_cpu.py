"""Keeps DeepSpeed from compiling a kernel that training does not call."""

from __future__ import annotations

import os


def leave_kernel_uncompiled() -> None:
    """Call it before the first `Accelerator` or `Trainer` is made; does nothing without DeepSpeed.

    The kernel is that of `inference_all_reduce`; in every new environment it takes a minute of two cores.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
