"""The names that a server's processes have in /dev/shm, so that those of a killed one can be removed.

vLLM removes them as it ends; after a kill -9 nobody does, and the next names come on top. What a server
maps is written down once it is ready, and taken away when its processes are gone: by `stop`, or before the
next start of this user.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from tink_rl.tokens import default_token_file

_SHM = Path("/dev/shm")
_MAPPED = re.compile(r" /dev/shm/(psm_[0-9a-f]+)$", re.MULTILINE)
"""Python's own names, in a process's map of its memory."""


def _folder() -> Path:
    return default_token_file().parent / "shared_memory"


def note(group: int, members: Sequence[int]) -> None:
    """Write down what the processes `members` of the process group `group` map; never raises."""
    names: dict[str, int] = {}
    for pid in members:
        with contextlib.suppress(OSError):
            for name in _MAPPED.findall(Path(f"/proc/{pid}/maps").read_text()):
                names[name] = (_SHM / name).stat().st_ino
    with contextlib.suppress(OSError):
        _folder().mkdir(parents=True, exist_ok=True, mode=0o700)
        (_folder() / f"{group}.json").write_text(json.dumps(names))


def remove_left(is_alive: Callable[[int], bool]) -> list[str]:
    """Remove the names of noted groups that are not alive; which were still there. Never raises."""
    removed = []
    for record in sorted(_folder().glob("*.json")):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            if is_alive(int(record.stem)):
                continue
            for name, inode in json.loads(record.read_text()).items():
                path = _SHM / name
                if path.parent == _SHM and path.exists() and path.stat().st_ino == inode:
                    path.unlink()
                    removed.append(name)
            record.unlink()
    return removed
