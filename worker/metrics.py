"""The worker's metrics: added up in the engine process, handed to the front a few times a second, rendered there.

The engine process keeps plain numbers (`Meter`), so that no scrape ever holds the interpreter that drives the device; the
front turns the latest state into families (`WorkerCollector`).
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from scheduler.calibration import CostModel
from scheduler.gate import Gate
from scheduler.hardware import Device
from scheduler.messages import Accept, Decision, Finish, Reason, Refuse, StepReport, Wait
from scheduler.roofline import CAUSES
from scheduler.sequence import Ended, Sequence
from scheduler.tenants import TenantLabels
from scheduler.tiers import Tier

SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
STEPS = (1.0, 1.25, 1.6, 2.0, 2.5, 3.15, 4.0, 5.0, 6.3, 8.0)  # ten to a decade: quantiles are read beside floors
RATES = (*(round(step * ten, 2) for ten in (1, 10, 100, 1000) for step in STEPS), 10000.0)
COUNTS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0)
RATIOS = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0)
WINDOW_SECONDS = 1.0  # over which the live rates are averaged
VIOLATION_CAUSES = ("schedule", "machine", "footprint")
ADMISSIONS = (
    "accepted/",
    *(f"waiting/{reason}" for reason in (Reason.TIME_BUDGET, Reason.KV_FOOTPRINT)),
    *(f"refused/{reason}" for reason in (Reason.TIME_BUDGET, Reason.KV_FOOTPRINT, Reason.QUEUE_FULL)),
    *(f"refused/{reason}" for reason in (Reason.TOO_LARGE, Reason.UNKNOWN_TIER, Reason.BAD_REQUEST)),
    f"refused_late/{Reason.TTFT_UNREACHABLE}",
)


class Meter:
    """Counters, and histograms as [counts per bucket, sum]; keys are family names with label values behind a slash."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._tenants = TenantLabels()
        self._counters = dict.fromkeys(zero_counters(gate.tiers.values()), 0.0)
        self._histograms: dict[str, tuple[list[int], list[float]]] = {}
        for key, bounds in zero_histograms(gate.tiers):
            self._histogram(key, bounds)
        self._speeds = Speeds()
        self._recent: deque[tuple[float, StepReport]] = deque()

    def decision(self, decision: Decision) -> None:
        match decision:
            case Accept():
                self._count("admissions/accepted/")
            case Wait(reason=reason):
                self._count(f"admissions/waiting/{reason}")
            case Refuse(reason=reason):
                self._count(f"admissions/refused/{reason}")

    def refused_late(self, reason: str) -> None:
        self._count(f"admissions/refused_late/{reason}")

    def idle(self, seconds: float) -> None:
        self._count("step_seconds/idle", seconds)

    def step(self, report: StepReport, now: float) -> None:
        for cause, seconds in report.seconds.items():
            self._count(f"step_seconds/{cause}", seconds)
        for cause, moved in report.bytes_moved.items():
            self._count(f"bandwidth_bytes/{cause}", moved)
        self._count("flops", report.flops)
        self._count("limit_seconds", report.limit_seconds)
        self._count("generation_tokens", report.delivered_tokens)
        self._count("prefill_tokens", report.prefill_tokens)
        self._observe("step_measured_seconds", SECONDS, report.measured_seconds)
        self._observe("step_predicted_seconds", SECONDS, report.predicted_seconds)
        self._observe("step_error_ratio", RATIOS, abs(report.predicted_seconds / report.measured_seconds - 1))
        self._observe("tokens_per_step", COUNTS, report.decode_tokens + report.prefill_tokens)
        if report.prefill_tokens:
            self._observe("prefill_tokens_per_step", COUNTS, report.prefill_tokens)
        self._recent.append((now, report))

    def ended(self, ended: Ended) -> None:
        tier = ended.tier
        self._count(f"ended/{tier}/{ended.finish.name.lower()}")
        self._observe(f"queue_seconds/{tier}", SECONDS, ended.queue_seconds)
        if ended.ttft_seconds is not None:
            self._observe(f"engine_ttft_seconds/{tier}", SECONDS, ended.ttft_seconds)
        if ended.utps is not None:
            self._observe(f"utps/{tier}", RATES, ended.utps)
        if ended.violation:
            self._count(f"floor_violations/{tier}/{ended.violation}")

    def state(self, now: float) -> dict[str, Any]:
        """Everything as JSON-ready values: cumulative counts, and gauges of this moment."""
        for tenant, seconds in self._gate.account.take_charged().items():
            self._count(f"tenant_step_seconds/{self._tenants.of(tenant).replace('/', '_')}", seconds)
        return {"counters": self._counters, "histograms": self._histograms, "gauges": self._gauges(now)}

    def _gauges(self, now: float) -> dict[str, float]:
        while self._recent and self._recent[0][0] < now - WINDOW_SECONDS:
            self._recent.popleft()
        reports = [report for _, report in self._recent]
        gate, cost = self._gate, self._gate.cost
        capacity = gate.ledger.capacity_bytes
        gauges = {
            "kv_cache_usage_ratio": sum(gate.shape.kv_bytes(s.computed) for s in gate.running.values()) / capacity,
            "kv_predicted_peak_ratio": gate.ledger.reserved_bytes / capacity,
            "stps": sum(report.delivered_tokens for report in reports) / WINDOW_SECONDS,
            "step_margin_ratio": cost.margin,
            "ridge_tokens": cost.ridge,
            "preemptions": gate.preemptions,
            "limit_bandwidth_bytes_per_second": cost.limit.bytes_per_second,
            "limit_flops_per_second": cost.limit.device.flops_per_second,
        }
        return gauges | self._tiers(now) | _measured(cost.device) | _utilization(reports, cost)

    def _tiers(self, now: float) -> dict[str, float]:
        """What each tier is promised, and what it has."""
        running, waiting = self._gate.running.values(), self._gate.waiting
        have = Counter(sequence.tier.name for sequence in running)
        gauges = {f"utps_slowest/{tier}": utps for tier, utps in self._speeds.slowest(running, now).items()}
        for tier in self._gate.tiers.values():
            gauges[f"requests_running/{tier.name}"] = have[tier.name]
            gauges[f"requests_waiting/{tier.name}"] = (
                waiting.up_to(tier.rank).count - waiting.up_to(tier.rank - 1).count
            )
            gauges[f"tier_floor_utps/{tier.name}"] = tier.floor_utps
            gauges[f"tier_ttft_target_seconds/{tier.name}"] = tier.ttft_target_seconds
        return gauges

    def _count(self, key: str, amount: float = 1.0) -> None:
        self._counters[key] = self._counters.get(key, 0.0) + amount

    def _observe(self, key: str, bounds: tuple[float, ...], value: float) -> None:
        counts, total = self._histogram(key, bounds)
        counts[bisect_left(bounds, value)] += 1
        total[0] += value

    def _histogram(self, key: str, bounds: tuple[float, ...]) -> tuple[list[int], list[float]]:
        histogram = self._histograms.get(key)
        if histogram is None:
            histogram = self._histograms[key] = ([0] * (len(bounds) + 1), [0.0])
        return histogram


def zero_counters(tiers: Iterable[Tier]) -> Iterator[str]:
    """What may happen, before it has: a counter that appears with its first event hides that event from every rate."""
    yield from ("flops", "limit_seconds", "generation_tokens", "prefill_tokens")
    yield from (f"admissions/{row}" for row in ADMISSIONS)
    yield from (f"step_seconds/{cause}" for cause in CAUSES)
    yield from (f"bandwidth_bytes/{cause}" for cause in ("weights", "kv_read", "kv_write"))
    for tier in tiers:
        yield from (f"ended/{tier.name}/{finish.name.lower()}" for finish in Finish if finish is not Finish.RUNNING)
        if tier.floor_utps:
            yield from (f"floor_violations/{tier.name}/{cause}" for cause in VIOLATION_CAUSES)


def zero_histograms(tiers: Iterable[str]) -> Iterator[tuple[str, tuple[float, ...]]]:
    for tier in tiers:
        yield f"queue_seconds/{tier}", SECONDS
        yield f"engine_ttft_seconds/{tier}", SECONDS
        yield f"utps/{tier}", RATES


class Speeds:
    """How fast running requests are right now: looks at them, and compares with a look of a second ago."""

    def __init__(self) -> None:
        self._looks: deque[tuple[float, dict[int, tuple[int, float]]]] = deque()  # when, key -> (tokens, last one at)

    def slowest(self, running: Iterable[Sequence], now: float) -> dict[str, float]:
        """UTPS of the slowest running request per tier; nothing of a tier where none has been decoding for a second."""
        self._looks.append((now, {s.key: (len(s.generated), s.last_at) for s in running if s.first_at}))
        while len(self._looks) > 1 and self._looks[1][0] <= now - WINDOW_SECONDS:
            self._looks.popleft()
        looked_at, before = self._looks[0]
        slowest: dict[str, float] = {}
        if looked_at <= now - WINDOW_SECONDS:
            for sequence in running:
                if sequence.key in before:
                    utps, tier = speed(sequence, *before[sequence.key], now), sequence.tier.name
                    slowest[tier] = min(utps, slowest.get(tier, utps))
        return slowest


def speed(sequence: Sequence, tokens_before: int, last_before: float, now: float) -> float:
    """Tokens per second since an earlier look, from delivery to delivery. The next cannot come before now, so a sequence
    that stalls slows down."""
    tokens = max(0, len(sequence.generated) - tokens_before)
    at_best = (tokens + 1) / (now - last_before)
    return min(tokens / (sequence.last_at - last_before), at_best) if tokens else at_best


def _measured(device: Device) -> dict[str, float]:
    """What was found at start, or what the catalogue says of a simulated device."""
    bandwidths = {level.name: level.bytes_per_second for level in device.levels}
    if device.weights_bytes_per_second:
        bandwidths["weights"] = device.weights_bytes_per_second
    return (
        {f"measured_bandwidth_bytes_per_second/{name}": rate for name, rate in bandwidths.items()}
        | {f"measured_flops_per_second/{name}": rate for name, rate in device.flops_per_dtype}
        | {"measured_call_seconds": device.call_seconds}
    )


def _utilization(reports: list[StepReport], cost: CostModel) -> dict[str, float]:
    """Of the steps of the last second: what they achieved against what the device can do, while it was busy."""
    busy = sum(report.measured_seconds for report in reports)
    moved = sum(sum(report.bytes_moved.values()) for report in reports)
    flops = sum(report.flops for report in reports)
    budgets = [report for report in reports if report.budget_seconds != float("inf")]
    return {
        "bandwidth_utilization_ratio": moved / busy / cost.limit.bytes_per_second if busy else 0.0,
        "compute_utilization_ratio": flops / busy / cost.device.flops_per_second if busy else 0.0,
        "limit_ratio": sum(report.limit_seconds for report in reports) / busy if busy else 0.0,
        "arithmetic_intensity_flops_per_byte": flops / moved if moved else 0.0,
        "bandwidth_budget_ratio": max((r.measured_seconds / r.budget_seconds for r in budgets), default=0.0),
    }


# --- the front --------------------------------------------------------------------------------------------------------

COUNTERS = {  # key -> family, help, labels
    "admissions": ("admissions", "Decisions of the gate.", ("decision", "reason")),
    "step_seconds": ("step_seconds_by_cause", "Seconds of all steps by cause; they sum to the wall clock.", ("cause",)),
    "bandwidth_bytes": ("bandwidth_bytes", "Bytes moved through memory by cause, as the model says.", ("cause",)),
    "tenant_step_seconds": (
        "tenant_step_seconds",
        "Seconds of all steps by whose requests they were for.",
        ("tenant",),
    ),
    "flops": ("flops", "Floating-point operations of all steps, as the model says.", ()),
    "limit_seconds": ("limit_seconds", "Seconds that physics allows for all steps: bytes or operations at best.", ()),
    "generation_tokens": ("generation_tokens", "Tokens generated.", ()),
    "prefill_tokens": ("prefill_tokens", "Prompt tokens computed.", ()),
    "ended": ("requests_ended", "Requests that left the gate, by how they ended.", ("tier", "finish")),
    "floor_violations": ("utps_floor_violations", "Requests whose UTPS ended below the floor.", ("tier", "cause")),
}
HISTOGRAMS = {
    "step_measured_seconds": ("step_seconds", "Seconds of a step, measured by the loop.", SECONDS, ()),
    "step_predicted_seconds": ("step_predicted_seconds", "Seconds of a step as predicted.", SECONDS, ()),
    "step_error_ratio": ("step_error_ratio", "Relative error of the predicted step seconds.", RATIOS, ()),
    "tokens_per_step": ("tokens_per_step", "Tokens that a step computed.", COUNTS, ()),
    "prefill_tokens_per_step": ("prefill_tokens_per_step", "Prompt tokens in steps that had any.", COUNTS, ()),
    "queue_seconds": ("request_queue_seconds", "Wait before the first step.", SECONDS, ("tier",)),
    "engine_ttft_seconds": ("engine_time_to_first_token_seconds", "From arrival at the gate.", SECONDS, ("tier",)),
    "utps": ("utps", "Tokens per second of a request, as emitted.", RATES, ("tier",)),
}
GAUGES = {
    "kv_cache_usage_ratio": "Share of the KV cache that holds tokens.",
    "kv_predicted_peak_ratio": "Share of the KV cache that is reserved for what running requests will become.",
    "stps": "Tokens generated per second, over the last second.",
    "bandwidth_utilization_ratio": "Bytes moved per busy second over the highest bandwidth seen, last second.",
    "compute_utilization_ratio": "Operations per busy second over measured peak, last second.",
    "limit_ratio": "Step time that physics allows over measured step time, last second.",
    "bandwidth_budget_ratio": "Largest share of a step's time budget that was used, last second.",
    "arithmetic_intensity_flops_per_byte": "Operations per byte moved, last second.",
    "step_margin_ratio": "Error that 95 % of predictions stay within.",
    "ridge_tokens": "Tokens per step at which arithmetic takes as long as reading the weights.",
    "limit_bandwidth_bytes_per_second": "Highest bandwidth seen, by a probe or an own step, where the weights lie.",
    "limit_flops_per_second": "Highest rate of operations seen, by a probe or an own step.",
    "measured_call_seconds": "Host time of the smallest operation, measured at start.",
}
LABELLED_GAUGES = {  # key -> help, label
    "requests_running": ("Requests in the running batch.", "tier"),
    "requests_waiting": ("Requests in the waiting list.", "tier"),
    "utps_slowest": ("Tokens per second of the slowest running request, over the last second.", "tier"),
    "tier_floor_utps": ("Tokens per second that every request of the tier is promised; 0: none.", "tier"),
    "tier_ttft_target_seconds": ("Time to first token that the tier aims at.", "tier"),
    "measured_bandwidth_bytes_per_second": ("Read bandwidth per memory level, measured at start.", "level"),
    "measured_flops_per_second": ("Operations per second of matrix products, measured at start.", "dtype"),
}


class WorkerCollector(Collector):
    """Renders the latest state that the engine process handed over."""

    def __init__(self, model: str, worker: str) -> None:
        self._labels = {"model": model, "worker": worker}
        self.state: dict[str, Any] = {"counters": {}, "histograms": {}, "gauges": {}}
        self._stalls, self._stalled_seconds = [0] * (len(SECONDS) + 1), 0.0

    def stalled(self, seconds: float) -> None:
        """The front's event loop ran a timer this late."""
        self._stalls[bisect_left(SECONDS, seconds)] += 1
        self._stalled_seconds += seconds

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily]:
        names, values = list(self._labels), list(self._labels.values())
        gauges = self.state["gauges"]
        for key, help_text in GAUGES.items():
            gauge = GaugeMetricFamily(f"headgate_{key}", help_text, labels=names)
            gauge.add_metric(values, gauges.get(key, 0.0))
            yield gauge
        for key, (help_text, label) in LABELLED_GAUGES.items():
            labelled = GaugeMetricFamily(f"headgate_{key}", help_text, labels=[*names, label])
            for row, value in _rows(gauges, key):
                labelled.add_metric([*values, *row], value)
            yield labelled
        build = GaugeMetricFamily("headgate_build_info", "What runs.", labels=["component", "version", *names])
        build.add_metric(["worker", version("headgate"), *values], 1.0)
        yield build
        preemptions = CounterMetricFamily("headgate_preemptions", "KV caches dropped and recomputed.", labels=names)
        preemptions.add_metric(values, gauges.get("preemptions", 0.0))
        yield preemptions
        for key, (name, help_text, labels) in COUNTERS.items():
            counter = CounterMetricFamily(f"headgate_{name}", help_text, labels=[*names, *labels])
            for row, amount in _rows(self.state["counters"], key):
                counter.add_metric([*values, *row], amount)
            yield counter
        for key, (name, help_text, bounds, labels) in HISTOGRAMS.items():
            histogram = HistogramMetricFamily(f"headgate_{name}", help_text, labels=[*names, *labels])
            for row, (counts, total) in _rows(self.state["histograms"], key):
                histogram.add_metric([*values, *row], _cumulative(bounds, counts), total[0])
            yield histogram
        help_text = "How late the event loop of the worker's front runs a timer."
        stalls = HistogramMetricFamily("headgate_event_loop_stall_seconds", help_text, labels=names)
        stalls.add_metric(values, _cumulative(SECONDS, self._stalls), self._stalled_seconds)
        yield stalls


def render(collector: WorkerCollector | None) -> tuple[bytes, bytes]:
    """(text, content type) for a scrape; nothing to tell until the engine process has said who it is."""
    registry = CollectorRegistry()
    if collector is not None:
        registry.register(collector)
    return generate_latest(registry), CONTENT_TYPE_LATEST.encode()


def _rows(table: dict[str, Any], family: str) -> Iterator[tuple[list[str], Any]]:
    for key, value in table.items():
        name, *labels = key.split("/")
        if name == family:
            yield labels, value


def _cumulative(bounds: tuple[float, ...], counts: list[int]) -> list[tuple[str, float]]:
    rows, total = [], 0
    for bound, count in zip([*map(str, bounds), "+Inf"], counts, strict=True):
        total += count
        rows.append((bound, float(total)))
    return rows
