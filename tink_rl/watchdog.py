"""`python -m tink_rl.watchdog PARENT COMMAND...`: run a command for as long as PARENT lives.

Leader of the server's process group. If the parent dies without stopping the server (kill -9), the
whole group is ended. Imports nothing heavy.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

_POLL_S = 0.5
_GRACE_S = 10.0


def main(argv: list[str]) -> int:
    """Exit code of the command, 128 + N if signal N ended it; 1 after the parent died."""
    parent, line = int(argv[0]), argv[1:]
    child = subprocess.Popen(line)
    # The group gets the signal too; the leader stays to reap, so that the group keeps its id.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while child.poll() is None:
        if os.getppid() != parent:
            _end_group(child)
            return 1
        time.sleep(_POLL_S)
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


def _end_group(child: subprocess.Popen[bytes]) -> None:
    os.killpg(0, signal.SIGTERM)
    deadline = time.monotonic() + _GRACE_S
    while child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(0, signal.SIGKILL)  # engine and workers may outlive the API server; this ends us too


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
