"""POST /v1/chat/completions. Numbers in docstrings are points of the list of what servers get wrong."""

from __future__ import annotations

import orjson
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from scheduler.messages import Finish

HELLO = [{"role": "user", "content": "hello"}]


def strict(model, fields):
    """Validates as the SDK's types demand, not as leniently as the SDK does."""
    return model.model_validate(fields, strict=True)


def test_sdk_reads_a_stream_and_gets_the_same_text_as_without(gateway, ids):
    """38: join(deltas) is the non-streamed text."""
    gateway.worker.script = ids.answer('hello wörld 😀\n"quoted" \\ done')
    create = gateway.sdk.chat.completions.create
    chunks = list(create(model="acme/tiny-chat", messages=HELLO, stream=True))
    whole = create(model="acme/tiny-chat", messages=HELLO)
    assert whole.choices[0].message.content == 'hello wörld 😀\n"quoted" \\ done'
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content


def test_stream_is_framed_as_events(gateway, ids):
    """1: headers and framing. 2: ends with [DONE]."""
    gateway.worker.script = ids.answer("hello world")
    response = gateway.post(stream=True)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    assert not response.content.startswith(b"\xef\xbb\xbf")
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    for event in events[:-2]:
        strict(ChatCompletionChunk, orjson.loads(event.removeprefix("data: ")))


def test_every_chunk_carries_the_same_heading(gateway, ids):
    """6: id, created, model and object. 43: a fingerprint. 44: the tier."""
    gateway.worker.script = ids.answer("hello world")
    chunks = gateway.chunks(stream_options={"include_usage": True})
    names = ("id", "created", "model", "object", "system_fingerprint", "service_tier")
    headings = {tuple(chunk[name] for name in names) for chunk in chunks}
    assert len(headings) == 1
    id, created, *rest = headings.pop()
    assert id.startswith("chatcmpl-")
    assert created > 1700000000
    assert rest == ["acme/tiny-chat", "chat.completion.chunk", "fp_scripted", "default"]


def test_role_comes_first_and_once_and_the_last_delta_is_empty(gateway, ids):
    """7: role in the first delta only. 8: final chunk with an empty delta; finish_reason null before."""
    gateway.worker.script = ids.answer("hello world")
    choices = [chunk["choices"][0] for chunk in gateway.chunks()]
    assert choices[0]["delta"]["role"] == "assistant"
    assert all("role" not in choice["delta"] for choice in choices[1:])
    assert all(choice["finish_reason"] is None for choice in choices[:-1])
    assert choices[-1]["delta"] == {}
    assert choices[-1]["finish_reason"] == "stop"


def test_first_token_without_text_still_brings_the_role(gateway, ids):
    """7: content is an empty string when the first token is half a character."""
    gateway.worker.script = None
    first, second = ids.bytewise("é")
    with gateway.stream() as events:
        request = gateway.worker.next_request()
        gateway.worker.emit(request, first)
        assert orjson.loads(next(events))["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        gateway.worker.emit(request, [*second, ids.end], Finish.STOP)
        assert orjson.loads(next(events))["choices"][0]["delta"] == {"content": "é"}


def test_usage_chunk_comes_once_and_only_when_asked_for(gateway, ids):
    """9: one extra chunk before [DONE]. 10: null before. 12: it sums up."""
    gateway.worker.script = ids.answer("hello")
    *chunks, last = gateway.chunks(stream_options={"include_usage": True})
    assert all(chunk["usage"] is None and chunk["choices"] for chunk in chunks)
    assert last["choices"] == []
    usage = last["usage"]
    assert usage["completion_tokens"] == len(ids.of("hello")) + 1
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["prompt_tokens"] == len(gateway.worker.next_request().prompt)


@pytest.mark.parametrize("options", [None, {}, {"include_usage": False}])
def test_no_usage_unless_asked_for(gateway, ids, options):
    """10 and 11: neither a chunk nor a key."""
    gateway.worker.script = ids.answer("hello")
    assert all("usage" not in chunk and chunk["choices"] for chunk in gateway.chunks(stream_options=options))


def test_stream_options_without_stream_is_refused(gateway):
    """11."""
    response = gateway.post(stream_options={"include_usage": True})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "stream_options"


def test_whole_answer_has_the_nullable_fields_and_no_foreign_ones(gateway, ids):
    """12: usage. 16: a finish reason. 41: nullables kept, extensions absent."""
    gateway.worker.script = ids.answer("hello")
    answer = gateway.post().json()
    strict(ChatCompletion, answer)
    (choice,) = answer["choices"]
    message = {"role": "assistant", "content": "hello", "refusal": None}
    assert choice == {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    assert answer.keys() == {
        *("id", "object", "created", "model", "system_fingerprint", "service_tier", "choices", "usage"),
    }
    assert answer["object"] == "chat.completion"


def test_length_is_told_and_counted(gateway, ids):
    """13 and 16: finish_reason length, usage up to the last token."""
    gateway.worker.script = ids.one_by_one("hello")
    gateway.worker.finish = Finish.LENGTH
    answer = gateway.post(max_tokens=len(ids.of("hello"))).json()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == len(ids.of("hello"))


def test_limit_in_the_request_reaches_the_worker(gateway, worker_info):
    """42: max_completion_tokens wins, absent is up to the context, and more than fits is cut."""
    prompt = None
    for fields, expected in [
        ({"max_tokens": 5}, 5),
        ({"max_tokens": 5, "max_completion_tokens": 7}, 7),
        ({}, None),
        ({"max_tokens": 10**9}, None),
        ({"max_tokens": None}, None),
    ]:
        assert gateway.post(**fields).status_code == 200
        request = gateway.worker.next_request()
        prompt = prompt or len(request.prompt)
        assert request.max_tokens == (expected or worker_info.context_tokens - prompt)


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_zero_tokens_are_no_chat(gateway, field):
    """42."""
    assert gateway.post(**{field: 0}).json()["error"]["param"] == field


@pytest.mark.parametrize("stream", [False, True])
def test_prompt_beyond_the_context_is_refused_before_it_queues(gateway, worker_info, stream):
    """20: 400 with numbers. 3: a status, not an event."""
    response = gateway.post(messages=[{"role": "user", "content": "x" * 5000}], stream=stream)
    error = response.json()["error"]
    assert response.status_code == 400
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")
    assert str(worker_info.context_tokens) in error["message"]
    assert "50" in error["message"]
    assert gateway.worker.requests.empty()


def test_prompt_beyond_the_workers_memory_is_refused(gateways):
    """20."""
    gateway = gateways(info={"max_prompt_tokens": 20})
    assert gateway.post(messages=[{"role": "user", "content": "zqzqzqzqzqzqzqzqzqzqzq"}]).status_code == 400
    assert gateway.post().status_code == 200


@pytest.mark.parametrize(
    ("asked", "used"),
    [
        (None, "default"),
        ("auto", "default"),
        ("default", "default"),
        ("scale", "default"),
        ("flex", "flex"),
        ("priority", "priority"),
        ("fast", "priority"),
    ],
)
def test_tier_used_is_told(gateway, asked, used):
    """44."""
    assert gateway.post(service_tier=asked).json()["service_tier"] == used
    assert gateway.worker.next_request().tier == used


def test_template_and_special_tokens(gateway, ids):
    """46: parts and the developer role. The template's special tokens are tokens, once."""
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages = [{"role": "developer", "content": "be kind"}, {"role": "user", "content": parts}]
    assert gateway.post(messages=messages).status_code == 200
    rendered = "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\none\ntwo<|im_end|>\n<|im_start|>assistant\n"
    assert gateway.worker.next_request().prompt == ids.of(rendered)


def test_long_prompt_is_tokenized_alike(gateway, ids):
    """Beyond 1 kB a thread does it."""
    text = "the quick brown fox " * 150
    assert gateway.post(messages=[{"role": "user", "content": text}]).status_code == 200
    expected = ids.of(f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n")
    assert gateway.worker.next_request().prompt == expected


def test_sampling_reaches_the_worker(gateway, worker_info):
    gateway.post(temperature=0.5, top_p=0.9, top_k=7, seed=-3)
    request = gateway.worker.next_request()
    assert (request.sampling.temperature, request.sampling.top_p, request.sampling.top_k) == (0.5, 0.9, 7)
    assert request.stop_ids == frozenset(worker_info.eos_ids)
    seed = request.sampling.seed
    gateway.post(seed=-3, top_k=-1)
    request = gateway.worker.next_request()
    assert request.sampling.seed == seed >= 0
    assert request.sampling.top_k == 0
    gateway.post(ignore_eos=True)
    request = gateway.worker.next_request()
    assert request.ignore_eos
    assert request.stop_ids == frozenset()


def test_model_is_sampled_as_it_wants_where_the_client_says_nothing(gateways):
    gateway = gateways(info={"temperature": 0.6, "top_p": 0.9, "top_k": 40})
    gateway.post()
    sampling = gateway.worker.next_request().sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.6, 0.9, 40)
    gateway.post(temperature=0, top_p=1, top_k=0)
    sampling = gateway.worker.next_request().sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0, 1, 0)


def test_model_without_a_template_says_so(gateways):
    gateway = gateways(info={"chat_template": None})
    error = gateway.post().json()["error"]
    assert error["param"] == "messages"
    assert "/v1/completions" in error["message"]


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% if messages|length != 2 %}{{ raise_exception('needs a system message, got ' ~ 1) }}{% endif %}", "got 1"),
        ("{{ persona.name }}", "'persona' is undefined"),
        ("{{ messages[7].content.upper() }}", "has no element 7"),
        ("{% macro again(x) %}{{ again(x) }}{% endmacro %}{{ again(1) }}", "recursion"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages[0].content + 1 }}", "str"),
        ("{% for x in range(10 ** 9) %}{{ x }}{% endfor %}", "too big"),
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_template_that_raises_is_the_clients_400(gateways, template, says, stream):
    """Its own words are shown. 3: also when streaming."""
    response = gateways(info={"chat_template": template}).post(stream=stream)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "messages")
    assert error["message"].startswith("The model's chat template does not take these messages: ")
    assert says in error["message"]


def test_undefined_variable_that_is_only_asked_about_is_nothing(gateways, ids):
    gateway = gateways(
        info={"chat_template": "{% if tools %}x{% endif %}{{ persona }}{% if y is defined %}y{% endif %}hi"}
    )
    assert gateway.post().status_code == 200
    assert gateway.worker.next_request().prompt == ids.of("hi")


def test_tokens_that_come_before_the_workers_answer_are_not_lost(gateway, ids):
    gateway.worker.tokens_first = True
    gateway.worker.script = ids.answer("hello world")
    assert gateway.post().json()["choices"][0]["message"]["content"] == "hello world"
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in gateway.chunks()) == "hello world"


def test_several_steps_in_one_read_are_one_delivery(gateway, ids):
    text = "hello world, this is a small tokenizer"
    gateway.worker.script = ids.answer(text)
    chunks = gateway.chunks()
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == text
