"""Whether the backend samples: a token every few seconds says so, never a health route alone."""

from __future__ import annotations

import asyncio
import logging
import time

from tink_rl.errors import TinkError
from tink_rl.worker.backends import Backend

_LOG = logging.getLogger(__name__)
MAX_AGE_S = 10.0
_INTERVAL_S = 3.0
_TIMEOUT_S = 5.0


class Readiness:
    """Keeps the time of the last generation that is known to have worked."""

    def __init__(
        self, backend: Backend, *, interval_s: float = _INTERVAL_S, max_age_s: float = MAX_AGE_S
    ) -> None:
        """Store; `run` does the work.

        Args:
            backend: Asked for a token.
            interval_s: Pause between canaries; none is sent while requests succeed.
            max_age_s: A success counts for this long.
        """
        self._backend = backend
        self._interval_s, self._max_age_s = interval_s, max_age_s
        self._last_success: float | None = None
        self._last_delta = 0.0
        self._last_error = "no canary has succeeded yet"

    def note_success(self) -> None:
        """A generation just worked."""
        self._last_success = time.monotonic()

    def note_delta(self) -> None:
        """A piece of a streamed answer just came."""
        self._last_delta = time.monotonic()

    @property
    def reason(self) -> str | None:
        """Why the worker is not ready, or None."""
        age_s = self._age_s()
        if age_s is not None and age_s <= self._max_age_s:
            return None
        since = "" if age_s is None else f"; the last success is {age_s:.0f} s ago"
        return f"the {self._backend.name} backend does not sample: {self._last_error}{since}"

    async def run(self) -> None:
        """Send canaries until cancelled."""
        while True:
            age_s = self._age_s()
            if age_s is None or age_s >= self._interval_s:
                await self._try_once()
            await asyncio.sleep(self._interval_s)

    async def _try_once(self) -> None:
        began = time.monotonic()
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                await self._backend.canary(_TIMEOUT_S)
        except TimeoutError:
            self._last_error = f"no token within {_TIMEOUT_S:g} s"
            if self._last_delta > began:  # it waits behind requests that are being answered
                self._last_success = max(self._last_delta, self._last_success or 0.0)
        except TinkError as error:
            self._last_error = error.message
        except Exception as error:  # noqa: BLE001 - the loop must outlive any answer of a server
            _LOG.exception("the canary failed")
            self._last_error = f"{type(error).__name__}: {error}"
        else:
            self.note_success()

    def _age_s(self) -> float | None:
        return None if self._last_success is None else time.monotonic() - self._last_success
