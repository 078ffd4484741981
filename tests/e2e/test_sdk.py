"""The official SDK as the client, against the whole service."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from worker.files import DEMO, find_model
from worker.simulated import SENTENCE
from worker.tokenizer import read_tokenizer

MESSAGES: Any = [{"role": "user", "content": "Document `textwrap.dedent`"}]


@pytest.fixture(params=["simulated", "demo"])
def server(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


@pytest.fixture
def sdk(server: Any) -> Iterator[openai.OpenAI]:
    with server.sdk() as client:
        yield client


def exactly(tokens: int) -> dict[str, Any]:
    return {"max_tokens": tokens, "extra_body": {"ignore_eos": True}}


def test_what_is_served_can_be_listed_and_looked_up(server: Any, sdk: openai.OpenAI) -> None:
    (model,) = sdk.models.list().data
    assert (model.id, model.object, model.owned_by) == (server.model, "model", "headgate")
    assert sdk.models.retrieve(server.model) == model
    with pytest.raises(openai.NotFoundError) as raised:
        sdk.models.retrieve("nobody/nothing")
    assert raised.value.code == "model_not_found"


def test_a_chat_in_one_piece(server: Any, sdk: openai.OpenAI) -> None:
    answer = sdk.chat.completions.create(
        model=server.model, messages=MESSAGES, temperature=0, service_tier="priority", **exactly(12)
    )
    assert (answer.model, answer.object, answer.service_tier) == (server.model, "chat.completion", "priority")
    assert answer.choices[0].finish_reason == "length" and answer.choices[0].message.role == "assistant"
    assert answer.usage is not None and answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12 and answer.usage.prompt_tokens > 5


def test_a_streamed_chat_says_the_same_as_one_in_one_piece(server: Any, sdk: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": server.model, "messages": MESSAGES, "temperature": 0, **exactly(40)}
    whole = sdk.chat.completions.create(**asked)
    chunks = list(sdk.chat.completions.create(stream=True, stream_options={"include_usage": True}, **asked))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])


@pytest.mark.parametrize(
    ("asked", "used"), [("auto", "default"), ("default", "default"), ("flex", "flex"), ("priority", "priority")]
)
def test_the_service_tier_that_was_used_is_told(server: Any, sdk: openai.OpenAI, asked: Any, used: str) -> None:
    answer = sdk.chat.completions.create(model=server.model, messages=MESSAGES, service_tier=asked, **exactly(1))
    assert answer.service_tier == used


def test_completions_of_texts_and_token_ids(server: Any, sdk: openai.OpenAI) -> None:
    answer = sdk.completions.create(
        model=server.model, prompt=["def main():", "import os"], temperature=0, **exactly(8)
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.usage is not None and answer.usage.completion_tokens == 16
    ids = sdk.completions.create(model=server.model, prompt=[7, 8, 9], temperature=0, **exactly(8))
    assert ids.usage is not None and (ids.usage.prompt_tokens, ids.usage.completion_tokens) == (3, 8)


def test_a_stop_string_ends_an_answer_before_it(simulated: Any) -> None:
    with simulated.sdk() as sdk:
        answer = sdk.completions.create(model=simulated.model, prompt="hi", stop="weights were", **exactly(99))
    assert answer.choices[0].text == "Simulated reply: no " and answer.choices[0].finish_reason == "stop"
    simulated.wait_until_idle()


def test_the_same_seed_gives_the_same_words(demo: Any) -> None:
    with demo.sdk() as sdk:

        def words(seed: int) -> str | None:
            answer = sdk.chat.completions.create(
                model=demo.model, messages=MESSAGES, temperature=1.0, seed=seed, **exactly(24)
            )
            return answer.choices[0].message.content

        first = words(7)
        assert words(7) == first
        assert {words(seed) for seed in range(8, 12)} != {first}


def test_greedy_words_do_not_depend_on_who_else_is_there(demo: Any) -> None:
    """Sixteen prompts alone, then each of them in four of 64 streams at once."""
    names = (
        "abs",
        "all",
        "any",
        "bin",
        "chr",
        "dir",
        "eval",
        "exec",
        "hash",
        "help",
        "hex",
        "id",
        "iter",
        "len",
        "map",
    )
    prompts = [f"Document `{name}`" for name in (*names, "max")]
    with demo.sdk() as sdk:

        def greedy(prompt: str) -> str:
            asked: Any = [{"role": "user", "content": prompt}]
            stream = sdk.chat.completions.create(
                model=demo.model,
                messages=asked,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
                service_tier="flex",
                **exactly(20),
            )
            chunks = list(stream)
            assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 20
            return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)

        alone = [greedy(prompt) for prompt in prompts]
        with ThreadPoolExecutor(64) as pool:
            together = list(pool.map(greedy, prompts * 4))
    assert together == alone * 4
    demo.wait_until_idle()


def test_sixty_four_streams_at_once_are_all_whole(simulated: Any) -> None:
    streams = [simulated.stream(100 + n, stream_options={"include_usage": True}) for n in range(64)]
    for n, stream in enumerate(streams):
        stream.wait()
        assert stream.finished, stream.events[-1:]
        assert stream.usage["completion_tokens"] == 100 + n
        assert stream.text == (SENTENCE * 20)[: len(stream.text)]
        assert stream.chunks[-1]["choices"][0]["finish_reason"] == "length"
    longer = [len(stream.text) for stream in streams]
    assert longer == sorted(longer)
    simulated.wait_until_idle()


def test_a_simulated_answer_ends_by_itself(simulated: Any) -> None:
    with simulated.sdk() as sdk:
        answer = sdk.chat.completions.create(model=simulated.model, messages=MESSAGES, seed=1)
        again = sdk.chat.completions.create(model=simulated.model, messages=MESSAGES, seed=1)
    assert answer.choices[0].finish_reason == "stop"
    assert (answer.choices[0].message.content or "").startswith("Simulated reply: ")
    assert answer.usage == again.usage


def test_mistakes_are_told_in_openais_shape(server: Any, sdk: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        sdk.chat.completions.create(model=server.model, messages=MESSAGES, temperature=9)
    assert raised.value.param == "temperature"
    with pytest.raises(openai.NotFoundError) as unknown:
        sdk.chat.completions.create(model="gpt-9", messages=MESSAGES)
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        sdk.completions.create(model=server.model, prompt=[7] * 200_000)
    assert long.value.code == "context_length_exceeded"


def test_a_stream_that_is_closed_early_frees_its_place(server: Any, sdk: openai.OpenAI) -> None:
    with sdk.chat.completions.create(model=server.model, messages=MESSAGES, stream=True, **exactly(3000)) as stream:
        next(stream)
    server.wait_until_idle()


def test_connections_are_kept_between_requests(simulated: Any) -> None:
    with simulated.sdk() as sdk:
        for _ in range(5):
            sdk.chat.completions.create(model=simulated.model, messages=MESSAGES, **exactly(1))
        pool = sdk._client._transport._pool  # type: ignore[attr-defined]
        assert len(pool.connections) == 1


def test_threads_may_share_a_client(simulated: Any) -> None:
    failures: list[BaseException] = []
    with simulated.sdk() as sdk:

        def talk() -> None:
            try:
                for _ in range(3):
                    answer = sdk.chat.completions.create(model=simulated.model, messages=MESSAGES, **exactly(5))
                    assert answer.usage is not None and answer.usage.completion_tokens == 5
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=talk) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert failures == []


# --- what shapes the draw, and what is told of it: the real engine


def drawn(demo: Any, sdk: openai.OpenAI, prompt: Any = "def main():", tokens: int = 12, **fields: Any) -> Any:
    """A completion that tells its token ids and log probabilities."""
    extra = {"return_token_ids": True, "ignore_eos": True, **fields.pop("extra_body", {})}
    asked = {"temperature": 0, "logprobs": 3, "max_tokens": tokens, **fields}
    return sdk.completions.create(model=demo.model, prompt=prompt, extra_body=extra, **asked)


def token_ids(choice: Any) -> list[int]:
    return list(choice.model_extra["token_ids"])


@pytest.fixture
def demo_sdk(demo: Any) -> Iterator[openai.OpenAI]:
    with demo.sdk() as client:
        yield client


def test_greedy_takes_the_likeliest_and_says_so(demo: Any, demo_sdk: openai.OpenAI) -> None:
    answer = demo_sdk.chat.completions.create(
        model=demo.model, messages=MESSAGES, temperature=0, logprobs=True, top_logprobs=4, **exactly(24)
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None and len(logprobs.content) == 24
    for entry in logprobs.content:
        best = entry.top_logprobs[0]
        assert (entry.token, entry.bytes, entry.logprob) == (best.token, best.bytes, best.logprob)
        likelihoods = [one.logprob for one in entry.top_logprobs]
        assert likelihoods == sorted(likelihoods, reverse=True) and len(likelihoods) == 4
        assert 0 < sum(math.exp(one) for one in likelihoods) <= 1.0001
    raw = b"".join(bytes(entry.bytes or ()) for entry in logprobs.content)
    assert raw.startswith((answer.choices[0].message.content or "").encode())


def test_streamed_log_probabilities_are_those_of_the_whole(demo: Any, demo_sdk: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": demo.model, "messages": MESSAGES, "seed": 5, "n": 2, **exactly(20)}
    asked |= {"logprobs": True, "top_logprobs": 2}
    whole = demo_sdk.chat.completions.create(**asked)
    streamed: dict[int, list[Any]] = {0: [], 1: []}
    for chunk in demo_sdk.chat.completions.create(stream=True, **asked):
        for choice in chunk.choices:
            streamed[choice.index] += (choice.logprobs and choice.logprobs.content) or []
    for choice in whole.choices:
        assert choice.logprobs is not None and choice.logprobs.content is not None
        told = [(entry.token, entry.bytes) for entry in choice.logprobs.content]
        assert [(entry.token, entry.bytes) for entry in streamed[choice.index]] == told
        likelihoods = [entry.logprob for entry in choice.logprobs.content]
        assert [entry.logprob for entry in streamed[choice.index]] == pytest.approx(likelihoods, abs=1e-3)


def test_a_bias_forces_a_token_or_bans_it(demo: Any, demo_sdk: openai.OpenAI) -> None:
    plain = token_ids(drawn(demo, demo_sdk).choices[0])
    forced = drawn(demo, demo_sdk, tokens=5, logit_bias={str(plain[3]): 100})
    assert token_ids(forced.choices[0]) == [plain[3]] * 5
    banned = drawn(demo, demo_sdk, logit_bias={str(plain[0]): -100})
    assert plain[0] not in token_ids(banned.choices[0])
    # what is told is the model's own opinion, whatever the bias
    free = drawn(demo, demo_sdk, tokens=1).choices[0].logprobs.token_logprobs[0]
    best = max(banned.choices[0].logprobs.top_logprobs[0].values())
    assert best == pytest.approx(free, abs=1e-3)


def test_a_scored_text_has_the_probabilities_that_it_was_drawn_with(demo: Any, demo_sdk: openai.OpenAI) -> None:
    written = drawn(demo, demo_sdk, tokens=16).choices[0]
    prompt = written.model_extra["prompt_token_ids"]
    scored = drawn(demo, demo_sdk, prompt=[*prompt, *token_ids(written)], tokens=0, echo=True)
    (choice,) = scored.choices
    assert choice.finish_reason == "length" and token_ids(choice) == []
    assert scored.usage.completion_tokens == 0 and scored.usage.prompt_tokens == len(prompt) + 16
    assert choice.logprobs.token_logprobs[0] is None
    assert choice.logprobs.tokens[len(prompt) :] == written.logprobs.tokens
    scores = choice.logprobs.token_logprobs[len(prompt) :]
    assert scores == pytest.approx(written.logprobs.token_logprobs, abs=2e-2)
    by_text = drawn(demo, demo_sdk, tokens=0, echo=True).choices[0]
    assert by_text.text == "def main():"
    assert by_text.logprobs.token_logprobs[1:] == pytest.approx(
        choice.logprobs.token_logprobs[1 : len(prompt)], abs=2e-2
    )


def test_several_answers_of_a_seed_come_again(demo: Any, demo_sdk: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": demo.model, "messages": MESSAGES, "temperature": 1.0, "seed": 7, **exactly(24)}

    def words(n: int) -> list[str | None]:
        answer = demo_sdk.chat.completions.create(n=n, **asked)
        assert answer.usage is not None and answer.usage.completion_tokens == 24 * n
        return [choice.message.content for choice in answer.choices]

    three = words(3)
    assert words(3) == three and len(set(three)) == 3
    assert words(1) == three[:1]


def test_no_answer_ends_before_its_min_tokens(demo: Any, demo_sdk: openai.OpenAI) -> None:
    plain = token_ids(drawn(demo, demo_sdk, tokens=12).choices[0])
    stop = plain[2]

    def until_stop(min_tokens: int) -> Any:
        extra = {"stop_token_ids": [stop], "min_tokens": min_tokens}
        return drawn(demo, demo_sdk, tokens=12, extra_body=extra).choices[0]

    ended = until_stop(0)
    assert (token_ids(ended), ended.finish_reason) == (plain[: plain.index(stop) + 1], "stop")
    assert "".join(ended.logprobs.tokens[:-1]) == ended.text
    assert ended.logprobs.text_offset[-1] == len(ended.text)
    longer = until_stop(8)
    assert len(token_ids(longer)) >= 8 and stop not in token_ids(longer)[:8]


def test_an_answer_that_ends_at_once_has_one_entry_behind_its_prompt(demo: Any, demo_sdk: openai.OpenAI) -> None:
    """Who scores continuations adds up `token_logprobs[context:-1]` of such an answer: the last one is what was drawn."""
    end = read_tokenizer(find_model(DEMO)).eos_ids[0]
    asked: dict[str, Any] = {"model": demo.model, "temperature": 0, "max_tokens": 1, "logit_bias": {str(end): 100}}
    answer = demo_sdk.completions.create(
        prompt="def main():", echo=True, logprobs=1, extra_body={"return_token_ids": True}, **asked
    )
    choice, usage = answer.choices[0], answer.usage
    assert usage is not None and (choice.finish_reason, usage.completion_tokens) == ("stop", 1)
    assert token_ids(choice) == [end] and choice.text == "def main():"
    logprobs = choice.logprobs
    assert logprobs is not None and logprobs.tokens is not None and logprobs.text_offset is not None
    assert len(logprobs.tokens) == usage.prompt_tokens + 1
    assert "".join(logprobs.tokens[:-1]) == choice.text and logprobs.text_offset[-1] == len(choice.text)
    chat = demo_sdk.chat.completions.create(messages=MESSAGES, logprobs=True, **asked).choices[0]
    assert chat.logprobs is not None and chat.logprobs.content is not None
    (entry,) = chat.logprobs.content
    assert (entry.token, entry.bytes, chat.message.content) == (logprobs.tokens[-1], None, "")


def test_penalties_keep_an_answer_from_going_round(demo: Any, demo_sdk: openai.OpenAI) -> None:
    free = token_ids(drawn(demo, demo_sdk, tokens=40).choices[0])
    for fields in (
        {"frequency_penalty": 2.0},
        {"presence_penalty": 2.0},
        {"extra_body": {"repetition_penalty": 5.0}},
    ):
        varied = token_ids(drawn(demo, demo_sdk, tokens=40, **fields).choices[0])
        assert len(set(varied)) > len(set(free)), fields


def test_min_p_of_one_is_greedy(demo: Any, demo_sdk: openai.OpenAI) -> None:
    greedy = token_ids(drawn(demo, demo_sdk).choices[0])
    assert token_ids(drawn(demo, demo_sdk, temperature=1.5, seed=3, extra_body={"min_p": 1.0}).choices[0]) == greedy


def test_token_ids_go_in_as_they_came_out(demo: Any, demo_sdk: openai.OpenAI) -> None:
    first = drawn(demo, demo_sdk, prompt="x = 'é😀'", tokens=6).choices[0]
    prompt = [*first.model_extra["prompt_token_ids"], *token_ids(first)]
    second = drawn(demo, demo_sdk, prompt=prompt, tokens=6).choices[0]
    assert second.model_extra["prompt_token_ids"] == prompt
    whole = drawn(demo, demo_sdk, prompt="x = 'é😀'", tokens=12).choices[0]
    assert token_ids(whole) == [*token_ids(first), *token_ids(second)]


def test_the_simulated_engine_tells_no_probabilities(simulated: Any) -> None:
    with simulated.sdk() as sdk, pytest.raises(openai.BadRequestError) as raised:
        sdk.chat.completions.create(model=simulated.model, messages=MESSAGES, logprobs=True)
    assert raised.value.param == "logprobs"
