"""The worker's metrics: added up in the engine process, handed to the front a few times a second, rendered there.

The engine process keeps plain numbers (`Meter`), so that no scrape ever holds the interpreter that drives the device; the
front turns the latest state into families (`WorkerCollector`).
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from scheduler.calibration import CostModel
from scheduler.gate import Gate
from scheduler.hardware import Device
from scheduler.messages import Accept, Decision, Refuse, StepReport, Wait
from scheduler.sequence import Ended

SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
RATES = (1.0, 2.0, 3.0, 5.0, 7.5, 10.0, 15.0, 20.0, 30.0, 50.0, 75.0, 100.0, 150.0, 200.0, 300.0, 500.0, 1000.0, 2000.0)
COUNTS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0)
RATIOS = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0)
WINDOW_SECONDS = 1.0  # over which the live rates are averaged


class Meter:
    """Counters, and histograms as [counts per bucket, sum]; keys are family names with label values behind a slash."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._counters: dict[str, float] = {}
        self._histograms: dict[str, tuple[list[int], list[float]]] = {}
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
        return {"counters": self._counters, "histograms": self._histograms, "gauges": self._gauges(now)}

    def _gauges(self, now: float) -> dict[str, float]:
        while self._recent and self._recent[0][0] < now - WINDOW_SECONDS:
            self._recent.popleft()
        reports = [report for _, report in self._recent]
        gate, cost = self._gate, self._gate.cost
        capacity = gate.ledger.capacity_bytes
        gauges = {
            "requests_running": len(gate.running),
            "requests_waiting": len(gate.waiting),
            "kv_cache_usage_ratio": sum(gate.shape.kv_bytes(s.computed) for s in gate.running.values()) / capacity,
            "kv_predicted_peak_ratio": gate.ledger.reserved_bytes / capacity,
            "stps": sum(report.delivered_tokens for report in reports) / WINDOW_SECONDS,
            "step_margin_ratio": cost.margin,
            "ridge_tokens": cost.ridge,
            "preemptions": gate.preemptions,
            "limit_bandwidth_bytes_per_second": cost.limit.bytes_per_second,
            "limit_flops_per_second": cost.limit.device.flops_per_second,
        }
        return gauges | _measured(cost.device) | _utilization(reports, cost)

    def _count(self, key: str, amount: float = 1.0) -> None:
        self._counters[key] = self._counters.get(key, 0.0) + amount

    def _observe(self, key: str, bounds: tuple[float, ...], value: float) -> None:
        histogram = self._histograms.get(key)
        if histogram is None:
            histogram = self._histograms[key] = ([0] * (len(bounds) + 1), [0.0])
        histogram[0][bisect_left(bounds, value)] += 1
        histogram[1][0] += value


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
    "flops": ("flops", "Floating-point operations of all steps, as the model says.", ()),
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
    "requests_running": "Requests in the running batch.",
    "requests_waiting": "Requests in the waiting list.",
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
MEASURED = {  # key -> help, label
    "measured_bandwidth_bytes_per_second": ("Read bandwidth per memory level, measured at start.", "level"),
    "measured_flops_per_second": ("Operations per second of matrix products, measured at start.", "dtype"),
}


class WorkerCollector(Collector):
    """Renders the latest state that the engine process handed over."""

    def __init__(self, model: str, worker: str) -> None:
        self._labels = {"model": model, "worker": worker}
        self.state: dict[str, Any] = {"counters": {}, "histograms": {}, "gauges": {}}

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily]:
        names, values = list(self._labels), list(self._labels.values())
        gauges = self.state["gauges"]
        for key, help_text in GAUGES.items():
            gauge = GaugeMetricFamily(f"headgate_{key}", help_text, labels=names)
            gauge.add_metric(values, gauges.get(key, 0.0))
            yield gauge
        for key, (help_text, label) in MEASURED.items():
            measured = GaugeMetricFamily(f"headgate_{key}", help_text, labels=[*names, label])
            for row, value in _rows(gauges, key):
                measured.add_metric([*values, *row], value)
            yield measured
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
