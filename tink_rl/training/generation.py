"""What stands where TRL's `VLLMGeneration` stands: `sync_weights()` and `generate(...)`.

Every rank samples for itself, from the version that rank 0 published last; nothing here is a
collective, so ranks may take different numbers of turns. Inside `rollout(batch)` all turns are sampled
from the version that the first one took, with seeds that follow from the batch.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

from tink_rl.errors import ConfigError, TinkError, UnknownVersion
from tink_rl.publish.vllm_client import VLLMClient
from tink_rl.training.lookahead import LookAhead
from tink_rl.training.rollouts import Ask, RolloutBatch
from tink_rl.training.sampler import Answers, BusyClock, Sampler
from tink_rl.training.trl_names import SamplingArguments
from tink_rl.transport.payloads import given_kwargs, sampling_fields
from tink_rl.transport.plain import plain
from tink_rl.transport.request_fields import distribution_changes

logger = logging.getLogger("tink_rl")
_NUMBERS = (
    *("max_completion_length", "temperature", "top_p", "top_k", "min_p", "repetition_penalty"),
)


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
        """Keyword arguments of `VLLMClient.generate`.

        Where something narrows what is drawn from, they ask for logprobs over the whole vocabulary: the
        trainer's are, and what compares the two must compare like with like.
        """
        full = {"full_logprobs": True} if self.changes else {}
        return {**self._arguments(), **full}

    @property
    def changes(self) -> tuple[str, ...]:
        """Fields by which tokens are drawn from something else than softmax(logits / temperature)."""
        return distribution_changes(self.fields())

    def _arguments(self) -> dict[str, Any]:
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

    def fields(self) -> dict[str, Any]:
        """The fields of a request by vLLM's names, `generation_kwargs` and structured outputs merged in.

        Raises:
            SamplingRefused: one of them is not taken.
        """
        return sampling_fields(**self._arguments())

    @classmethod
    def of(cls, args: SamplingArguments) -> SamplingSettings:
        """The settings of a trainer's arguments."""
        return cls(
            **{name: plain(getattr(args, name)) for name in _NUMBERS},
            structured_outputs_regex=args.vllm_structured_outputs_regex,
            generation_kwargs=given_kwargs(args.generation_kwargs) or None,
        )


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
        pin: Callable[[str | None], None] = lambda name: None,
        agree: Callable[[TinkError | None], None] | None = None,
    ) -> None:
        """Store.

        Args:
            clients: One per replica; prompts are shared out between them.
            settings: How to sample.
            current: Name of the current version, `policy@N`.
            sync: Publish if the model differs from what is served; every rank calls it.
            recover: Publish again to replicas that lost the version; False if none did.
            pin: Told the version that an open rollout samples from, then None: it must stay served.
            agree: Told after the first turn of an open rollout why it could not be sampled, or None; it
                raises that, on every rank. Later turns are not a collective.
        """
        self.clients = list(clients)
        self.settings = settings
        self.clock = BusyClock()
        """Runs while anything is sampled."""
        self.ahead: LookAhead | None = None
        """Samples the next batches while this one trains; None: nobody does."""
        self._sampler = Sampler(self.clients, self.clock)
        self._current, self._sync, self._recover, self._pin = current, sync, recover, pin
        self._agree = agree
        self._batch: RolloutBatch | None = None
        self.last_model = ""
        """The version that sampled the last batch."""
        self.last_trained_model = ""
        """The version that sampled the last batch to train on."""
        self.last_seconds = 0.0
        """How long the last call took."""
        self.last_sampled_seconds = 0.0
        """How long its rows took to be sampled, ahead or not."""
        self.total_seconds = 0.0
        """Of all calls so far: a step may sample several times, or not at all."""
        self.last_num_tokens = 0

    def sync_weights(self) -> None:
        """Publish if the model differs from what is served (same digest: free)."""
        self._sync()

    @contextmanager
    def rollout(self, batch: RolloutBatch) -> Iterator[RolloutBatch]:
        """All turns generated inside belong to `batch` and are sampled from one version."""
        if self._batch is not None:
            raise ConfigError("a rollout is under way already; it cannot hold another one")
        self._batch = batch
        try:
            yield batch
        finally:
            self._batch = None
            self._pin(None)

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
        batch = self._batch or RolloutBatch()
        if not batch.model:
            batch.model = self._current()
        is_first = batch.num_turns == 0
        asks = batch.plan(prompts)
        if not is_first:
            asks = [self._within_limits(ask, batch) for ask in asks]
        self.last_sampled_seconds = 0.0
        start = time.perf_counter()
        with profiler or nullcontext():
            answers = self._sample_together(asks, batch)
        self.last_seconds = time.perf_counter() - start
        self.last_sampled_seconds = self.last_sampled_seconds or self.last_seconds
        self.total_seconds += self.last_seconds
        self.last_model = batch.model
        if self.ahead is not None and self._is_trained_on(batch):
            self.ahead.count_wait(self.last_seconds)
            if is_first:
                self.look_ahead()
        if batch.phase == "train":
            self.last_trained_model = batch.model
        batch.add(asks, answers)
        rows = [row for answer in answers for row in answer]  # asks stand in the prompts' order
        self.last_num_tokens = sum(len(row["completion_ids"]) for row in rows)
        logprobs = [row["logprobs"] for row in rows]
        return (
            prompts,
            [row["completion_ids"] for row in rows],
            None if self.settings.logprobs is None else logprobs,
            [row["logprob_token_ids"] for row in rows],
        )

    def _within_limits(self, ask: Ask, batch: RolloutBatch) -> Ask:
        """`ask`, with what is left of the rollout's completion where another whole one would not fit.

        TRL cuts a rollout at max_completion_length, its tools' answers included: the same tokens are left.
        """
        limit = self.clients[0].limits().max_model_len
        rest = None if limit is None else limit - len(ask.prompt_ids)
        if rest is None or rest >= self.settings.fields()["max_tokens"]:
            return ask
        begin = batch.turns[ask.rows[0]][0].prompt_ids
        left = self.settings.max_completion_length - (len(ask.prompt_ids) - len(begin))
        # Where nothing is left the server's limit says so.
        return replace(ask, max_tokens=min(left, rest)) if min(left, rest) > 0 else ask

    def _sample_together(self, asks: list[Ask], batch: RolloutBatch) -> Answers:
        if batch is not self._batch or batch.num_turns > 0:
            return self._sample_or_recover(asks, batch.model)
        try:
            answers = self._first_turn(asks, batch)
        except TinkError as error:
            if self._agree is not None:
                self._agree(error)
            raise
        if self._agree is not None:
            self._agree(None)
        return answers

    def _first_turn(self, asks: list[Ask], batch: RolloutBatch) -> Answers:
        """What was sampled ahead for this batch, else sampled now; `batch.model` is pinned."""
        answers = None
        if self.ahead is not None and self._is_trained_on(batch):
            answers = self.ahead.take(batch, asks, self.settings.as_request())
        self._pin(batch.model)
        if answers is None:
            return self._sample_or_recover(asks, batch.model)
        assert self.ahead is not None
        self.last_sampled_seconds = self.ahead.last_seconds
        return answers

    def _is_trained_on(self, batch: RolloutBatch) -> bool:
        return batch is self._batch and batch.phase == "train"

    def settle_rows(self, are_replaced: bool) -> None:
        """Before a publish that takes the current version away: wait for the rows that it is sampling."""
        if self.ahead is not None and are_replaced:
            self.ahead.wait_for_rows()

    def look_ahead(self) -> None:
        """Ask for the batches whose turn it is; every rank must call it."""
        if self.ahead is not None:
            self.ahead.send(self._current(), self.settings.as_request())

    def _sample_or_recover(self, asks: list[Ask], model: str) -> Answers:
        arguments = self.settings.as_request()
        try:
            return self._sampler.sample(asks, model=model, arguments=arguments)
        except UnknownVersion:
            if not self._recover():
                raise
            return self._sampler.sample(asks, model=model, arguments=arguments)
