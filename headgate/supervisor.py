"""A small supervisor: starts gateway and worker, restarts what dies, drains in order, and leaves nothing behind.

It holds the listening sockets, so a gateway that is restarted misses no connection. No framework is imported here.
"""

from __future__ import annotations

import http.client
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from headgate.settings import Settings, is_loopback
from headgate.start import address_of, gateway_config, say, worker_config

FIRST_BACKOFF_SECONDS, LONGEST_BACKOFF_SECONDS = 0.2, 5.0
STEADY_SECONDS = 10.0  # a child that lived this long starts over with the first backoff
GRACE_SECONDS = 10.0  # beyond the drain, until a child that does not end is killed
READY_POLL_SECONDS = 0.1
TWIN_SECONDS = 0.5  # GNU timeout, among others, signals a process and its whole group: one wish that arrives twice


@dataclass(frozen=True, slots=True)
class Sockets:
    """Bound and listening."""

    api: socket.socket
    gateway_metrics: socket.socket
    metrics: socket.socket
    worker: socket.socket


@dataclass(slots=True)
class Child:
    """A process of ours: how to start it, and how it fares."""

    name: str
    start: Callable[[], subprocess.Popen[bytes]]
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    backoff_seconds: float = FIRST_BACKOFF_SECONDS


@dataclass(frozen=True, slots=True)
class Launch:
    """What a child is told, as JSON in its argument; file descriptors are inherited under the same numbers."""

    config: str
    lifeline_fd: int
    folder: str
    socket_fds: list[int] = field(default_factory=list)


class Supervisor:
    """Runs until a signal ends it. Threads only wait and put what happened into one queue; the main thread acts."""

    def __init__(self, settings: Settings, sockets: Sockets, folder: Path, wants_keys: bool) -> None:
        self._settings = settings
        self._wants_keys = wants_keys
        self._sockets = sockets
        self._folder = folder
        self._events: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._lifeline_read, self._lifeline_write = os.pipe()
        self._worker = Child("worker", self._start_worker)
        self._gateway = Child("gateway", self._start_gateway)
        self._has_terminal = os.isatty(0)
        self._was_ready = False
        self._status: int | None = None
        self._signals = 0
        self._signalled_at = 0.0

    def run(self) -> int:
        """The exit status: 0 after a drain, 2 when the worker could not start as it is told to, 1 when it failed at it."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: self._events.put(self._signalled))
        signal.signal(signal.SIGHUP, lambda *_: self._events.put(self._hung_up))
        self._launch(self._worker)
        self._launch(self._gateway)
        threading.Thread(target=self._wait_until_ready, daemon=True).start()
        while self._status is None:
            self._events.get()()
        return self._status

    # --- children -----------------------------------------------------------------------------------------------------

    def _start_worker(self) -> subprocess.Popen[bytes]:
        config = worker_config(self._settings)
        return self._spawn("worker", config.encode(), [self._sockets.worker, self._sockets.metrics])

    def _start_gateway(self) -> subprocess.Popen[bytes]:
        config = gateway_config(self._settings, [str(self._folder / "worker")])
        return self._spawn("gateway", json.dumps(config), [self._sockets.api, self._sockets.gateway_metrics])

    def _spawn(self, role: str, config: str, sockets: list[socket.socket]) -> subprocess.Popen[bytes]:
        fds = [listener.fileno() for listener in sockets]
        launch = Launch(config, self._lifeline_read, str(self._folder), fds)
        arguments = [sys.executable, "-P", "-m", "headgate", "child", role]  # -P: not the user's worker.py
        # a child inherits that it ignores SIGHUP: one that comes before it listens does not end it
        reload = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            return subprocess.Popen(
                [*arguments, json.dumps(asdict(launch))],
                stdin=subprocess.DEVNULL,
                pass_fds=[*fds, self._lifeline_read],
                start_new_session=True,  # Ctrl-C is for the supervisor alone, which drains in order
            )
        finally:
            signal.signal(signal.SIGHUP, reload)

    def _launch(self, child: Child) -> None:
        child.started_at = time.monotonic()
        process = child.process = child.start()

        def wait() -> None:
            process.wait()
            self._events.put(lambda: self._ended(child, process))

        threading.Thread(target=wait, daemon=True).start()

    def _ended(self, child: Child, process: subprocess.Popen[bytes]) -> None:
        if child.process is not process or self._signals:
            return
        if child is self._worker and not self._was_ready and process.returncode > 0:
            self._give_up(process.returncode)
            return
        if time.monotonic() - child.started_at > STEADY_SECONDS:
            child.backoff_seconds = FIRST_BACKOFF_SECONDS
        say(f"the {child.name} ended ({describe(process.returncode)}); starting it again")
        timer = threading.Timer(child.backoff_seconds, lambda: self._events.put(lambda: self._relaunch(child, process)))
        timer.daemon = True
        timer.start()
        child.backoff_seconds = min(2 * child.backoff_seconds, LONGEST_BACKOFF_SECONDS)

    def _relaunch(self, child: Child, ended: subprocess.Popen[bytes]) -> None:
        if child.process is ended and not self._signals:
            self._launch(child)

    def _give_up(self, status: int) -> None:
        """The worker said why it cannot start; another try would fail alike."""
        self._signals += 1
        self._end(self._gateway, 0.0)
        self._status = status

    def _hung_up(self) -> None:
        """SIGHUP: a closed terminal ends us. Otherwise it asks for a reload; keys and tenants are the gateway's to read."""
        process = self._gateway.process
        if self._has_terminal and not os.isatty(0):
            self._signalled()
        elif process is not None and process.poll() is None:
            process.send_signal(signal.SIGHUP)

    # --- the end ------------------------------------------------------------------------------------------------------

    def _signalled(self) -> None:
        if self._signals and time.monotonic() - self._signalled_at < TWIN_SECONDS:
            return
        self._signals += 1
        if self._signals == 1:
            self._signalled_at = time.monotonic()
            say("draining; once more to end at once")
            threading.Thread(target=self._drain, daemon=True).start()
        else:
            for child in (self._gateway, self._worker):
                if child.process is not None and child.process.poll() is None:
                    child.process.kill()
            self._status = 1

    def _drain(self) -> None:
        """Gateways first: they end what runs; then the worker, which nobody asks any more."""
        self._end(self._gateway, self._settings.drain_seconds)
        self._end(self._worker, 0.0)
        self._events.put(self._drained)

    def _drained(self) -> None:
        if self._status is None:
            say("ended")
            self._status = 0

    @staticmethod
    def _end(child: Child, drain_seconds: float) -> None:
        process = child.process
        if process is None or process.poll() is not None:
            return
        process.terminate()
        try:
            process.wait(drain_seconds + GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    # --- the first words ----------------------------------------------------------------------------------------------

    def _wait_until_ready(self) -> None:
        host, port = self._sockets.api.getsockname()[:2]
        while (model := ready_model(host, port)) is None:
            time.sleep(READY_POLL_SECONDS)
        self._events.put(lambda: self._greet(host, port, model))

    def _greet(self, host: str, port: int, model: str) -> None:
        self._was_ready = True
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        if not self._wants_keys and not is_loopback(self._settings.reached_at):
            say(f"anybody who reaches {self._settings.reached_at}:{port} may use this API")
        metrics = {"gateway": address_of(self._sockets.gateway_metrics), "worker": address_of(self._sockets.metrics)}
        words = WITH_KEYS if self._wants_keys else OPEN
        print(GREETING.format(url=url, model=model, **metrics, **words), flush=True)


def ready_model(host: str, port: int) -> str | None:
    """The served model's name once a token can be generated, else None."""
    address = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    connection = http.client.HTTPConnection(address, port, timeout=5)
    try:
        connection.request("GET", "/readyz")
        answer = connection.getresponse()
        return str(json.loads(answer.read())["models"][0]) if answer.status == 200 else None
    except (OSError, http.client.HTTPException, ValueError, LookupError):
        return None
    finally:
        connection.close()


def describe(returncode: int) -> str:
    return f"killed by {signal.Signals(-returncode).name}" if returncode < 0 else f"exit status {returncode}"


GREETING = """headgate: ready: {model} at {url}/v1 (metrics: http://{gateway}/metrics and http://{worker}/metrics)

  curl {url}/v1/chat/completions -H 'content-type: application/json' {header}\\
    -d '{{"model": "{model}", "stream": true, "messages": [{{"role": "user", "content": "Document `textwrap.dedent`"}}]}}'

  {imports}from openai import OpenAI
  client = OpenAI(base_url="{url}/v1", api_key={key})
  stream = client.chat.completions.create(
      model="{model}", stream=True, messages=[{{"role": "user", "content": "Document `textwrap.dedent`"}}]
  )
  for chunk in stream:
      print(chunk.choices[0].delta.content or "", end="", flush=True)
"""
OPEN = {"header": "", "imports": "", "key": '"none"'}
WITH_KEYS = {
    "header": '-H "Authorization: Bearer $HEADGATE_API_KEY" ',
    "imports": "import os\n  ",
    "key": 'os.environ["HEADGATE_API_KEY"]',
}
