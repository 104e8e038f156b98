"""How the commands speak: on standard error, one line at a time."""

from __future__ import annotations

import sys
import threading
import time

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
        elif _kind(what) != _kind(self._what) or not 0 <= seconds - self._said < _EVERY_S:
            sys.stderr.write(f"{text}\n")
            self._what, self._said = what, seconds
        sys.stderr.flush()


def _kind(what: str) -> str:
    """`downloading` of `downloading: 45 % of 2.9 GiB`: how far it is makes no new stage."""
    return what.partition(":")[0]


show_wait = WaitLine("vllm")
"""For `VLLMServer(on_wait=show_wait)`."""


class Heartbeat:
    """Says on standard error, every ten seconds in which nothing else was said, what goes on.

    Example:
        with Heartbeat("trainer", "importing TRL") as heartbeat:
            for line in process.stdout:
                print(line)
                heartbeat.said("training")
    """

    def __init__(self, who: str, what: str, *, every_s: float = _EVERY_S) -> None:
        """Store; `who` and `what` as `WaitLine` shows them."""
        self._who, self._what, self._every_s = who, what, every_s
        self._start = self._last = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tink-heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def said(self, what: str) -> None:
        """Something was shown just now; from here on `what` goes on."""
        self._what, self._last = what, time.monotonic()

    def _run(self) -> None:
        while not self._over.wait(self._every_s / 20):
            now = time.monotonic()
            if now - self._last >= self._every_s:
                sys.stderr.write(f"{self._who}: {self._what} ({now - self._start:.0f} s)\n")
                sys.stderr.flush()
                self._last = now


def say(text: str) -> None:
    """One line; takes the place of a wait that was shown there."""
    clear = _CLEAR if sys.stderr.isatty() else ""
    sys.stderr.write(f"{clear}tink-rl: {text}\n")
    sys.stderr.flush()
