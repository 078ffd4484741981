"""`headgate serve` as people run it: a real process with its children, found by the folder it was given."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

PATIENCE_SECONDS = 30.0
READY = re.compile(r"headgate: ready: (\S+) at (http://\S+)/v1 \(metrics: \S+ and (http://\S+)/metrics\)")
ROLES = {"gateway": b"\0gateway\0", "front": b"\0worker\0", "engine": b"\0worker.core\0"}

# there is no package below tests/: what stands beside this file imports from it by this name
sys.modules["e2e_conftest"] = sys.modules[__name__]

# a device on which a step takes 3 ms whatever it carries, and a prompt of 20,000 tokens some seconds
QUICK = {
    "name": "quick",
    "flops_per_second": 2e14,
    "host_seconds": 0.003,
    "levels": [{"name": "memory", "capacity_bytes": 1e12, "bytes_per_second": 1e14}],
}


def wait_until(condition: Callable[[], Any], what: str = "it did not come true in time") -> Any:
    ends_at = time.monotonic() + PATIENCE_SECONDS
    while not (value := condition()):
        assert time.monotonic() < ends_at, what
        time.sleep(0.01)
    return value


class Samples:
    """One scrape, parsed as Prometheus does."""

    def __init__(self, text: str) -> None:
        self.families = {family.name: family for family in text_string_to_metric_families(text)}

    def value(self, name: str, **labels: str) -> float:
        """The sum of the samples of this name that have these labels."""
        return sum(
            sample.value
            for family in self.families.values()
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )


class Server:
    """A running `headgate serve`. Its whole process tree carries a TMPDIR of its own, by which it is found again."""

    def __init__(self, *arguments: str, environ: dict[str, str] | None = None, wait: bool = True) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="hg-"))
        self.data = self.folder.with_name(f"{self.folder.name}-data")
        self.output: list[str] = []
        clean = {name: value for name, value in os.environ.items() if not name.startswith("HEADGATE_")}
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "headgate", "serve", "--port", "0", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**clean, "TMPDIR": str(self.folder), "HEADGATE_DATA": str(self.data), **(environ or {})},
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        self._streams: list[Stream] = []
        self.model = self.url = self.worker_url = ""
        if wait:
            try:
                self.wait_for_the_greeting()
            except BaseException:
                self.close()
                raise

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output.append(line)
        self.process.stdout.close()

    @property
    def said(self) -> str:
        return "".join(self.output)

    def wait_for_the_greeting(self) -> None:
        wait_until(lambda: READY.search(self.said) or self.process.poll() is not None, "it did not get ready")
        greeting = READY.search(self.said)
        assert greeting is not None, self.said
        self.model, self.url, self.worker_url = greeting.groups()

    # --- clients

    def sdk(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE_SECONDS)

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=PATIENCE_SECONDS)

    def body(self, max_tokens: int, **fields: Any) -> dict[str, Any]:
        """A request for exactly so many tokens."""
        return {"model": self.model, "prompt": "Hello", "max_tokens": max_tokens, "ignore_eos": True, **fields}

    def post(self, max_tokens: int = 1, **fields: Any) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/completions", json=self.body(max_tokens, **fields), timeout=PATIENCE_SECONDS)

    def stream(self, max_tokens: int, **fields: Any) -> Stream:
        """A request whose answer comes in pieces."""
        return self.ask(max_tokens, **fields, stream=True)

    def ask(self, max_tokens: int, **fields: Any) -> Stream:
        """A request, read in the background."""
        self._streams.append(Stream(self.url, self.body(max_tokens, **fields)))
        return self._streams[-1]

    def is_ready(self) -> bool:
        return self.status("/readyz") == 200

    def status(self, path: str) -> int:
        """0 where nobody answers."""
        try:
            return self.get(path).status_code
        except httpx.TransportError:
            return 0

    # --- what it counts

    def gateway_metrics(self) -> Samples:
        return Samples(self.get("/metrics").text)

    def worker_metrics(self) -> Samples:
        return Samples(httpx.get(f"{self.worker_url}/metrics", timeout=PATIENCE_SECONDS).text)

    def worker(self, name: str, **labels: str) -> float:
        """0 while the worker is away."""
        try:
            return self.worker_metrics().value(name, **labels)
        except httpx.TransportError:
            return 0.0

    def wait_until_idle(self) -> None:
        """Nothing runs, waits, or holds memory."""
        names = ("requests_running", "requests_waiting", "kv_cache_usage_ratio", "kv_predicted_peak_ratio")

        def idle() -> bool:
            samples = self.worker_metrics()
            return not any(samples.value(f"headgate_{name}") for name in names)

        wait_until(idle, "the worker still has requests")
        wait_until(lambda: self.gateway_metrics().value("headgate_requests_open") == 0)

    # --- processes

    def pids(self, role: str | None = None) -> list[int]:
        """Processes of this server, or those of one role; none where there is no /proc to find them in."""
        mark, named = f"TMPDIR={self.folder}\0".encode(), ROLES[role] if role else b""
        mine = []
        for path in Path("/proc").glob("[0-9]*"):
            if int(path.name) == self.process.pid:
                continue
            with suppress(OSError):  # it has ended, or is not ours to read
                if mark in (path / "environ").read_bytes() and named in (path / "cmdline").read_bytes():
                    mine.append(int(path.name))
        return mine

    def pid(self, role: str) -> int:
        (pid,) = wait_until(lambda: self.pids(role))
        return pid

    def kill(self, role: str) -> int:
        pid = self.pid(role)
        os.kill(pid, signal.SIGKILL)
        return pid

    def wait(self) -> int:
        """Its exit status, once it has ended with everything it started."""
        status = self.process.wait(PATIENCE_SECONDS)
        wait_until(lambda: not self.pids(), f"still there: {self.pids()}")
        self._reader.join(PATIENCE_SECONDS)
        return status

    def left_behind(self) -> list[str]:
        """What is still in the folder it was given."""
        return sorted(path.name for path in self.folder.iterdir())

    def can_be_bound_again(self) -> bool:
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                sock.bind(("127.0.0.1", int(self.url.rsplit(":", 1)[1])))
                sock.listen()
            except OSError:
                return False
        return True

    def close(self) -> None:
        for stream in self._streams:
            stream.leave()
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        for pid in self.pids():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._reader.join(PATIENCE_SECONDS)
        for folder in (self.folder, self.data):
            shutil.rmtree(folder, ignore_errors=True)


class Stream:
    """A stream on a socket of its own, read by a thread: what has come is there to be looked at."""

    def __init__(self, url: str, body: dict[str, Any], path: str = "/v1/completions") -> None:
        host, port = url.removeprefix("http://").split(":")
        self.socket = socket.create_connection((host, int(port)), timeout=PATIENCE_SECONDS)
        content = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\nconnection: close\r\n"
        self.socket.sendall(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)
        self.events: list[Any] = []  # parsed; "[DONE]" as it is
        self.status = 0
        self.whole = False  # the body ended as HTTP says it should
        self.ended = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            with self.socket.makefile("rb") as lines:
                self.status = int(lines.readline().split(b" ")[1])
                while lines.readline().strip():  # headers
                    pass
                for line in lines:
                    if line.startswith(b"data: "):
                        data = line[6:].strip()
                        self.events.append("[DONE]" if data == b"[DONE]" else json.loads(data))
                    elif line.startswith(b"{"):
                        self.events.append(json.loads(line))
                    elif line == b"0\r\n":
                        self.whole = True
        except (OSError, IndexError, ValueError):  # it broke; what had come is kept
            pass
        self.ended.set()

    @property
    def chunks(self) -> list[dict[str, Any]]:
        return [event for event in self.events if event != "[DONE]" and event.get("choices")]

    @property
    def text(self) -> str:
        return "".join(choice["text"] for chunk in self.chunks for choice in chunk["choices"])

    @property
    def error(self) -> dict[str, Any] | None:
        return next((event["error"] for event in self.events if event != "[DONE]" and "error" in event), None)

    @property
    def usage(self) -> dict[str, Any] | None:
        return next((event["usage"] for event in self.events if event != "[DONE]" and event.get("usage")), None)

    @property
    def finished(self) -> bool:
        """It came to a good end."""
        return self.error is None and self.events[-1:] == ["[DONE]"] and self.whole

    def wait_for_text(self) -> Stream:
        wait_until(lambda: self.text or self.ended.is_set())
        assert self.text, self.events
        return self

    def wait(self) -> Stream:
        assert self.ended.wait(PATIENCE_SECONDS), f"still open after {len(self.events)} events"
        self._thread.join()
        self.socket.close()
        return self

    def leave(self) -> None:
        """Hangs up, as a closed browser tab does."""
        with suppress(OSError):  # the other side was quicker
            self.socket.shutdown(socket.SHUT_RDWR)
        self.wait()


@contextmanager
def serving(*arguments: str, **settings: Any) -> Iterator[Server]:
    server = Server(*arguments, **settings)
    try:
        yield server
    finally:
        server.close()


@pytest.fixture(scope="session")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Options for a simulated engine that is quick."""
    path = tmp_path_factory.mktemp("hardware") / "quick.json"
    path.write_text(json.dumps(QUICK))
    return ("--engine", "simulated", "--hardware", str(path))


@pytest.fixture(scope="session")
def simulated(quick: tuple[str, ...]) -> Iterator[Server]:
    """Shared by tests that leave it as they found it."""
    with serving(*quick) as server:
        yield server


@pytest.fixture(scope="session")
def demo() -> Iterator[Server]:
    """The model that ships, on the native engine. Shared."""
    with serving("--threads", "1") as server:
        yield server


@pytest.fixture
def serve(quick: tuple[str, ...]) -> Iterator[Callable[..., Server]]:
    """Starts servers of a test's own: `serve(*options)`, simulated and quick."""
    servers: list[Server] = []

    def start(*arguments: str, **settings: Any) -> Server:
        servers.append(Server(*quick, *arguments, **settings))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def until() -> Callable[..., Any]:
    """Waits for a condition."""
    return wait_until
