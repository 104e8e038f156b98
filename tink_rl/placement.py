"""Which cores the server and the trainer take where both share one small machine without a GPU.

vLLM pins its workers; here they get the first half. With `max_staleness=0` a trainer takes every core while
the server waits, asleep: a demo step of 0.54 s takes 0.43 s then. With more both compute at once, a thread
that lands on a worker's core delays its step (0.54 s became 1.4 s), and the trainer keeps to the other half.
So does the Tink worker, if its vLLM runs on this machine.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass

from tink_rl.cpu_limit import affinity, cores_here
from tink_rl.gpus import has_gpu

_SMALL_MACHINE_CORES = 8
CORES = affinity() if has_gpu() else cores_here()
"""Cores of this process as of its start, before it pinned itself; without a GPU as many as its container's
CPU limit is worth."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """`Placement(server_binding="0", trainer_cores=(1,))`: who runs where; None means anywhere."""

    server_binding: str | None
    """Value of VLLM_CPU_OMP_THREADS_BIND: one range of cores per worker, joined by `|`."""
    trainer_cores: tuple[int, ...] | None


def plan(*, cores: tuple[int, ...], num_workers: int, has_gpu: bool) -> Placement:
    """Split `cores`: the first ones to the server's workers, the rest to the trainer.

    Args:
        cores: Cores that this process may use.
        num_workers: vLLM workers (tensor parallel size).
        has_gpu: With a GPU nothing is pinned.
    """
    if has_gpu or len(cores) > _SMALL_MACHINE_CORES:
        return Placement(server_binding=None, trainer_cores=None)
    if len(cores) <= num_workers:
        binding = "|".join(str(cores[i % len(cores)]) for i in range(num_workers))
        return Placement(server_binding=binding, trainer_cores=None)
    per_worker = max(1, len(cores) // (2 * num_workers))
    taken = [cores[i * per_worker : (i + 1) * per_worker] for i in range(num_workers)]
    binding = "|".join(",".join(str(core) for core in part) for part in taken)
    return Placement(server_binding=binding, trainer_cores=tuple(cores[num_workers * per_worker :]))


def who_waits_asleep(*, shares_cores: bool = False, cores: tuple[int, ...] = CORES) -> str:
    """Which of vLLM's processes must not spin while they wait for each other, see `server/plugin.py`.

    On a small machine without a GPU the engine core shares its core with trainer, API server and their
    like ("engine"); the workers do too where they share theirs with a trainer, or there is one core
    ("all"); elsewhere nobody ("").
    """
    if has_gpu() or len(cores) > _SMALL_MACHINE_CORES:
        return ""
    return "all" if shares_cores or _is_off() or len(cores) == 1 else "engine"


def _is_off() -> bool:
    return os.environ.get("TINK_PLACEMENT", "").lower() == "off"


def plan_here(num_workers: int = 1) -> Placement:
    """The plan for this machine; `TINK_PLACEMENT=off` pins nothing."""
    if _is_off():
        return Placement(server_binding=None, trainer_cores=None)
    return plan(cores=CORES, num_workers=num_workers, has_gpu=has_gpu())


def place_trainer(*, max_staleness: int) -> str:
    """Place this process, which trains beside a server on this machine.

    Returns:
        Who computes where, in a line for the log; "" where nothing is to be decided.
    """
    own = plan_here()
    if own.trainer_cores is None or not hasattr(os, "sched_setaffinity"):
        return ""
    if max_staleness == 0:
        return (
            f"cores: all {len(CORES)} for the trainer, the server waits meanwhile (max_staleness=0)"
        )
    keep_to(own.trainer_cores)
    names = ",".join(str(core) for core in own.trainer_cores)
    return f"cores: {names} for the trainer, {own.server_binding} for vLLM ({max_staleness=})"


def let_threads_sleep() -> None:
    """Let torch's threads wait for each other asleep; call it before torch is imported.

    They spin by default, which is fastest where every core is theirs. On a small machine something else
    runs sooner or later, and two that spin for one which is not running took 7.7 s for a step of 0.4 s.
    """
    if not has_gpu() and len(CORES) <= _SMALL_MACHINE_CORES:
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def keep_to(cores: Iterable[int]) -> None:
    """Keep this process to `cores`, with one of torch's threads on each, whenever torch is imported."""
    wanted = set(cores)
    # The main thread's mask alone would leave out the threads that run already.
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):  # it ended meanwhile
            os.sched_setaffinity(int(thread), wanted)
    os.environ["OMP_NUM_THREADS"] = str(len(wanted))
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(len(wanted))


def apply_to_worker(placement: Placement) -> None:
    """Pin this process, a Tink worker, to the cores beside the server's; call it before threads start."""
    if placement.trainer_cores is not None:
        os.sched_setaffinity(0, placement.trainer_cores)
