"""What runs have left: a policy that nobody owns, and that nobody has asked for in a day, goes."""

from __future__ import annotations

import asyncio
import logging

from tink_rl.errors import TinkError
from tink_rl.server.commits import Commits
from tink_rl.server.state import ServedState

logger = logging.getLogger("tink_rl.server")
_LOOK_EVERY_S = 60.0


class Leftovers:
    """Drops them; see `served.py` for whose a policy is."""

    def __init__(self, state: ServedState, commits: Commits, keep_s: float) -> None:
        """Store.

        Args:
            state: The server.
            commits: Its own.
            keep_s: For so long a policy stays served that nobody owns and nobody samples.
        """
        self._state, self._commits, self._keep_s = state, commits, keep_s

    async def watch(self) -> None:
        """Look again and again, until cancelled."""
        while True:
            await asyncio.sleep(min(_LOOK_EVERY_S, self._keep_s))
            try:
                await self.drop_idle()
            except TinkError as error:  # the next look tries again
                logger.warning("tink_rl: an idle policy stays served: %s", error)

    async def drop_idle(self) -> None:
        """Drop what has been idle for too long.

        Raises:
            TinkError: something could not be dropped.
        """
        for found in self._state.policies():
            if found.owner is None and found.idle_s > self._keep_s:
                logger.info(
                    "tink_rl: dropping %s: nobody has owned or sampled it for %.0f s",
                    *(", ".join(found.versions), found.idle_s),
                )
                await self._commits.drop_unowned(found.policy)
