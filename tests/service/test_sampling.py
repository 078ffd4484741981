"""What shapes the draw reaches the worker as the client said it."""

from __future__ import annotations

import pytest

from scheduler.messages import Finish, Sampling

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


def sampling_of(gateway, path=CHAT, **fields) -> Sampling:
    response = gateway.post(path, **fields)
    assert response.status_code == 200, response.text
    return gateway.worker.next_request().sampling


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_all_of_it_reaches_the_worker(gateway, path):
    sampling = sampling_of(
        gateway,
        path,
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        seed=3,
        min_p=0.1,
        repetition_penalty=1.2,
        presence_penalty=-0.5,
        frequency_penalty=2,
        logit_bias={"20": -100, "3": 5, "7": 0},
        min_tokens=4,
    )
    assert sampling == Sampling(0.5, 0.9, 7, 3, 0.1, 1.2, -0.5, 2.0, ((3, 5.0), (20, -100.0)), 4)


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_nulls_are_as_if_nothing_was_said(gateway, path):
    names = ("n", "best_of", "presence_penalty", "frequency_penalty", "logit_bias", "min_p", "repetition_penalty")
    more = ("min_tokens", "stop_token_ids", "return_token_ids", "logprobs")
    sampling = sampling_of(gateway, path, seed=1, **dict.fromkeys((*names, *more)))
    assert sampling == Sampling(seed=1)


def test_model_has_its_own_min_p_and_repetition_penalty(gateways):
    gateway = gateways(info={"min_p": 0.05, "repetition_penalty": 1.1})
    sampling = sampling_of(gateway)
    assert (sampling.min_p, sampling.repetition_penalty) == (0.05, 1.1)
    sampling = sampling_of(gateway, min_p=0, repetition_penalty=1)
    assert (sampling.min_p, sampling.repetition_penalty) == (0, 1)


def test_bounds_themselves_are_inside(gateway):
    for fields in (
        {"presence_penalty": 2, "frequency_penalty": -2, "min_p": 1, "repetition_penalty": 10},
        {"logit_bias": {str(id): 100 for id in range(300)}},
        {"logprobs": True, "top_logprobs": 20},
        {"stop_token_ids": [0] * 64, "min_tokens": 5, "max_tokens": 5},
        {"n": 128},
    ):
        assert gateway.post(**fields).status_code == 200, fields


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_stop_ids_join_those_of_the_model(gateway, ids, worker_info, ignore_eos):
    """They end an answer with reason stop, unseen; also where the model's own do not."""
    (stop,) = ids.of("!")
    gateway.worker.script = [*ids.one_by_one("hello"), [stop]]
    answer = gateway.post(stop_token_ids=[stop, stop], ignore_eos=ignore_eos).json()
    assert answer["choices"][0]["message"]["content"] == "hello"
    assert answer["choices"][0]["finish_reason"] == "stop"
    request = gateway.worker.next_request()
    assert request.stop_ids == {stop, *(() if ignore_eos else worker_info.eos_ids)}
    assert request.ignore_eos == ignore_eos


@pytest.mark.parametrize("stream", [False, True])
def test_no_stop_string_ends_an_answer_before_its_min_tokens(gateway, ids, stream):
    gateway.worker.script = ids.bytewise("a.b.c.d")
    gateway.worker.finish = Finish.RUNNING
    asked = {"stop": ".", "min_tokens": 4}
    if stream:
        text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in gateway.chunks(**asked))
    else:
        text = gateway.post(**asked).json()["choices"][0]["message"]["content"]
    assert text == "a.b.c"


def test_min_tokens_beyond_what_may_be_generated_are_refused(gateway):
    error = gateway.post(min_tokens=9, max_tokens=8).json()["error"]
    assert error["message"] == "'min_tokens' is 9, but no more than 8 tokens may be generated."
    assert gateway.post(TEXT, min_tokens=1, max_tokens=0).json()["error"]["param"] == "min_tokens"
    assert gateway.post(TEXT, min_tokens=17).json()["error"]["param"] == "min_tokens"  # 16 by default


@pytest.mark.parametrize(("field", "value"), [("stop_token_ids", [1 << 20]), ("logit_bias", {str(1 << 20): 1})])
def test_ids_beyond_the_vocabulary_are_named(gateway, field, value):
    error = gateway.post(**{field: value}).json()["error"]
    assert error["param"] == field
    assert error["message"].startswith(f"'{field}' holds 1048576, which is no token id: they are 0 to ")


def test_ids_that_only_the_tokenizer_knows_are_refused(gateways, ids):
    """A model may have been given fewer tokens than its tokenizer has, or more (then nobody could name them)."""
    gateway = gateways(info={"vocabulary": ids.end})
    for path, fields, name in [
        (CHAT, {"logit_bias": {str(ids.end): 1}}, "logit_bias"),
        (CHAT, {"stop_token_ids": [ids.end]}, "stop_token_ids"),
        (TEXT, {"prompt": [ids.end]}, "prompt"),
        (TEXT, {"prompt": "a<|im_end|>"}, "prompt"),
        (CHAT, {}, "messages"),  # the template writes it
    ]:
        response = gateway.post(path, **fields)
        assert (response.status_code, response.json()["error"]["param"]) == (400, name)
    assert gateway.post(TEXT, prompt=[ids.end - 1], logit_bias={str(ids.end - 1): 1}).status_code == 200
    larger = gateways(info={"vocabulary": 10**6})
    assert larger.post(logit_bias={"999999": 1}).json()["error"]["param"] == "logit_bias"
    assert larger.post().status_code == 200
