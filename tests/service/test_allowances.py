"""Limits of keys and tenants, as clients meet them: through real sockets, and as the SDK sees them."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from gateway_under_test import MODEL, PATIENCE_SECONDS, Cabinet, Gateway

from scheduler.messages import Accept, Finish, Reason, Refuse
from service.keys import Limits

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
MESSAGES: Any = [{"role": "user", "content": "hi"}]
NAMES = {f"x-ratelimit-{what}-{of}" for what in ("limit", "remaining", "reset") for of in ("requests", "tokens")}


def told(response: httpx.Response) -> set[str]:
    return {name for name in response.headers if name.startswith("x-ratelimit")}


def remaining(response: httpx.Response, of: str) -> int:
    return int(response.headers[f"x-ratelimit-remaining-{of}"])


@pytest.fixture
def limited(gateways: Any, cabinet: Cabinet) -> Any:
    """Makes a gateway whose client's key has these limits."""

    def make(info: dict[str, Any] | None = None, settings: dict[str, Any] | None = None, **limits: int) -> Gateway:
        key = cabinet.make(limits=Limits(**limits))
        gateway: Gateway = gateways(info, data=cabinet.folder, **(settings or {}))
        gateway.http.headers["authorization"] = f"Bearer {key}"
        gateway.sdk = gateway.sdk.with_options(api_key=key)
        return gateway

    return make


def waiting(gateway: Gateway) -> int:
    """Requests in line."""
    houses = gateway.server._door._limiter.slots._houses.values()
    return sum(len(line.waiting) for house in list(houses) for line in list(house.lines.values()))


# --- per minute -------------------------------------------------------------------------------------------------------


def test_every_answer_tells_what_is_left(limited):
    gateway = limited(requests_per_minute=1000, tokens_per_minute=100_000)
    gateway.worker.decide = lambda request: Refuse(Reason.TIME_BUDGET, 2.0) if request.tier == "flex" else Accept()
    answers = {
        200: gateway.post(),
        400: gateway.post(temperature=9),
        404: gateway.post(model="another"),
        415: gateway.http.post(CHAT, content=b"{}"),
        429: gateway.post(service_tier="flex"),
        405: gateway.http.get(CHAT),
    }
    for status, answer in answers.items():
        assert answer.status_code == status and told(answer) == NAMES, status
    for path in ("/v1/models", f"/v1/models/{MODEL}", "/v1/nothing"):
        assert told(gateway.http.get(path)) == NAMES
    assert told(gateway.post(stream=True)) == NAMES
    stranger = httpx.get(gateway.url + "/v1/models")
    assert stranger.status_code == 401 and not told(stranger), "nobody's limits"


def test_without_limits_nothing_is_told(gateway, gateways, cabinet):
    key = cabinet.make()
    one = gateways(data=cabinet.folder)
    assert not told(gateway.post())
    assert not told(one.http.post(CHAT, json={"model": MODEL, "messages": MESSAGES}, headers={"api-key": key}))


def test_only_what_generates_is_charged(limited):
    gateway = limited(requests_per_minute=10)
    for _ in range(15):
        assert gateway.http.get("/v1/models").status_code == 200
    assert remaining(gateway.http.get("/v1/models"), "requests") == 10
    assert remaining(gateway.post(), "requests") == 9
    assert remaining(gateway.http.get("/v1/models"), "requests") == 9


def test_too_many_requests_are_told_when_to_come_back(limited):
    gateway = limited(requests_per_minute=2)
    assert [gateway.post().status_code for _ in range(2)] == [200, 200]
    with pytest.raises(openai.RateLimitError) as caught:
        gateway.sdk.chat.completions.create(model=MODEL, messages=MESSAGES)
    assert (caught.value.code, caught.value.type) == ("rate_limit_exceeded", "requests")
    headers = caught.value.response.headers
    assert 29_000 < int(headers["retry-after-ms"]) <= 30_000 and headers["retry-after"] == "30"
    assert headers["x-ratelimit-remaining-requests"] == "0" and caught.value.request_id
    assert len(headers.get_list("x-ratelimit-limit-requests")) == 1


def test_the_sdk_comes_back_by_itself_when_there_is_room_again(limited):
    gateway = limited(requests_per_minute=30)
    gateway.wait_until(lambda: gateway.post(temperature=9).status_code == 429)
    client = gateway.sdk.with_options(max_retries=1)
    answer = client.chat.completions.with_raw_response.create(model=MODEL, messages=MESSAGES)
    assert answer.retries_taken == 1 and answer.parse().choices


def test_of_two_requests_for_the_last_token_one_gets_it(limited):
    gateway = limited(requests_per_minute=3)
    ready = threading.Barrier(8)

    def ask(_: int) -> int:
        ready.wait(PATIENCE_SECONDS)
        return gateway.post().status_code

    with ThreadPoolExecutor(8) as clients:
        statuses = sorted(clients.map(ask, range(8)))
    assert statuses == [200] * 3 + [429] * 5
    assert gateway.worker.requests.qsize() == 3


def test_a_request_costs_what_it_used_once_it_has_ended(limited, ids):
    gateway = limited(tokens_per_minute=60)
    gateway.worker.script = ids.answer("hello world")
    usage = gateway.post().json()["usage"]
    left = remaining(gateway.http.get("/v1/models"), "tokens")
    assert 0 <= left - (60 - usage["total_tokens"]) <= 10, "and what has been refilled since"


def test_while_it_runs_it_costs_what_it_is_expected_to_use(limited, ids):
    gateway = limited(tokens_per_minute=600)
    gateway.worker.script = None
    with gateway.stream(key=gateway.sdk.api_key, max_tokens=100) as events:
        request = gateway.worker.next_request()
        left = remaining(gateway.http.get("/v1/models"), "tokens")
        assert left - (600 - len(request.prompt) - 100) in range(60)
        gateway.worker.emit(request, ids.of("hello"))
        next(events)
    gateway.worker.next_cancelled()
    used = len(request.prompt) + len(ids.of("hello"))
    gateway.wait_until(lambda: remaining(gateway.http.get("/v1/models"), "tokens") >= 600 - used)


def test_prompts_that_are_too_much_for_now_are_refused_by_their_tokens(limited):
    gateway = limited(tokens_per_minute=60)
    assert gateway.post(TEXT, prompt=[70] * 40, max_tokens=1).status_code == 200
    answer = gateway.post(TEXT, prompt=[70] * 40, max_tokens=1)
    assert answer.status_code == 429
    assert (answer.json()["error"]["code"], answer.json()["error"]["type"]) == ("rate_limit_exceeded", "tokens")
    assert 15 <= int(answer.headers["retry-after"]) <= 22
    assert gateway.worker.requests.qsize() == 1
    never = gateway.post(TEXT, prompt=[70] * 61, max_tokens=1)
    assert never.status_code == 429 and never.headers["x-should-retry"] == "false"


def test_what_the_worker_refuses_costs_nothing(limited):
    gateway = limited(requests_per_minute=10, tokens_per_minute=10_000)
    gateway.worker.decide = lambda request: Refuse(Reason.TIME_BUDGET, 2.0)
    assert gateway.post().status_code == 429
    answer = gateway.http.get("/v1/models")
    assert (remaining(answer, "requests"), remaining(answer, "tokens")) == (10, 10_000)
    gateway.worker.status = 500
    assert gateway.post().status_code == 503
    answer = gateway.http.get("/v1/models")
    assert (remaining(answer, "requests"), remaining(answer, "tokens")) == (10, 10_000)


def test_what_the_worker_refuses_late_costs_nothing(limited):
    gateway = limited(requests_per_minute=10, tokens_per_minute=10_000)
    gateway.worker.script = None
    with ThreadPoolExecutor(1) as client:
        answer = client.submit(gateway.post)
        gateway.worker.emit(gateway.worker.next_request(), (), Finish.REFUSED, Reason.TTFT_UNREACHABLE, 3.0)
        assert answer.result().status_code == 429
    after = gateway.http.get("/v1/models")
    assert (remaining(after, "requests"), remaining(after, "tokens")) == (10, 10_000)


def test_a_tenants_limits_are_shared_by_its_keys(gateways, cabinet, tmp_path):
    config = tmp_path / "headgate.toml"
    config.write_text("[tenants.acme]\nrequests_per_minute = 2\n[tenants.anonymous]\nrequests_per_minute = 1\n")
    keys = [cabinet.make(), cabinet.make(), cabinet.make(tenant="umbrella")]
    gateway = gateways(data=cabinet.folder, config_file=str(config))
    body = {"model": MODEL, "messages": MESSAGES}
    statuses = [gateway.http.post(CHAT, json=body, headers={"api-key": keys[n]}).status_code for n in (0, 1, 0, 1, 2)]
    assert statuses == [200, 200, 429, 429, 200]
    without_keys = gateways(config_file=str(config))
    assert [without_keys.post().status_code for _ in range(2)] == [200, 429]


# --- at once ----------------------------------------------------------------------------------------------------------


def test_one_too_many_waits_until_another_has_ended(limited, ids):
    gateway = limited(concurrent_requests=1)
    gateway.worker.script = None
    with ThreadPoolExecutor(2) as clients:
        answers = [clients.submit(gateway.post)]
        first = gateway.worker.next_request()
        answers.append(clients.submit(gateway.post))
        gateway.wait_until(lambda: waiting(gateway) == 1)
        assert gateway.worker.requests.empty()
        gateway.worker.emit(first, [*ids.of("one"), ids.end], Finish.STOP)
        second = gateway.worker.next_request()
        gateway.worker.emit(second, [*ids.of("two"), ids.end], Finish.STOP)
        texts = [answer.result().json()["choices"][0]["message"]["content"] for answer in answers]
    assert texts == ["one", "two"]


@pytest.mark.parametrize("longest_wait", [0.0, 0.05])
def test_a_tier_that_does_not_wait_is_refused(limited, ids, longest_wait):
    gateway = limited({"tier_wait_seconds": {"default": 60.0, "priority": longest_wait}}, concurrent_requests=1)
    gateway.worker.script = None
    with gateway.stream(key=gateway.sdk.api_key) as events:
        request = gateway.worker.next_request()
        with pytest.raises(openai.RateLimitError) as caught:
            gateway.sdk.chat.completions.create(model=MODEL, messages=MESSAGES, service_tier="priority")
        assert (caught.value.code, caught.value.type) == ("concurrency_limit", "requests")
        assert int(caught.value.response.headers["retry-after"]) >= 1
        gateway.worker.emit(request, [ids.end], Finish.STOP)
        assert list(events)[-1] == "[DONE]"
    assert gateway.worker.requests.empty()


def test_nobody_waits_in_line_only_to_hear_that_the_prompt_is_too_long(limited):
    gateway = limited(concurrent_requests=1)
    gateway.worker.script = None
    with gateway.stream(key=gateway.sdk.api_key):
        gateway.worker.next_request()
        assert gateway.post(TEXT, prompt=[70] * 5000).status_code == 400


def test_who_leaves_the_line_is_not_waited_for(limited, ids):
    gateway = limited(concurrent_requests=1)
    gateway.worker.script = None
    key = gateway.sdk.api_key
    with gateway.stream(key=key) as running:
        first = gateway.worker.next_request()
        with gateway.stream(key=key, max_tokens=7):
            gateway.wait_until(lambda: waiting(gateway) == 1)
        gateway.wait_until(lambda: waiting(gateway) == 0)
        with gateway.stream(key=key, max_tokens=9) as after:
            gateway.wait_until(lambda: waiting(gateway) == 1)
            gateway.worker.emit(first, [ids.end], Finish.STOP)
            assert list(running)[-1] == "[DONE]"
            request = gateway.worker.next_request()
            assert request.max_tokens == 9
            gateway.worker.emit(request, [ids.end], Finish.STOP)
            assert list(after)[-1] == "[DONE]"
    assert gateway.worker.requests.empty()


def test_who_waits_in_line_is_told_when_its_key_ends(limited, cabinet):
    gateway = limited(concurrent_requests=1)
    gateway.worker.script = None
    with gateway.stream(key=gateway.sdk.api_key), ThreadPoolExecutor(1) as client:
        gateway.worker.next_request()
        answer = client.submit(gateway.post)
        gateway.wait_until(lambda: waiting(gateway) == 1)
        cabinet.revoke(gateway.sdk.api_key)
        assert answer.result().status_code == 401
    assert gateway.worker.requests.empty()


def test_who_waits_in_line_is_told_at_the_end_of_a_drain(limited):
    gateway = limited(settings={"drain_seconds": 0.2}, concurrent_requests=1)
    gateway.worker.script = None
    with gateway.stream(key=gateway.sdk.api_key), ThreadPoolExecutor(1) as client:
        gateway.worker.next_request()
        answer = client.submit(gateway.post)
        gateway.wait_until(lambda: waiting(gateway) == 1)
        gateway.server.should_exit = True
        assert answer.result().status_code == 503
        assert answer.result().json()["error"]["code"] == "shutting_down"


def test_slots_come_back_however_a_request_ends(limited, ids):
    gateway = limited(concurrent_requests=1)
    key = gateway.sdk.api_key
    gateway.worker.decide = lambda request: Refuse(Reason.KV_FOOTPRINT, 1.0)
    assert gateway.post().status_code == 429
    gateway.worker.reset()
    gateway.worker.finish = Finish.ERROR
    assert gateway.post().status_code == 503
    gateway.worker.reset()
    gateway.worker.script = None
    with gateway.stream(key=key):
        gateway.worker.next_request()
    gateway.worker.next_cancelled()
    assert gateway.post(TEXT, max_tokens=0).status_code == 200
    gateway.worker.reset()
    gateway.worker.script = ids.answer("hello")
    begins_at = time.monotonic()
    assert gateway.post(service_tier="priority").status_code == 200
    assert time.monotonic() - begins_at < 2
    gateway.wait_until(lambda: not gateway.server._door._limiter.slots._houses)
