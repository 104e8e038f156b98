"""How the commands speak: on standard error, one line at a time."""

from __future__ import annotations

import sys

_EVERY_S = 10.0
_CLEAR = "\r\x1b[K"


class WaitLine:
    """What is waited for, and since when: a line that renews itself on a terminal; elsewhere a line
    for every new stage, and one every ten seconds.
    """

    def __init__(self, who: str) -> None:
        """Store; `who` stands before every line."""
        self._who, self._what, self._said = who, "", 0.0

    def __call__(self, what: str, seconds: float) -> None:
        """Show that `what` has been waited for since `seconds`; "ready" ends the line."""
        text = f"{self._who}: {what} ({seconds:.0f} s)"
        if sys.stderr.isatty():
            sys.stderr.write(f"{_CLEAR}{text}" + ("\n" if what == "ready" else ""))
        elif what != self._what or not 0 <= seconds - self._said < _EVERY_S:
            sys.stderr.write(f"{text}\n")
            self._what, self._said = what, seconds
        sys.stderr.flush()


show_wait = WaitLine("vllm")
"""For `VLLMServer(on_wait=show_wait)`."""


def say(text: str) -> None:
    """One line; takes the place of a wait that was shown there."""
    clear = _CLEAR if sys.stderr.isatty() else ""
    sys.stderr.write(f"{clear}tink-rl: {text}\n")
    sys.stderr.flush()
