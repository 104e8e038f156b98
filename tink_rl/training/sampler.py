"""From the asks of one turn to their answers: dealt to the servers in few requests that run side by side."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from tink_rl.training.rollouts import Ask
from tink_rl.transport.sampling_client import SamplingClient

Answers = list[list[dict[str, Any]]]
"""For each ask one `{"completion_ids", "logprobs", "logprob_token_ids"}` per row."""
_AT_ONCE = 16


class BusyClock:
    """Seconds during which at least one of several overlapping works was under way. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running = 0
        self._since = self._total = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Some work, from here to its end."""
        self._count(1)
        try:
            yield
        finally:
            self._count(-1)

    def _count(self, change: int) -> None:
        with self._lock:
            now = time.perf_counter()
            if self._running:
                self._total += now - self._since
            self._since = now
            self._running += change

    @property
    def seconds(self) -> float:
        """Of all works until now."""
        self._count(0)
        return self._total


class Sampler:
    """Samples from one or more servers that serve the same versions."""

    def __init__(self, clients: Sequence[SamplingClient], clock: BusyClock | None = None) -> None:
        """Store.

        Args:
            clients: One per replica; prompts are shared out between them.
            clock: Runs while anything is sampled.
        """
        self.clients = list(clients)
        self._clock = clock or BusyClock()

    def longest_s(self, asks: Sequence[Ask]) -> float:
        """The deadlines of the requests for `asks`, one after the other as far as they do not run at once."""
        at_once = math.ceil(len(_requests(asks, len(self.clients))) / _AT_ONCE)
        return at_once * max(client.request_timeout_s for client in self.clients)

    def sample(self, asks: Sequence[Ask], *, model: str, arguments: dict[str, Any]) -> Answers:
        """For each of `asks` its answers.

        Args:
            asks: What one turn asks for.
            model: `policy@N`.
            arguments: Of `VLLMClient.generate`, beside prompts and model.

        Raises:
            UnknownVersion: a server does not serve `model`.
            TinkError: see `VLLMClient.generate`.
        """
        requests = _requests(asks, len(self.clients))

        def ask(request: tuple[int, list[tuple[int, Ask]]]) -> dict[int, list[dict[str, Any]]]:
            return self._ask(*request, model=model, arguments=arguments)

        with self._clock.running():
            if len(requests) == 1:
                answers = [ask(requests[0])]
            else:
                with ThreadPoolExecutor(min(len(requests), _AT_ONCE)) as pool:
                    answers = list(pool.map(ask, requests))
        by_ask: dict[int, list[dict[str, Any]]] = {}
        for answer in answers:
            by_ask |= answer
        return [by_ask[index] for index in range(len(asks))]

    def _ask(
        self,
        client_index: int,
        items: list[tuple[int, Ask]],
        *,
        model: str,
        arguments: dict[str, Any],
    ) -> dict[int, list[dict[str, Any]]]:
        first = items[0][1]
        n = len(first.rows)
        own = {"seed": first.seed, "max_tokens": first.max_tokens}
        kwargs = {
            **(arguments["generation_kwargs"] or {}),
            **{name: value for name, value in own.items() if value is not None},
        }
        output = self.clients[client_index].generate(
            [ask.prompt_ids for _, ask in items],
            n=n,
            model=model,
            ids_only=True,
            **{**arguments, "generation_kwargs": kwargs},
        )
        rows = []
        for i, completion_ids in enumerate(output["completion_ids"]):
            row: dict[str, Any] = {"completion_ids": completion_ids}
            for key in ("logprobs", "logprob_token_ids"):
                row[key] = output[key][i] if output[key] is not None else None
            rows.append(row)
        return {index: rows[k * n : (k + 1) * n] for k, (index, _) in enumerate(items)}


def _requests(asks: Sequence[Ask], num_clients: int) -> list[tuple[int, list[tuple[int, Ask]]]]:
    """`(client, [(index of ask, ask)])`: what has one seed, number of rows and length travels together."""
    alike: dict[tuple[int, int, int], list[tuple[int, Ask]]] = {}
    for index, ask in enumerate(asks):
        key = (ask.seed or 0, len(ask.rows), ask.max_tokens or 0)
        alike.setdefault(key, []).append((index, ask))
    return [
        ((turn + share) % num_clients, mine)
        for turn, items in enumerate(alike.values())
        for share in range(num_clients)
        if (mine := items[share::num_clients])
    ]
