"""SIGHUP: a wish to read keys and tenants again, or the end of the terminal that `headgate serve` was started in."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from e2e_conftest import READY, wait_until

from service.store import PEPPER, make_secret

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
IN_A_TERMINAL = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
)


def test_the_gateway_reads_again_and_nobody_ends(serve: Callable[..., Any], tmp_path: Path) -> None:
    config = tmp_path / "headgate.toml"
    config.write_text("")
    server = serve("--config", str(config))
    before = {role: server.pid(role) for role in ("gateway", "front", "engine")}
    config.write_text("[tenants.acme]\nrequests_per_minute = 60\n")
    server.process.send_signal(signal.SIGHUP)
    wait_until(lambda: "read again: 0 keys, 1 tenants" in server.said, server.said)
    assert {role: server.pid(role) for role in before} == before
    assert server.post().status_code == 200


def test_a_wish_that_comes_while_everything_starts_ends_nobody(serve: Callable[..., Any], until: Any) -> None:
    server = serve(wait=False)
    gateway, front = server.pid("gateway"), server.pid("front")
    for _ in range(5):
        server.process.send_signal(signal.SIGHUP)
    until(lambda: READY.search(server.said))
    assert (server.pid("gateway"), server.pid("front")) == (gateway, front)


def test_closing_the_terminal_ends_the_server(quick: tuple[str, ...], tmp_path: Path) -> None:
    terminal, standard_input = pty.openpty()
    log = tmp_path / "log"
    command = [sys.executable, "-P", "-m", "headgate", "serve", "--port", "0", *quick]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", IN_A_TERMINAL, *command],
            stdin=standard_input,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "HEADGATE_DATA": str(tmp_path / "data")},
            start_new_session=True,
        )
    os.close(standard_input)
    try:
        wait_until(lambda: READY.search(log.read_text()), log.read_text())
        os.close(terminal)
        assert process.wait(20) == 0
        assert log.read_text().rstrip().endswith("headgate: ended")
    finally:
        process.kill()
        process.wait()


def test_once_keys_are_wanted_the_greeting_shows_how_to_give_one(serve: Callable[..., Any], tmp_path: Path) -> None:
    make_secret(tmp_path / PEPPER)
    server = serve(environ={"HEADGATE_DATA": str(tmp_path)})
    assert '-H "Authorization: Bearer $HEADGATE_API_KEY"' in server.said
    assert 'api_key=os.environ["HEADGATE_API_KEY"]' in server.said and "import os\n" in server.said
    assert server.post().status_code == 401 and server.status("/metrics") == 401
    metrics = server.said.split("(metrics: ")[1].split(" ")[0]
    assert httpx.get(metrics).status_code == 200, "the gateway's own port for scrapers needs no key"


def test_without_keys_the_greeting_says_nothing_of_them(simulated: Any) -> None:
    assert 'api_key="none"' in simulated.said and "HEADGATE_API_KEY" not in simulated.said
