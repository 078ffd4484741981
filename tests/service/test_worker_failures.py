"""Workers that die, hang, babble, or are not there yet."""

from __future__ import annotations

import json
from dataclasses import replace

import openai
import pytest
from gateway_under_test import join_deltas, raw_post, read_events

from scheduler.messages import Accept, Finish, Reason, TokenEvent, encode_step, words_to_bytes

HELLO = [{"role": "user", "content": "hi"}]


def test_death_in_mid_stream_is_an_error_event(gateway, ids):
    """4: an event, then the end; the SDK raises."""
    gateway.worker.script = None
    with gateway.stream() as events:
        gateway.worker.emit(gateway.worker.next_request(), ids.of("hello"))
        assert "error" not in json.loads(next(events))
        gateway.worker.raw(None)  # the step stream breaks
        assert json.loads(next(events))["error"]["code"] == "worker_failed"
        assert next(events) == "[DONE]"
    gateway.wait_until(lambda: gateway.http.get("/readyz").status_code == 200)  # and it reconnects by itself
    gateway.worker.script = ids.answer("hello")
    stream = gateway.sdk.chat.completions.create(model="acme/tiny-chat", messages=HELLO, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "hello"


@pytest.mark.parametrize("stream", [False, True])
def test_death_before_the_first_token_is_503(gateway, stream):
    """3 and 21."""
    gateway.worker.script = None
    gateway.worker.decide = lambda request: die(gateway)
    response = gateway.post(stream=stream)
    assert response.status_code == 503
    assert response.headers["retry-after"] == "1"
    assert response.json()["error"]["type"] == "service_unavailable"
    gateway.wait_until(lambda: gateway.http.get("/readyz").status_code == 200)


def die(gateway):
    gateway.worker.raw(None)
    return Accept()


@pytest.mark.parametrize("finish", [Finish.ERROR, Finish.CANCELLED])
def test_error_of_one_request_ends_only_that_one(gateway, ids, finish):
    """4."""
    gateway.worker.script = None
    with gateway.stream() as broken:
        first = gateway.worker.next_request()
        with gateway.stream() as healthy:
            second = gateway.worker.next_request()
            gateway.worker.emit(first, ids.of("a"))
            gateway.worker.emit(second, ids.of("a"))
            assert "error" not in json.loads(next(broken))
            assert "error" not in json.loads(next(healthy))
            gateway.worker.emit(first, (), finish, Reason.WORKER_FAILED)
            gateway.worker.emit(second, [ids.end], Finish.STOP)
            error, done = broken
            assert (json.loads(error)["error"]["code"], done) == ("worker_failed", "[DONE]")
            final, done = healthy
            assert (json.loads(final)["choices"][0]["finish_reason"], done) == ("stop", "[DONE]")


def test_error_in_the_same_read_as_a_first_token_costs_the_others_nothing(gateway, ids):
    """4: two steps in one read, the first with a first token, the second with a failure."""
    gateway.worker.script = None
    with gateway.stream() as running:
        old = gateway.worker.next_request()
        gateway.worker.emit(old, ids.of("a"))
        shown = [next(running)]
        with gateway.stream() as fresh:
            new = gateway.worker.next_request()
            with gateway.stream() as failing:
                bad = gateway.worker.next_request()
                gateway.worker.emit(bad, ids.of("a"))
                next(failing)
                error = TokenEvent(bad.key, [], Finish.ERROR, Reason.WORKER_FAILED, 0.0)
                steps = [
                    [TokenEvent(new.key, ids.of("x")), TokenEvent(old.key, ids.of("b"))],
                    [TokenEvent(old.key, [*ids.of("c"), ids.end], Finish.STOP), error],
                    [TokenEvent(new.key, [*ids.of("y"), ids.end], Finish.STOP)],
                ]
                gateway.worker.raw(b"".join(encode_step(number, events) for number, events in enumerate(steps)))
                assert json.loads(next(failing))["error"]["code"] == "worker_failed"
            assert join_deltas(list(fresh)[:-1]) == "xy"
        assert join_deltas([*shown, *list(running)[:-1]]) == "abc"


def test_sdk_raises_on_an_error_event(gateway, ids):
    """4."""
    gateway.worker.script, gateway.worker.finish = [ids.of("a")], Finish.RUNNING
    stream = gateway.sdk.chat.completions.create(model="acme/tiny-chat", messages=HELLO, stream=True)
    gateway.worker.emit(gateway.worker.next_request(), (), Finish.ERROR, Reason.WORKER_FAILED)
    with pytest.raises(openai.APIError, match="worker failed"):
        list(stream)


GARBAGE = {
    "not a frame": b"\xff" * 64,
    "unknown kind": words_to_bytes([2, 99, 0]),
    "too short": words_to_bytes([1, 0]),
    "columns that do not fit": words_to_bytes([6, 0, 1, 1, 7, 5, 3]),
    "a count beyond the frame": words_to_bytes([4, 0, 1, 50, 1]),
    "a snapshot that is none": words_to_bytes([2, 1]) + b"[1 ]",
    "not words": words_to_bytes([1]) + b"\x00\x00\x00\x00" + b"HTTP",
    "a snapshot without fields": words_to_bytes([2, 1]) + b"{}  ",
}


@pytest.mark.parametrize("kind", GARBAGE)
def test_garbage_on_the_step_stream_ends_requests_with_an_error(gateway, ids, kind):
    """4: the connection is dropped and made again."""
    gateway.worker.script = None
    with gateway.stream() as events:
        gateway.worker.emit(gateway.worker.next_request(), ids.of("hello"))
        next(events)
        gateway.worker.raw(GARBAGE[kind] + b"\xff" * 12)
        assert json.loads(next(events))["error"]["code"] == "worker_failed"
        assert next(events) == "[DONE]"
    gateway.worker.script = ids.answer("hello")
    gateway.wait_until(lambda: gateway.post().status_code == 200)


def test_tokens_for_nobody_are_ignored(gateway, ids):
    gateway.worker.raw(encode_step(1, [TokenEvent(12345, [1, 2], Finish.STOP)]))
    gateway.worker.script = ids.answer("hello")
    assert gateway.post().status_code == 200


def test_frames_cut_anywhere_are_put_together(gateway, ids):
    gateway.worker.script = None
    with gateway.stream() as events:
        request = gateway.worker.next_request()
        frame = encode_step(1, [TokenEvent(request.key, [*ids.of("hello"), ids.end], Finish.STOP)])
        for byte in frame:
            gateway.worker.raw(bytes([byte]))
        chunks = [json.loads(event) for event in events if event != "[DONE]"]
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == "hello"


def test_worker_that_does_not_decide_is_503(gateways):
    gateway = gateways(submit_seconds=0.2)
    gateway.worker.undecided = True
    response = gateway.post()
    assert response.status_code == 503
    assert gateway.worker.next_cancelled() == gateway.worker.next_request().id


@pytest.mark.parametrize("status", [400, 500, 503])
def test_worker_that_answers_with_a_fault_is_503(gateway, status):
    """21: never a 500."""
    gateway.worker.status = status
    assert gateway.post().status_code == 503


@pytest.mark.parametrize("info", [{"tokenizer_json": "{}"}, {"chat_template": "{% if %}"}, {"special_tokens": 3}])
def test_worker_whose_word_is_of_no_use_is_asked_again(gateways, worker_info, info):
    """It may be replaced by a better one."""
    gateway = gateways(info=info, wait=False)
    gateway.wait_until(lambda: gateway.worker.asked >= 2)
    assert gateway.post().status_code == 503
    gateway.worker.worker = worker_info
    gateway.wait_until(lambda: gateway.http.get("/readyz").status_code == 200)


def test_template_that_cannot_be_compiled_is_told_where_readiness_is_asked(gateways, worker_info):
    """A worker looks at its template before it starts; should one get here all the same, nobody has to guess."""
    gateway = gateways(info={"chat_template": "{% for m in messages %}\n{{ m.content }\n{% endfor %}"}, wait=False)
    gateway.wait_until(lambda: "cannot be compiled" in gateway.http.get("/readyz").text)
    assert "(line 2)" in gateway.http.get("/readyz").text
    gateway.worker.worker = worker_info
    gateway.wait_until(lambda: gateway.http.get("/readyz").status_code == 200)


def test_worker_with_another_model_is_learnt_anew(gateways, worker_info):
    gateway = gateways()
    gateway.worker.worker = replace(worker_info, model="acme/other", variant="v2")
    gateway.worker.raw(None)
    gateway.wait_until(lambda: gateway.http.get("/v1/models/acme/other").status_code == 200)
    assert gateway.post().json()["error"]["code"] == "model_not_found"
    gateway.wait_until(lambda: gateway.post(model="acme/other").status_code == 200)


def test_no_worker_yet(gateways):
    gateway = gateways(start_worker=False)
    response = gateway.post()
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")
    assert gateway.http.get("/healthz").status_code == 200
    assert gateway.http.get("/readyz").status_code == 503
    assert gateway.http.get("/v1/models").json() == {"object": "list", "data": []}


def test_worker_that_restarts_is_found_again(gateways, ids):
    gateway = gateways()
    gateway.worker.stop()
    gateway.wait_until(lambda: gateway.http.get("/readyz").status_code == 503)
    response = gateway.post()
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")
    gateway.worker.start()
    gateway.worker.script = ids.answer("back")
    gateway.wait_until(lambda: gateway.http.get("/readyz").status_code == 200)
    assert gateway.post().json()["choices"][0]["message"]["content"] == "back"


def test_many_requests_at_once_share_the_connections(gateways, ids):
    """A pool with a bound, waiters in order: all are answered."""
    gateway = gateways(worker_connections=2)
    gateway.worker.script = ids.answer("hello")
    sockets = [gateway.connect() for _ in range(200)]
    body = {"model": "acme/tiny-chat", "messages": HELLO}
    for sock in sockets:
        sock.sendall(raw_post("/v1/chat/completions", {**body, "stream": True}))
    for sock in sockets:
        with sock, sock.makefile("rb") as lines:
            assert list(read_events(lines))[-1] == "[DONE]"
    assert gateway.outcome("ok") == 200
