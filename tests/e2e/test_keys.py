"""Keys from the command line to the answer: made, used, revoked and never written down, with real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")

TALKING = str(Path(__file__).with_name("talking"))
MARK = "Xyzzy"  # in everything that is nobody's business


def keys(data: Path, *arguments: str) -> str:
    """What `headgate keys …` prints."""
    command = [sys.executable, "-P", "-m", "headgate", "keys", *arguments, "--data", str(data)]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HEADGATE_")}
    return subprocess.run(command, env=clean, stdout=subprocess.PIPE, text=True, timeout=30, check=True).stdout.strip()


def client(server: Any, key: str, **settings: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=30, **settings)


def endless(server: Any, key: str) -> Any:
    """A stream that goes on until somebody ends it."""
    fields = {"prompt": MARK, "max_tokens": 100_000, "stream": True, "extra_body": {"ignore_eos": True}}
    return client(server, key).completions.create(model=server.model, **fields)


def test_a_key_is_made_used_and_revoked_while_the_server_runs(
    serve: Callable[..., Any], until: Callable[..., Any], tmp_path: Path
) -> None:
    config = tmp_path / "headgate.toml"
    config.write_text("[tenants.acme]\nrequests_per_minute = 600\n")
    data = tmp_path / "data"
    server = serve("--data", str(data), "--config", str(config))
    assert server.post(1).status_code == 200, "open while there are none"

    first = keys(data, "create", "--tenant", "acme", "--tiers", "flex")
    admin = keys(data, "create", "--tenant", "ops", "--admin")
    until(lambda: server.post(1).status_code == 401)
    mine = client(server, first)
    answer = mine.completions.with_raw_response.create(model=server.model, prompt="Hello", max_tokens=3)
    assert answer.headers["x-ratelimit-limit-requests"] == "600"
    assert answer.parse().usage.completion_tokens == 3
    with pytest.raises(openai.PermissionDeniedError):
        mine.completions.create(model=server.model, prompt="Hello", extra_body={"service_tier": "priority"})

    config.write_text("[tenants.acme]\nrequests_per_minute = 1200\n")
    server.process.send_signal(signal.SIGHUP)
    limits = lambda: mine.models.with_raw_response.list().headers["x-ratelimit-limit-requests"]  # noqa: E731
    until(lambda: limits() == "1200")
    config.write_text("[tenants.acme]\nrequests_per_minute = -1\n")
    server.process.send_signal(signal.SIGHUP)
    until(lambda: "keys and tenants stay as they were" in server.said)
    assert "tenants.acme.requests_per_minute: must be a whole number from 1" in server.said and limits() == "1200"
    answer = httpx.post(f"{server.url}/v1/headgate/reload", headers={"api-key": admin})
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "configuration_faulty"

    stream = endless(server, first)
    next(stream)
    keys(data, "revoke", first)
    with pytest.raises(openai.APIError) as caught:
        list(stream)
    assert caught.value.code == "invalid_api_key"
    until(lambda: server.worker("headgate_requests_running") == 0)
    with pytest.raises(openai.AuthenticationError):
        mine.models.list()

    told = httpx.get(f"{server.url}/metrics", headers={"api-key": admin}).text
    assert 'tenant="acme"' in told and first not in told and admin not in told
    until(lambda: server.worker("headgate_tenant_step_seconds_total", tenant="acme") > 0)


def test_keys_prompts_and_headers_are_never_written_down(
    serve: Callable[..., Any], until: Callable[..., Any], tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shown = [keys(data, "create", "--tenant", "acme", *more) for more in ((), ("--admin",), ())]
    key, admin, ended = shown
    server = serve("--data", str(data), environ={"PYTHONPATH": TALKING, "PYTHONASYNCIODEBUG": "1"})
    marked = client(server, key, default_headers={"x-request-purpose": MARK, "cookie": f"session={MARK}"})

    marked.completions.create(model=server.model, prompt=f"{MARK} was here", max_tokens=2, user=MARK)
    messages: Any = [{"role": "user", "content": MARK, "name": MARK}]
    marked.chat.completions.create(model=server.model, messages=messages, max_tokens=2)
    list(marked.chat.completions.create(model=server.model, messages=messages, max_tokens=2, stream=True))
    for wrong in ({"model": MARK}, {"stop": [MARK] * 9}, {"temperature": MARK}, {"service_tier": MARK}):
        with pytest.raises(openai.APIStatusError):
            marked.chat.completions.create(**({"model": server.model, "messages": messages} | wrong))  # type: ignore[call-overload]
    for body in (MARK, json.dumps([MARK]), f'{{"model": "{MARK}"'):
        post = {"content": body, "headers": {"api-key": key, "content-type": "application/json"}}
        assert httpx.post(f"{server.url}/v1/completions", **post).status_code == 400
    assert httpx.get(f"{server.url}/v1/{MARK}?key={key}", headers={"api-key": key}).status_code == 404
    for stranger in (f"hg-aaaaaaaaaaaa-{MARK}", MARK, key + MARK):
        with pytest.raises(openai.AuthenticationError):
            client(server, stranger).models.list()
    with endless(server, key) as left:
        next(left)
    ending = endless(server, ended)
    next(ending)
    keys(data, "revoke", ended)
    with pytest.raises(openai.APIError):
        list(ending)
    httpx.post(f"{server.url}/v1/headgate/reload", headers={"api-key": admin}).raise_for_status()
    until(lambda: "the client left" in server.said)  # said at debug level: so all levels are heard
    server.process.terminate()
    server.wait()

    assert "DEBUG" in server.said
    written = {"output": server.said.encode()}
    for folder in (data, server.folder, server.data):
        written |= {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert any(name.endswith("headgate.db") for name in written)
    for secret in (MARK, *(one.split("-", 2)[2] for one in shown)):
        assert not [name for name, content in written.items() if secret.encode() in content], secret
