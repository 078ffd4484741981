"""An engine process in a thread: the real loop on a real socket pair, with an engine of twenty lines."""

from __future__ import annotations

import importlib.util
import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from scheduler.batch import StepPlan
from scheduler.calibration import CostModel
from scheduler.gate import Gate, Limits
from scheduler.hardware import Device, MemoryLevel
from scheduler.messages import (
    Decision,
    Finish,
    Request,
    Sampling,
    StepFrame,
    WorkerInfo,
    decode_decision,
    decode_frame,
    words_to_bytes,
)
from scheduler.model import ModelShape
from scheduler.tiers import default_tiers
from worker.build import Built
from worker.core import Core
from worker.engine import StepResult
from worker.link import FRONT, Answer, Command, EngineLink, LinkClosed, cut_answers, encode_command, link_pair

# There is no package below tests/, so the helper that stands beside the tests is imported by path.
_spec = importlib.util.spec_from_file_location("gguf_maker", Path(__file__).with_name("gguf_maker.py"))
assert _spec is not None and _spec.loader is not None
sys.modules["gguf_maker"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sys.modules["gguf_maker"])

PATIENCE_SECONDS = 20.0
EOS = 2
SHAPE = ModelShape("tiny", 2, 64, 4, 2, 16, 128, 1000, 4096)
DEVICE = Device("slate", (MemoryLevel("memory", 1e9, 1e9),), 1e12, host_seconds=0.001)


class FakeEngine:
    """Counts up from the last prompt id, and says what it was asked. A test may block it, slow it or make it fail."""

    def __init__(self) -> None:
        self.plans: list[StepPlan] = []
        self.held: dict[int, int] = {}  # sequence -> its next token
        self.before: Callable[[StepPlan], None] = lambda plan: None
        self.may_go = threading.Event()
        self.may_go.set()
        self.tokens_each = 1

    def run(self, plan: StepPlan) -> StepResult:
        self.plans.append(plan)
        for key in plan.stop:
            del self.held[key]
        for request in plan.start:
            self.held[request.key] = request.prompt[-1] + 1
        assert self.may_go.wait(PATIENCE_SECONDS)
        self.before(plan)
        return StepResult({entry.key: self._next(entry.key) for entry in plan.entries if entry.delivers})

    def _next(self, key: int) -> list[int]:
        first = self.held[key]
        self.held[key] += self.tokens_each
        return list(range(first, first + self.tokens_each))


def wait_until(condition: Callable[[], Any]) -> None:
    ends_at = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < ends_at, "did not become true in time"
        time.sleep(0.002)


def build_with(engine: Any, coalesce_seconds: float = 0.0, capacity_bytes: float = 1e8, **limits: int) -> Built:
    """The parts of an engine process around this engine."""
    tiers = default_tiers(solo_utps=10.0)
    gate = Gate(CostModel(DEVICE, SHAPE), capacity_bytes, tiers, Limits(SHAPE.context_tokens, **limits))
    waits = {tier.name: tier.max_wait_seconds for tier in tiers}
    info = WorkerInfo(
        "tiny", "v1", 1, 4096, 4095, (EOS,), "{}", None, {}, waits, "fake", "fp-fake", coalesce_seconds=coalesce_seconds
    )
    return Built(engine, gate, info)


def request(id: int, gateway: int = 7, prompt: tuple[int, ...] = (100,), max_tokens: int = 4, **fields: Any) -> Request:
    return Request(id, gateway, prompt, max_tokens, sampling=Sampling(temperature=0.0), **fields)


class Running:
    """A core that runs in a thread, and the front's end of its link."""

    def __init__(self, built: Built) -> None:
        self.front, self.end = link_pair()
        self.front.settimeout(PATIENCE_SECONDS)
        self.core = Core(EngineLink(self.end), built)
        self.gate = self.core.gate
        threading.Thread(target=self.core.stepper.run, daemon=True).start()
        self.thread = threading.Thread(target=self._run)
        self.messages: list[tuple[int, bytes]] = []  # everything that was read, in order
        self._rest = b""
        self._tickets = 0

    def _run(self) -> None:
        try:
            self.core.run()
        except LinkClosed:
            pass
        finally:
            self.end.close()  # as the end of the process does

    def start(self) -> Running:
        self.thread.start()
        return self

    # --- what the front says

    def tell(self, kind: Command, *words: int, body: bytes = b"") -> None:
        self.front.sendall(encode_command(kind, words_to_bytes(words) + body))

    def submit(self, asked: Request) -> Decision:
        self._tickets += 1
        self.tell(Command.SUBMIT, self._tickets, body=asked.encode())
        (decision,) = self.read_until(lambda: self.decisions(self._tickets))
        return decision

    # --- what the front hears

    def read(self) -> None:
        data = self.front.recv(1 << 16)
        assert data, "the engine process is gone"
        messages, self._rest = cut_answers(self._rest + data)
        self.messages += messages

    def read_until(self, what: Callable[[], Any]) -> Any:
        """What is asked for, as soon as it has been said."""
        while not (found := what()):
            self.read()
        return found

    def decisions(self, ticket: int) -> list[Decision]:
        head = words_to_bytes([Answer.DECISION, ticket])
        return [decode_decision(f[12:]) for to, f in self.messages if to == FRONT and f[4:12] == head]

    def metrics(self) -> list[dict[str, Any]]:
        kind = words_to_bytes([Answer.METRICS])
        return [json.loads(frame[8:]) for to, frame in self.messages if to == FRONT and frame[4:8] == kind]

    def frames(self, gateway: int) -> list[StepFrame | dict[str, Any]]:
        return [decode_frame(frame[4:]) for to, frame in self.messages if to == gateway]

    def snapshots(self) -> list[dict[str, Any]]:
        return [frame for frame in self.frames(0) if isinstance(frame, dict)]

    def steps(self, gateway: int = 7) -> list[StepFrame]:
        return [frame for frame in self.frames(gateway) if isinstance(frame, StepFrame)]

    def deliveries(self, id: int, gateway: int = 7) -> list[tuple[list[int], Finish]]:
        """(token column, finish) per line that mentions this request."""
        found = []
        for step in self.steps(gateway):
            at = 0
            for other, word in zip(step.ids, step.info, strict=True):
                if other == id:
                    found.append((step.tokens[at : at + (word & 0xFFFF)], Finish(word >> 16)))
                at += word & 0xFFFF
        return found

    def ended(self, id: int, gateway: int = 7) -> bool:
        return any(finish for _, finish in self.deliveries(id, gateway))

    def close(self) -> None:
        self.front.close()
        self.thread.join(PATIENCE_SECONDS)
        assert not self.thread.is_alive()


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def run_core(engine: FakeEngine) -> Iterator[Callable[..., Running]]:
    """Starts cores around the fake engine; `build_with` gets the keywords. All of them end with the test."""
    started: list[Running] = []

    def run(**settings: Any) -> Running:
        started.append(Running(build_with(engine, **settings)).start())
        return started[-1]

    yield run
    engine.may_go.set()
    for running in started:
        running.close()


@pytest.fixture
def tools() -> SimpleNamespace:
    """The helpers of this file, for tests that build their own surroundings."""
    return SimpleNamespace(
        FakeEngine=FakeEngine,
        Running=Running,
        build_with=build_with,
        request=request,
        wait_until=wait_until,
        SHAPE=SHAPE,
        DEVICE=DEVICE,
        EOS=EOS,
    )


@pytest.fixture
def link() -> Iterator[tuple[socket.socket, EngineLink]]:
    """(front's end, engine's end)."""
    front, engine = link_pair()
    front.settimeout(PATIENCE_SECONDS)
    with front, engine:
        yield front, EngineLink(engine)
