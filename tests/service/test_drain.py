"""The end of a gateway process, as its supervisor sees it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys

import httpx
import pytest
from gateway_under_test import raw_post

from scheduler.messages import Finish

CHILD = """
import json, socket, sys
from service.config import GatewayConfig
from service.server import run
run(GatewayConfig(**json.loads(sys.argv[2])), socket.socket(fileno=int(sys.argv[1])), lambda: print("ended", flush=True))
print("returned", flush=True)
"""


@pytest.fixture
def child(gateways):
    """A gateway process of its own, behind the socket of a gateway that has not been told to serve it."""
    started = []

    def start(**settings):
        gateway = gateways()
        sock = socket.socket()
        sock.bind(("127.0.0.1", 0))
        config = json.dumps({"workers": [gateway.worker.path], **settings})
        process = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(sock.fileno()), config],
            pass_fds=[sock.fileno()],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.getcwd()},
        )
        port = sock.getsockname()[1]
        sock.close()
        started.append(process)
        gateway.become(port)
        gateway.wait_until(lambda: ready(gateway))
        return gateway, process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def ready(gateway):
    try:
        return gateway.http.get("/readyz").status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_drain_turns_newcomers_away_and_lets_streams_finish(child, ids, number):
    gateway, process = child()
    gateway.worker.script = None
    with gateway.stream() as events:
        request = gateway.worker.next_request()
        gateway.worker.emit(request, ids.of("hello"))
        next(events)
        process.send_signal(number)
        gateway.wait_until(lambda: gateway.http.get("/v1/models").status_code == 503)
        assert gateway.http.get("/readyz").status_code == 503
        assert gateway.http.head("/readyz").status_code == 503
        with gateway.connect() as sock:
            sock.sendall(raw_post("/v1/chat/completions", {"model": "acme/tiny-chat"}))
            answer = sock.makefile("rb").read().lower()
        assert b"connection: close" in answer
        assert b'"code":"shutting_down"' in answer
        assert gateway.http.get("/healthz").status_code == 200
        gateway.worker.emit(request, [*ids.of(" world"), ids.end], Finish.STOP)
        rest = list(events)
    assert rest[-1] == "[DONE]"
    assert json.loads(rest[0])["choices"][0]["delta"]["content"] == " world"
    assert process.wait(10) == 0
    assert process.stdout.read().split() == ["ended", "returned"]


def test_drain_ends_the_rest_with_an_error_event(child, ids):
    gateway, process = child(drain_seconds=0.2)
    gateway.worker.script = None
    with gateway.stream() as events:
        request = gateway.worker.next_request()
        gateway.worker.emit(request, ids.of("hello"))
        next(events)
        process.send_signal(signal.SIGTERM)
        rest = list(events)
    assert json.loads(rest[0])["error"]["code"] == "shutting_down"
    assert rest[1:] == ["[DONE]"]
    assert process.wait(10) == 0
    assert gateway.worker.next_cancelled() == request.id


def test_idle_process_ends_at_once(child):
    _, process = child()
    process.send_signal(signal.SIGTERM)
    assert process.wait(3) == 0
