"""What the doctor says: one fact, how bad it is, and the command that mends it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Level(StrEnum):
    """How bad a finding is."""

    OK = "ok"
    NOTE = "note"
    """Worth knowing; nothing to mend."""
    WARNING = "warning"
    """Works, but not as well as it could, or not for everything."""
    BLOCKER = "blocker"
    """Will not work; the exit code is 1."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Example: `Finding(area="port", level=Level.WARNING, what="8000 is in use by process 17",
    fix="tink-rl serve MODEL --port 8001")`
    """

    area: str
    level: Level
    what: str
    fix: str = ""
    """The command or setting that mends it; every blocker has one."""

    def __post_init__(self) -> None:
        assert self.fix or self.level is not Level.BLOCKER, f"blocker without a remedy: {self.what}"


def ok(area: str, what: str) -> Finding:
    """A finding that needs no remedy."""
    return Finding(area=area, level=Level.OK, what=what)


def note(area: str, what: str, fix: str = "") -> Finding:
    """Something to know."""
    return Finding(area=area, level=Level.NOTE, what=what, fix=fix)


def warning(area: str, what: str, fix: str = "") -> Finding:
    """Something to look at."""
    return Finding(area=area, level=Level.WARNING, what=what, fix=fix)


def blocker(area: str, what: str, fix: str) -> Finding:
    """Something that must be mended first."""
    return Finding(area=area, level=Level.BLOCKER, what=what, fix=fix)


def bytes_text(num_bytes: float) -> str:
    """`393216` -> `384.0 KiB`."""
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} GiB"
