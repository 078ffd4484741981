"""GET /metrics."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from scheduler.messages import Reason, Refuse
from service.metrics import Buckets, Metrics

LABELS = '{model="acme/tiny-chat",tier="flex"}'


def test_families_and_their_labels(gateways, ids):
    gateway = gateways()
    gateway.worker.script = ids.answer("hello world")
    gateway.chunks(service_tier="flex")
    gateway.post(temperature=9)
    gateway.worker.decide = lambda request: Refuse(Reason.TIME_BUDGET, 4.0)
    gateway.post(service_tier="flex")
    prompt_tokens = len(gateway.worker.next_request().prompt)
    response = gateway.http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = {family.name: family for family in text_string_to_metric_families(response.text)}
    assert families.keys() == {
        "headgate_time_to_first_token_seconds",
        "headgate_inter_token_latency_seconds",
        "headgate_request_duration_seconds",
        "headgate_retry_after_seconds",
        "headgate_event_loop_stall_seconds",
        "headgate_requests",
        "headgate_prompt_tokens",
        "headgate_requests_open",
        "headgate_build_info",
    }
    assert gateway.metric(f"headgate_time_to_first_token_seconds_count{LABELS}") == 1
    assert gateway.metric(f"headgate_retry_after_seconds_sum{LABELS}") == 4.0
    assert gateway.metric(f"headgate_prompt_tokens_total{LABELS}") == prompt_tokens
    assert gateway.metric('headgate_build_info{component="gateway",version="1.2.3"}') == 1
    names = ("model", "tier", "outcome")
    counts = {
        tuple(sample.labels[name] for name in names): sample.value for sample in families["headgate_requests"].samples
    }
    assert counts == {
        ("acme/tiny-chat", "flex", "ok"): 1,
        ("acme/tiny-chat", "flex", "refused"): 1,
        ("", "", "invalid"): 1,
    }


def test_labels_come_from_the_servers_own_lists(gateways):
    """What clients invent never becomes a label."""
    gateway = gateways()
    for number in range(20):
        gateway.post(model=f"invented-{number}")
        gateway.post(service_tier=f"invented-{number}")
        gateway.http.get(f"/invented/{number}")
    assert "invented" not in gateway.http.get("/metrics").text


def test_loop_stalls_are_watched(gateway):
    gateway.wait_until(lambda: gateway.metric("headgate_event_loop_stall_seconds_count") >= 1)


def test_gaps_are_counted_per_delivery(gateways, ids):
    gateway = gateways()
    gateway.worker.script = None
    with gateway.stream() as events:
        request = gateway.worker.next_request()
        for _ in range(4):
            gateway.worker.emit(request, ids.of("a") * 3)
            next(events)
    gateway.worker.next_cancelled()
    assert gateway.metric("headgate_inter_token_latency_seconds_count") == 3


def test_buckets_cumulate():
    buckets = Buckets((0.1, 1))
    for value in (0.05, 0.1, 0.5, 7):
        buckets.observe(value)
    assert buckets.cumulated() == [("0.1", 2.0), ("1.0", 3.0), ("+Inf", 4.0)]
    assert buckets.total == 7.65


def test_empty_metrics_render():
    assert b"headgate_requests_open 0.0" in Metrics("0").render()
