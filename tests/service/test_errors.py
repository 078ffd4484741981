"""What is wrong with a request is said in OpenAI's shape, with the field's name and a sentence."""

from __future__ import annotations

import json
import re

import httpx
import openai
import pytest

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hi"}]


def check_shape(response: httpx.Response) -> dict[str, str | None]:
    """18: exactly these four; param and code are null or a string."""
    assert response.headers["content-type"] == "application/json"
    assert response.json().keys() == {"error"}
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert len(error["message"]) > 10
    assert all(error[name] is None or (isinstance(error[name], str) and error[name] != "None") for name in error)
    return error


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": "10"}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"seed": 1.5}, "seed"),
        ({"seed": 10**30}, "seed"),
        ({"stream": "yes"}, "stream"),
        ({"stream": 1}, "stream"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", ""]}, "stop"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop": [1]}, "stop"),
        ({"stop": {"a": 1}}, "stop"),
        ({"stop": "x" * 1001}, "stop"),
        ({"service_tier": "gold"}, "service_tier"),
        ({"service_tier": 1}, "service_tier"),
        ({"service_tier": ["flex"]}, "service_tier"),
        ({"stream": True, "stream_options": []}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": ["hi"]}, "messages[0]"),
        ({"messages": [{"content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "king", "content": "hi"}]}, "messages[0].role"),
        ({"messages": [*HELLO, {"role": "user", "content": 3}]}, "messages[1].content"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": ["hi"]}]}, "messages[0].content"),
        ({"model": None}, "model"),
        ({"model": ""}, "model"),
        ({"model": 3}, "model"),
        ({"ignore_eos": "no"}, "ignore_eos"),
        *[({"n": value}, "n") for value in (0, -1, 129, True, 1.5, "2", [1], 10**30)],
        *[({"best_of": value}, "best_of") for value in (2, 0, True, "1")],
        ({"n": 3, "best_of": 2}, "best_of"),
        *[
            ({name: value}, name)
            for name in ("presence_penalty", "frequency_penalty")
            for value in (2.01, -2.01, True, "1", [], 10**300)
        ],
        *[({"min_p": value}, "min_p") for value in (-0.1, 1.1, False, "0.1")],
        *[({"repetition_penalty": value}, "repetition_penalty") for value in (0, -1, 10.5, True, "1.1")],
        *[({"min_tokens": value}, "min_tokens") for value in (-1, 1.5, True, "1", 1 << 31, 10**30)],
        ({"min_tokens": 6, "max_tokens": 5}, "min_tokens"),
        ({"min_tokens": 4096}, "min_tokens"),  # more than the context leaves room for
        *[
            ({"stop_token_ids": value}, "stop_token_ids")
            for value in (5, "5", {}, [True], [1.5], ["1"], [-1], [100_000], [10**18], [1] * 65)
        ],
        *[
            ({"logit_bias": value}, "logit_bias")
            for value in (
                *([], "5", 5, {"a": 1}, {"-1": 1}, {"01": 1}, {"1.0": 1}, {"": 1}, {"٣": 1}, {"100000": 1}),
                *({"9" * 5000: 1}, {"5": 100.5}, {"5": -101}, {"5": True}, {"5": "1"}, {"5": None}, {"5": 10**300}),
                {str(id): 1 for id in range(1025)},
            )
        ],
        *[({"logprobs": value}, "logprobs") for value in (1, 0, "yes", [])],
        *[({"logprobs": True, "top_logprobs": value}, "top_logprobs") for value in (-1, 21, True, 1.5, "3", 10**30)],
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"top_logprobs": 0, "logprobs": False}, "top_logprobs"),
        ({"return_token_ids": 1}, "return_token_ids"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_wrong_value_is_named(gateway, fields, param, stream):
    """19: 400 invalid_request_error, with param. 37: empty stops. 46: unknown modality. 3: also when streaming."""
    response = gateway.post(**{"stream": stream, **fields})
    error = check_shape(response)
    assert response.status_code == 400
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert f"'{param}'" in error["message"]


def test_bounds_are_said_as_they_are(gateway):
    message = gateway.post(top_k=1 << 40).json()["error"]["message"]
    assert message == "'top_k' must be at most 2147483647."
    assert "at least -1." in gateway.post(top_k=-5).json()["error"]["message"]


def test_too_many_messages_are_counted_and_not_read(gateway):
    """What is wrong with the messages themselves is not even seen."""
    response = gateway.post(messages=[None] * 4097)
    assert response.status_code == 400
    assert response.json()["error"]["message"] == "'messages' takes at most 4096 messages, not 4097."
    assert check_shape(response)["param"] == "messages"


@pytest.mark.parametrize(("role", "status"), [("user", 200), ("king", 400)])
def test_large_body_is_checked_like_a_small_one(gateways, role, status):
    gateway = gateways(info={"context_tokens": 1 << 20, "max_prompt_tokens": 1 << 20})
    response = gateway.post(messages=[{"role": role, "content": "x" * (300 << 10)}])
    assert response.status_code == status, response.text
    if status == 400:
        assert check_shape(response)["param"] == "messages[0].role"


@pytest.mark.parametrize("field", ["model", "messages"])
def test_missing_field_is_named(gateway, field):
    """19."""
    body = {"model": "acme/tiny-chat", "messages": HELLO}
    del body[field]
    error = check_shape(gateway.http.post(CHAT, json=body))
    assert (error["param"], error["code"]) == (field, "missing_required_parameter")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("tool_choice", "auto"),
        ("tool_choice", "required"),
        ("functions", [{"name": "f"}]),
        ("response_format", {"type": "json_object"}),
        ("response_format", {"type": "json_schema", "json_schema": {}}),
        ("modalities", ["text", "audio"]),
        ("audio", {"voice": "alloy"}),
        ("prediction", {"type": "content", "content": "x"}),
        ("web_search_options", {}),
        ("tools", {}),
        ("function_call", {"name": "f"}),
        ("tool_choice", {"type": "function", "function": {"name": "f"}}),
        ("response_format", "json_object"),
        ("response_format", {"type": "text", "more": 1}),
        ("echo", True),
        ("prompt_logprobs", 1),
        ("truncate_prompt_tokens", 10),
        ("length_penalty", 0.5),
        ("use_beam_search", True),
        ("skip_special_tokens", False),
        ("include_stop_str_in_output", True),
        ("guided_json", {"type": "object"}),
        ("guided_regex", "a+"),
        ("guided_choice", ["a"]),
        ("guided_grammar", "root ::= 'a'"),
        ("structured_outputs", {"json": {}}),
        ("grammar", "root ::= 'a'"),
        ("json_schema", {}),
    ],
)
def test_known_but_not_offered_is_refused_by_name(gateway, field, value):
    """23, 34 and 40."""
    response = gateway.post(**{field: value})
    assert (response.status_code, check_shape(response)["param"]) == (400, field)


def test_values_that_change_nothing_are_taken(gateway):
    """23: neutral values, nulls, and fields that nobody knows."""
    neutral = {
        "n": 1,
        "logprobs": False,
        "top_logprobs": None,
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "logit_bias": {},
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "modalities": ["text"],
        "min_p": 0,
        "repetition_penalty": 1.0,
        "min_tokens": 0,
        "stop_token_ids": None,
        "bad_words": [],
        "include_stop_str_in_output": False,
        "temperature": None,
        "top_p": None,
        "top_k": None,
        "seed": None,
        "stop": None,
        "stream_options": None,
        "user": "someone",
        "metadata": {"a": "b"},
        "store": False,
        "chat_template_kwargs": {"x": 1},
        "no_such_field": [1, 2],
    }
    assert gateway.post(**neutral).status_code == 200
    assert gateway.post(stop=[]).status_code == 200


def test_unknown_model_is_404(gateway):
    """19, as the SDK sees it."""
    with pytest.raises(openai.NotFoundError) as caught:
        gateway.sdk.chat.completions.create(model="nobody/knows", messages=HELLO)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"text"',
        b"null",
        b'{"model": NaN}',
        b'{"temperature": Infinity}',
        b'{"min_p": NaN}',
        b'{"logit_bias": {"5": -Infinity}}',
        b'{"temperature": 1e999}',
        b"[" * 100_000,
        b'{"a":' * 2000 + b"1" + b"}" * 2000,
        b'{"model": "\xff"}',
        b'{"model": "\\ud800"}',
        b"\xef\xbb\xbf{}",
    ],
)
def test_what_is_not_json_is_400(gateway, body):
    """19: never a 500."""
    response = gateway.http.post(CHAT, content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert check_shape(response)["type"] == "invalid_request_error"


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "", "jsonish"])
def test_other_content_type_is_415(gateway, content_type):
    """51."""
    body = json.dumps({"model": "acme/tiny-chat", "messages": HELLO})
    response = gateway.http.post(CHAT, content=body, headers={"content-type": content_type})
    assert response.status_code == 415
    check_shape(response)


def test_json_with_a_charset_is_json(gateway):
    body = json.dumps({"model": "acme/tiny-chat", "messages": HELLO})
    response = gateway.http.post(CHAT, content=body, headers={"content-type": "application/json; charset=utf-8"})
    assert response.status_code == 200


@pytest.mark.parametrize("chunked", [False, True])
def test_body_over_the_limit_is_413_and_the_connection_lives(gateways, chunked):
    """51: also for a body that does not say its length."""
    gateway = gateways(body_limit_bytes=1 << 20)
    body = json.dumps({"model": "acme/tiny-chat", "messages": [{"role": "user", "content": "x" * (3 << 20)}]}).encode()
    pieces = (body[at : at + 65536] for at in range(0, len(body), 65536)) if chunked else body
    response = gateway.http.post(CHAT, content=pieces, headers={"content-type": "application/json"})
    assert response.status_code == 413
    check_shape(response)
    assert gateway.post().status_code == 200


def test_all_bodies_together_are_bounded(gateways):
    gateway = gateways(bodies_limit_bytes=100_000)
    response = gateway.post(messages=[{"role": "user", "content": "x" * 100_000}])
    assert response.status_code == 429
    assert check_shape(response)["code"] == "queue_full"
    assert gateway.post().status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/v1", 404),
        ("POST", "/v1/embeddings", 404),
        ("GET", "/v1/models/", 404),
        ("GET", "/v1/chat/completions", 405),
        ("OPTIONS", "/v1/chat/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("POST", "/healthz", 405),
    ],
)
def test_wrong_path_or_method_has_the_shape(gateway, method, path, status):
    """18 and 51."""
    response = gateway.http.request(method, path)
    assert response.status_code == status
    check_shape(response)
    if status == 405:
        assert response.headers["allow"]


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/v1/models", 200),
        ("/v1/models/acme/tiny-chat", 200),
        ("/v1/models/acme/other", 404),
        ("/healthz", 200),
        ("/readyz", 200),
        ("/metrics", 200),
        ("/nowhere", 404),
        ("/v1/chat/completions", 405),
    ],
)
def test_head_is_get_without_the_body(gateway, path, status):
    """51."""
    response = gateway.http.head(path)
    assert response.status_code == gateway.http.get(path).status_code == status
    assert response.content == b""
    assert response.headers["content-type"] == gateway.http.get(path).headers["content-type"]
    assert gateway.http.get("/healthz").json() == {"status": "ok"}


@pytest.mark.parametrize("path", ["/v1/models", "/healthz", "/metrics", "/nowhere"])
def test_every_answer_has_a_request_id(gateway, path):
    """22."""
    first, second = (gateway.http.get(path).headers["x-request-id"] for _ in range(2))
    assert first != second
    assert gateway.http.get(path, headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"


@pytest.mark.parametrize("fields", [{}, {"stream": True}, {"temperature": 9}, {"model": "nobody/knows"}])
def test_clients_request_id_is_honoured(gateway, fields):
    """22: on success, on streams and on errors."""
    body = {"model": "acme/tiny-chat", "messages": HELLO, **fields}
    response = gateway.http.post(CHAT, json=body, headers={"x-request-id": "abc-123"})
    assert response.headers.get_list("x-request-id") == ["abc-123"]


@pytest.mark.parametrize("id", ["x" * 129, "two words", "é".encode(), ""])
def test_insane_request_id_is_replaced(gateway, id):
    """22."""
    answered = gateway.http.get("/healthz", headers={"x-request-id": id}).headers["x-request-id"]
    assert answered.startswith("req_")


def test_what_is_not_http_gets_the_shape(gateway):
    """18."""
    with gateway.connect() as sock:
        sock.sendall(b"\x16\x03\x01 this is TLS\r\n\r\n")
        answer = sock.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 400")
    assert b'{"error":{"message":' in answer


def test_openapi_describes_the_routes(gateway):
    paths = gateway.http.get("/openapi.json").json()["paths"]
    schema = paths[CHAT]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert {"model", "messages", "max_completion_tokens"} <= schema["properties"].keys()
    assert "$ref" not in json.dumps(schema)


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
def test_openapi_says_what_is_taken(gateway, path):
    paths = gateway.http.get("/openapi.json").json()["paths"]
    fields = paths[path]["post"]["requestBody"]["content"]["application/json"]["schema"]["properties"]
    assert (fields["n"]["minimum"], fields["n"]["maximum"], fields["n"]["default"]) == (1, 128, 1)
    assert (fields["presence_penalty"]["minimum"], fields["presence_penalty"]["maximum"]) == (-2, 2)
    assert fields["min_tokens"]["minimum"] == 0
    assert [kind["type"] for kind in fields["stop"]["anyOf"]] == ["string", "array"]
    assert fields["logit_bias"]["type"] == "object" and "default" not in fields["logit_bias"]
    assert not {"ge", "le", "gt", "lt"} & set(re.findall(r'"(\w+)":', json.dumps(fields)))
    if path != CHAT:
        text, texts, ids, several = fields["prompt"]["anyOf"]
        assert (text, texts["items"]) == ({"type": "string"}, {"type": "string"})
        assert ids["items"]["type"] == "integer" and several["items"]["items"] == ids["items"]
