"""Whatever is killed: requests end, the rest goes on, what died comes back, and nothing is left behind."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")

ENDLESS = 100_000


@pytest.fixture(scope="module")
def server(quick: tuple[str, ...], simulated: Any) -> Iterator[Any]:
    """Its tests kill parts of it and wait until it is whole again."""
    server = type(simulated)(*quick)
    yield server
    server.close()


def others_of(server: Any, *killed: str) -> dict[str, list[int]]:
    return {role: server.pids(role) for role in ("gateway", "front", "engine") if role not in killed}


def serves(server: Any) -> bool:
    answer = server.post(max_tokens=3)
    assert answer.status_code in (200, 503), answer.text
    return bool(answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 3)


@pytest.mark.parametrize("victim", ["front", "engine"])
def test_a_worker_that_dies_ends_its_requests_with_an_error_and_comes_back(
    server: Any, until: Callable[..., Any], victim: str
) -> None:
    until(server.is_ready)
    others = others_of(server, "front", "engine")
    streams = [server.stream(ENDLESS).wait_for_text() for _ in range(3)]
    killed = server.kill(victim)
    for stream in streams:
        stream.wait()
        assert stream.error is not None and stream.error["code"] == "worker_failed", stream.events[-1]
        assert stream.events[-1] == "[DONE]" and stream.whole
    until(lambda: server.status("/readyz") == 503)
    assert server.status("/healthz") == 200, "the gateway lives"
    until(server.is_ready)
    until(lambda: serves(server))
    assert others_of(server, "front", "engine") == others, "the gateway was not restarted"
    until(lambda: len(server.pids("engine")) == 1 and len(server.pids("front")) == 1)
    assert killed not in server.pids()
    assert "the worker ended" in server.said and "Traceback" not in server.said


def test_a_worker_that_dies_answers_who_waits_for_one_piece_with_503(server: Any, until: Callable[..., Any]) -> None:
    until(server.is_ready)
    server.wait_until_idle()
    answers = []
    thread = threading.Thread(target=lambda: answers.append(server.post(ENDLESS)))
    thread.start()
    until(lambda: server.worker("headgate_requests_running") == 1)
    server.kill("engine")
    thread.join(60)
    (answer,) = answers
    assert answer.status_code == 503, answer.text
    assert answer.json()["error"]["code"] == "worker_failed", answer.text
    assert int(answer.headers["retry-after"]) >= 1
    until(server.is_ready)


def test_a_gateway_that_dies_breaks_its_connections_and_comes_back_while_the_worker_goes_on(
    server: Any, until: Callable[..., Any]
) -> None:
    until(server.is_ready)
    others = others_of(server, "gateway")
    streams = [server.stream(ENDLESS).wait_for_text() for _ in range(3)]
    until(lambda: server.worker("headgate_requests_running") == 3)
    server.kill("gateway")
    for stream in streams:
        stream.wait()
        assert not stream.whole and not stream.finished, "the connection broke"
    until(server.is_ready)
    server.wait_until_idle()  # the dead gateway's requests are gone from the worker
    assert serves(server)
    assert others_of(server, "gateway") == others, "the worker was not restarted"


def test_a_gateway_that_dies_in_a_rush_leaves_no_request_behind(server: Any, until: Callable[..., Any]) -> None:
    """Requests of a dead gateway that were still on their way to the worker must not run for nobody."""
    until(server.is_ready)
    streams = [server.stream(ENDLESS) for _ in range(100)]
    server.kill("gateway")
    until(server.is_ready)
    for stream in streams:
        stream.leave()  # connections that nobody had taken yet are served by the new gateway
    server.wait_until_idle()


def test_a_supervisor_that_dies_takes_everything_along(serve: Callable[..., Any], until: Callable[..., Any]) -> None:
    server = serve()
    stream = server.stream(ENDLESS).wait_for_text()
    assert len(server.pids()) == 3
    server.process.kill()
    assert server.wait() == -signal.SIGKILL  # waits until no process of it is left
    assert not stream.wait().finished
    until(lambda: server.left_behind() == [], "the runtime folder is still there")
    until(server.can_be_bound_again)


def test_a_worker_that_is_stopped_during_its_start_makes_the_gateway_say_so(
    serve: Callable[..., Any], until: Callable[..., Any]
) -> None:
    server = serve(wait=False)
    engine = server.pid("engine")
    os.kill(engine, signal.SIGSTOP)
    try:
        assert "ready:" not in server.said
        server.url = until(lambda: api_url(server))
        until(lambda: server.status("/healthz") == 200)
        assert server.status("/readyz") == 503
        server.model = "any"
        answer = server.post()
        assert answer.status_code == 503 and set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert int(answer.headers["retry-after"]) >= 1
        assert server.get("/v1/models").json() == {"object": "list", "data": []}
    finally:
        os.kill(engine, signal.SIGCONT)
    server.wait_for_the_greeting()
    assert server.status("/readyz") == server.status("/healthz") == 200
    assert serves(server)


def api_url(server: Any) -> str:
    """Where it listens, before it has said so: the gateway's one inherited TCP socket."""
    for pid in server.pids("gateway"):
        with open(f"/proc/{pid}/net/tcp") as table:
            listening = {row[9]: int(row[1].split(":")[1], 16) for row in map(str.split, table) if row[3] == "0A"}
        for fd in os.listdir(f"/proc/{pid}/fd"):
            target = os.readlink(f"/proc/{pid}/fd/{fd}")
            if target.startswith("socket:[") and target[8:-1] in listening:
                return f"http://127.0.0.1:{listening[target[8:-1]]}"
    return ""


def test_a_worker_that_hangs_makes_the_gateway_unready_until_it_goes_on(server: Any, until: Callable[..., Any]) -> None:
    until(server.is_ready)
    engine = server.pid("engine")
    os.kill(engine, signal.SIGSTOP)
    try:
        until(lambda: server.status("/readyz") == 503)
        assert server.status("/healthz") == 200
    finally:
        os.kill(engine, signal.SIGCONT)
    until(server.is_ready)
    until(lambda: serves(server))
