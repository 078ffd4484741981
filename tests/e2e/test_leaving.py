"""A client that leaves, wherever its request is, gives back at once what it held; nobody else notices."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from worker.simulated import SENTENCE

ENDLESS = 20_000  # more would not be admitted beside a neighbour: its footprint would break the floor
PLACES = 3
LONG_PROMPT = [7] * 100_000  # minutes of prefill on the small card
SMALL = {  # a step takes 3 ms, but arithmetic is dear
    "name": "small",
    "flops_per_second": 1e13,
    "host_seconds": 0.001,
    "levels": [{"name": "memory", "capacity_bytes": 1e12, "bytes_per_second": 1e13}],
}


@pytest.fixture(scope="module")
def server(simulated: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Room for three at once; prompts can be long."""
    path = tmp_path_factory.mktemp("hardware") / "small.json"
    path.write_text(json.dumps(SMALL))
    server = type(simulated)("--engine", "simulated", "--hardware", str(path), "--max-sequences", str(PLACES))
    yield server
    server.close()


@pytest.fixture
def neighbour(server: Any, until: Callable[..., Any]) -> Iterator[Any]:
    """Somebody else, who gets every token although others come and go."""
    server.wait_until_idle()
    stream = server.stream(ENDLESS).wait_for_text()
    yield stream
    so_far = len(stream.text)
    until(lambda: len(stream.text) > so_far)
    stream.leave()
    assert stream.error is None
    text = stream.text
    assert text == (SENTENCE * (len(text) // len(SENTENCE) + 1))[: len(text)]
    server.wait_until_idle()


def cancelled(server: Any) -> float:
    return float(server.gateway_metrics().value("headgate_requests_total", outcome="cancelled"))


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "in one piece"])
def test_while_it_decodes(server: Any, neighbour: Any, until: Callable[..., Any], stream: bool) -> None:
    before = cancelled(server)
    client = server.ask(ENDLESS, stream=stream, service_tier="flex")
    until(lambda: server.worker("headgate_requests_running") == 2)
    tokens = server.worker("headgate_generation_tokens_total")
    until(lambda: server.worker("headgate_generation_tokens_total") > tokens + 20)
    client.leave()
    until(lambda: server.worker("headgate_requests_running") == 1)
    until(lambda: cancelled(server) == before + 1)


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "in one piece"])
def test_while_its_prompt_is_computed(server: Any, neighbour: Any, until: Callable[..., Any], stream: bool) -> None:
    before, computed = cancelled(server), server.worker("headgate_prefill_tokens_total")
    client = server.ask(10, prompt=LONG_PROMPT, stream=stream, service_tier="flex")
    until(lambda: server.worker("headgate_prefill_tokens_total") > computed + 100)
    client.leave()
    until(lambda: server.worker("headgate_requests_running") == 1)
    until(lambda: cancelled(server) == before + 1)
    assert server.worker("headgate_prefill_tokens_total") < computed + len(LONG_PROMPT), "it was cut short"
    assert client.events == []


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "in one piece"])
def test_while_it_waits(server: Any, until: Callable[..., Any], stream: bool) -> None:
    server.wait_until_idle()
    before = cancelled(server)
    holders = [server.stream(ENDLESS, service_tier="flex").wait_for_text() for _ in range(PLACES)]
    client = server.ask(10, stream=stream, service_tier="flex")
    until(lambda: server.worker("headgate_requests_waiting") == 1)
    client.leave()
    until(lambda: server.worker("headgate_requests_waiting") == 0)
    until(lambda: cancelled(server) == before + 1)
    assert server.worker("headgate_requests_running") == PLACES
    for holder in holders:
        assert not holder.ended.is_set()
        holder.leave()
    server.wait_until_idle()
    assert server.post(max_tokens=2).json()["usage"]["completion_tokens"] == 2


def test_before_its_body_has_arrived(server: Any, until: Callable[..., Any]) -> None:
    before = cancelled(server)
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as sock:
        head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 999\r\n\r\n{"
        sock.sendall(head.encode())
        until(lambda: server.gateway_metrics().value("headgate_requests_open") == 1)
    until(lambda: cancelled(server) == before + 1)
    server.wait_until_idle()


def test_many_at_once_leave_nothing_behind(server: Any, until: Callable[..., Any]) -> None:
    server.wait_until_idle()
    clients = [server.ask(ENDLESS, stream=bool(n % 2), service_tier="flex") for n in range(60)]
    until(lambda: server.worker("headgate_requests_running") + server.worker("headgate_requests_waiting") == 60)
    for client in clients:
        client.leave()
    server.wait_until_idle()


def test_a_reader_that_never_reads_is_dropped_and_others_go_on(
    server: Any, neighbour: Any, until: Callable[..., Any]
) -> None:
    def dropped() -> float:
        return float(server.gateway_metrics().value("headgate_requests_total", outcome="slow_reader"))

    before = dropped()
    ends = server.worker("headgate_requests_ended_total", finish="cancelled")
    host, port = server.url.removeprefix("http://").split(":")
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect((host, int(port)))
        content = json.dumps(server.body(ENDLESS, prompt=["Hello"] * 2, stream=True, service_tier="flex")).encode()
        head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        sock.sendall(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)
        until(lambda: dropped() == before + 1, "the reader was not dropped")
        until(lambda: server.worker("headgate_requests_ended_total", finish="cancelled") == ends + 2)
