"""An engine without weights: it takes the time the cost model gives for a named device and model, and says so.

A laptop shows with it how a GPU behaves under load. Text is one fixed sentence, over and over; how long an answer becomes
is drawn from a heavy-tailed distribution, seeded by the request. Of what shapes a draw `min_tokens` alone is heeded: no
answer ends before. It has no log probabilities to tell; the gateway refuses who asks.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from scheduler.batch import Entry, StepPlan
from scheduler.hardware import CATALOGUE, Device, device_from_json
from scheduler.messages import Request
from scheduler.model import SHAPES, ModelShape
from scheduler.roofline import step_cost, step_work
from worker.engine import StepResult
from worker.files import DEMO

SENTENCE = (
    "Simulated reply: no weights were read for these words. A gate lets into the step only what its memory bandwidth "
    "can carry, and every user keeps the speed that was promised. "
)
DEFAULT_SHAPE = "llama-3.1-8b"
MEDIAN_TOKENS = 180  # of answers; sigma 1.0 puts the mean near 300 and one in a hundred above 1,800
SIGMA = 1.0
MEMORY_SHARE = 0.92  # of the device's memory, for weights and KV together


@dataclass(slots=True)
class Answer:
    """A sequence: how long its answer will be, and how far it is."""

    tokens: int
    ends: bool  # with an end-of-sequence token; otherwise it goes on until somebody stops it
    given: int  # in an earlier run too


class SimulatedEngine:
    """Stepwise. `clock` and `sleep` are arguments so that tests need no time to pass."""

    def __init__(
        self,
        device: Device,
        shape: ModelShape,
        sentence_ids: Sequence[int],
        eos_id: int,
        seed: int = 0,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.device = device
        self.shape = shape
        self._sentence = list(sentence_ids)
        self._eos_id = eos_id
        self._seed = seed
        self._clock = clock
        self._sleep = sleep
        self._free_at = 0.0  # when the device was done with the last step
        self._answers: dict[int, Answer] = {}

    @property
    def kv_cache_bytes(self) -> float:
        return self.device.memory.capacity_bytes * MEMORY_SHARE - self.shape.resident_bytes

    def run(self, plan: StepPlan) -> StepResult:
        for key in plan.stop:
            self._answers.pop(key, None)
        for request in plan.start:
            self._answers[request.key] = self._answer(request)
        if plan.entries:
            self._take_time(plan.entries)
        return StepResult({entry.key: [self._next_token(entry.key)] for entry in plan.entries if entry.delivers})

    def _answer(self, request: Request) -> Answer:
        prompt_tokens = len(request.prompt) - request.resumed_tokens
        rng = random.Random(f"{self._seed}/{request.sampling.seed}/{prompt_tokens}")
        tokens = max(2, round(rng.lognormvariate(0.0, SIGMA) * MEDIAN_TOKENS), request.sampling.min_tokens + 1)
        return Answer(tokens, self._eos_id in request.stop_ids, request.resumed_tokens)

    def _take_time(self, entries: Sequence[Entry]) -> None:
        """Sleeps until the device would be done. The loop's own work is part of the host seconds, not added to them."""
        cost = step_cost(self.device, self.shape, step_work(self.shape, entries))
        now = self._clock()
        begin = self._free_at if now - self._free_at < cost.host else now
        self._free_at = begin + cost.seconds
        while (left := self._free_at - self._clock()) > 0:
            self._sleep(left)

    def _next_token(self, key: int) -> int:
        answer = self._answers[key]
        answer.given += 1
        if answer.ends and answer.given >= answer.tokens:
            return self._eos_id
        return self._sentence[(answer.given - 1) % len(self._sentence)]


def find_device(name: str) -> Device:
    """A device of the catalogue, or of a JSON file. ValueError naming those there are."""
    if name in CATALOGUE:
        return CATALOGUE[name]
    if Path(name).is_file():
        return device_from_json(Path(name).read_text("utf-8"))
    raise ValueError(f"hardware {name} is neither a JSON file nor one of: {', '.join(sorted(CATALOGUE))}")


def find_shape(name: str) -> ModelShape:
    """A model shape by name; the demo model's stands for the usual one. ValueError naming those there are."""
    shape = SHAPES.get(DEFAULT_SHAPE if name == DEMO else name.lower())
    if shape is None:
        raise ValueError(f"the simulated engine knows no model {name}; there are: {', '.join(sorted(SHAPES))}")
    return shape
