"""The vLLM workers behind one API server: every one of them is asked, in rank order."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from typing import Any

from tink_rl import errors

_POLL_S = (0.0005, *([0.001] * 12), 0.002, 0.005, 0.01)


class Workers:
    """The receivers (`receiver.TinkWorkerExtension`) of one engine."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    async def ask(self, method: str, *args: Any) -> list[Any]:
        """Every worker's value of `method(*args)`, in rank order.

        Raises:
            TinkError: what the first failing worker raised.
        """
        answers = await self._engine.collective_rpc(method, args=args)
        for answer in answers:
            if not answer["ok"]:
                raise errors.from_wire(answer, 500)
        return [answer["value"] for answer in answers]

    async def tell(self, method: str, *args: Any) -> None:
        """Let every worker do `method(*args)`; whether it can is not asked."""
        await self._engine.collective_rpc(method, args=args)

    async def until_done(self, method: str, key: Any, timeout_s: float, what: str) -> None:
        """Ask `method(key)` again and again until every worker says "done".

        A busy engine answers between two of its steps, and with several workers waits for the one under
        way: it is left alone for as long as it took to answer.

        Raises:
            ChannelLost: `what` did not end within `timeout_s`.
        """
        deadline = time.monotonic() + timeout_s
        for attempt in range(10_000_000):
            asked = time.monotonic()
            if all(state == "done" for state in await self.ask(method, key)):
                return
            now = time.monotonic()
            if now > deadline:
                raise errors.ChannelLost(f"{what} did not end within {timeout_s:g} s")
            pause_s = _POLL_S[min(attempt, len(_POLL_S) - 1)]
            await asyncio.sleep(max(pause_s, min(now - asked, _POLL_S[-1])))


def check_alike(name: str, digest: str | None, held: Iterable[str | None]) -> None:
    """Raise unless every worker made the packet of `digest` its own (None: the base).

    A worker answers with the digest that it computed and checked on arrival, so this finds workers that
    were given different packets.

    Raises:
        WorkersDiffer: one does not.
    """
    for found in held:
        if found != digest:
            raise errors.WorkersDiffer(
                f"{name}: a worker holds digest {found!r}, expected {digest!r}; publish again"
            )
