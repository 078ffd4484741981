"""Clients that leave, stall, or send half of what they promised."""

from __future__ import annotations

import socket

import pytest
from gateway_under_test import join_deltas, raw_post, read_events

from scheduler.messages import Finish, Reason, Wait

CHAT = "/v1/chat/completions"
BODY = {"model": "acme/tiny-chat", "messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stage", ["deciding", "waiting", "prefill", "decode"])
def test_client_that_leaves_frees_its_request_at_once(gateway, ids, stream, stage):
    """47: in every stage, streamed or not; counted as cancelled, not as an error."""
    gateway.worker.script = None
    if stage == "waiting":
        gateway.worker.decide = lambda request: Wait(5.0, Reason.TIME_BUDGET)
    elif stage == "deciding":
        gateway.worker.undecided = True
    before = gateway.outcome("cancelled"), gateway.outcome("error")
    with gateway.connect() as sock:
        sock.sendall(raw_post(CHAT, {**BODY, "stream": stream}))
        request = gateway.worker.next_request()
        if stage == "decode":
            gateway.worker.emit(request, ids.of("hello"))
            if stream:
                assert sock.recv(100).startswith(b"HTTP/1.1 200")
    assert gateway.worker.next_cancelled() == request.id
    if stage == "deciding":
        gateway.worker.undecided = False
        assert gateway.worker.next_cancelled() == request.id  # the first may have overtaken the request
    gateway.wait_until(lambda: gateway.outcome("cancelled") == before[0] + 1)
    assert gateway.outcome("error") == before[1]


def test_finished_requests_are_not_cancelled(gateway, ids):
    gateway.worker.script = ids.answer("hello")
    assert gateway.post().status_code == 200
    assert gateway.chunks()
    with gateway.connect() as sock:
        sock.sendall(raw_post(CHAT, BODY))
        assert sock.recv(20)
    gateway.wait_until(lambda: gateway.metric("headgate_requests_open") == 0)
    assert gateway.worker.cancelled.empty()


def test_reader_that_stalls_is_cut_off(gateways, ids):
    """A stalled reader costs a bounded amount of memory, then its connection."""
    gateway = gateways(reader_backlog_bytes=64 << 10)
    gateway.worker.script = None
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect(("127.0.0.1", gateway.port))
    with sock:
        sock.sendall(raw_post(CHAT, {**BODY, "stream": True, "max_tokens": 4000}))
        request = gateway.worker.next_request()
        text = ids.of("the quick brown fox jumps over the lazy dog") * 100
        for _ in range(3000):
            gateway.worker.emit(request, text)
            if not gateway.worker.cancelled.empty():
                break
        assert gateway.worker.next_cancelled() == request.id
        gateway.wait_until(lambda: gateway.outcome("slow_reader") == 1)
        assert b"[DONE]" not in sock.makefile("rb").read()


def test_reader_that_takes_nothing_is_not_waited_for_for_ever(gateways, ids):
    """It may stall with less than the backlog, after the last token."""
    gateway = gateways(reader_backlog_bytes=64 << 20, reader_seconds=0.2)
    gateway.worker.script = [ids.of("the quick brown fox jumps over the lazy dog") * 500 for _ in range(100)]
    gateway.worker.finish = Finish.LENGTH
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", gateway.port))
        sock.sendall(raw_post(CHAT, {**BODY, "stream": True}))
        gateway.wait_until(lambda: gateway.outcome("slow_reader") == 1)


def test_reader_that_lags_gets_everything(gateways, ids):
    """Below the bound nothing is lost, and the order is kept."""
    gateway = gateways(reader_backlog_bytes=8 << 20)
    gateway.worker.script = None
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    sock.connect(("127.0.0.1", gateway.port))
    words = [f"{number} " for number in range(3000)]
    with sock, sock.makefile("rb") as lines:
        sock.sendall(raw_post(CHAT, {**BODY, "stream": True}))
        request = gateway.worker.next_request()
        for word in words:
            gateway.worker.emit(request, ids.of(word))
        gateway.worker.emit(request, [ids.end], Finish.STOP)
        text = join_deltas(event for event in read_events(lines) if event != "[DONE]")
    assert text == "".join(words)


def test_half_a_body_then_nobody(gateway):
    before = gateway.outcome("cancelled")
    with gateway.connect() as sock:
        sock.sendall(raw_post(CHAT, BODY)[:-10])
        gateway.wait_until(lambda: gateway.metric("headgate_requests_open") == 1)
    gateway.wait_until(lambda: gateway.outcome("cancelled") == before + 1)
    assert gateway.worker.requests.empty()


def test_body_that_does_not_go_on_is_408(gateways):
    gateway = gateways(body_seconds=0.1)
    with gateway.connect() as sock:
        sock.sendall(raw_post(CHAT, BODY)[:-10])
        answer = sock.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 408")
    assert b'{"error":{' in answer


def test_pipelined_requests_are_answered_in_order(gateway, ids):
    """51: two streams and a question on one connection."""
    gateway.worker.script = ids.answer("hello")
    get = b"GET /healthz HTTP/1.1\r\nhost: gateway\r\nconnection: close\r\n\r\n"
    with gateway.connect() as sock:
        sock.sendall(raw_post(CHAT, {**BODY, "stream": True}) * 2 + get)
        answer = sock.makefile("rb").read()
    assert answer.count(b"HTTP/1.1 200") == 3
    assert answer.count(b"data: [DONE]\n\n") == 2
    assert answer.endswith(b'{"status":"ok"}')


def test_connection_is_kept_after_a_stream(gateway, ids):
    """2 and 51."""
    gateway.worker.script = ids.answer("hello")
    with gateway.connect() as sock, sock.makefile("rb") as answer:
        for _ in range(3):
            sock.sendall(raw_post(CHAT, {**BODY, "stream": True}))
            while answer.readline() != b"0\r\n":
                pass
            assert answer.readline() == b"\r\n"


def test_client_that_leaves_with_a_request_in_the_pipeline(gateway, ids):
    """47 and 51: the one being answered is freed, the one behind it never starts."""
    gateway.worker.script = None
    with gateway.connect() as sock:
        sock.sendall(raw_post(CHAT, {**BODY, "stream": True}))
        request = gateway.worker.next_request()
        gateway.worker.emit(request, ids.of("hello"))
        assert sock.recv(1000)
    assert gateway.worker.next_cancelled() == request.id
    gateway.wait_until(lambda: gateway.metric("headgate_requests_open") == 0)
    gateway.worker.script = ids.answer("hello")
    assert gateway.post().status_code == 200
