"""Log probabilities and token ids in both shapes, through the whole gateway."""

from __future__ import annotations

import random
import socket
from types import SimpleNamespace

import orjson
import pytest
from gateway_under_test import raw_post
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from scripted_worker import row_of

from scheduler.messages import Finish, TokenEvent, encode_events
from service.config import GatewayConfig
from service.metrics import Metrics
from service.stream import PART_BYTES, LoggedCollection, in_parts
from service.text import Text
from service.token_log import ChatLog

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "hello"}]
TRICKY = "grüße 한국어 日本語 😀👩‍👩‍👧 END of it"


def random_tokens(ids, text: str, seed: int) -> list[int]:
    """Whole tokens and single bytes, mixed."""
    chance = random.Random(seed)
    tokens: list[int] = []
    for character in text:
        pieces = ids.bytewise(character) if chance.random() < 0.5 else [ids.of(character)]
        tokens += [id for piece in pieces for id in piece]
    return tokens


def deliveries(tokens: list[int], end: int, seed: int) -> list[list[int]]:
    chance, script = random.Random(seed), []
    while tokens:
        size = chance.choice((1, 1, 2, 5))
        script.append(tokens[:size])
        tokens = tokens[size:]
    return [*script, [end]]


def streamed(gateway, path, index=0, **fields):
    """(texts, entries per chunk, last chunk) of one choice of a stream."""
    texts, entries = [], []
    for chunk in gateway.chunks(path, **fields):
        (ChatCompletionChunk if path == CHAT else Completion).model_validate(
            chunk if path == CHAT else {**chunk, "choices": []}, strict=True
        )
        for choice in chunk["choices"]:
            if choice["index"] == index and choice["finish_reason"] is None:
                texts.append(choice["text"] if path == TEXT else choice["delta"]["content"])
                entries.append(choice["logprobs"])
    return texts, entries


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("stop", [None, "END", ["国", "日本"]])
def test_chat_streams_the_entries_that_it_tells_at_once(gateway, ids, seed, stop):
    """30, 32 and 33."""
    tokens = random_tokens(ids, TRICKY, seed)
    gateway.worker.script = deliveries(tokens, ids.end, seed)
    asked = {"logprobs": True, "top_logprobs": 3, "stop": stop}
    answer = gateway.post(**asked).json()
    ChatCompletion.model_validate(answer, strict=True)
    (choice,) = answer["choices"]
    assert choice["logprobs"].keys() == {"content", "refusal"} and choice["logprobs"]["refusal"] is None
    content = choice["logprobs"]["content"]
    texts, entries = streamed(gateway, CHAT, **asked)
    assert "".join(texts) == choice["message"]["content"]
    assert [entry for part in entries for entry in part["content"]] == content
    text = choice["message"]["content"].encode()
    assert b"".join(bytes(entry["bytes"] or ()) for entry in content).startswith(text)
    assert (content[-1]["token"] == "<|im_end|>") == (stop is None)
    for entry, token in zip(content, tokens, strict=False):
        _, *likeliest = row_of(token, 3)
        assert entry["logprob"] == row_of(token, 3)[0][1]
        assert [one["logprob"] for one in entry["top_logprobs"]] == [logprob for _, logprob in likeliest]
        assert all(one.keys() == {"token", "logprob", "bytes"} for one in entry["top_logprobs"])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("echo", [False, True])
def test_completions_stream_the_columns_that_they_tell_at_once(gateway, ids, seed, echo):
    """31 and 32: text_offset counts from the beginning of the whole text."""
    tokens = random_tokens(ids, TRICKY, seed)
    gateway.worker.script = deliveries(tokens, ids.end, seed)
    asked = {"prompt": "say 😀: ", "logprobs": 2, "echo": echo}
    answer = gateway.post(TEXT, **asked).json()
    (choice,) = answer["choices"]
    columns = choice["logprobs"]
    texts, parts = streamed(gateway, TEXT, **asked)
    assert "".join(texts) == choice["text"]
    assert {name: [value for part in parts for value in part[name]] for name in columns} == columns
    names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    assert columns.keys() == set(names)
    assert len({len(columns[name]) for name in names}) == 1
    assert len(columns["tokens"]) == len(tokens) + 1 + echo * len(ids.of(asked["prompt"]))
    check_offsets(columns, choice["text"])


def check_offsets(columns, text):
    """Tokens are where they are said to be; the one that ended the answer is behind all text."""
    ends = columns["tokens"][-1] == "<|im_end|>"
    assert not ends or columns["text_offset"][-1] == len(text)
    for token, begin in list(zip(columns["tokens"], columns["text_offset"], strict=True))[: -1 if ends else None]:
        assert "\ufffd" in token or text[begin : begin + len(token)] == token


def test_sdk_reads_log_probabilities(gateway, ids):
    """30: as everybody will."""
    gateway.worker.script = ids.answer("hello world")
    create = gateway.sdk.chat.completions.create
    asked = {"model": "acme/tiny-chat", "messages": HELLO, "logprobs": True, "top_logprobs": 3, "n": 2}
    whole = create(**asked)
    told = {choice.index: choice.logprobs.content for choice in whole.choices}
    streams = {0: [], 1: []}
    for chunk in create(**asked, stream=True):
        for choice in chunk.choices:
            if choice.logprobs is not None:
                streams[choice.index] += choice.logprobs.content
    assert streams == told
    assert "".join(entry.token for entry in told[1]) == "hello world<|im_end|>"
    assert all(len(entry.top_logprobs) == 3 and entry.logprob <= 0 for entry in told[0])
    legacy = gateway.sdk.completions.create(model="acme/tiny-chat", prompt="x", logprobs=2)
    assert "".join(legacy.choices[0].logprobs.tokens) == "hello world<|im_end|>"


def test_zero_alternatives_are_an_empty_list(gateway, ids):
    """34. In completions the chosen one is always there."""
    gateway.worker.script = ids.answer("hello")
    for asked in ({}, {"top_logprobs": 0}, {"top_logprobs": None}):
        content = gateway.post(logprobs=True, **asked).json()["choices"][0]["logprobs"]["content"]
        assert content and all(entry["top_logprobs"] == [] for entry in content)
    columns = gateway.post(TEXT, logprobs=0).json()["choices"][0]["logprobs"]
    assert columns["top_logprobs"] == [
        {token: logprob} for token, logprob in zip(columns["tokens"], columns["token_logprobs"], strict=True)
    ]


@pytest.mark.parametrize("fields", [{"logprobs": False}, {"logprobs": None, "top_logprobs": None}])
def test_nothing_is_told_or_asked_for_unless_the_client_wants_it(gateway, ids, fields):
    """41."""
    gateway.worker.script = ids.answer("hello")
    answer = gateway.post(**fields).json()
    assert answer["choices"][0]["logprobs"] is None
    assert "token_ids" not in answer["choices"][0] and "prompt_token_ids" not in answer
    assert gateway.worker.next_request().logprobs is None
    assert all(chunk["choices"][0]["logprobs"] is None for chunk in gateway.chunks(**fields))


def test_what_the_worker_is_asked_for(gateway):
    for path, fields, expected in [
        (CHAT, {"logprobs": True}, (0, False)),
        (CHAT, {"logprobs": True, "top_logprobs": 20}, (20, False)),
        (TEXT, {"logprobs": 5}, (5, False)),
        (TEXT, {"logprobs": 5, "echo": True}, (5, True)),
        (TEXT, {"echo": True}, (None, False)),
        (CHAT, {"return_token_ids": True}, (None, False)),
    ]:
        gateway.worker.row_of, gateway.worker.script = row_of, [[5]]
        assert gateway.post(path, **fields).status_code == 200
        request = gateway.worker.next_request()
        assert (request.logprobs, request.prompt_logprobs) == expected


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_without_their_probabilities_are_a_failure_of_the_worker(gateway, ids, stream):
    gateway.worker.script, gateway.worker.row_of = ids.answer("hello"), None
    response = gateway.post(logprobs=True, stream=stream)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "worker_failed")


def test_simulated_engine_has_no_probabilities_to_tell(gateways):
    gateway = gateways(info={"engine": "simulated"})
    for path, asked in ((CHAT, {"logprobs": True}), (TEXT, {"logprobs": 0})):
        response = gateway.post(path, **asked)
        assert (response.status_code, response.json()["error"]["param"]) == (400, "logprobs")


@pytest.mark.parametrize("frames_in_one_read", [False, True])
def test_entries_keep_to_their_tokens_when_first_tokens_come_first(gateway, ids, frames_in_one_read):
    """Of one step the first tokens are dealt before the others, and steps that come together are one."""
    gateway.worker.script = None
    with gateway.stream(n=2, logprobs=True) as events:
        requests = sorted((gateway.worker.next_request() for _ in range(2)), key=lambda request: request.id)
        words = [ids.of("the quick brown fox"), ids.of("jumps over the lazy dog")]

        def frame(*places: tuple[int, int]) -> bytes:
            told = []
            for choice, place in places:
                token = words[choice][place]
                told.append(TokenEvent(requests[choice].key, [token], logprobs=[row_of(token, 0)]))
            return b"".join(encode_events(0, told))

        frames = [frame((0, 0)), frame((0, 1), (1, 0)), frame((0, 2), (1, 1)), frame((1, 2))]
        for data in [b"".join(frames)] if frames_in_one_read else frames:
            gateway.worker.raw(data, requests[0].gateway)
        gateway.worker.emit(requests[0], words[0][3:], Finish.LENGTH)
        gateway.worker.emit(requests[1], words[1][3:], Finish.LENGTH)
        told = {0: [], 1: []}
        for event in list(events)[:-1]:
            (choice,) = orjson.loads(event)["choices"]
            entries = choice["logprobs"]["content"] if choice["logprobs"] else []
            assert choice["delta"].get("content", "") == "".join(entry["token"] for entry in entries)
            told[choice["index"]] += [entry["logprob"] for entry in entries]
    assert told == {n: [row_of(token, 0)[0][1] for token in words[n]] for n in (0, 1)}


# --- what ends an answer


@pytest.mark.parametrize("in_one_delivery", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_the_id_that_ends_a_sequence_has_an_entry(gateway, ids, stream, in_one_delivery):
    """13: it is counted; it is no text. Entries, ids and count are of the same tokens."""
    gateway.worker.script = [[*ids.of("hello"), ids.end]] if in_one_delivery else ids.answer("hello")
    asked = {"logprobs": True, "return_token_ids": True}
    if stream:
        *chunks, usage = gateway.chunks(stream_options={"include_usage": True}, **asked)
        choices, answer = [chunk["choices"][0] for chunk in chunks[:-1]], usage
        assert chunks[-1]["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}
    else:
        answer = gateway.post(**asked).json()
        choices = answer["choices"]
    entries = [entry for choice in choices for entry in choice["logprobs"]["content"]]
    assert [entry["token"] for entry in entries][-1] == "<|im_end|>" and entries[-1]["bytes"] is None
    assert "".join(entry["token"] for entry in entries[:-1]) == "hello"
    assert entries[-1]["logprob"] == row_of(ids.end, 0)[0][1]
    assert [id for choice in choices for id in choice["token_ids"]] == [*ids.of("hello"), ids.end]
    assert answer["usage"]["completion_tokens"] == len(entries)


def test_an_answer_that_ends_at_once_has_one_entry(gateway, ids):
    """Who scores a continuation asks for one token, echo and log probabilities, and takes the last entry off."""
    gateway.worker.script = [[ids.end]]
    choice = gateway.post(TEXT, prompt="hello", echo=True, logprobs=1, max_tokens=1).json()["choices"][0]
    columns = choice["logprobs"]
    assert (choice["text"], choice["finish_reason"]) == ("hello", "stop")
    assert "".join(columns["tokens"][:-1]) == "hello"
    assert (columns["tokens"][-1], columns["text_offset"][-1]) == ("<|im_end|>", 5)
    assert columns["top_logprobs"][-1]["<|im_end|>"] == columns["token_logprobs"][-1] == row_of(ids.end, 0)[0][1]


def test_stop_id_that_is_a_word_has_an_entry_behind_the_text(gateway, ids):
    (word,) = ids.of("x")
    gateway.worker.script = [*ids.one_by_one("ab"), [word]]
    choice = gateway.post(TEXT, logprobs=0, stop_token_ids=[word]).json()["choices"][0]
    assert choice["text"] == "ab"
    assert (choice["logprobs"]["tokens"][-1], choice["logprobs"]["text_offset"][-1]) == ("x", 2)


def test_the_end_behind_a_stop_string_is_not_listed(gateway, ids):
    gateway.worker.script = [[*ids.of("one STOP"), ids.end]]
    answer = gateway.post(stop="STOP", logprobs=True, return_token_ids=True).json()
    (choice,) = answer["choices"]
    assert "".join(entry["token"] for entry in choice["logprobs"]["content"]).strip() == "one"
    assert choice["token_ids"] == ids.of("one STOP")
    assert answer["usage"]["completion_tokens"] == len(choice["token_ids"])


def test_special_token_inside_a_text_is_named(gateway, ids):
    gateway.worker.script = [*ids.one_by_one("a"), [ids.end], *ids.one_by_one("b")]
    gateway.worker.finish = Finish.LENGTH
    asked = {"logprobs": True, "ignore_eos": True}
    choice = gateway.post(**asked).json()["choices"][0]
    assert [entry["token"] for entry in choice["logprobs"]["content"]] == ["a", "<|im_end|>", "b"]
    assert choice["logprobs"]["content"][1]["bytes"] is None
    texts, entries = streamed(gateway, CHAT, **asked)
    assert "".join(texts) == choice["message"]["content"] == "ab"
    assert [entry for part in entries for entry in part["content"]] == choice["logprobs"]["content"]


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_past_a_stop_are_not_listed(gateway, ids, stream):
    """13: nor those of the stop string; the ids of these are counted, and so they are told."""
    gateway.worker.script = ids.bytewise("one STOP two")
    gateway.worker.finish = Finish.RUNNING
    asked = {"stop": "STOP", "logprobs": True, "return_token_ids": True}
    if stream:
        chunks = gateway.chunks(**asked)
        choices = [chunk["choices"][0] for chunk in chunks[:-1]]
        listed = [entry["token"] for choice in choices for entry in choice["logprobs"]["content"]]
        told = [id for choice in choices for id in choice["token_ids"]]
        assert chunks[-1]["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}
    else:
        (choice,) = gateway.post(**asked).json()["choices"]
        listed, told = [entry["token"] for entry in choice["logprobs"]["content"]], choice["token_ids"]
    assert "".join(listed) == "one "
    assert told == [id for (id,) in ids.bytewise("one STOP")]


def test_open_character_at_the_end_is_listed(gateway, ids):
    """33: with its bytes, though it is no text."""
    gateway.worker.script = ids.bytewise("a😀")[:-1]
    gateway.worker.finish = Finish.LENGTH
    choice = gateway.post(logprobs=True).json()["choices"][0]
    assert choice["message"]["content"] == "a"
    assert [entry["bytes"] for entry in choice["logprobs"]["content"]] == [[97], [0xF0], [0x9F], [0x98]]
    _texts, entries = streamed(gateway, CHAT, logprobs=True)
    assert [entry for part in entries for entry in part["content"]] == choice["logprobs"]["content"]


# --- echo


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("as_ids", [False, True])
@pytest.mark.parametrize("max_tokens", [0, 5])
def test_prompt_is_scored(gateway, ids, stream, as_ids, max_tokens):
    """31: the first token has no probability. 13: what is drawn only to score is neither shown nor counted."""
    gateway.worker.script = [ids.of("!")] if max_tokens == 0 else ids.answer("!?")
    gateway.worker.finish = Finish.LENGTH if max_tokens == 0 else Finish.STOP
    text = "the quick 😀 fox"
    prompt = ids.of(text) if as_ids else text
    asked = {"prompt": prompt, "echo": True, "logprobs": 1, "max_tokens": max_tokens}
    if stream:
        *chunks, usage = gateway.chunks(TEXT, stream_options={"include_usage": True}, **asked)
        choices, answer = [chunk["choices"][0] for chunk in chunks], usage
        shown = "".join(choice["text"] for choice in choices)
        names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        columns = {
            name: [v for choice in choices if choice["logprobs"] for v in choice["logprobs"][name]] for name in names
        }
    else:
        answer = gateway.post(TEXT, **asked).json()
        shown, columns = answer["choices"][0]["text"], answer["choices"][0]["logprobs"]
        choices = answer["choices"]
    request = gateway.worker.next_request()
    assert request.max_tokens == max(1, max_tokens)
    assert choices[-1]["finish_reason"] == ("stop" if max_tokens else "length")
    generated = "!?" if max_tokens else ""
    tokens = [*ids.of(text), *(id for (id,) in (ids.answer(generated) if max_tokens else ()))]
    assert shown == text + generated
    assert answer["usage"]["completion_tokens"] == (len(ids.of(generated)) + 1 if max_tokens else 0)
    assert columns["token_logprobs"] == [None, *(row_of(token, 0)[0][1] for token in tokens[1:])]
    assert columns["top_logprobs"][0] is None and all(columns["top_logprobs"][1:])
    assert len(columns["tokens"]) == len(tokens)
    check_offsets(columns, shown)


def test_prompt_of_one_token_is_scored(gateway, ids):
    gateway.worker.script = [ids.of("!")]
    (one,) = ids.of("a")
    columns = gateway.post(TEXT, prompt=[one], echo=True, logprobs=1, max_tokens=0).json()["choices"][0]["logprobs"]
    assert columns == {"tokens": ["a"], "token_logprobs": [None], "top_logprobs": [None], "text_offset": [0]}


def test_drawing_the_end_while_scoring_is_no_stop(gateway, ids):
    gateway.worker.script = [[ids.end]]
    answer = gateway.post(TEXT, prompt="hello", echo=True, logprobs=1, max_tokens=0).json()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 0


@pytest.mark.parametrize("as_ids", [False, True])
def test_special_tokens_of_a_prompt_are_in_the_text_only_when_written(gateway, ids, as_ids):
    text = "a<|im_end|>b"
    gateway.worker.script = [ids.of("!")]
    prompt = ids.of(text) if as_ids else text
    choice = gateway.post(TEXT, prompt=prompt, echo=True, logprobs=0, max_tokens=0).json()["choices"][0]
    assert choice["text"] == ("ab" if as_ids else text)
    assert choice["logprobs"]["tokens"] == ["a", "<|im_end|>", "b"]
    assert choice["logprobs"]["text_offset"] == ([0, 1, 1] if as_ids else [0, 1, 11])


def test_zero_tokens_without_echo_have_nothing_to_tell(gateway):
    answer = gateway.post(TEXT, prompt="hello", logprobs=3, max_tokens=0).json()
    columns = answer["choices"][0]["logprobs"]
    assert columns == {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    assert gateway.worker.requests.empty()


def test_too_many_scores_are_refused_with_the_arithmetic(gateway):
    asked = {"prompt": [[70] * 2000, [71] * 2000], "echo": True, "logprobs": 20}
    error = gateway.post(TEXT, **asked).json()["error"]
    assert error["param"] == "logprobs" and "84000" in error["message"]
    assert gateway.post(TEXT, **{**asked, "echo": False}).status_code == 200


def test_what_one_request_may_be_told_is_bounded(gateways):
    gateway = gateways(info={"context_tokens": 40_000, "max_prompt_tokens": 40_000})
    assert gateway.post(max_tokens=32_768, logprobs=True, top_logprobs=5).status_code == 200
    assert gateway.post(max_tokens=400, n=29, logprobs=True, top_logprobs=20).status_code == 200
    for path, asked, number in [
        (CHAT, {"max_tokens": 400, "n": 32, "logprobs": True, "top_logprobs": 20}, 268_800),
        (CHAT, {"max_completion_tokens": 32_768, "logprobs": True, "top_logprobs": 8}, 294_912),
        (TEXT, {"prompt": ["a"] * 20, "n": 2, "max_tokens": 2000, "logprobs": 3}, 320_000),
    ]:
        response = gateway.post(path, **asked)
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (400, "logprobs")
        assert f"up to {number} log probabilities" in error["message"]


def test_a_chat_that_names_no_limit_ends_where_its_log_probabilities_do(gateways):
    gateway = gateways(info={"context_tokens": 40_000, "max_prompt_tokens": 40_000})
    for asked, most in [({"top_logprobs": 20}, (1 << 18) // 21), ({"top_logprobs": 20, "n": 2}, (1 << 18) // 42)]:
        assert gateway.post(logprobs=True, **asked).status_code == 200
        assert [gateway.worker.next_request().max_tokens for _ in range(asked.get("n", 1))] == [most] * asked.get(
            "n", 1
        )
    assert gateway.post(logprobs=True).status_code == 200
    assert gateway.worker.next_request().max_tokens > 39_000


@pytest.mark.parametrize("stream", [False, True])
def test_probabilities_of_other_tokens_are_a_failure_of_the_worker(gateway, ids, stream):
    """As they would be when a step got lost behind its log probabilities."""
    gateway.worker.script = ids.answer("hello")
    gateway.worker.row_of = lambda token, count: row_of(token + 1, count)
    response = gateway.post(logprobs=True, stream=stream)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "worker_failed")
    response = gateway.post(TEXT, prompt="hello", echo=True, logprobs=1, stream=stream)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "worker_failed")


def test_scores_of_a_long_prompt_are_whole_though_they_come_in_many_frames(gateways, ids):
    gateway = gateways(info={"context_tokens": 5000, "max_prompt_tokens": 5000})
    gateway.worker.script = [[5]]
    prompt = [70 + place % 50 for place in range(2500)]
    asked = {"prompt": prompt, "echo": True, "logprobs": 20, "max_tokens": 0}
    columns = gateway.post(TEXT, **asked).json()["choices"][0]["logprobs"]
    assert columns["token_logprobs"] == [None, *(row_of(token, 0)[0][1] for token in prompt[1:])]
    (streamed_columns, *_) = streamed(gateway, TEXT, **asked)[1]
    assert streamed_columns == columns


def test_long_scored_prompt_is_no_reason_to_call_its_reader_slow(gateways, ids):
    gateway = gateways(reader_backlog_bytes=1024)
    gateway.worker.script = [ids.of("!")]
    asked = {"prompt": "hello world " * 200, "echo": True, "logprobs": 5, "max_tokens": 0, "n": 3}
    texts = [streamed(gateway, TEXT, index, **asked)[0] for index in range(3)]
    assert ["".join(text) for text in texts] == ["hello world " * 200] * 3


# --- token ids


@pytest.mark.parametrize("stream", [False, True])
def test_chat_returns_token_ids(gateway, ids, stream):
    gateway.worker.script = ids.answer("hello 😀 world")
    asked = {"return_token_ids": True, "n": 2}
    if stream:
        chunks = gateway.chunks(**asked)
        told = {0: [], 1: []}
        for chunk in chunks:
            for choice in chunk["choices"]:
                told[choice["index"]] += choice.get("token_ids", [])
        prompts = [chunk["prompt_token_ids"] for chunk in chunks if "prompt_token_ids" in chunk]
        assert len(prompts) == 1 and all(chunk["choices"][0]["logprobs"] is None for chunk in chunks)
        (prompt,) = prompts
    else:
        answer = gateway.post(**asked).json()
        prompt, told = answer["prompt_token_ids"], {c["index"]: c["token_ids"] for c in answer["choices"]}
    assert told == {key: [*ids.of("hello 😀 world"), ids.end] for key in (0, 1)}
    assert prompt == list(gateway.worker.next_request().prompt)


@pytest.mark.parametrize("stream", [False, True])
def test_completions_return_token_ids_of_each_prompt(gateway, ids, stream):
    gateway.worker.script = ids.answer("yes")
    asked = {"prompt": ["one", "two"], "return_token_ids": True}
    prompts, told = {}, {0: [], 1: []}
    for answer in gateway.chunks(TEXT, **asked) if stream else [gateway.post(TEXT, **asked).json()]:
        for choice in answer["choices"]:
            told[choice["index"]] += choice.get("token_ids", [])
            if "prompt_token_ids" in choice:
                assert prompts.setdefault(choice["index"], choice["prompt_token_ids"]) is choice["prompt_token_ids"]
    assert prompts == {0: ids.of("one"), 1: ids.of("two")}
    assert told == {key: [*ids.of("yes"), ids.end] for key in (0, 1)}


def test_ids_out_are_ids_in(gateway, ids):
    """What came back can be sent again, as it is."""
    gateway.worker.script = [*ids.bytewise("😀")[:2], [ids.end]]
    first = gateway.post(TEXT, prompt="hello", return_token_ids=True).json()["choices"][0]
    again = [*first["prompt_token_ids"], *first["token_ids"]]
    second = gateway.post(TEXT, prompt=again, return_token_ids=True, max_tokens=0).json()["choices"][0]
    assert second["prompt_token_ids"] == again and second["token_ids"] == []


def test_log_probabilities_of_a_first_chunk_without_text(gateway, ids):
    """7 and 32: the role comes at once; the entry waits for the character."""
    gateway.worker.script = None
    first, second = ids.bytewise("é")
    with gateway.stream(logprobs=True) as events:
        request = gateway.worker.next_request()
        gateway.worker.emit(request, first)
        choice = orjson.loads(next(events))["choices"][0]
        assert choice["delta"] == {"role": "assistant", "content": ""}
        assert choice["logprobs"] == {"content": [], "refusal": None}
        gateway.worker.emit(request, [*second, ids.end], Finish.STOP)
        choice = orjson.loads(next(events))["choices"][0]
        assert [entry["bytes"] for entry in choice["logprobs"]["content"]] == [[0xC3], [0xA9], None]


# --- nobody waits for it


class CountedLog(ChatLog):
    """Remembers how many tokens it wrote down at a time."""

    def _columns_of(self, rows, starts):
        self.counts.append(len(rows))
        return super()._columns_of(rows, starts)


def test_an_answer_in_one_piece_is_written_down_as_it_comes(worker_info, ids):
    """Not all at its end, where a long one would stop the loop: then there is nothing left to write."""
    text = Text(worker_info)
    logs = [CountedLog(text.names, True, True) for _ in range(2)]
    for log in logs:
        log.counts = []
    order = SimpleNamespace(
        requests=[SimpleNamespace(id=1), SimpleNamespace(id=2)],
        prompt_tokens=2,
        answers_each=2,
        renderings=[text.traced_rendering((), 0), text.traced_rendering(("STOP",), 0)],
        logs=logs,
        echoes=[b"", b""],
        shape=None,
    )
    visit = SimpleNamespace(model="m", tier="t", arrived_at=0.0)
    client = SimpleNamespace(withdraw=lambda id: None)
    answer = LoggedCollection(visit, client, order, GatewayConfig("/nowhere"), Metrics("0"))
    deliveries = [ids.of("the quick ")] * 100
    for choice in answer.choices:
        for number, delivery in enumerate(deliveries, 1):
            choice.take_logprobs([row_of(id, 20) for id in delivery])
            choice.take(delivery, Finish.LENGTH if number == len(deliveries) else Finish.RUNNING, 1.0)
    assert answer.ended
    for choice, log in zip(answer.choices, logs, strict=True):
        assert sum(log.counts) == sum(map(len, deliveries))
        assert max(log.counts) <= 2 * len(deliveries[0])  # what may become a stop string waits for the next delivery
        before = len(log.counts)
        told = orjson.loads(b"{%b}" % b"".join(choice.told()))
        assert len(told["logprobs"]["content"]) == len(told["token_ids"]) == sum(log.counts)
        assert len(log.counts) == before


@pytest.mark.parametrize("sizes", [[], [0], [3, 4], [PART_BYTES], [PART_BYTES - 1, 2], [3 * PART_BYTES + 5, 0, 1]])
def test_a_long_answer_leaves_in_parts(sizes):
    pieces = [bytes([number]) * size for number, size in enumerate(sizes)]
    parts = list(in_parts(pieces))
    assert b"".join(parts) == b"".join(pieces)
    assert all(PART_BYTES <= len(part) < 2 * PART_BYTES for part in parts[:-1]) and len(parts[-1]) < PART_BYTES


def test_a_long_answer_is_whole(gateway, ids):
    gateway.worker.script = [ids.of("hello ") * 10] * 30
    gateway.worker.finish = Finish.LENGTH
    response = gateway.post(logprobs=True, top_logprobs=20, n=2)
    assert len(response.content) > 4 * PART_BYTES
    for choice in response.json()["choices"]:
        assert "".join(entry["token"] for entry in choice["logprobs"]["content"]) == choice["message"]["content"]


def test_reader_of_a_long_answer_that_takes_nothing_is_cut_off(gateways, ids):
    gateway = gateways(reader_seconds=0.2)
    gateway.worker.script = [ids.of("hello ") * 10] * 100
    with gateway.connect() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        body = {
            "model": "acme/tiny-chat",
            "messages": HELLO,
            "logprobs": True,
            "top_logprobs": 20,
            "n": 4,
            "max_tokens": 2000,
        }
        sock.sendall(raw_post(CHAT, body))
        gateway.wait_until(lambda: gateway.outcome("slow_reader") == 1)
    gateway.worker.script = ids.answer("hello")
    assert gateway.post(logprobs=True).status_code == 200
