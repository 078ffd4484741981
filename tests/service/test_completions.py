"""POST /v1/completions."""

from __future__ import annotations

import json

import pytest
from openai.types import Completion

from scheduler.messages import Finish, Reason, Refuse

PATH = "/v1/completions"


def test_sdk_completes_a_text(gateway, ids):
    """50: shape, id prefix, default of 16 tokens."""
    gateway.worker.script = ids.answer("hello world")
    answer = gateway.sdk.completions.create(model="acme/tiny-chat", prompt="once upon")
    assert answer.choices[0].text == "hello world"
    assert answer.choices[0].finish_reason == "stop"
    assert (answer.id[:5], answer.object) == ("cmpl-", "text_completion")
    request = gateway.worker.next_request()
    assert request.max_tokens == 16
    assert request.prompt == ids.of("once upon")


def test_chunks_have_the_shape_of_completions(gateway, ids):
    """2, 6, 9 and 50 for a stream."""
    gateway.worker.script = ids.answer("hello world")
    *chunks, usage = gateway.chunks(PATH, stream_options={"include_usage": True})
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "hello world"
    assert {chunk["object"] for chunk in [*chunks, usage]} == {"text_completion"}
    assert len({chunk["id"] for chunk in [*chunks, usage]}) == 1
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-2:] == [None, "stop"]
    assert usage["choices"] == []
    assert "service_tier" not in usage  # 41: not OpenAI's for completions, so only when it was asked for
    for chunk in chunks:
        Completion.model_validate({**chunk, "choices": []}, strict=True)


@pytest.mark.parametrize("stream", [False, True])
def test_prompts_of_all_four_kinds(gateway, ids, stream):
    """50: str, list[str], list[int], list[list[int]]; index is the prompt's."""
    gateway.worker.script = ids.answer("yes")
    for prompt, expected in [
        ("one", [ids.of("one")]),
        (["one", "two"], [ids.of("one"), ids.of("two")]),
        (ids.of("three"), [ids.of("three")]),
        ([ids.of("one"), ids.of("four")], [ids.of("one"), ids.of("four")]),
    ]:
        texts = dict.fromkeys(range(len(expected)), "")
        if stream:
            for chunk in gateway.chunks(PATH, prompt=prompt):
                texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
        else:
            for choice in gateway.post(PATH, prompt=prompt).json()["choices"]:
                texts[choice["index"]] += choice["text"]
        assert texts == dict.fromkeys(range(len(expected)), "yes")
        prompts = [list(gateway.worker.next_request().prompt) for _ in expected]
        assert sorted(prompts) == sorted(expected)


def test_several_prompts_have_one_usage_and_one_end(gateway, ids):
    """17 and 40: each choice its finish reason, one usage chunk, one [DONE]. 12: summed up."""
    gateway.worker.script = ids.answer("yes")
    prompts = ["one", "two", "three"]
    events = gateway.events(PATH, prompt=prompts, stream_options={"include_usage": True})
    assert events.count("[DONE]") == 1
    chunks = [json.loads(event) for event in events[:-1]]
    reasons = [(c["index"], c["finish_reason"]) for chunk in chunks for c in chunk["choices"] if c["finish_reason"]]
    assert sorted(reasons) == [(0, "stop"), (1, "stop"), (2, "stop")]
    usages = [chunk["usage"] for chunk in chunks if chunk["usage"]]
    assert len(usages) == 1
    assert usages[0]["completion_tokens"] == 3 * (len(ids.of("yes")) + 1)
    assert usages[0]["prompt_tokens"] == sum(len(ids.of(prompt)) for prompt in prompts)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("as_ids", [False, True])
def test_echo_puts_the_prompt_in_front(gateway, ids, stream, as_ids):
    """13 and 50."""
    gateway.worker.script = ids.answer(" world")
    prompt = ids.of('say "hello"') if as_ids else 'say "hello"'
    if stream:
        text = "".join(chunk["choices"][0]["text"] for chunk in gateway.chunks(PATH, prompt=prompt, echo=True))
    else:
        text = gateway.post(PATH, prompt=prompt, echo=True).json()["choices"][0]["text"]
    assert text == 'say "hello" world'


@pytest.mark.parametrize("echo", [False, True])
def test_zero_tokens_ask_no_worker(gateway, ids, echo):
    """13: allowed here, and counted right."""
    answer = gateway.post(PATH, prompt="hello", max_tokens=0, echo=echo).json()
    assert answer["choices"][0] == {
        "index": 0,
        "text": "hello" if echo else "",
        "logprobs": None,
        "finish_reason": "length",
    }
    assert answer["usage"] == {
        "prompt_tokens": len(ids.of("hello")),
        "completion_tokens": 0,
        "total_tokens": len(ids.of("hello")),
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    chunks = gateway.chunks(PATH, prompt="hello", max_tokens=0, echo=echo)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == ("hello" if echo else "")
    assert gateway.worker.requests.empty()


def test_one_token_is_counted_as_one(gateway, ids):
    """13."""
    gateway.worker.script, gateway.worker.finish = [ids.of("hello")[:1]], Finish.LENGTH
    answer = gateway.post(PATH, max_tokens=1).json()
    assert answer["usage"]["completion_tokens"] == 1
    assert answer["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        [],
        [[]],
        [1, "a"],
        [[1], "a"],
        [True],
        {"text": "a"},
        3,
        None,
        [-1],
        [10**9],
        [1.5],
        [[1], [10**9]],
        [1, True],
        [[1, 2.5]],
    ],
)
def test_prompt_that_is_none_is_refused(gateway, prompt):
    """19 and 50."""
    response = gateway.post(PATH, prompt=prompt)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "prompt"


@pytest.mark.parametrize("prompt", [["a"] * 129, [[1]] * 129, [["not even an id"]] * 129, ["a", None] * 70])
def test_prompts_are_counted_before_they_are_read(gateway, prompt):
    message = gateway.post(PATH, prompt=prompt).json()["error"]["message"]
    assert message == f"'prompt' takes at most 128 prompts in one request, not {len(prompt)}."


def test_ids_are_counted_before_they_are_read(gateway):
    error = gateway.post(PATH, prompt=[1, "not an id"] * 10_000).json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")
    assert "came to 20000 tokens" in error["message"]


@pytest.mark.parametrize("letter", ["x", "é"])
def test_text_that_cannot_fit_is_not_tokenized(gateway, letter):
    """Every token covers so many characters at most: the sentence says what is known without counting."""
    error = gateway.post(PATH, prompt=letter * 1_000_000).json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")
    assert "came to at least" in error["message"]
    error = gateway.post("/v1/chat/completions", messages=[{"role": "user", "content": letter * 1_000_000}]).json()[
        "error"
    ]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")
    assert "came to at least" in error["message"]


def test_text_that_might_fit_is_counted(gateway):
    error = gateway.post(PATH, prompt="x" * 5000).json()["error"]
    assert "came to 5000 tokens" in error["message"]


def test_echo_of_long_id_prompts(gateway, ids):
    """Decoded in a thread, in the order of the prompts."""
    gateway.worker.script = ids.answer("!")
    texts = ["hello world " * 200, "grüße " * 300]
    choices = gateway.post(PATH, prompt=[ids.of(text) for text in texts], echo=True).json()["choices"]
    assert [choice["text"] for choice in choices] == [text + "!" for text in texts]


def test_too_many_prompts_are_refused(gateway):
    assert gateway.post(PATH, prompt=["a"] * 129).json()["error"]["param"] == "prompt"
    assert gateway.post(PATH, prompt=["a"] * 128).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_one_refused_prompt_refuses_the_request_and_withdraws_the_others(gateway, ids, stream):
    """21 with several prompts."""
    refused = ids.of("two")
    gateway.worker.script = None
    accept = gateway.worker.decide
    gateway.worker.decide = lambda request: (
        Refuse(Reason.TIME_BUDGET, 2.0) if list(request.prompt) == refused else accept(request)
    )
    response = gateway.post(PATH, prompt=["one", "two", "three"], stream=stream)
    assert response.status_code == 429
    asked = {tuple(r.prompt): r.id for r in (gateway.worker.next_request() for _ in range(3))}
    withdrawn = {gateway.worker.next_cancelled() for _ in range(2)}
    assert withdrawn == {id for prompt, id in asked.items() if list(prompt) != refused}


@pytest.mark.parametrize(
    ("field", "value"), [("suffix", "x"), ("top_logprobs", 3), ("prompt_logprobs", 1), ("truncate_prompt_tokens", 5)]
)
def test_what_is_not_offered_is_refused_by_name(gateway, field, value):
    """23."""
    response = gateway.post(PATH, **{field: value})
    assert (response.status_code, response.json()["error"]["param"]) == (400, field)
