"""A worker and the gateways under test in front of it, started and stopped; what they use of the CPU, and what they saw."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.load import chat_request
from headgate.key_book import KeyBook
from headgate.supervisor import Launch, ready_model
from service.keys import LIMIT_NAMES, NO_DIGEST, Key, Limits, mint
from worker.config import WorkerConfig

START_SECONDS = 30.0
ROOT = Path(__file__).parent.parent
KEYS = 100
MOST = dict.fromkeys(LIMIT_NAMES, 1000000000)  # limits that are counted, and never reached


class Sightings:
    """What an observed engine process said: (event, request key) -> when."""

    def __init__(self) -> None:
        self.at: dict[tuple[str, int], float] = {}

    def follow(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(b"@ "):
                _, event, key, seconds = line.split()
                self.at[event.decode(), int(key)] = float(seconds)


class Serving:
    """One simulated worker whose steps all take the same time, with any number of gateways. Ends with its `with` block.

    The processes are those that `headgate serve` starts, with the same arguments.
    """

    def __init__(self, step_seconds: float, speed_of: str = "fixed") -> None:
        self.sightings = Sightings()
        self._folder = tempfile.TemporaryDirectory(prefix="headgate-bench-", ignore_cleanup_errors=True)
        self._lifeline = os.pipe()  # every child ends when its writing end closes, also when we are killed
        self._processes: list[subprocess.Popen[bytes]] = []
        self._socket = str(Path(self._folder.name) / "worker")
        hardware = Path(self._folder.name) / f"{speed_of}.json"
        hardware.write_text(json.dumps(constant_device(speed_of, step_seconds)))
        self._start_worker(str(hardware))

    def _start_worker(self, hardware: str) -> None:
        config = WorkerConfig(engine="simulated", hardware=hardware)
        unix = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        unix.bind(self._socket)
        unix.listen(4096)
        metrics = listen()
        self.front = self._launch("benchmarks.observed", "worker", config.encode(), [unix, metrics])
        threading.Thread(target=self.sightings.follow, args=[self.front], daemon=True).start()

    def start_gateway(self, module: str = "headgate", config: dict[str, Any] | None = None, key: str = "") -> Server:
        """`module` runs it: the product, or a usual gateway in its place. `config`: more than it has to be told."""
        api = listen()
        told = {"workers": [self._socket], "drain_seconds": 0.0, **(config or {})}
        process = self._launch(module, "gateway", json.dumps(told), [api])
        return Server(process, api.getsockname()[1], [process.pid, self.front.pid], key)

    def start_gateway_with_keys(self) -> Server:
        """The product among many keys, where everything that can be limited is, for key and tenant."""
        folder = Path(self._folder.name) / "data"
        keys = [make_key(KeyBook(folder, time.time())) for _ in range(KEYS)]
        tenants = Path(self._folder.name) / "tenants.toml"
        tenants.write_text("[tenants.bench]\n" + "".join(f"{name} = {most}\n" for name, most in MOST.items()))
        return self.start_gateway(config={"data": str(folder), "config_file": str(tenants)}, key=keys[0])

    def start_bare(self, step_seconds: float) -> Server:
        api = listen()
        arguments = [str(api.fileno()), str(step_seconds), str(self._lifeline[0])]
        process = self._spawn("benchmarks.bare", arguments, [api])
        return Server(process, api.getsockname()[1], [process.pid])

    def _launch(self, module: str, verb: str, config: str, sockets: Sequence[socket.socket]) -> subprocess.Popen[bytes]:
        launch = Launch(config, self._lifeline[0], self._folder.name, [sock.fileno() for sock in sockets])
        child = ["child"] if module == "headgate" else []
        return self._spawn(module, [*child, verb, json.dumps(asdict(launch))], sockets)

    def _spawn(
        self, module: str, arguments: Sequence[str], sockets: Sequence[socket.socket]
    ) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.fspath(ROOT)},  # the observing engine process is not installed
            stdout=subprocess.PIPE if "worker" in arguments else None,
            pass_fds=[self._lifeline[0], *(sock.fileno() for sock in sockets)],
        )
        self._processes.append(process)
        return process

    def __enter__(self) -> Serving:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._lifeline[1])
        for process in self._processes:
            process.wait(10.0)
        self._folder.cleanup()


class Server:
    """Something that streams chat answers on a port."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, pids: Sequence[int], key: str = "") -> None:
        self.process = process
        self.port = port
        self._key = key
        self.model = ""
        self._pids = pids

    def wait_until_ready(self) -> None:
        ends_at = time.monotonic() + START_SECONDS
        while (model := ready_model("127.0.0.1", self.port)) is None:
            if self.process.poll() is not None or time.monotonic() > ends_at:
                raise RuntimeError("a server under test did not start")
            time.sleep(0.1)
        self.model = model

    def request(self, prompt: str, max_tokens: int) -> bytes:
        return chat_request(self.model, prompt, max_tokens, self._key)

    def cpu_seconds(self) -> float:
        """User and system time of everything between engine process and client, since the start."""
        return sum(map(process_cpu_seconds, self._pids))


def make_key(book: KeyBook) -> str:
    id, whole = mint()
    book.create(Key(id, "bench", NO_DIGEST, book.now, limits=Limits(**MOST)), whole)
    return whole


def process_cpu_seconds(pid: int) -> float:
    """To the nanosecond, where /proc/PID/stat counts in hundredths. Linux."""
    return time.clock_gettime(~pid << 3 | 2)


def constant_device(name: str, step_seconds: float) -> dict[str, Any]:
    """A device that reads and multiplies in no time: every step takes its host seconds, whatever it carries."""
    memory = {"name": "memory", "capacity_bytes": 1e15, "bytes_per_second": 1e18}
    return {"name": name, "levels": [memory], "flops_per_second": 1e21, "host_seconds": step_seconds}


def listen() -> socket.socket:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", 0))
    listener.listen(4096)
    return listener
