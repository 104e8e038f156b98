"""Which cores the servers and runs of the suite compute on.

Unpinned by us, and vLLM's workers on a core by test process: left to itself vLLM binds the workers of every
server to the first core, where those of the two test processes meet.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

_CORES = sorted(os.sched_getaffinity(0))
_PLACES = {"VLLM_CPU_OMP_THREADS_BIND", "TINK_PLACEMENT"}


def share() -> None:
    """Set what this process and the servers that it starts go by; before torch is imported."""
    index = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    # Two servers and a trainer on two cores: more threads than cores only wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", str(_CORES[index % len(_CORES)]))
    os.environ.setdefault("TINK_PLACEMENT", "off")


def for_workers(count: int) -> dict[str, str]:
    """What a tensor parallel server of `count` workers needs: a core each, as far as there are so many."""
    cores = [str(_CORES[i % len(_CORES)]) for i in range(count)]
    return {"VLLM_CPU_OMP_THREADS_BIND": "|".join(cores)}


def as_users_have_it(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` without the places that `share` set: server and trainer place themselves.

    A trainer still has one thread: two that spin for each other beside another test take ten times as long.
    """
    return {name: value for name, value in environment.items() if name not in _PLACES}
