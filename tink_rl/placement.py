"""Which cores the server and the trainer take where both share one small machine. Pure, but `apply`.

vLLM pins its worker to a core, and every thread that lands there delays its step: trainer threads made a
demo step take 1.4 s instead of 0.54 s. So on a machine without a GPU they get different cores. The Tink
worker, if its vLLM runs on this machine, takes the trainer's.
"""

from __future__ import annotations

import os
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


def who_waits_asleep(*, cores: tuple[int, ...] = CORES) -> str:
    """Which of vLLM's processes must not spin while they wait for each other, see `server/plugin.py`.

    On a small machine without a GPU the engine core shares its core with trainer, API server and their
    like ("engine"); if nothing is pinned, or there is one core, the workers share theirs too ("all");
    elsewhere nobody ("").
    """
    if has_gpu() or len(cores) > _SMALL_MACHINE_CORES:
        return ""
    return "all" if _is_off() or len(cores) == 1 else "engine"


def _is_off() -> bool:
    return os.environ.get("TINK_PLACEMENT", "").lower() == "off"


def plan_here(num_workers: int = 1) -> Placement:
    """The plan for this machine; `TINK_PLACEMENT=off` pins nothing."""
    if _is_off():
        return Placement(server_binding=None, trainer_cores=None)
    return plan(cores=CORES, num_workers=num_workers, has_gpu=has_gpu())


def apply_to_trainer(placement: Placement) -> None:
    """Pin this process to the trainer's cores, with one thread per core.

    Call it before torch is imported: OpenMP reads its number of threads once, and threads without a
    core of their own cost a demo step 0.55 s instead of 0.39 s.
    """
    if placement.trainer_cores is None:
        return
    apply_to_worker(placement)
    os.environ["OMP_NUM_THREADS"] = str(len(placement.trainer_cores))


def apply_to_worker(placement: Placement) -> None:
    """Pin this process, a Tink worker, to the cores beside the server's; call it before threads start."""
    if placement.trainer_cores is not None:
        os.sched_setaffinity(0, placement.trainer_cores)
