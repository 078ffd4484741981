"""An engine that raises, in a real engine process: who ran is told, who comes next is served."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")

CURSED = [7] * 13
RAISING = str(Path(__file__).with_name("raising"))


def test_an_engine_that_raises_ends_what_runs_and_serves_the_next(
    serve: Callable[..., Any], until: Callable[..., Any]
) -> None:
    server = serve(environ={"PYTHONPATH": RAISING})
    engine = server.pid("engine")
    running = server.stream(10_000).wait_for_text()
    answer = server.post(5, prompt=CURSED)
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "worker_failed"
    running.wait()
    assert running.error is not None and running.error["code"] == "worker_failed" and running.whole
    assert server.post(5).json()["usage"]["completion_tokens"] == 5
    server.wait_until_idle()
    assert server.pid("engine") == engine, "the process went on"
    assert server.is_ready() and "RuntimeError: thirteen tokens" in server.said

    for _ in range(3):  # an engine that only fails is given up: a fresh process is the better bet
        server.post(5, prompt=CURSED)
    until(lambda: engine not in server.pids())
    until(lambda: server.post(5).status_code == 200)
    assert server.pid("engine") != engine
