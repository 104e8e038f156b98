"""Rollouts of later steps, sampled while this one trains: which are asked for when, and who may have them.

A generation batch of optimizer step t may be asked for once t - k steps are done (k: `max_staleness`), of
the version that is current then. So its rows are at most k versions old, and which version samples them
depends on no clock. It is prepared on the main thread, as TRL prepares it, and sent from a thread of its
own: plain HTTP, nothing of torch. Its rows are handed out if, and only if, what is asked for in the end
(prompts, rows, seeds, sampling options) is what was asked for ahead; else the batch is sampled as without
look-ahead.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

from tink_rl.errors import RequestTimeout, Retry, TinkError, UnknownVersion
from tink_rl.training.batch_feed import BatchFeed, Upcoming
from tink_rl.training.rollouts import Ask, RolloutBatch
from tink_rl.training.sampler import Answers, BusyClock, Sampler
from tink_rl.training.trl_names import RolloutTrainer
from tink_rl.transport.abortable_client import AbortableClient
from tink_rl.transport.sampling_client import SamplingClient

logger = logging.getLogger("tink_rl")
_END_S = 10.0
"""How long threads may take to see that their requests were ended."""
_AT_ONCE = 64
"""Generation batches that may be under way."""
_Key = tuple[int, int]
"""Optimizer step, and the number of the generation batch in it."""


@dataclass(kw_only=True)
class _Sent:
    """A batch that is being sampled, or was, and that nobody has asked for yet."""

    batch: RolloutBatch
    asks: list[Ask]
    arguments: dict[str, Any]
    deadline: float
    answers: Future[Answers]
    begin: float
    seconds: float = 0.0
    """From the first request to the last answer."""

    def __post_init__(self) -> None:
        self.answers.add_done_callback(self._note_end)

    def _note_end(self, _: object) -> None:
        self.seconds = time.perf_counter() - self.begin


class _Ahead:
    """Connections and threads of one training."""

    def __init__(self, clients: Sequence[SamplingClient], clock: BusyClock) -> None:
        self._clients = [AbortableClient.like(client) for client in clients]
        self.sampler = Sampler(self._clients, clock)
        self.pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="tink-ahead")

    def end(self, running: Sequence[Future[Answers]]) -> None:
        for client in self._clients:
            client.abort()
        wait(running, timeout=_END_S)
        self.pool.shutdown(wait=False, cancel_futures=True)


class LookAhead:
    """Samples ahead for one rank of a trainer."""

    def __init__(
        self,
        trainer: RolloutTrainer,
        clients: Sequence[SamplingClient],
        *,
        max_staleness: int,
        new_batch: Callable[..., RolloutBatch],
        clock: BusyClock,
    ) -> None:
        """Put itself between the trainer and its data loader; asks for nothing yet.

        Args:
            trainer: With its `train` method as the user will call it.
            clients: One per server. Requests go over connections of their own, so that they can be ended.
            max_staleness: k, at least 1.
            new_batch: Makes an empty batch of a phase, step and draw, as the trainer will.
            clock: Runs while anything is sampled, ahead or not.
        """
        self._trainer, self._clients, self._new_batch = trainer, list(clients), new_batch
        self._max_staleness, self._clock = max_staleness, clock
        self._feed = BatchFeed(trainer)
        self._ahead: _Ahead | None = None
        self._sent: dict[_Key, _Sent] = {}
        self._running: list[_Sent] = []
        """What is being sampled, also where nobody wants the rows any more."""
        self._last: _Key = (-1, 0)
        """The last batch that was asked for."""
        self._fresh_because: str | None = None
        self._said: set[str] = set()
        self._num_hits = self._num_asked = 0
        self._waited_s = 0.0
        self._step_begin, self._busy_before = time.perf_counter(), clock.seconds
        self.last_seconds = 0.0
        """How long the rows that were handed out last took to be sampled."""
        trainer.train = self._ending_with(trainer.train)

    # -- ask ahead --------------------------------------------------------------------------------

    def send(self, model: str, arguments: dict[str, Any]) -> None:
        """Ask for every batch whose turn it is; returns at once.

        Every rank must call it, on its main thread: what stands in several groups is found over all ranks.

        Args:
            model: The current version.
            arguments: Of `VLLMClient.generate`.
        """
        state = self._trainer.state
        last_step = min(state.global_step + self._max_staleness, state.max_steps - 1)
        for batch, prompts in self._planned(last_step):
            batch.model = model
            self._start(batch, batch.plan(prompts), arguments)

    def _planned(self, last_step: int) -> Iterator[tuple[RolloutBatch, list[list[int]]]]:
        """Batches to ask for that every rank could prepare, each with this rank's prompts."""
        found = {
            key: self._prompts_of(upcoming)
            for upcoming in self._feed.upcoming(last_step)
            if (key := (upcoming.step, upcoming.draw)) > self._last and key not in self._sent
        }
        mine = {
            key: None if prompts is None else RolloutBatch.keys_of(prompts)
            for key, prompts in found.items()
        }
        ranks = self._new_batch("train", 0, 0).gather([mine])
        for (step, draw), prompts in found.items():
            keys = [rank.get((step, draw)) for rank in ranks]
            if prompts is not None and None not in keys:
                batch = self._new_batch("train", step, draw)
                batch.gather = partial(_known, keys)
                yield batch, prompts

    def _prompts_of(self, upcoming: Upcoming) -> list[list[int]] | None:
        """Token ids as TRL will make them; None if they cannot be known ahead."""
        try:
            prompts = copy.deepcopy([row["prompt"] for row in upcoming.inputs])
            return [list(ids) for ids in self._trainer._tokenize_prompts(prompts)[0]]
        except Exception as error:  # noqa: BLE001 - the trainer meets it again, and raises it
            self._say(f"its prompts cannot be prepared ahead ({type(error).__name__}: {error})")
            return None

    def _start(self, batch: RolloutBatch, asks: list[Ask], arguments: dict[str, Any]) -> None:
        if self._ahead is None:
            self._ahead = _Ahead(self._clients, self._clock)
        sampler = self._ahead.sampler
        sent = _Sent(
            batch=batch,
            asks=asks,
            arguments=arguments,
            deadline=time.monotonic() + sampler.longest_s(asks),
            begin=time.perf_counter(),
            answers=self._ahead.pool.submit(
                sampler.sample, asks, model=batch.model, arguments=arguments
            ),
        )
        self._sent[batch.step, batch.draw] = sent
        self._running = [*(other for other in self._running if not other.answers.done()), sent]

    # -- hand out ---------------------------------------------------------------------------------

    def take(
        self, batch: RolloutBatch, asks: Sequence[Ask], arguments: dict[str, Any]
    ) -> Answers | None:
        """The answers to `asks` that were sampled ahead; None if there are none, and they must be sampled.

        With answers, `batch.model` is set to the version that sampled them.

        Raises:
            TinkError: they could not be sampled, and asking again would not help.
        """
        key = self._last = (batch.step, batch.draw)
        fresh_because, self._fresh_because = self._fresh_because, None
        sent = self._sent.pop(key, None)
        self._sent = {other: waiting for other, waiting in self._sent.items() if other > key}
        num_rows = sum(len(ask.rows) for ask in asks)
        self._num_asked += num_rows
        why_not = fresh_because or _difference(sent, batch, asks, arguments)
        if why_not is not None:
            self._say(why_not)
            return None
        assert sent is not None
        answers = self._answers_of(sent)
        if answers is not None:
            batch.model = sent.batch.model
            self.last_seconds = sent.seconds
            self._num_hits += num_rows
        return answers

    def _answers_of(self, sent: _Sent) -> Answers | None:
        left_s = max(0.0, sent.deadline - time.monotonic())
        try:
            return sent.answers.result(left_s + _END_S)
        except FutureTimeout as error:
            raise RequestTimeout(
                f"the rollouts of step {sent.batch.step}, sampled ahead, did not come within their deadline; "
                "raise SyncConfig.request_timeout_s, or look with `tink-rl status` what the server does"
            ) from error
        except TinkError as error:
            if isinstance(error, UnknownVersion) or error.retry is not Retry.NO:
                # Sampled once more, with all that sampling does to recover; what fails then is raised.
                logger.warning(
                    "step %d: sampling ahead failed (%s); sampling it now", sent.batch.step, error
                )
                return None
            raise

    def next_fresh(self, because: str) -> None:
        """Let the next batch be sampled from the version that is current then."""
        self._fresh_because = because

    def _say(self, why: str) -> None:
        """Why rows were not sampled ahead: each reason once."""
        if why not in self._said:
            self._said.add(why)
            logger.info(
                "step %d: sampled now, not ahead: %s (said once; overlap/hit_share counts them)",
                self._trainer.state.global_step,
                why,
            )

    # -- wait and end -----------------------------------------------------------------------------

    def wait_for_rows(self) -> None:
        """Return when nothing is being sampled ahead: before weights are replaced that sample it.

        Failures stay for whoever takes the rows.
        """
        start = time.perf_counter()
        if self._running:
            latest = max(sent.deadline for sent in self._running)
            left_s = max(0.0, latest - time.monotonic())
            wait([sent.answers for sent in self._running], timeout=left_s + _END_S)
        self._waited_s += time.perf_counter() - start

    def count_wait(self, seconds: float) -> None:
        """The trainer waited so long for rows."""
        self._waited_s += seconds

    def begin(self, step: int) -> None:
        """Training begins at `step`."""
        self.step_metrics()  # what came before belongs to no step
        if step:
            logger.info(
                "resumed at step %d: a checkpoint holds no rollouts, so the rows of the first step are "
                "sampled again, by its policy; from then on they are up to %d versions old",
                step,
                self._max_staleness,
            )

    def step_metrics(self) -> dict[str, float]:
        """The `overlap/*` metrics since the last call, which was a step ago."""
        now, busy_s = time.perf_counter(), self._clock.seconds
        wall_s = now - self._step_begin
        metrics = {
            "overlap/idle_trainer_s": self._waited_s,
            "overlap/idle_sampler_s": max(0.0, wall_s - (busy_s - self._busy_before)),
        }
        if self._num_asked:
            metrics["overlap/hit_share"] = self._num_hits / self._num_asked
        self._step_begin, self._busy_before = now, busy_s
        self._waited_s, self._num_hits, self._num_asked = 0.0, 0, 0
        return metrics

    def close(self) -> None:
        """End every request under way and its thread, drop what was sampled ahead; can be used again."""
        if self._ahead is not None:
            self._ahead.end([sent.answers for sent in self._running])
        self._ahead = None
        self._running.clear()
        self._sent.clear()
        self._last = (-1, 0)

    def _ending_with(self, train: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(train)
        def ending(*args: object, **kwargs: object) -> Any:
            try:
                return train(*args, **kwargs)
            finally:  # an interrupted notebook cell too
                self.close()

        return ending


def _known(keys: Sequence[Sequence[int]], _: object) -> list[int]:
    """As a gather over all ranks would give them."""
    return [key for rank in keys for key in rank]


def _difference(
    sent: _Sent | None, batch: RolloutBatch, asks: Sequence[Ask], arguments: dict[str, Any]
) -> str | None:
    """Why the rows that were `sent` for are not those of `asks`; None if they are."""
    if sent is None:
        return "nothing was asked for ahead (the first batch of a run, or of an epoch)"
    if [ask.prompt_ids for ask in sent.asks] != [ask.prompt_ids for ask in asks]:
        return "the prompts are not those of the data loader (changed, or another order)"
    if sent.arguments != arguments:
        return "the sampling options were changed"
    if sent.asks != list(asks):
        return "the number of rows or their seeds were changed"
    return None
