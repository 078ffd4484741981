"""What the engine process adds up, and what the front makes of it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from scheduler.calibration import CostModel
from scheduler.gate import Ended
from scheduler.messages import Accept, Finish, Reason, Refuse, Request, StepReport, Wait
from scheduler.roofline import CAUSES, decode_work
from worker.metrics import GAUGES, HISTOGRAMS, LABELLED_GAUGES, Meter, Speeds, WorkerCollector


def report(step: int = 1, measured: float = 0.02, budget: float = 0.04, prefill: int = 0) -> StepReport:
    seconds = dict.fromkeys(CAUSES, 0.0) | {"weights": measured / 2, "host": measured / 4, "unexplained": measured / 4}
    moved = {"weights": 6e6, "kv_read": 3e6, "kv_write": 1e6}
    return StepReport(step, 2, prefill, 2, 2, moved, 5e8, seconds, 0.018, measured, 0.01, budget)


def ended(**fields: Any) -> Ended:
    values: dict[str, Any] = {
        "tier": "default",
        "finish": Finish.STOP,
        "prompt_tokens": 5,
        "output_tokens": 9,
        "queue_seconds": 0.1,
        "ttft_seconds": 0.3,
        "utps": 42.0,
        "floor_utps": 40.0,
    }
    return Ended(**(values | fields))


@pytest.fixture
def meter(tools: Any) -> Meter:
    return Meter(tools.build_with(None).gate)


def rendered(meter: Meter, now: float = 1.0) -> dict[str, Any]:
    """As the front does it: over the pipe as JSON, into families, through Prometheus' own text and parser."""
    collector = WorkerCollector("tiny", "here")
    collector.state = json.loads(json.dumps(meter.state(now)))
    registry = CollectorRegistry()
    registry.register(collector)
    return {f.name: f for f in text_string_to_metric_families(generate_latest(registry).decode())}


def samples(families: dict[str, Any], name: str) -> dict[tuple[str, ...], float]:
    """Values by their labels other than model and worker, in the order of the labels' names."""
    return {
        tuple(s.labels[label] for label in sorted(s.labels.keys() - {"model", "worker"})): s.value
        for family in families.values()
        for s in family.samples
        if s.name == name
    }


def moved(families: dict[str, Any], name: str) -> dict[tuple[str, ...], float]:
    """The samples that are not nothing."""
    return {labels: value for labels, value in samples(families, name).items() if value}


def test_seconds_by_cause_and_idle_sum_to_the_measured_time(meter: Meter) -> None:
    meter.idle(1.5)
    for step in range(10):
        meter.step(report(step, measured=0.01 * (step + 1)), now=float(step))
    families = rendered(meter)
    causes = samples(families, "headgate_step_seconds_by_cause_total")
    assert set(causes) == {(cause,) for cause in CAUSES}
    assert sum(causes.values()) == pytest.approx(1.5 + 0.55)
    assert samples(families, "headgate_step_seconds_sum")[()] == pytest.approx(0.55)
    assert samples(families, "headgate_step_seconds_count")[()] == 10


def test_decisions_are_counted_by_kind_and_reason(meter: Meter) -> None:
    meter.decision(Accept())
    meter.decision(Accept())
    meter.decision(Wait(1.0, Reason.TIME_BUDGET))
    meter.decision(Refuse(Reason.QUEUE_FULL, 1.0))
    meter.refused_late(Reason.TTFT_UNREACHABLE)
    assert moved(rendered(meter), "headgate_admissions_total") == {
        ("accepted", ""): 2,
        ("waiting", "time_budget"): 1,
        ("refused", "queue_full"): 1,
        ("refused_late", "ttft_unreachable"): 1,
    }


def test_ended_requests_are_counted_by_tier_and_finish(meter: Meter) -> None:
    meter.ended(ended())
    meter.ended(ended(finish=Finish.CANCELLED, utps=None, ttft_seconds=None))
    meter.ended(ended(tier="priority", utps=20.0, violation="schedule"))
    families = rendered(meter)
    assert moved(families, "headgate_requests_ended_total") == {
        ("stop", "default"): 1,
        ("cancelled", "default"): 1,
        ("stop", "priority"): 1,
    }
    assert moved(families, "headgate_utps_count") == {("default",): 1, ("priority",): 1}
    assert samples(families, "headgate_engine_time_to_first_token_seconds_sum")[("default",)] == pytest.approx(0.3)
    assert samples(families, "headgate_request_queue_seconds_count")[("default",)] == 2
    assert moved(families, "headgate_utps_floor_violations_total") == {("schedule", "priority"): 1}


def test_live_ratios_are_those_of_the_last_second(meter: Meter, tools: Any) -> None:
    meter.step(report(1, measured=0.5), now=10.0)
    meter.step(report(2, measured=0.02), now=11.5)
    meter.step(report(3, measured=0.02), now=11.6)
    gauges = meter.state(now=12.0)["gauges"]
    bandwidth = tools.DEVICE.memory.bytes_per_second
    assert gauges["limit_ratio"] == pytest.approx(0.01 / 0.02)
    assert gauges["bandwidth_utilization_ratio"] == pytest.approx(1e7 / 0.02 / bandwidth)
    assert gauges["compute_utilization_ratio"] == pytest.approx(5e8 / 0.02 / tools.DEVICE.flops_per_second)
    assert gauges["arithmetic_intensity_flops_per_byte"] == pytest.approx(50)
    assert gauges["bandwidth_budget_ratio"] == pytest.approx(0.5)
    assert gauges["stps"] == pytest.approx(4)


def test_without_steps_every_gauge_is_there_and_nothing_is_divided_by_nothing(meter: Meter) -> None:
    families = rendered(meter)
    assert all(samples(families, f"headgate_{name}") for name in GAUGES)
    assert {f"headgate_{name}" for name in LABELLED_GAUGES} <= families.keys()
    assert samples(families, "headgate_limit_ratio")[()] == 0


def test_what_was_measured_of_the_machine_is_told(tools: Any) -> None:
    built = tools.build_with(None)
    measured = replace(
        tools.DEVICE,
        flops_per_dtype=(("bfloat16", 3e11), ("float32", 9e10)),
        weights_bytes_per_second=9e8,
        call_seconds=2e-6,
    )
    built.gate.cost = CostModel(measured, tools.SHAPE)
    families = rendered(Meter(built.gate))
    assert samples(families, "headgate_measured_bandwidth_bytes_per_second") == {("memory",): 1e9, ("weights",): 9e8}
    assert samples(families, "headgate_measured_flops_per_second") == {("bfloat16",): 3e11, ("float32",): 9e10}
    assert samples(families, "headgate_measured_call_seconds")[()] == 2e-6


def test_the_limit_is_that_of_the_fastest_step_once_one_was_faster_than_the_probe(tools: Any) -> None:
    gate = tools.build_with(None).gate
    meter = Meter(gate)
    work = decode_work(tools.SHAPE, 1, 0.0)
    gate.cost.observe(work, gate.cost.limit.seconds(work) / 2)
    gauges = meter.state(now=1.0)["gauges"]
    assert gauges["limit_bandwidth_bytes_per_second"] == pytest.approx(2 * tools.DEVICE.memory.bytes_per_second)
    assert gauges["measured_bandwidth_bytes_per_second/memory"] == tools.DEVICE.memory.bytes_per_second


def test_a_step_without_a_floor_says_nothing_of_the_budget(meter: Meter) -> None:
    meter.step(report(budget=float("inf")), now=1.0)
    assert meter.state(1.0)["gauges"]["bandwidth_budget_ratio"] == 0


def test_buckets_are_cumulative_and_end_with_everything(meter: Meter) -> None:
    for value in (1.0, 42.0, 42.0, 99999.0):
        meter.ended(ended(utps=value))
    everything = samples(rendered(meter), "headgate_utps_bucket")
    buckets = {labels: count for labels, count in everything.items() if labels[1] == "default"}
    counts = [count for _, count in sorted(buckets.items(), key=lambda row: float(row[0][0]))]
    assert counts == sorted(counts) and counts[-1] == 4
    assert next(count for labels, count in buckets.items() if float(labels[0]) == 1.0) == 1, (
        "a bound holds its own value"
    )


def test_prefill_is_counted_and_only_steps_that_had_any_are_observed(meter: Meter) -> None:
    meter.step(report(1, prefill=0), now=1.0)
    meter.step(report(2, prefill=64), now=1.0)
    families = rendered(meter)
    assert samples(families, "headgate_prefill_tokens_total")[()] == 64
    assert samples(families, "headgate_prefill_tokens_per_step_count")[()] == 1
    assert samples(families, "headgate_tokens_per_step_sum")[()] == 68


def test_labels_are_bounded_however_many_requests_there_were(meter: Meter) -> None:
    for step in range(500):
        meter.decision(Accept())
        meter.step(report(step), now=step / 1000)
        meter.ended(ended(utps=float(step), prompt_tokens=step))
    families = rendered(meter)
    rows = sum(len(family.samples) for family in families.values())
    meter.ended(ended())
    assert sum(len(family.samples) for family in rendered(meter).values()) == rows < 700
    assert {label for f in families.values() for s in f.samples for label in s.labels} == (
        {"model", "worker", "tier", "finish", "cause", "decision", "reason", "le", "component", "version", "level"}
    )


def test_every_histogram_has_a_family_whether_or_not_it_was_observed(meter: Meter) -> None:
    families = rendered(meter)
    assert {f"headgate_{name}" for name, *_ in HISTOGRAMS.values()} <= families.keys()
    assert all(family.documentation for family in families.values())


def test_what_has_not_happened_yet_counts_nothing_rather_than_being_absent(meter: Meter) -> None:
    """A counter that appears with its first event hides that event from every rate."""
    families = rendered(meter)
    violations = samples(families, "headgate_utps_floor_violations_total")
    assert violations == {(c, t): 0 for c in ("schedule", "machine", "footprint") for t in ("priority", "default")}
    assert samples(families, "headgate_preemptions_total") == {(): 0}
    assert samples(families, "headgate_limit_seconds_total") == {(): 0}
    admissions = samples(families, "headgate_admissions_total")
    assert ("refused", "queue_full") in admissions and not any(admissions.values())
    before = {(s.name, tuple(s.labels.items())) for f in families.values() for s in f.samples}
    meter.decision(Accept())
    meter.decision(Wait(1.0, Reason.KV_FOOTPRINT))
    meter.decision(Refuse(Reason.TIME_BUDGET, 1.0))
    meter.refused_late(Reason.TTFT_UNREACHABLE)
    meter.step(report(), now=1.0)
    meter.ended(ended(tier="priority", utps=20.0, violation="machine"))
    after = {(s.name, tuple(s.labels.items())) for f in rendered(meter).values() for s in f.samples}
    assert {name for name, _ in after - before} <= {
        f"headgate_{name}_{part}"
        for name in ("step_seconds", "step_predicted_seconds", "step_error_ratio", "tokens_per_step")
        for part in ("bucket", "count", "sum")
    }


def test_tiers_tell_what_they_promise_and_how_many_they_have(tools: Any) -> None:
    gate = tools.build_with(None).gate
    families = rendered(Meter(gate))
    floors = samples(families, "headgate_tier_floor_utps")
    assert floors == {(tier.name,): tier.floor_utps for tier in gate.tiers.values()}
    assert samples(families, "headgate_tier_ttft_target_seconds")[("priority",)] == 2
    for number, tier in enumerate(("priority", "default", "default")):
        gate.arrive(Request(1, number, (1, 2, 3), 4, tier=tier), now=0.0)
    now_running = samples(rendered(Meter(gate)), "headgate_requests_running")
    waiting = samples(rendered(Meter(gate)), "headgate_requests_waiting")
    assert sum(now_running.values()) + sum(waiting.values()) == 3
    assert now_running[("priority",)] + waiting[("priority",)] == 1
    assert waiting[("flex",)] == now_running[("flex",)] == 0


def sequence(tools: Any, key: int, tier: str) -> Any:
    gate = tools.build_with(None).gate
    gate.arrive(Request(1, key, (1, 2, 3), 1000, tier=tier), now=0.0)
    return next(iter(gate.running.values()))


def test_the_slowest_running_request_of_a_tier_is_measured_from_delivery_to_delivery(tools: Any) -> None:
    fast, slow, other = (sequence(tools, *of) for of in ((1, "default"), (2, "default"), (3, "priority")))
    speeds, rates = Speeds(), {fast.key: 40, slow.key: 25, other.key: 10}
    told = {}
    for tick in range(6):
        now = 1.0 + tick * 0.25
        for one in (fast, slow, other):
            made = int((now - 1.0) * rates[one.key]) + 1
            one.first_at, one.generated, one.last_at = 1.0, [0] * made, 1.0 + (made - 1) / rates[one.key]
        told = speeds.slowest([fast, slow, other], now)
        assert bool(told) == (tick >= 4), "a second has to pass first"
    assert told == {"default": pytest.approx(25), "priority": pytest.approx(10)}
    stalled = speeds.slowest([fast, slow, other], 12.25)
    assert stalled["default"] < 3, "the next token cannot come before now"
    assert speeds.slowest([], 13.5) == {}


def test_step_seconds_are_told_by_tenant_and_sum_to_the_steps(tools: Any) -> None:
    gate = tools.build_with(None).gate
    meter = Meter(gate)
    for number, tenant in enumerate(("acme", "umbrella", "a/b")):
        gate.arrive(Request(1, number, (1, 2, 3), 4, tenant=tenant), 0.0)
    seconds = 0.0
    for step in range(1, 4):
        plan = gate.plan(float(step))
        seconds += 0.5 if plan.entries else 0.0
        gate.observe({entry.key: [5] for entry in plan.entries if entry.delivers}, 0.5, 0.0, step + 0.5)
    told = samples(rendered(meter), "headgate_tenant_step_seconds_total")
    assert told.keys() == {("acme",), ("umbrella",), ("a_b",)}
    assert sum(told.values()) == pytest.approx(seconds) and min(told.values()) > 0
    assert samples(rendered(meter), "headgate_tenant_step_seconds_total") == told, "nothing is told twice"


def test_the_fronts_event_loop_is_watched_from_the_start() -> None:
    collector = WorkerCollector("tiny", "here")
    for seconds in (0.0001, 0.0001, 0.3):
        collector.stalled(seconds)
    (family,) = (family for family in collector.collect() if family.name == "headgate_event_loop_stall_seconds")
    counts = {sample.labels.get("le", sample.name): sample.value for sample in family.samples}
    assert counts["0.0005"] == counts["0.2"] == 2
    assert counts["0.5"] == counts["headgate_event_loop_stall_seconds_count"] == 3
    assert counts["headgate_event_loop_stall_seconds_sum"] == pytest.approx(0.3002)
