"""Who may come in, and with what rights: through real sockets, and as the SDK sees it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from gateway_under_test import MODEL, Cabinet, Gateway

from scheduler.messages import Finish
from service.access import is_this_machine
from service.app import create_app
from service.config import GatewayConfig

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
MESSAGES: Any = [{"role": "user", "content": "hi"}]
JSON = {"content-type": "application/json"}


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def sdk(gateway: Gateway, key: str) -> openai.OpenAI:
    return gateway.sdk.with_options(api_key=key)


def learn(gateway: Gateway) -> None:
    """It knows the keys of this moment, without the half second until it looks by itself."""
    gateway.server._door._access._keyring.reload()


def error(response: httpx.Response) -> tuple[int, str | None, str | None]:
    """Status, code and param, after a look at the shape."""
    body = response.json()["error"]
    assert body.keys() == {"message", "type", "param", "code"} and body["message"].endswith((".", "'."))
    assert response.headers["x-request-id"]
    return response.status_code, body["code"], body["param"]


@pytest.fixture
def guarded(gateways: Any, cabinet: Cabinet) -> Gateway:
    """A gateway that wants keys; `headers` of its client show a plain one of acme's."""
    key = cabinet.make()
    gateway: Gateway = gateways(data=cabinet.folder)
    gateway.http.headers.update(bearer(key))
    return gateway


# --- while there are no keys ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1", "127.8.9.1:80", "[::1]", "[::1]:8000"])
def test_a_host_that_is_this_machine_is_let_in(gateway, host):
    assert gateway.http.get("/v1/models", headers={"host": host}).status_code == 200


FOREIGN = ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "0.0.0.0", ""]


@pytest.mark.parametrize("host", [*FOREIGN, "10.0.0.1:8000", "[fd00::1]", "localhost:80@evil.example", "::1"])
def test_a_host_that_is_somebody_elses_name_for_this_machine_is_not(gateway, host):
    """DNS rebinding: the page is of evil.example, and so, to the browser, is this server."""
    for path in ("/v1/models", "/metrics", "/v1/nothing"):
        assert error(gateway.http.get(path, headers={"host": host})) == (403, "host_not_allowed", None)
    answer = gateway.http.post(CHAT, json={"model": MODEL, "messages": MESSAGES}, headers={"host": host})
    assert error(answer) == (403, "host_not_allowed", None)
    assert gateway.worker.requests.empty()


def test_probes_and_descriptions_are_for_everybody(gateway):
    for path in ("/healthz", "/readyz", "/openapi.json", "/docs"):
        assert gateway.http.get(path, headers={"host": "evil.example"}).status_code == 200


def test_who_tells_no_host_is_no_browser(gateway):
    with gateway.connect() as sock:
        sock.sendall(b"GET /v1/models HTTP/1.0\r\n\r\n")
        assert b" 200 " in sock.makefile("rb").readline()


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://localhost.evil.example", "file://"])
def test_pages_of_others_are_not_let_in(gateway, origin):
    for path in (CHAT, "/v1/headgate/reload"):
        answer = gateway.http.post(path, json={"model": MODEL, "messages": MESSAGES}, headers={"origin": origin})
        assert error(answer) == (403, "origin_not_allowed", None)


def test_own_pages_are_let_in(gateway):
    for origin in (gateway.url, "http://localhost:3000", "http://[::1]"):
        assert gateway.http.get("/v1/models", headers={"origin": origin}).status_code == 200


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", None])
def test_what_a_page_may_send_without_asking_is_no_request(gateway, kind):
    body = json.dumps({"model": MODEL, "messages": MESSAGES}).encode()
    headers = {} if kind is None else {"content-type": kind}
    assert error(gateway.http.post(CHAT, content=body, headers=headers))[0] == 415
    if kind is not None:
        assert error(gateway.http.post("/v1/headgate/reload", content=body, headers=headers))[0] == 415


def test_no_preflight_is_answered_with_permission(gateway, guarded):
    asks = {"origin": "http://localhost:3000", "access-control-request-method": "POST"}
    for one in (gateway, guarded):
        for path in (CHAT, "/v1/models", "/v1/headgate/reload"):
            answer = one.http.options(path, headers={**asks, "access-control-request-headers": "content-type"})
            assert answer.status_code in (401, 403, 405)
            assert not [name for name in answer.headers if name.startswith("access-control")]


def test_an_exposed_gateway_goes_by_any_name_but_serves_no_foreign_page(gateways):
    gateway = gateways(is_exposed=True)
    assert gateway.http.get("/v1/models", headers={"host": "gpu.example:8000"}).status_code == 200
    own = {"host": "gpu.example:8000", "origin": "http://gpu.example:8000"}
    assert gateway.http.get("/v1/models", headers=own).status_code == 200
    assert error(gateway.http.get("/v1/models", headers={**own, "origin": "http://evil.example"}))[0] == 403


def test_a_host_header_is_read_without_tricks():
    assert is_this_machine(b"localhost") and is_this_machine(b"[::1]:1")
    assert not any(
        map(is_this_machine, (b"localhost:", b"[::1", b"127.1", b"2130706433", b"\xff\xfe", b"[fe80::1%25lo]"))
    )


def test_the_first_key_locks_the_door(gateways, cabinet):
    """Without a restart; also for who is inside without one."""
    gateway = gateways(data=cabinet.folder)
    assert gateway.post().status_code == 200
    gateway.worker.script = None
    with gateway.stream() as events:
        gateway.worker.next_request()
        request = gateway.worker.next_request()
        gateway.worker.emit(request, [70])
        next(events)
        key = cabinet.make()
        assert json.loads(next(events))["error"]["code"] == "invalid_api_key"
    assert error(gateway.post()) == (401, "invalid_api_key", None)
    gateway.worker.script = [[]]
    assert sdk(gateway, key).chat.completions.create(model=MODEL, messages=MESSAGES).choices


# --- who asks ---------------------------------------------------------------------------------------------------------


def test_who_shows_no_key_or_a_wrong_one_is_told_as_openai_does(guarded, cabinet):
    for key in ("none", "hg-000000000000-nothing", cabinet.make() + "x"):
        with pytest.raises(openai.AuthenticationError) as caught:
            sdk(guarded, key).chat.completions.create(model=MODEL, messages=MESSAGES)
        assert (caught.value.code, caught.value.type) == ("invalid_api_key", "invalid_request_error")
        assert caught.value.request_id and key not in caught.value.message
    with pytest.raises(openai.AuthenticationError):
        sdk(guarded, "none").models.list()
    assert guarded.worker.requests.empty()


def test_every_path_of_the_api_wants_a_key(guarded):
    del guarded.http.headers["authorization"]
    for path in ("/v1/models", f"/v1/models/{MODEL}", "/v1/nothing", "/v1/", "/metrics"):
        assert error(guarded.http.get(path)) == (401, "invalid_api_key", None)
    for path in (CHAT, TEXT, "/v1/headgate/reload"):
        answer = guarded.http.post(path, json={})
        assert error(answer) == (401, "invalid_api_key", None)
        assert answer.headers["www-authenticate"] == "Bearer"
    for path in ("/healthz", "/readyz", "/openapi.json", "/docs"):
        assert guarded.http.get(path).status_code == 200


def test_no_body_is_read_for_a_stranger(guarded):
    """The answer is there before the first byte of it."""
    with guarded.connect() as sock:
        sock.sendall(f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000000\r\n\r\n".encode())
        assert b" 401 " in sock.makefile("rb").readline()


def test_the_key_may_come_in_azures_header(guarded, cabinet):
    del guarded.http.headers["authorization"]
    key = cabinet.make()
    learn(guarded)
    assert guarded.http.get("/v1/models", headers={"api-key": key}).status_code == 200


def test_a_foreign_host_with_a_key_is_let_in(guarded):
    headers = {"host": "gpu.example", "origin": "https://chat.example"}
    assert guarded.http.get("/v1/models", headers=headers).status_code == 200


def test_guessing_is_slowed(guarded):
    answers = [guarded.http.get("/v1/models", headers=bearer(f"hg-guess-{number}")) for number in range(40)]
    assert {answer.status_code for answer in answers} == {401, 429}
    assert error(answers[-1]) == (429, "rate_limit_exceeded", None)
    assert int(answers[-1].headers["retry-after"]) >= 1
    assert guarded.post().status_code == 429, "and so are strangers from the same address"


def test_ten_thousand_keys(gateways, cabinet):
    keys = [cabinet.make(tenant=f"t{number % 50}") for number in range(3)]
    with cabinet._objects._connection or pytest.fail("no file") as file:
        file.execute("BEGIN")
        keys += [cabinet.make(tenant=f"t{number % 50}") for number in range(9_997)]
        file.execute("COMMIT")
    cabinet.revoke(keys[5000])
    gateway = gateways(data=cabinet.folder)
    for place in (0, 4999, 9999):
        assert gateway.http.get("/v1/models", headers=bearer(keys[place])).status_code == 200
    assert gateway.http.get("/v1/models", headers=bearer(keys[5000])).status_code == 401
    cabinet.revoke(keys[4999])
    gateway.wait_until(lambda: gateway.http.get("/v1/models", headers=bearer(keys[4999])).status_code == 401)
    assert gateway.http.get("/v1/models", headers=bearer(keys[0])).status_code == 200


# --- rights -----------------------------------------------------------------------------------------------------------


def test_a_model_that_is_not_for_this_key(gateways, cabinet):
    key = cabinet.make(models=("acme/other",))
    gateway = gateways(data=cabinet.folder)
    with pytest.raises(openai.PermissionDeniedError) as caught:
        sdk(gateway, key).chat.completions.create(model=MODEL, messages=MESSAGES)
    assert (caught.value.code, caught.value.type) == ("model_not_allowed", "invalid_request_error")
    assert caught.value.param == "model" and "acme/other" in caught.value.message
    answer = gateway.http.post(CHAT, json={"model": "invented", "messages": MESSAGES}, headers=bearer(key))
    assert error(answer)[:2] == (403, "model_not_allowed"), "it says nothing about what there is"
    assert sdk(gateway, key).models.list().data == []
    with pytest.raises(openai.NotFoundError):
        sdk(gateway, key).models.retrieve(MODEL)


def test_a_model_that_is(gateways, cabinet):
    key = cabinet.make(models=(MODEL,))
    gateway = gateways(data=cabinet.folder)
    assert [model.id for model in sdk(gateway, key).models.list()] == [MODEL]
    assert sdk(gateway, key).models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.PermissionDeniedError):
        sdk(gateway, key).completions.create(model="another", prompt="hi")


@pytest.mark.parametrize(
    ("tiers", "default_tier", "asked", "served"),
    [
        ((), "default", None, "default"),
        ((), "priority", None, "priority"),
        ((), "flex", "auto", "flex"),
        ((), "flex", "default", "default"),
        ((), "flex", "scale", "default"),
        (("flex", "priority"), "default", None, "flex"),
        (("priority", "flex"), "flex", "fast", "priority"),
        (("flex",), "default", "auto", "flex"),
    ],
)
def test_the_tier_of_a_request(gateways, cabinet, tiers, default_tier, asked, served):
    key = cabinet.make(tiers=tiers, default_tier=default_tier)
    gateway = gateways(data=cabinet.folder)
    client = sdk(gateway, key)
    fields: Any = {} if asked is None else {"service_tier": asked}
    assert client.chat.completions.create(model=MODEL, messages=MESSAGES, **fields).service_tier == served
    assert gateway.worker.next_request().tier == served
    chunks = client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True, **fields)
    assert {chunk.service_tier for chunk in chunks} == {served}
    answer = client.completions.create(model=MODEL, prompt="hi", extra_body=fields)
    assert getattr(answer, "service_tier", None) == (served if asked else None)


def test_a_tier_that_is_not_for_this_key(gateways, cabinet):
    key = cabinet.make(tiers=("flex",))
    gateway = gateways(data=cabinet.folder)
    for asked in ("default", "priority", "fast", "scale"):
        with pytest.raises(openai.PermissionDeniedError) as caught:
            sdk(gateway, key).chat.completions.create(model=MODEL, messages=MESSAGES, service_tier=asked)  # type: ignore[arg-type]
        assert (caught.value.code, caught.value.param) == ("tier_not_allowed", "service_tier")
        assert "flex" in caught.value.message


def test_the_longest_context_of_a_key(gateways, cabinet, ids):
    key = cabinet.make(max_context_tokens=20)
    gateway = gateways(data=cabinet.folder)
    gateway.http.headers.update(bearer(key))
    for path, fields, param in (
        (CHAT, {"messages": [{"role": "user", "content": "a b c d e f g h i j k l m n o p"}]}, "messages"),
        (TEXT, {"prompt": "a b c d e f g h i j k l m n o p"}, "prompt"),
        (TEXT, {"prompt": [70] * 20}, "prompt"),
    ):
        answer = gateway.post(path, **fields)
        assert error(answer) == (400, "context_length_exceeded", param)
        assert "at most 20 tokens" in answer.json()["error"]["message"]
    assert gateway.post(TEXT, prompt=[70] * 15, max_tokens=50).status_code == 200
    assert gateway.worker.next_request().max_tokens == 5, "prompt and answer together"


@pytest.mark.parametrize("param", ["max_tokens", "max_completion_tokens"])
def test_the_longest_answer_of_a_key(gateways, cabinet, param):
    key = cabinet.make(max_output_tokens=9)
    gateway = gateways(data=cabinet.folder)
    gateway.http.headers.update(bearer(key))
    asked: list[tuple[str, dict[str, Any], int]] = [(CHAT, {}, 9), (CHAT, {param: 9}, 9), (CHAT, {param: 3}, 3)]
    asked += [(TEXT, {}, 9), (TEXT, {"max_tokens": None}, 9), (TEXT, {"max_tokens": 2}, 2)]
    for path, fields, most in asked:
        assert gateway.post(path, **fields).status_code == 200
        assert gateway.worker.next_request().max_tokens == most
    answer = gateway.post(CHAT, **{param: 10})
    assert error(answer) == (400, None, param) and "at most 9" in answer.json()["error"]["message"]
    assert error(gateway.post(TEXT, max_tokens=10)) == (400, None, "max_tokens")


def test_the_worker_learns_the_tenant(gateways, cabinet, gateway):
    key = cabinet.make(tenant="umbrella")
    one = gateways(data=cabinet.folder)
    one.http.headers.update(bearer(key))
    one.post()
    assert one.worker.next_request().tenant == "umbrella"
    gateway.post()
    assert gateway.worker.next_request().tenant == "anonymous"


# --- rights that end --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["revoked", "expired"])
def test_a_stream_ends_when_its_key_does(guarded, cabinet, how):
    key = cabinet.make()
    guarded.worker.script = None
    learn(guarded)
    with guarded.stream(key=key) as events:
        request = guarded.worker.next_request()
        guarded.worker.emit(request, [70])
        assert json.loads(next(events))["choices"]
        fields = {"revoked_at": time.time()} if how == "revoked" else {"expires_at": time.time() + 0.2}
        cabinet.change(key, **fields)
        ending = json.loads(next(events))["error"]
        assert (ending["code"], ending["type"], ending["param"]) == ("invalid_api_key", "invalid_request_error", None)
        assert next(events) == "[DONE]"
    assert guarded.worker.next_cancelled() == request.id
    assert error(guarded.http.get("/v1/models", headers=bearer(key))) == (401, "invalid_api_key", None)


@pytest.mark.parametrize("stream", [True, False])
def test_who_has_heard_nothing_yet_gets_a_status(guarded, cabinet, stream):
    key = cabinet.make()
    guarded.worker.script = None
    learn(guarded)
    with guarded.connect() as sock, sock.makefile("rb") as lines:
        body = {"model": MODEL, "messages": MESSAGES, "stream": stream}
        content = json.dumps(body).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\nauthorization: Bearer {key}\r\n"
        sock.sendall(head.encode() + f"content-length: {len(content)}\r\n\r\n".encode() + content)
        request = guarded.worker.next_request()
        cabinet.revoke(key)
        assert b" 401 " in lines.readline()
    assert guarded.worker.next_cancelled() == request.id


def test_a_body_that_still_comes_is_of_no_use_any_more(guarded, cabinet):
    key = cabinet.make()
    learn(guarded)
    content = json.dumps({"model": MODEL, "messages": MESSAGES}).encode()
    with guarded.connect() as sock, sock.makefile("rb") as lines:
        head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\nauthorization: Bearer {key}\r\n"
        sock.sendall(head.encode() + f"content-length: {len(content)}\r\n\r\n".encode() + content[:5])
        open_now = guarded.server._door._inside
        guarded.wait_until(lambda: len(open_now) == 1)
        cabinet.revoke(key)
        guarded.wait_until(lambda: all(visit.failure for visit in open_now))
        sock.sendall(content[5:])
        assert b" 401 " in lines.readline()
    assert guarded.worker.requests.empty()


def test_a_rotated_keys_stream_goes_on(guarded, cabinet, ids):
    key = cabinet.make()
    guarded.worker.script = None
    learn(guarded)
    with guarded.stream(key=key) as events:
        request = guarded.worker.next_request()
        guarded.worker.emit(request, ids.of("hello"))
        next(events)
        new = cabinet.rotate(key)
        learn(guarded)
        assert guarded.http.get("/v1/models", headers=bearer(new)).status_code == 200
        assert guarded.http.get("/v1/models", headers=bearer(key)).status_code == 401
        guarded.worker.emit(request, [ids.end], Finish.STOP)
        rest = list(events)
    assert json.loads(rest[-2])["choices"][0]["finish_reason"] == "stop" and rest[-1] == "[DONE]"


# --- for operators ----------------------------------------------------------------------------------------------------


def test_metrics_at_the_apis_port_are_for_admins(gateways, cabinet):
    plain, admin = cabinet.make(), cabinet.make(admin=True)
    gateway = gateways(data=cabinet.folder)
    assert error(gateway.http.get("/metrics"))[:2] == (401, "invalid_api_key")
    assert error(gateway.http.get("/metrics", headers=bearer(plain)))[:2] == (403, "admin_key_required")
    assert "headgate_build_info" in gateway.http.get("/metrics", headers=bearer(admin)).text


def test_a_reload_takes_keys_and_tenants(gateways, cabinet, tmp_path: Path):
    plain, admin = cabinet.make(), cabinet.make(admin=True)
    config = tmp_path / "headgate.toml"
    config.write_text("[tenants.acme]\nrequests_per_minute = 600\n")
    gateway = gateways(data=cabinet.folder, config_file=str(config))
    assert gateway.http.get("/v1/models", headers=bearer(plain)).headers["x-ratelimit-limit-requests"] == "600"

    config.write_text("[tenants.acme]\nrequests_per_minute = 700\n[tenants.umbrella]\n")
    third = cabinet.make()
    assert error(gateway.http.post("/v1/headgate/reload", headers=bearer(plain)))[:2] == (403, "admin_key_required")
    answer = gateway.http.post("/v1/headgate/reload", headers=bearer(admin))
    assert answer.json() == {"object": "headgate.reload", "keys": 3, "tenants": 2}
    assert gateway.http.get("/v1/models", headers=bearer(third)).headers["x-ratelimit-limit-requests"] == "700"

    for text in ("[tenants.acme]\nrequests_per_minute = 0\n", "[tenants", "tenants = 3\n"):
        config.write_text(text)
        answer = gateway.http.post("/v1/headgate/reload", headers=bearer(admin))
        assert error(answer)[:2] == (400, "configuration_faulty")
        assert "tenants" in answer.json()["error"]["message"] or "TOML" in answer.json()["error"]["message"]
    config.unlink()
    assert error(gateway.http.post("/v1/headgate/reload", headers=bearer(admin)))[0] == 400
    assert gateway.http.get("/v1/models", headers=bearer(third)).headers["x-ratelimit-limit-requests"] == "700"


def test_the_description_says_what_wants_a_key(gateway):
    paths = gateway.http.get("/openapi.json").json()["paths"]
    wants = {
        path for path, methods in paths.items() for one in methods.values() if one.get("security") == [{"key": []}]
    }
    assert wants == {CHAT, TEXT, "/v1/models", "/v1/models/{id}", "/v1/headgate/reload", "/metrics"}
    assert paths.keys() - wants == {"/healthz", "/readyz"}


def test_a_reload_without_keys_and_tenants(gateway):
    assert gateway.http.post("/v1/headgate/reload").json() == {"object": "headgate.reload", "keys": 0, "tenants": 0}


def test_a_gateway_does_not_start_with_limits_that_it_cannot_read(tmp_path: Path):
    config = tmp_path / "headgate.toml"
    config.write_text("[tenants.acme]\nrequests = 1\n")
    with pytest.raises(ValueError, match=r"tenants.acme.requests: there is no such limit"):
        create_app(GatewayConfig(workers=("/nowhere",), config_file=str(config)))
