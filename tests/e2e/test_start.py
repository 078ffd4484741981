"""Starting: in any folder, and being ended before it has come to an end."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def test_a_folder_with_modules_of_our_names_is_not_looked_into(
    quick: tuple[str, ...], simulated: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("worker", "service", "scheduler", "headgate"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the user\\'s own module was imported')")
    monkeypatch.chdir(tmp_path)
    server = type(simulated)(*quick)
    try:
        assert server.post(max_tokens=3).status_code == 200
    finally:
        server.close()


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_whoever_is_ended_while_it_loads_leaves_nothing(
    simulated: Any, until: Callable[..., Any], number: signal.Signals
) -> None:
    server = type(simulated)(wait=False)
    try:
        until(lambda: server.pids("engine"))
        os.kill(server.process.pid, number)
        server.process.wait(30.0)
        until(lambda: not server.pids())
    finally:
        server.close()
