"""How it ends: what runs is finished, who comes is sent away, and time is bounded."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest

from headgate.supervisor import TWIN_SECONDS

LONG = 400  # tokens; at 3 ms each there is time to knock while they run
ENDLESS = 100_000


def knock_until_turned_away(server: Any, until: Callable[..., Any]) -> Any:
    """Every answer on the way is a good one."""

    def turned_away() -> Any:
        answer = server.post(max_tokens=1)
        assert answer.status_code in (200, 503), answer.text
        return answer if answer.status_code == 503 else None

    return until(turned_away)


@pytest.mark.parametrize("how", ["SIGTERM", "Ctrl-C"])
def test_a_signal_lets_running_streams_finish_and_turns_new_requests_away(
    serve: Callable[..., Any], until: Callable[..., Any], how: str
) -> None:
    server = serve()
    streams = [server.stream(LONG, stream_options={"include_usage": True}) for _ in range(8)]
    for stream in streams:
        stream.wait_for_text()
    if how == "SIGTERM":
        server.process.send_signal(signal.SIGTERM)
    else:
        os.killpg(server.process.pid, signal.SIGINT)  # a terminal signals the whole foreground group
    answer = knock_until_turned_away(server, until)
    assert answer.json()["error"]["code"] == "shutting_down" and int(answer.headers["retry-after"]) >= 1
    for stream in streams:
        stream.wait()
        assert stream.finished
        assert stream.usage["completion_tokens"] == LONG
    assert server.wait() == 0
    assert server.left_behind() == [] and server.can_be_bound_again()
    assert "draining" in server.said and "Traceback" not in server.said and "Error" not in server.said


def test_a_signal_that_arrives_twice_at_once_is_one_wish(serve: Callable[..., Any]) -> None:
    """GNU timeout signals a process and then its whole group."""
    server = serve()
    stream = server.stream(LONG).wait_for_text()
    server.process.send_signal(signal.SIGTERM)
    os.killpg(server.process.pid, signal.SIGTERM)
    assert stream.wait().finished
    assert server.wait() == 0


def test_streams_longer_than_the_drain_end_with_an_error(serve: Callable[..., Any], until: Callable[..., Any]) -> None:
    server = serve("--drain-seconds", "0.5")
    stream = server.stream(ENDLESS).wait_for_text()
    collected = server.ask(ENDLESS)
    until(lambda: server.worker("headgate_requests_running") == 2)
    server.process.send_signal(signal.SIGTERM)
    stream.wait()
    assert stream.error is not None and stream.error["code"] == "shutting_down"
    assert stream.events[-1] == "[DONE]" and stream.whole
    collected.wait()
    assert collected.status == 503 and collected.error is not None and collected.error["code"] == "shutting_down"
    assert server.wait() == 0
    assert server.left_behind() == []


def test_a_second_signal_ends_at_once(serve: Callable[..., Any], until: Callable[..., Any]) -> None:
    server = serve()
    stream = server.stream(ENDLESS).wait_for_text()
    server.process.send_signal(signal.SIGTERM)
    until(lambda: "draining; once more to end at once" in server.said)
    drained_for = time.monotonic()
    until(lambda: time.monotonic() - drained_for > TWIN_SECONDS)  # one that comes sooner counts as the first one's twin
    server.process.send_signal(signal.SIGTERM)
    assert server.wait() == 1
    assert not stream.wait().finished
    assert server.left_behind() == [] and server.can_be_bound_again()


def test_an_idle_server_ends_at_once_and_says_so(serve: Callable[..., Any]) -> None:
    server = serve()
    server.process.send_signal(signal.SIGTERM)
    assert server.wait() == 0
    assert server.said.rstrip().endswith("headgate: ended")
    assert server.left_behind() == [] and server.can_be_bound_again()


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_a_server_that_is_still_starting_can_be_ended(serve: Callable[..., Any]) -> None:
    server = serve(wait=False)
    server.pid("gateway")
    server.process.send_signal(signal.SIGTERM)
    assert server.wait() == 0
    assert server.left_behind() == []
