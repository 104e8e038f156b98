"""Figures for Prometheus, in a registry of our own."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tink_rl.worker.ledger import ENDS, RequestLedger

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics(Collector):
    """What the worker counts, or keeps elsewhere. No label carries a name that a client chose."""

    def __init__(
        self,
        ledger: RequestLedger,
        depth: Callable[[], dict[str, int]],
        is_ready: Callable[[], bool],
    ) -> None:
        """Make the registry; `ledger` and `depth` are read when the figures are asked for."""
        self._ledger, self._depth, self._is_ready = ledger, depth, is_ready
        self.registry = CollectorRegistry()
        self.answers = Counter(
            "tink_worker_http_answers",
            "HTTP answers by route and status.",
            ("route", "status"),
            registry=self.registry,
        )
        self.errors = Counter(
            "tink_worker_errors",
            "Answers that were errors, by code.",
            ("code",),
            registry=self.registry,
        )
        self.replays = Counter(
            "tink_worker_replays",
            "Retries that joined a running request or got its answer again.",
            registry=self.registry,
        )
        self.tokens = Counter(
            "tink_worker_completion_tokens", "Tokens in answers.", registry=self.registry
        )
        self.seconds = Histogram(
            "tink_worker_sample_seconds",
            "From admission to the answer of a sampling request.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.registry.register(self)

    def render(self) -> bytes:
        """The exposition text."""
        return generate_latest(self.registry)

    def collect(self) -> Iterator[Metric]:
        """The figures that live elsewhere, as they are now."""
        admitted = CounterMetricFamily("tink_worker_admitted", "Sampling requests admitted.")
        ended = CounterMetricFamily(
            "tink_worker_ended", "Admitted requests that ended, by how.", labels=["state"]
        )
        # ends first: an admission in between then shows as a request under way, never as one lost
        for state in ENDS:
            ended.add_metric([state], self._ledger.ends[state])
        admitted.add_metric([], self._ledger.num_admitted)
        yield admitted
        yield ended
        depth = GaugeMetricFamily("tink_worker_now", "What is under way.", labels=["what"])
        for what, number in self._depth().items():
            depth.add_metric([what], number)
        yield depth
        yield GaugeMetricFamily(
            "tink_worker_ready", "1 if a recent generation worked.", value=int(self._is_ready())
        )
