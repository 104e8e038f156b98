"""The cores that this process may use, and how many of them its container's CPU limit is worth. A leaf."""

from __future__ import annotations

import math
import os
import socket
import zlib
from collections.abc import Callable
from pathlib import Path

_CGROUPS, _MINE = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def affinity() -> tuple[int, ...]:
    """Cores that this process may run on; all of them where the system has no such mask."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def usable_cores(allowed: tuple[int, ...], quota: float | None, host: str) -> tuple[int, ...]:
    """As many of `allowed` as `quota` cores' worth of time keeps busy, at least one.

    More threads than the limit is worth are all stopped together until the next period. Which ones
    follows from `host`, a container's name: processes of one container agree, and two containers of one
    machine do not meet on its first cores.
    """
    count = len(allowed) if quota is None else max(1, min(len(allowed), math.ceil(quota)))
    if count == len(allowed):
        return allowed
    start = zlib.crc32(host.encode()) % len(allowed)
    return tuple(sorted(allowed[(start + i) % len(allowed)] for i in range(count)))


def cores_here() -> tuple[int, ...]:
    """`usable_cores` of this process."""
    return usable_cores(affinity(), cpu_quota(), socket.gethostname())


def cpu_quota(cgroups: Path = _CGROUPS, mine: Path = _MINE) -> float | None:
    """Cores' worth of time that this process's cgroup and those above it allow; None: no limit.

    Args:
        cgroups: Where they are mounted, version 2 or 1.
        mine: Lines `ID:CONTROLLERS:PATH` of this process.
    """
    try:
        lines = mine.read_text().splitlines()
    except OSError:
        return None
    limits = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            limits += _up(cgroups, path, _limit_v2)
        elif "cpu" in controllers.split(","):
            limits += _up(cgroups / "cpu", path, _limit_v1)
    return min(limits, default=None)


def _up(root: Path, path: str, limit: Callable[[Path], float | None]) -> list[float]:
    """The limits of the cgroup `path` and of those above it; in a container it may be the root itself."""
    here, found = root / path.strip("/"), []
    while True:
        value = limit(here)
        if value is not None:
            found.append(value)
        if here == root or root not in here.parents:
            return found
        here = here.parent


def _limit_v2(group: Path) -> float | None:
    words = _read(group / "cpu.max").split()
    return _cores(*words) if len(words) == 2 else None


def _limit_v1(group: Path) -> float | None:
    quota, period = (_read(group / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
    return _cores(quota, period)


def _cores(quota: str, period: str) -> float | None:
    if not (quota.isdecimal() and period.isdecimal()) or int(period) == 0:
        return None  # `max`, or -1
    return int(quota) / int(period)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
