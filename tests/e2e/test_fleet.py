"""`headgate gateway` in front of several `headgate worker`: real processes that speak over TCP with a secret."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from e2e_conftest import PATIENCE_SECONDS, Samples, Stream, wait_until

LISTENING = re.compile(r"headgate: worker: listening on (\S+),")
FRONTING = re.compile(r"headgate: gateway: (http://\S+)/v1 in front of .* \(metrics: (http://\S+)/metrics\)")
ABSENT = {"torch", "numpy", "safetensors", "huggingface_hub", "transformers"}
MOST_SECONDS_TO_END = 10.0


class Process:
    """`headgate VERB …`, and what it has said."""

    def __init__(self, folder: Path, verb: str, *arguments: str, python: tuple[str, ...] = ()) -> None:
        self.log = folder / f"{verb}-{time.monotonic_ns()}.log"
        clean = {name: value for name, value in os.environ.items() if not name.startswith("HEADGATE_")}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-P", *python, "-m", "headgate", verb, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**clean, "HEADGATE_DATA": str(folder / "data"), "TMPDIR": str(folder)},
            )

    @property
    def said(self) -> str:
        return self.log.read_text("utf-8", "replace")

    def wait_for(self, words: re.Pattern[str]) -> re.Match[str]:
        wait_until(lambda: words.search(self.said) or self.process.poll() is not None)
        found = words.search(self.said)
        assert found is not None, self.said
        return found

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Its exit status."""
        self.process.send_signal(number)
        return self.process.wait(MOST_SECONDS_TO_END)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


class Worker(Process):
    def __init__(self, folder: Path, options: tuple[str, ...], name: str, listen: str = "127.0.0.1:0") -> None:
        super().__init__(folder, "worker", *options, "--served-name", name, "--listen", listen)
        self.name = name
        self.address = self.wait_for(LISTENING)[1]

    def metric(self, name: str) -> float:
        try:
            return Samples(httpx.get(f"http://{self.address}/metrics", timeout=5.0).text).value(name)
        except httpx.TransportError:
            return 0.0

    def engine(self) -> int:
        """The engine process."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(children[0])


class Gateway(Process):
    def __init__(self, folder: Path, workers: list[str], *options: str, python: tuple[str, ...] = ()) -> None:
        super().__init__(folder, "gateway", "--port", "0", "--workers", ",".join(workers), *options, python=python)
        self.url, self.metrics_url = self.wait_for(FRONTING).groups()
        self.streams: list[Stream] = []

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=PATIENCE_SECONDS)

    def ready_models(self) -> list[str]:
        with suppress(httpx.TransportError):
            answer = self.get("/readyz")
            return list(answer.json()["models"]) if answer.status_code == 200 else []
        return []

    def wait_until_ready(self, *models: str) -> None:
        wait_until(lambda: set(models) <= set(self.ready_models()), f"not ready: {self.said}")

    def body(self, model: str, max_tokens: int) -> dict[str, Any]:
        return {"model": model, "prompt": "Hello", "max_tokens": max_tokens, "ignore_eos": True}

    def post(self, model: str, max_tokens: int = 1) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/completions", json=self.body(model, max_tokens), timeout=PATIENCE_SECONDS)

    def stream(self, model: str, max_tokens: int) -> Stream:
        self.streams.append(Stream(self.url, {**self.body(model, max_tokens), "stream": True}))
        return self.streams[-1]

    def close(self) -> None:
        super().close()
        for stream in self.streams:
            stream.leave()


class Fleet:
    """Starts its parts with one secret, and ends them all."""

    def __init__(self, folder: Path, simulated: tuple[str, ...]) -> None:
        self.folder = folder
        self.secret = folder / "secret"
        self._simulated = simulated
        self._parts: list[Process] = []

    @property
    def with_secret(self) -> tuple[str, ...]:
        return ("--secret-file", str(self.secret))

    def worker(self, name: str, listen: str = "127.0.0.1:0") -> Worker:
        return self._add(Worker(self.folder, (*self._simulated, *self.with_secret), name, listen))

    def gateway(self, *workers: Worker, secret_file: Path | None = None, python: tuple[str, ...] = ()) -> Gateway:
        options = ("--secret-file", str(secret_file or self.secret))
        return self._add(Gateway(self.folder, [worker.address for worker in workers], *options, python=python))

    def _add(self, part: Any) -> Any:
        self._parts.append(part)
        return part

    def close(self) -> None:
        for part in reversed(self._parts):
            part.close()


@pytest.fixture
def fleet(tmp_path: Path, quick: tuple[str, ...]) -> Iterator[Fleet]:
    made = Fleet(tmp_path, quick)
    yield made
    made.close()


def test_one_gateway_serves_the_models_of_all_its_workers(fleet: Fleet) -> None:
    gateway = fleet.gateway(fleet.worker("one"), fleet.worker("two"))
    gateway.wait_until_ready("one", "two")
    assert [model["id"] for model in gateway.get("/v1/models").json()["data"]] == ["one", "two"]
    answers = [gateway.post(name).json() for name in ("one", "two", "one", "two")]
    assert [answer["model"] for answer in answers] == ["one", "two", "one", "two"]
    assert len({answer["id"] for answer in answers}) == 4
    assert gateway.post("three").status_code == 404


def test_one_worker_dies_and_comes_back_while_the_other_serves_on(fleet: Fleet) -> None:
    mortal, other = fleet.worker("mortal"), fleet.worker("other")
    gateway = fleet.gateway(mortal, other)
    gateway.wait_until_ready("mortal", "other")
    lasting, broken = gateway.stream("other", 4000), gateway.stream("mortal", 4000)
    lasting.wait_for_text()
    broken.wait_for_text()

    mortal.end(signal.SIGKILL)
    assert broken.wait().error is not None
    refused = gateway.post("mortal")
    assert refused.status_code == 503 and refused.headers["retry-after"]
    assert gateway.ready_models() == ["other"]
    assert len(gateway.get("/v1/models").json()["data"]) == 2
    assert gateway.post("other").status_code == 200 and not lasting.ended.is_set()

    fleet.worker("mortal", mortal.address)
    gateway.wait_until_ready("mortal", "other")
    assert gateway.post("mortal").status_code == 200
    assert not lasting.ended.is_set() and lasting.error is None


def test_a_worker_that_comes_back_with_another_model_replaces_it(fleet: Fleet) -> None:
    old = fleet.worker("old")
    gateway = fleet.gateway(old)
    gateway.wait_until_ready("old")
    old.end()
    fleet.worker("new", old.address)
    gateway.wait_until_ready("new")
    assert gateway.post("old").status_code == 404 and gateway.post("new").status_code == 200


def test_workers_with_the_same_model_share_the_requests(fleet: Fleet) -> None:
    workers = [fleet.worker("same"), fleet.worker("same")]
    gateway = fleet.gateway(*workers)
    gateway.wait_until_ready("same")
    wait_until(lambda: gateway.said.count("serves same") == 2)
    for _ in range(4):
        gateway.stream("same", 20_000).wait_for_text()
    wait_until(lambda: [worker.metric("headgate_requests_running") for worker in workers] == [2, 2])
    assert len(gateway.get("/v1/models").json()["data"]) == 1


def test_a_gateway_with_another_secret_says_so(fleet: Fleet) -> None:
    worker = fleet.worker("one")
    gateway = fleet.gateway(worker, secret_file=fleet.folder / "another")
    sentence = "it does not take this gateway's secret"
    wait_until(lambda: sentence in gateway.get("/readyz").text)
    assert gateway.get("/readyz").status_code == 503
    assert f"the worker at {worker.address} cannot be used: {sentence}" in gateway.said


def test_the_secret_is_nowhere_to_be_seen(fleet: Fleet) -> None:
    worker = fleet.worker("one")
    gateway = fleet.gateway(worker)
    gateway.wait_until_ready("one")
    secret = fleet.secret.read_bytes().strip()
    for pid in (worker.process.pid, worker.engine(), gateway.process.pid):
        for file in ("cmdline", "environ"):
            assert secret not in Path(f"/proc/{pid}/{file}").read_bytes()
    for said in (worker.said, gateway.said, gateway.get("/readyz").text, gateway.get("/metrics").text):
        assert secret.decode() not in said


def test_a_gateway_that_is_gone_leaves_nothing_at_its_workers(fleet: Fleet) -> None:
    workers = [fleet.worker("one"), fleet.worker("two")]
    gateway, other = fleet.gateway(*workers), fleet.gateway(*workers)
    gateway.wait_until_ready("one", "two")
    other.wait_until_ready("one", "two")
    for name in ("one", "two"):
        gateway.stream(name, 20_000).wait_for_text()
    kept = other.stream("one", 20_000).wait_for_text()
    gateway.end(signal.SIGKILL)
    wait_until(lambda: [worker.metric("headgate_requests_running") for worker in workers] == [1, 0])
    assert not kept.ended.is_set()


def test_a_gateway_lets_running_requests_end_and_then_ends_well(fleet: Fleet) -> None:
    gateway = fleet.gateway(fleet.worker("one"))
    gateway.wait_until_ready("one")
    running = gateway.stream("one", 300).wait_for_text()
    assert gateway.end() == 0
    assert running.wait().finished and running.usage is None


def test_a_worker_that_is_told_to_end_ends_well_and_soon(fleet: Fleet) -> None:
    worker = fleet.worker("one")
    gateway = fleet.gateway(worker)
    gateway.wait_until_ready("one")
    running = gateway.stream("one", 20_000).wait_for_text()
    engine = worker.engine()
    assert worker.end() == 0
    assert running.wait().error is not None
    assert not Path(f"/proc/{engine}").exists()


def test_a_worker_whose_engine_process_dies_ends_with_its_status(fleet: Fleet) -> None:
    worker = fleet.worker("one")
    gateway = fleet.gateway(worker)
    gateway.wait_until_ready("one")
    os.kill(worker.engine(), signal.SIGKILL)
    assert worker.process.wait(MOST_SECONDS_TO_END) == 1
    assert "headgate: worker: the engine process died" in worker.said


def test_the_gateways_second_port_answers_metrics_and_probes_only(fleet: Fleet) -> None:
    gateway = fleet.gateway(fleet.worker("one"))
    gateway.wait_until_ready("one")
    with httpx.Client(base_url=gateway.metrics_url, timeout=PATIENCE_SECONDS) as client:
        for path in ("/metrics", "/healthz", "/readyz"):
            assert client.get(path).status_code == 200, path
        for path in ("/v1/models", "/docs", "/openapi.json", "/"):
            assert client.get(path).status_code == 404, path
        assert client.post("/v1/completions", json=gateway.body("one", 1)).status_code == 404
        assert client.post("/v1/headgate/reload").status_code == 404


@pytest.fixture
def imported() -> Callable[[str], set[str]]:
    """The packages that a log of -X importtime names."""
    return lambda log: {
        line.rsplit("|", 1)[1].strip().split(".")[0] for line in log.splitlines() if line.count("|") == 2
    }


def test_a_gateway_imports_nothing_that_only_workers_need(fleet: Fleet, imported: Callable[[str], set[str]]) -> None:
    """The gateway's container image does without it."""
    gateway = fleet.gateway(fleet.worker("one"), python=("-X", "importtime"))
    gateway.wait_until_ready("one")
    assert gateway.post("one", 5).status_code == 200
    gateway.get("/metrics")
    assert gateway.end() == 0
    names = imported(gateway.said)
    assert {"fastapi", "tokenizers", "service", "scheduler"} <= names
    assert not names & {*ABSENT, "worker"}
