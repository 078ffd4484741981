"""Overload is said at once and in full: early as a status, late as an event."""

from __future__ import annotations

import json
from types import SimpleNamespace

import openai
import pytest

from scheduler.messages import Finish, Reason, Refuse, Wait
from service.config import GatewayConfig
from service.metrics import Metrics
from service.stream import StreamedAnswer

HELLO = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "reason", [Reason.TIME_BUDGET, Reason.KV_FOOTPRINT, Reason.TTFT_UNREACHABLE, Reason.QUEUE_FULL]
)
def test_refusal_is_429_with_a_time_to_come_back(gateway, reason, stream):
    """21, and 3: also for a stream."""
    gateway.worker.decide = lambda request: Refuse(reason, 2.3)
    response = gateway.post(stream=stream)
    assert response.status_code == 429
    assert response.headers["retry-after"] == "3"
    assert response.headers["retry-after-ms"] == "2300"
    error = response.json()["error"]
    assert (error["type"], error["code"], error["param"]) == ("rate_limit_exceeded", reason, None)


def test_retry_after_is_at_least_a_second(gateway):
    """21: an integer, as the RFC wants it."""
    gateway.worker.decide = lambda request: Refuse(Reason.TIME_BUDGET, 0.05)
    response = gateway.post()
    assert (response.headers["retry-after"], response.headers["retry-after-ms"]) == ("1", "50")


def test_sdk_sees_a_rate_limit(gateway):
    gateway.worker.decide = lambda request: Refuse(Reason.KV_FOOTPRINT, 1.0)
    with pytest.raises(openai.RateLimitError) as caught:
        gateway.sdk.chat.completions.create(model="acme/tiny-chat", messages=HELLO)
    assert (caught.value.code, caught.value.type) == ("kv_footprint", "rate_limit_exceeded")


@pytest.mark.parametrize(
    ("reason", "status", "code", "param"),
    [
        (Reason.TOO_LARGE, 400, "context_length_exceeded", None),
        (Reason.UNKNOWN_TIER, 400, "unknown_tier", "service_tier"),
        (Reason.SHUTTING_DOWN, 503, "shutting_down", None),
        (Reason.WORKER_FAILED, 503, "worker_failed", None),
    ],
)
def test_other_refusals_have_their_own_status(gateway, reason, status, code, param):
    gateway.worker.decide = lambda request: Refuse(reason, 1.0)
    response = gateway.post()
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (status, code, param)
    assert ("retry-after" in response.headers) == (status == 503)


@pytest.mark.parametrize("stream", [False, True])
def test_late_refusal_before_the_first_byte_is_a_status(gateway, stream):
    """3 and 21: a waiting stream has no status yet."""
    gateway.worker.script = None
    gateway.worker.decide = lambda request: refuse_soon(gateway, request)
    response = gateway.post(stream=stream)
    assert response.status_code == 429
    assert response.headers["retry-after-ms"] == "1500"
    assert response.json()["error"]["code"] == "ttft_unreachable"


def refuse_soon(gateway, request):
    gateway.worker.emit(request, (), Finish.REFUSED, Reason.TTFT_UNREACHABLE, 1.5)
    return Wait(1.0, Reason.TIME_BUDGET)


def test_waiting_stream_is_pinged_and_a_refusal_is_then_an_event(gateway):
    """4 and 5: after a while 200 and comments; the error comes as an event, then [DONE]."""
    gateway.worker.script = None
    gateway.worker.decide = lambda request: Wait(1.0, Reason.TIME_BUDGET)
    body = {"model": "acme/tiny-chat", "messages": HELLO, "stream": True}
    with gateway.http.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.status_code == 200
        lines = response.iter_lines()
        assert [next(lines) for _ in range(4)] == [": ping", "", ": ping", ""]
        gateway.worker.emit(gateway.worker.next_request(), (), Finish.REFUSED, Reason.TIME_BUDGET, 1.0)
        events = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert json.loads(events[0])["error"]["code"] == "time_budget"
    assert events[1:] == ["[DONE]"]


def test_stream_that_was_pinged_goes_on_normally(gateway, ids):
    """5: the SDK does not notice."""
    gateway.worker.script = None
    gateway.worker.decide = lambda request: Wait(1.0, Reason.TIME_BUDGET)
    stream = gateway.sdk.chat.completions.create(model="acme/tiny-chat", messages=HELLO, stream=True)  # returns at 200
    gateway.worker.emit(gateway.worker.next_request(), [*ids.of("hello"), ids.end], Finish.STOP)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "hello"


def test_stream_that_pauses_is_pinged(gateway, ids):
    """5: also after the first token."""
    gateway.worker.script, gateway.worker.finish = [ids.of("hello")], Finish.RUNNING
    body = {"model": "acme/tiny-chat", "messages": HELLO, "stream": True}
    with gateway.http.stream("POST", "/v1/chat/completions", json=body) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: ")
        assert [next(lines) for _ in range(2)] == ["", ": ping"]


def test_waiting_answer_in_one_piece_just_waits(gateway, ids):
    gateway.worker.decide = lambda request: answer_soon(gateway, ids, request)
    gateway.worker.script = None
    assert gateway.post().json()["choices"][0]["message"]["content"] == "hello"


def answer_soon(gateway, ids, request):
    gateway.worker.emit(request, [*ids.of("hello"), ids.end], Finish.STOP)
    return Wait(1.0, Reason.TIME_BUDGET)


def test_open_requests_are_bounded(gateways, ids):
    """21: beyond the bound nobody waits."""
    gateway = gateways(max_open_requests=2)
    gateway.worker.script = None
    with gateway.stream() as one, gateway.stream() as two:
        requests = [gateway.worker.next_request() for _ in range(2)]
        response = gateway.post()
        assert (response.status_code, response.json()["error"]["code"]) == (429, "queue_full")
        assert response.headers["retry-after"] == "1"
        for request in requests:
            gateway.worker.emit(request, [ids.end], Finish.STOP)
        assert [list(events)[-1] for events in (one, two)] == ["[DONE]", "[DONE]"]
    gateway.worker.script = [[ids.end]]
    gateway.wait_until(lambda: gateway.post().status_code == 200)


def test_ping_is_due_after_the_last_delivery_or_the_last_ping():
    """5: never later, also when the deliveries came while the writer slept."""
    order = SimpleNamespace(
        requests=[SimpleNamespace(id=1), SimpleNamespace(id=2)],
        prompt_tokens=2,
        answers_each=2,
        renderings=[None, None],
        logs=[],
        echoes=[b"", b""],
        shape=SimpleNamespace(opening=lambda index: b"", after_text=b""),
        include_usage=False,
    )
    visit = SimpleNamespace(model="m", tier="t", wire=SimpleNamespace(transport=None, flow=None))
    config = GatewayConfig("/nowhere", ping_seconds=15.0)
    answer = StreamedAnswer(visit, None, order, config, Metrics("0"))
    answer.pinged_at = 100.0
    assert answer.seconds_to_ping(104.0) == 11.0
    answer.choices[0].last_at, answer.choices[1].last_at = 103.0, 110.0
    assert answer.seconds_to_ping(115.0) == 10.0
    answer.pinged_at = 125.0
    assert answer.seconds_to_ping(125.0) == 15.0
