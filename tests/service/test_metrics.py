"""GET /metrics."""

from __future__ import annotations

import httpx
from gateway_under_test import MODEL
from prometheus_client.parser import text_string_to_metric_families

from scheduler.messages import Reason, Refuse
from service.keys import Limits
from service.metrics import Buckets, Metrics

LABELS = '{model="acme/tiny-chat",tier="flex"}'
WITH_TENANT = '{model="acme/tiny-chat",tenant="anonymous",tier="flex"}'


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
        "headgate_refusals",
        "headgate_prompt_tokens",
        "headgate_completion_tokens",
        "headgate_requests_open",
        "headgate_build_info",
    }
    assert gateway.metric(f"headgate_time_to_first_token_seconds_count{LABELS}") == 1
    assert gateway.metric(f"headgate_retry_after_seconds_sum{LABELS}") == 4.0
    assert gateway.metric(f"headgate_prompt_tokens_total{WITH_TENANT}") == prompt_tokens
    assert gateway.metric(f"headgate_completion_tokens_total{WITH_TENANT}") == len(ids.of("hello world")) + 1
    refused = '{model="acme/tiny-chat",reason="time_budget",tenant="anonymous",tier="flex"}'
    assert gateway.metric(f"headgate_refusals_total{refused}") == 1
    assert gateway.metric('headgate_build_info{component="gateway",version="1.2.3"}') == 1
    names = ("model", "tier", "outcome", "tenant")
    counts = {
        tuple(sample.labels[name] for name in names): sample.value for sample in families["headgate_requests"].samples
    }
    assert counts == {
        ("acme/tiny-chat", "flex", "ok", "anonymous"): 1,
        ("acme/tiny-chat", "flex", "refused", "anonymous"): 1,
        ("", "", "invalid", "anonymous"): 1,
    }


def test_labels_come_from_the_servers_own_lists(gateways):
    """What clients invent never becomes a label."""
    gateway = gateways()
    for number in range(20):
        gateway.post(model=f"invented-{number}")
        gateway.post(service_tier=f"invented-{number}")
        gateway.http.get(f"/invented/{number}")
    assert "invented" not in gateway.http.get("/metrics").text


def test_tenants_are_told_apart(gateways, cabinet, ids):
    """On tokens, requests and refusals, also those at the door."""
    acme, umbrella = cabinet.make(), cabinet.make(tenant="umbrella", limits=Limits(requests_per_minute=2))
    admin = cabinet.make(admin=True)
    gateway = gateways(data=cabinet.folder)
    gateway.worker.script = ids.answer("hello")

    def ask(key: str) -> int:
        body = {"model": MODEL, "prompt": "hi"}
        return gateway.http.post("/v1/completions", json=body, headers={"api-key": key}).status_code

    assert [ask(key) for key in (acme, umbrella, umbrella, umbrella, "wrong")] == [200, 200, 200, 429, 401]
    gateway.http.headers["api-key"] = admin
    for tenant, count in (("acme", 1), ("umbrella", 2)):
        assert (
            gateway.metric(f'headgate_requests_total{{model="{MODEL}",outcome="ok",tenant="{tenant}",tier="default"}}')
            == count
        )
        tokens = gateway.metric(f'headgate_completion_tokens_total{{model="{MODEL}",tenant="{tenant}",tier="default"}}')
        assert tokens == count * (len(ids.of("hello")) + 1)
    assert (
        gateway.metric('headgate_refusals_total{model="",reason="rate_limit_exceeded",tenant="umbrella",tier=""}') == 1
    )
    assert gateway.metric('headgate_requests_total{model="",outcome="refused",tenant="umbrella",tier=""}') == 1
    assert gateway.metric('headgate_requests_total{model="",outcome="invalid",tenant="anonymous",tier=""}') == 1


def test_the_metrics_socket_is_always_open_and_answers_nothing_else(cabinet, gateways):
    cabinet.make()
    gateway = gateways(data=cabinet.folder, has_metrics_socket=True)
    with httpx.Client(base_url=gateway.metrics_url) as scraper:
        for host in ("localhost", "gateway:9464"):
            assert "headgate_build_info" in scraper.get("/metrics", headers={"host": host}).text
        assert [scraper.get(path).status_code for path in ("/healthz", "/readyz")] == [200, 200]
        others = [scraper.get(path) for path in ("/v1/models", "/docs", "/openapi.json", "/")]
        others += [scraper.post(path, json={}) for path in ("/v1/chat/completions", "/v1/headgate/reload")]
        assert {(answer.status_code, answer.json()["error"]["code"]) for answer in others} == {(404, "not_found")}


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
