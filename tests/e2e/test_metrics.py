"""What a dashboard reads: every family, parsed as Prometheus does, moved by exactly what happened."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from scheduler.batch import Entry, Kind
from scheduler.roofline import step_flops, step_work
from worker.simulated import find_shape

SHAPE = find_shape("headgate-demo")
GATEWAY = {
    "headgate_time_to_first_token_seconds": "histogram",
    "headgate_inter_token_latency_seconds": "histogram",
    "headgate_request_duration_seconds": "histogram",
    "headgate_retry_after_seconds": "histogram",
    "headgate_event_loop_stall_seconds": "histogram",
    "headgate_requests": "counter",
    "headgate_refusals": "counter",
    "headgate_prompt_tokens": "counter",
    "headgate_completion_tokens": "counter",
    "headgate_requests_open": "gauge",
    "headgate_build_info": "gauge",
}
WORKER = {
    "headgate_utps": "histogram",
    "headgate_stps": "gauge",
    "headgate_generation_tokens": "counter",
    "headgate_prefill_tokens": "counter",
    "headgate_step_seconds": "histogram",
    "headgate_step_predicted_seconds": "histogram",
    "headgate_step_error_ratio": "histogram",
    "headgate_step_seconds_by_cause": "counter",
    "headgate_bandwidth_bytes": "counter",
    "headgate_bandwidth_utilization_ratio": "gauge",
    "headgate_bandwidth_budget_ratio": "gauge",
    "headgate_compute_utilization_ratio": "gauge",
    "headgate_arithmetic_intensity_flops_per_byte": "gauge",
    "headgate_flops": "counter",
    "headgate_limit_ratio": "gauge",
    "headgate_limit_seconds": "counter",
    "headgate_event_loop_stall_seconds": "histogram",
    "headgate_tier_floor_utps": "gauge",
    "headgate_tier_ttft_target_seconds": "gauge",
    "headgate_utps_slowest": "gauge",
    "headgate_kv_cache_usage_ratio": "gauge",
    "headgate_kv_predicted_peak_ratio": "gauge",
    "headgate_admissions": "counter",
    "headgate_requests_running": "gauge",
    "headgate_requests_waiting": "gauge",
    "headgate_requests_ended": "counter",
    "headgate_request_queue_seconds": "histogram",
    "headgate_engine_time_to_first_token_seconds": "histogram",
    "headgate_tokens_per_step": "histogram",
    "headgate_tenant_step_seconds": "counter",
    "headgate_preemptions": "counter",
    "headgate_measured_bandwidth_bytes_per_second": "gauge",
    "headgate_limit_bandwidth_bytes_per_second": "gauge",
    "headgate_utps_floor_violations": "counter",
}
CAUSES = {"weights", "kv", "compute", "comm", "phases", "host", "interference", "idle", "unexplained"}
LABELS = {
    *("model", "worker", "tier", "le", "outcome", "cause", "decision", "reason", "finish"),
    *("version", "component", "tenant"),
    *("level", "dtype"),  # of memory; of products
}


def settled(server: Any, tokens: int) -> Any:
    """A scrape of the worker, which tells four times a second, once it has told of so many tokens."""
    ends_at = time.monotonic() + 30
    while (samples := server.worker_metrics()).value("headgate_generation_tokens_total") < tokens:
        assert time.monotonic() < ends_at, "the worker did not tell"
    return samples


def test_every_family_is_there_with_its_type(simulated: Any) -> None:
    simulated.post(3)
    simulated.wait_until_idle()
    for samples, expected in ((simulated.gateway_metrics(), GATEWAY), (simulated.worker_metrics(), WORKER)):
        assert {name: family.type for name, family in samples.families.items() if name in expected} == expected
        assert all(family.documentation for family in samples.families.values())
        used = {label for f in samples.families.values() for s in f.samples for label in s.labels}
        assert used <= LABELS, "labels are bounded: no ids, no keys"


def test_a_known_request_moves_the_counters_by_exactly_what_it_cost(serve: Callable[..., Any]) -> None:
    """On a server that has served nothing before, so that every value is this request's."""
    server, output = serve(), 20
    server.post(output, prompt=[7] * 40, service_tier="priority")
    worker, gateway = settled(server, output), server.gateway_metrics()

    for name, expected in {
        "headgate_requests_total": 1,
        "headgate_prompt_tokens_total": 40,
        "headgate_completion_tokens_total": output,
        "headgate_time_to_first_token_seconds_count": 1,
        "headgate_request_duration_seconds_count": 1,
    }.items():
        assert gateway.value(name, tier="priority", model=server.model) == gateway.value(name) == expected, name
    assert gateway.value("headgate_requests_total", outcome="ok") == 1
    assert 1 <= gateway.value("headgate_inter_token_latency_seconds_count", tier="priority") <= output - 1

    for name, expected in {
        "headgate_admissions_total": 1,
        "headgate_generation_tokens_total": output,
        "headgate_prefill_tokens_total": 40,
        "headgate_requests_ended_total": 1,
        "headgate_utps_count": 1,
        "headgate_engine_time_to_first_token_seconds_count": 1,
        "headgate_request_queue_seconds_count": 1,
        "headgate_step_seconds_count": output,
        "headgate_step_predicted_seconds_count": output,
        "headgate_step_error_ratio_count": output,
        "headgate_tokens_per_step_count": output,
        "headgate_tokens_per_step_sum": 40 + output - 1,
    }.items():
        assert worker.value(name, model=server.model) == worker.value(name) == expected, name
    assert worker.value("headgate_admissions_total", decision="accepted") == 1
    assert worker.value("headgate_requests_ended_total", finish="length", tier="priority") == 1
    assert worker.value("headgate_utps_count", tier="priority") == 1

    steps = [[Entry(1, Kind.PREFILL, 0, 40, True)]]
    steps += [[Entry(1, Kind.DECODE, position, 1, True)] for position in range(40, 40 + output - 1)]
    works = [step_work(SHAPE, entries) for entries in steps]
    for cause, expected in {
        "weights": sum(SHAPE.weight_bytes(work.query_tokens) for work in works),
        "kv_read": sum(work.kv_read_bytes for work in works),
        "kv_write": sum(work.kv_write_bytes for work in works),
    }.items():
        assert worker.value("headgate_bandwidth_bytes_total", cause=cause) == pytest.approx(expected, rel=1e-9), cause
    flops = sum(step_flops(SHAPE, work) for work in works)
    # the gate counts the token itself among those it attends to, `step_work` half of it
    assert worker.value("headgate_flops_total") == pytest.approx(flops, rel=1e-4)


def test_seconds_by_cause_sum_to_the_wall_clock(serve: Callable[..., Any]) -> None:
    """The worker's clock between the ends of two requests lies between two spans that the client can see."""
    server = serve()
    first_sent = time.monotonic()
    first = server.post(5)
    first_came = time.monotonic()
    before = settled(server, 5)
    stream = server.stream(150).wait_for_text()
    second_began = time.monotonic()
    stream.wait()
    second_came = time.monotonic()
    after = settled(server, 155)
    assert first.status_code == 200 and stream.finished

    name = "headgate_step_seconds_by_cause_total"
    told = {s.labels["cause"] for s in after.families["headgate_step_seconds_by_cause"].samples if s.name == name}
    assert told == CAUSES
    seconds = after.value(name) - before.value(name)
    assert second_began - first_came <= seconds <= second_came - first_sent
    busy = seconds - (after.value(name, cause="idle") - before.value(name, cause="idle"))
    measured = after.value("headgate_step_seconds_sum") - before.value("headgate_step_seconds_sum")
    assert busy == pytest.approx(measured, rel=1e-6)


def test_gauges_follow_a_running_request_and_fall_back_to_nothing(simulated: Any, until: Callable[..., Any]) -> None:
    simulated.wait_until_idle()
    stream = simulated.stream(50_000).wait_for_text()
    names = (
        *("requests_running", "kv_cache_usage_ratio", "kv_predicted_peak_ratio", "stps", "limit_ratio"),
        *("bandwidth_utilization_ratio", "compute_utilization_ratio", "bandwidth_budget_ratio"),
    )
    samples = until(lambda: all((s := simulated.worker_metrics()).value(f"headgate_{n}") > 0 for n in names) and s)
    assert samples.value("headgate_requests_running") == 1
    assert 0 < samples.value("headgate_kv_cache_usage_ratio") < samples.value("headgate_kv_predicted_peak_ratio") <= 1
    assert 0 < samples.value("headgate_limit_ratio") <= 1
    stream.leave()
    simulated.wait_until_idle()
    until(lambda: simulated.worker("headgate_stps") == 0)


def test_a_refusal_is_counted_with_its_reason(serve: Callable[..., Any], until: Callable[..., Any]) -> None:
    server = serve("--max-sequences", "1", "--max-waiting", "0")
    server.stream(50_000).wait_for_text()
    assert server.post(2).status_code == 429
    until(lambda: server.worker("headgate_admissions_total", decision="refused", reason="queue_full") == 1)
    samples = server.gateway_metrics()
    assert samples.value("headgate_requests_total", outcome="refused") == 1
    assert samples.value("headgate_retry_after_seconds_count") == 1


def test_the_workers_own_port_answers_nothing_else(simulated: Any) -> None:
    assert httpx.get(f"{simulated.worker_url}/healthz").status_code == 200
    assert httpx.get(f"{simulated.worker_url}/readyz").status_code == 200
    for path in ("/model", "/steps?gateway=1", "/requests", "/"):
        assert httpx.get(simulated.worker_url + path).status_code == 404
    assert httpx.post(f"{simulated.worker_url}/requests", content=b"{}").status_code == 404
