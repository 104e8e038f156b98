"""What stands where TRL's `VLLMGeneration` stands: `sync_weights()` and `generate(...)`.

Every rank samples for itself, from the version that rank 0 published last; nothing here is a
collective, so ranks may take different numbers of turns.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from tink_rl.errors import ConfigError, UnknownVersion
from tink_rl.transport.vllm_client import VLLMClient

logger = logging.getLogger("tink_rl")


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How completions are sampled; TRL's names."""

    max_completion_length: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    logprobs: int | None = 0
    structured_outputs_regex: str | None = None
    generation_kwargs: dict[str, Any] | None = None

    def as_request(self) -> dict[str, Any]:
        """Keyword arguments of `VLLMClient.generate`."""
        return {
            "repetition_penalty": self.repetition_penalty,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p or 0.0,
            "max_tokens": self.max_completion_length,
            "logprobs": self.logprobs,
            "structured_outputs_regex": self.structured_outputs_regex,
            "generation_kwargs": self.generation_kwargs,
        }


class PolicyGeneration:
    """Samples rollouts of the current policy version."""

    def __init__(
        self,
        clients: Sequence[VLLMClient],
        settings: SamplingSettings,
        *,
        current: Callable[[], str],
        sync: Callable[[], None],
        recover: Callable[[], bool],
    ) -> None:
        """Store.

        Args:
            clients: One per replica; prompts are shared out between them.
            settings: How to sample.
            current: Name of the current version, `policy@N`.
            sync: Publish if the model differs from what is served; every rank calls it.
            recover: Publish again to replicas that lost the version; False if none did.
        """
        self.clients = list(clients)
        self.settings = settings
        self._current, self._sync, self._recover = current, sync, recover
        self.last_model = ""
        """The version that sampled the last batch."""
        self.last_seconds = 0.0
        self.total_seconds = 0.0
        """Of all calls so far: a step may sample several times, or not at all."""
        self.last_num_tokens = 0

    def sync_weights(self) -> None:
        """Publish if the model differs from what is served (same digest: free)."""
        self._sync()

    def generate(
        self,
        prompts: list[list[int]],
        images: list[Any] | None,
        num_generations: int,
        profiler: AbstractContextManager[Any] | None = None,
    ) -> tuple[list[list[int]], list[list[int]], list[list[list[float]]] | None, Any]:
        """One completion per entry of `prompts`, in order.

        Args:
            prompts: Token ids, `[B][T]`; a prompt stands once for each of its generations.
            images: Must be None.
            num_generations: Ignored: repeated neighbours are sampled in one request.
            profiler: TRL's timer around the request.

        Returns:
            `prompt_ids` [B][T], `completion_ids` [B][T], `logprobs` [B][T][K], `logprob_token_ids`.

        Raises:
            UnknownVersion: the version was lost and could not be published again.
        """
        if images is not None and any(image is not None for image in images):
            raise ConfigError("images were given; this trainer samples text only")
        model = self._current()
        start = time.perf_counter()
        with profiler or nullcontext():
            try:
                rows = self._sample(prompts, model)
            except UnknownVersion:
                if not self._recover():
                    raise
                rows = self._sample(prompts, model)
        self.last_seconds = time.perf_counter() - start
        self.total_seconds += self.last_seconds
        self.last_model = model
        self.last_num_tokens = sum(len(row["completion_ids"]) for row in rows)
        logprobs = [row["logprobs"] for row in rows]
        return (
            prompts,
            [row["completion_ids"] for row in rows],
            None if self.settings.logprobs is None else logprobs,
            [row["logprob_token_ids"] for row in rows],
        )

    def _sample(self, prompts: list[list[int]], model: str) -> list[dict[str, Any]]:
        """Rows in the order of `prompts`, sampled in as few requests as there are group sizes."""
        groups = [(list(key), len(list(run))) for key, run in itertools.groupby(prompts)]
        requests = list(_requests(groups, len(self.clients)))
        if len(requests) == 1:
            answers = [self._ask(client, n, items, model) for client, n, items in requests]
        else:
            with ThreadPoolExecutor(min(len(requests), 16)) as pool:
                answers = list(pool.map(lambda r: self._ask(r[0], r[1], r[2], model), requests))
        by_group: dict[int, list[dict[str, Any]]] = {}
        for answer in answers:
            by_group |= answer
        return [row for index in range(len(groups)) for row in by_group[index]]

    def _ask(
        self, client_index: int, n: int, items: list[tuple[int, list[int]]], model: str
    ) -> dict[int, list[dict[str, Any]]]:
        output = self.clients[client_index].generate(
            [prompt for _, prompt in items], n=n, model=model, **self.settings.as_request()
        )
        rows = []
        for i, completion_ids in enumerate(output["completion_ids"]):
            row: dict[str, Any] = {"completion_ids": completion_ids}
            for key in ("logprobs", "logprob_token_ids"):
                row[key] = output[key][i] if output[key] is not None else None
            rows.append(row)
        return {index: rows[k * n : (k + 1) * n] for k, (index, _) in enumerate(items)}


def _requests(
    groups: list[tuple[list[int], int]], num_clients: int
) -> list[tuple[int, int, list[tuple[int, list[int]]]]]:
    """`(client, n, [(group index, prompt)])`: prompts of the same group size travel together."""
    sizes = sorted({size for _, size in groups})
    found = []
    for size in sizes:
        items = [(i, prompt) for i, (prompt, count) in enumerate(groups) if count == size]
        for client in range(num_clients):
            share = items[client::num_clients]
            if share:
                found.append((client, size, share))
    return found
