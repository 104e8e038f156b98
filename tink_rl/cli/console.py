"""How the commands speak: one line at a time, on standard error."""

from __future__ import annotations

import sys


def show_wait(what: str, seconds: float) -> None:
    """One line on a terminal, a line every ten seconds elsewhere."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[Kvllm: {what} ({seconds:.0f} s)")
        sys.stderr.flush()
    elif int(seconds) % 10 == 0 or what == "first request":
        sys.stderr.write(f"vllm: {what} ({seconds:.0f} s)\n")


def say(text: str) -> None:
    clear = "\r\x1b[K" if sys.stderr.isatty() else ""
    sys.stderr.write(f"{clear}tink-rl: {text}\n")
    sys.stderr.flush()
