"""Times an engine over a range of steps at start, so that the cost model begins fitted to it."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Iterator

from scheduler.batch import Entry, Kind, StepPlan
from scheduler.calibration import Timing
from scheduler.gate import Limits
from scheduler.messages import Request, Sampling
from scheduler.model import ModelShape
from scheduler.roofline import step_work
from worker.engine import Engine

BATCHES = (1, 2, 4, 8, 16, 32, 64)
LONG_BATCHES = (1, 4, 16)
CHUNKS = (8, 16, 32, 64, 128, 256, 512)
LONG_CHUNKS = (16, 64, 256)
MIXES = ((4, 16), (8, 64), (16, 16), (32, 64))  # decodes and prompt tokens in one step
SHORT, LONG = 32, 512  # tokens of context
REPEATS = 5
GREEDY = Sampling(temperature=0.0)
SECONDS = 6.0  # for the whole sweep; larger steps are left out when it is spent


class Sweep:
    """Runs made-up sequences through an engine. Every sequence is gone from it at the end."""

    def __init__(
        self,
        engine: Engine,
        shape: ModelShape,
        limits: Limits,
        capacity_tokens: int,
        sampling: Sampling,
        clock: Callable[[], float],
    ) -> None:
        self._sampling = sampling
        self._engine = engine
        self._shape = shape
        self._limits = limits
        self._capacity_tokens = capacity_tokens
        self._clock = clock
        self._random = random.Random(0)
        self._keys = 0
        self._deadline = clock() + SECONDS

    def run(self) -> list[Timing]:
        timings: list[Timing] = []
        for decodes, context, chunk, position in self._cases():
            if self._clock() > self._deadline and timings:
                break
            if self._fits(decodes, context, chunk, position):
                timings.append(self._time(decodes, context, chunk, position))
        return timings

    @staticmethod
    def _cases() -> Iterator[tuple[int, int, int, int]]:
        """(sequences that decode, their context, prompt tokens, the position these start at), cheap ones first."""
        for batch in BATCHES:
            yield batch, SHORT, 0, 0
        for chunk in CHUNKS:
            yield 0, 0, chunk, 0
        for decodes, chunk in MIXES:
            yield decodes, SHORT, chunk, 0
        for batch in LONG_BATCHES:
            yield batch, LONG, 0, 0
        for chunk in LONG_CHUNKS:
            yield 0, 0, chunk, LONG

    def _fits(self, decodes: int, context: int, chunk: int, position: int) -> bool:
        longest = max(context + REPEATS + 3, position + chunk + 1)
        total = decodes * (context + 2 * REPEATS + 32) + REPEATS * (position + chunk + 16)
        return longest <= self._limits.context_tokens and total <= self._capacity_tokens

    def _time(self, decodes: int, context: int, chunk: int, position: int) -> Timing:
        """The median of several steps that are alike but for one token of context."""
        decoding = [self._start(context) for _ in range(decodes)]
        prompts = [self._start(position + chunk) for _ in range(REPEATS + 1)] if chunk else []
        for key, tokens in decoding:
            self._step([Entry(key, Kind.PREFILL, 0, tokens, True)])
        if position:
            for key, _ in prompts:
                self._step([Entry(key, Kind.PREFILL, 0, position, False)])
        seconds = []
        for repeat in range(REPEATS + 1):
            entries = [Entry(key, Kind.DECODE, context + repeat, 1, True) for key, _ in decoding]
            if chunk:
                entries.append(Entry(prompts[repeat][0], Kind.PREFILL, position, chunk, True))
            seconds.append(self._step(entries))
        self._stop([key for key, _ in decoding + prompts])
        median = statistics.median(seconds[1:])  # the first one warms up
        return Timing(step_work(self._shape, entries), median, _spread(seconds[1:], median))

    def _start(self, tokens: int) -> tuple[int, int]:
        self._keys += 1
        prompt = [self._random.randrange(self._shape.vocabulary) for _ in range(tokens)]
        request = Request(self._keys, 0, prompt, max_tokens=REPEATS + 2, sampling=self._sampling)
        self._engine.run(StepPlan(start=(request,)))
        return request.key, tokens

    def _step(self, entries: list[Entry]) -> float:
        began = self._clock()
        self._engine.run(StepPlan(entries=tuple(entries)))
        return self._clock() - began

    def _stop(self, keys: list[int]) -> None:
        self._engine.run(StepPlan(stop=tuple(keys)))


def sweep(
    engine: Engine, shape: ModelShape, limits: Limits, capacity_tokens: int, sampling: Sampling = GREEDY
) -> list[Timing]:
    """Timings of decode, prefill and mixed steps, at most about `SECONDS` in all, drawing as requests will usually draw."""
    return Sweep(engine, shape, limits, capacity_tokens, sampling, time.perf_counter).run()


def _spread(seconds: list[float], median: float) -> float:
    """Mean absolute relative deviation from the median."""
    return math.fsum(abs(s - median) for s in seconds) / len(seconds) / median
