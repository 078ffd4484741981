"""What a gateway counts. Plain numbers in memory, turned into Prometheus families when somebody scrapes.

`prometheus_client` costs 0.9 to 1.7 µs per observation, a list of counts 0.2; one is made per delivery.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric

from scheduler.tenants import TenantLabels

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

GAP_SECONDS = (
    *(0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.025, 0.03),
    *(0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0),
)
TTFT_SECONDS = (
    0.0005,
    0.001,
    0.002,
    0.005,
    0.01,
    0.02,
    0.05,
    0.1,
    0.2,
    0.3,
    0.5,
    0.75,
    1,
    2,
    3,
    5,
    10,
    20,
    30,
    60,
    120,
)
DURATION_SECONDS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1800)
RETRY_SECONDS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300)
STALL_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 5)

Served = tuple[str, str]  # model, tier


class Buckets:
    """A histogram: counts per bucket, not yet cumulated."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def cumulated(self) -> list[tuple[str, float]]:
        rows, count = [], 0
        for bound, new in zip([*map(str, map(float, self.bounds)), "+Inf"], self.counts, strict=True):
            count += new
            rows.append((bound, float(count)))
        return rows


class Histogram:
    """A family of histograms by model and tier: both come from the server's own lists, so their number is bounded."""

    def __init__(self, name: str, help: str, bounds: Sequence[float]) -> None:
        self._name = name
        self._help = help
        self._bounds = bounds
        self._by: dict[Served, Buckets] = {}

    def of(self, model: str, tier: str) -> Buckets:
        key = (model, tier)
        if key not in self._by:
            self._by[key] = Buckets(self._bounds)
        return self._by[key]

    def family(self) -> HistogramMetricFamily:
        family = HistogramMetricFamily(self._name, self._help, labels=["model", "tier"])
        for labels, buckets in self._by.items():
            family.add_metric(labels, buckets.cumulated(), buckets.total)
        return family


class Counts:
    """A family of counters. The last label is the tenant's, which is bounded; the others come from the server's own lists."""

    def __init__(self, name: str, help: str, labels: Sequence[str], tenants: TenantLabels) -> None:
        self._name = name
        self._help = help
        self._labels = (*labels, "tenant")
        self._tenants = tenants
        self._by: dict[tuple[str, ...], int] = {}

    def add(self, *labels: str, amount: int = 1) -> None:
        *others, tenant = labels
        key = (*others, self._tenants.of(tenant))
        self._by[key] = self._by.get(key, 0) + amount

    def family(self) -> CounterMetricFamily:
        family = CounterMetricFamily(self._name, self._help, labels=self._labels)
        for labels, count in self._by.items():
            family.add_metric(labels, count)
        return family


class Metrics:
    """One per gateway process. Every attribute is written by exactly one place. `tenants`: who has a label for sure."""

    def __init__(self, version: str, tenants: Iterable[str] = ()) -> None:
        self.ttft = Histogram(
            "headgate_time_to_first_token_seconds", "From a request's arrival to its first delivery", TTFT_SECONDS
        )
        self.gaps = Histogram("headgate_inter_token_latency_seconds", "Time between two deliveries", GAP_SECONDS)
        self.durations = Histogram(
            "headgate_request_duration_seconds", "From a request's arrival to its end", DURATION_SECONDS
        )
        self.retry_after = Histogram(
            "headgate_retry_after_seconds", "When refused requests were asked to come back", RETRY_SECONDS
        )
        self.stalls = Buckets(STALL_SECONDS)
        self.requests_open = 0
        labels = TenantLabels(tenants)
        self.requests = Counts("headgate_requests", "Requests that ended, by how", ("model", "tier", "outcome"), labels)
        self.refusals = Counts(
            "headgate_refusals", "Requests answered with 429 or 503, by code", ("model", "tier", "reason"), labels
        )
        self.prompt_tokens = Counts("headgate_prompt_tokens", "Tokens of admitted prompts", ("model", "tier"), labels)
        self.completion_tokens = Counts(
            "headgate_completion_tokens", "Tokens of answers that ended, whole or not", ("model", "tier"), labels
        )
        self._version = version
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def render(self) -> bytes:
        """Reads memory only."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        for histogram in (self.ttft, self.gaps, self.durations, self.retry_after):
            yield histogram.family()
        stalls = HistogramMetricFamily("headgate_event_loop_stall_seconds", "How late the event loop runs a timer")
        stalls.add_metric([], self.stalls.cumulated(), self.stalls.total)
        yield stalls
        for counts in (self.requests, self.refusals, self.prompt_tokens, self.completion_tokens):
            yield counts.family()
        yield GaugeMetricFamily("headgate_requests_open", "Requests being answered", value=self.requests_open)
        build = GaugeMetricFamily("headgate_build_info", "Always 1", labels=["version", "component"])
        build.add_metric([self._version, "gateway"], 1)
        yield build
