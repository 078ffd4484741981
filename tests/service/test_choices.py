"""Several answers to one request: `n`, in both families of routes."""

from __future__ import annotations

import json
import threading

import pytest
from gateway_under_test import raw_post

from scheduler.messages import Accept, Finish, Reason, Refuse

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
BODY = {"model": "acme/tiny-chat", "messages": [{"role": "user", "content": "hi"}]}


def requests_of(gateway, count):
    """In the order of their choices."""
    return sorted((gateway.worker.next_request() for _ in range(count)), key=lambda request: request.id)


def test_each_choice_has_its_text_and_its_reason(gateway, ids):
    """17 and 40: tagged by index; one [DONE], one usage chunk. 12: the prompt is counted once."""
    gateway.worker.script = None
    with gateway.stream(n=3, stream_options={"include_usage": True}) as events:
        requests = requests_of(gateway, 3)
        for request, word in zip(reversed(requests), ("three", "two", "one"), strict=True):
            gateway.worker.emit(request, ids.of(word))
        gateway.worker.emit(requests[1], [ids.end], Finish.STOP)
        gateway.worker.emit(requests[0], ids.of("!"), Finish.LENGTH)
        gateway.worker.emit(requests[2], [ids.end], Finish.STOP)
        told = list(events)
    assert told.count("[DONE]") == 1 and told[-1] == "[DONE]"
    chunks = [json.loads(event) for event in told[:-1]]
    texts, reasons, roles = {}, {}, {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            index = choice["index"]
            texts[index] = texts.get(index, "") + choice["delta"].get("content", "")
            reasons.setdefault(index, []).append(choice["finish_reason"])
            roles.setdefault(index, []).append(choice["delta"].get("role"))
    assert texts == {0: "one!", 1: "two", 2: "three"}
    assert {index: reason[-1] for index, reason in reasons.items()} == {0: "length", 1: "stop", 2: "stop"}
    assert all(role[0] == "assistant" and not any(role[1:]) for role in roles.values())
    usages = [chunk for chunk in chunks if chunk["usage"]]
    assert len(usages) == 1 and usages[0]["choices"] == [] and usages[0] is chunks[-1]
    usage = usages[0]["usage"]
    assert usage["prompt_tokens"] == len(requests[0].prompt)
    assert usage["completion_tokens"] == sum(len(ids.of(word)) for word in ("one", "two", "three")) + 3


def test_whole_answer_has_n_choices(gateway, ids):
    """12 and 17."""
    gateway.worker.script = ids.answer("hello")
    answer = gateway.post(n=4).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert {choice["message"]["content"] for choice in answer["choices"]} == {"hello"}
    requests = requests_of(gateway, 4)
    assert answer["usage"]["prompt_tokens"] == len(requests[0].prompt)
    assert answer["usage"]["completion_tokens"] == 4 * (len(ids.of("hello")) + 1)
    assert len({tuple(request.prompt) for request in requests}) == 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("echo", [False, True])
def test_index_is_the_prompts_times_n_and_the_answers(gateway, ids, stream, echo):
    """50: prompt_i * n + j."""
    gateway.worker.script = ids.answer("yes")
    asked = {"prompt": ["one", "two"], "n": 3, "echo": echo}
    texts = dict.fromkeys(range(6), "")
    if stream:
        *chunks, last = gateway.chunks(TEXT, stream_options={"include_usage": True}, **asked)
    else:
        last = gateway.post(TEXT, **asked).json()
        chunks = [last]
    for chunk in chunks:
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"]
    requests = requests_of(gateway, 6)
    assert [list(request.prompt) for request in requests] == [ids.of("one")] * 3 + [ids.of("two")] * 3
    assert texts == {i: (("one", "two")[i // 3] if echo else "") + "yes" for i in range(6)}
    assert last["usage"]["prompt_tokens"] == len(ids.of("one")) + len(ids.of("two"))
    assert last["usage"]["completion_tokens"] == 6 * (len(ids.of("yes")) + 1)


def test_seeds_of_choices_differ_and_come_again(gateway):
    """43: the first one's is the client's own."""
    seeds = []
    for n in (1, 3, 3, 5):
        gateway.post(n=n, seed=42)
        seeds.append([request.sampling.seed for request in requests_of(gateway, n)])
    assert seeds[0] == [42]
    assert seeds[1] == seeds[2] == seeds[3][:3] and len(set(seeds[3])) == 5
    assert all(0 <= seed < 1 << 63 for seed in seeds[3])
    gateway.post(n=2)
    gateway.post(n=2)
    assert len({request.sampling.seed for request in requests_of(gateway, 4)}) == 4


def test_temperature_zero_is_no_reason_against_several(gateway, ids):
    """40."""
    gateway.worker.script = ids.answer("same")
    assert [c["message"]["content"] for c in gateway.post(n=2, temperature=0).json()["choices"]] == ["same", "same"]


def test_best_of_is_taken_when_it_is_n(gateway, ids):
    gateway.worker.script = ids.answer("yes")
    for fields in ({"n": 2, "best_of": 2}, {"n": 3, "best_of": None}, {"best_of": 1}):
        answer = gateway.post(TEXT, **fields).json()
        assert len(answer["choices"]) == fields.get("n", 1)
    message = gateway.post(TEXT, n=1, best_of=4).json()["error"]["message"]
    assert message == "'best_of' must be equal to 'n': every answer that is generated is shown."


def test_answers_of_one_request_are_bounded(gateways, ids):
    gateway = gateways(max_choices=6)
    gateway.worker.script = ids.answer("yes")
    assert len(gateway.post(n=6).json()["choices"]) == 6
    error = gateway.post(n=7).json()["error"]
    assert (error["param"], error["message"]) == (
        "n",
        "'n' asks for too many answers: 7; one request gets at most 6.",
    )
    assert len(gateway.post(TEXT, prompt=["a", "b"], n=3).json()["choices"]) == 6
    error = gateway.post(TEXT, prompt=["a", "b"], n=4).json()["error"]
    assert error["param"] == "n" and "2 prompts x 4 = 8" in error["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_one_refusal_refuses_all_and_withdraws_the_others(gateway, stream):
    """21: all or nothing, as a status."""
    gateway.worker.script = None
    seen = []

    def decide(request):
        seen.append(request.id)
        return Refuse(Reason.KV_FOOTPRINT, 2.0) if len(seen) == 2 else Accept()

    gateway.worker.decide = decide
    response = gateway.post(n=3, stream=stream)
    assert (response.status_code, response.json()["error"]["code"]) == (429, "kv_footprint")
    assert {gateway.worker.next_cancelled() for _ in range(2)} == {seen[0], seen[2]}


@pytest.mark.parametrize("stream", [False, True])
def test_refusal_that_comes_late_ends_all(gateway, stream):
    gateway.worker.script = None
    gateway.worker.decide = lambda request: Accept()
    with gateway.connect() as sock, sock.makefile("rb") as answer:
        sock.sendall(raw_post(CHAT, {**BODY, "n": 3, "stream": stream}))
        requests = requests_of(gateway, 3)
        gateway.worker.emit(requests[1], (), Finish.REFUSED, Reason.TTFT_UNREACHABLE, 1.0)
        assert answer.readline().startswith(b"HTTP/1.1 429")
    assert {gateway.worker.next_cancelled() for _ in range(2)} == {requests[0].id, requests[2].id}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("logprobs", [False, True])
def test_client_that_leaves_frees_all_choices(gateway, ids, stream, logprobs):
    """47."""
    gateway.worker.script = None
    before = gateway.outcome("cancelled")
    with gateway.connect() as sock:
        sock.sendall(raw_post(CHAT, {**BODY, "n": 3, "stream": stream, "logprobs": logprobs}))
        requests = requests_of(gateway, 3)
        gateway.worker.emit(requests[0], ids.of("hello"))
        if stream:
            assert sock.recv(100).startswith(b"HTTP/1.1 200")
    assert {gateway.worker.next_cancelled() for _ in range(3)} == {request.id for request in requests}
    gateway.wait_until(lambda: gateway.outcome("cancelled") == before + 1)


def test_prompt_is_not_repeated_without_end(gateways):
    gateway = gateways(info={"context_tokens": 1 << 20, "max_prompt_tokens": 1 << 20})
    error = gateway.post(TEXT, prompt=[70] * 10_000, n=105).json()["error"]
    assert error["param"] == "n" and "1050000 tokens" in error["message"]
    assert gateway.post(TEXT, prompt=[70] * 10_000, n=104, max_tokens=0).status_code == 200


@pytest.mark.parametrize("is_streamed", [False, True])
def test_what_is_cached_is_counted_once_for_every_prompt(gateway, ids, is_streamed):
    """12: of a prompt's choices the one that found least; the others found what that one had computed."""
    gateway.worker.script = None
    fields = {"prompt": ["one", "two"], "n": 2, "max_tokens": 4}
    asked = threading.Thread(target=lambda: told.append(ask(gateway, is_streamed, fields)))
    told = []
    asked.start()
    for request, cached in zip(requests_of(gateway, 4), (0, 48, 32, 64), strict=True):
        gateway.worker.emit(request, ids.of("hello")[:1], cached_tokens=cached)
        gateway.worker.emit(request, [ids.end], Finish.STOP)
    asked.join()
    assert told[0]["prompt_tokens_details"] == {"cached_tokens": 32}


def ask(gateway, is_streamed, fields):
    """The usage."""
    if is_streamed:
        return gateway.chunks("/v1/completions", stream_options={"include_usage": True}, **fields)[-1]["usage"]
    return gateway.post("/v1/completions", **fields).json()["usage"]
