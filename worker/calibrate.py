"""Times an engine over a range of steps at start, so that the cost model begins fitted to it."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from scheduler.batch import Entry, Kind, StepPlan
from scheduler.calibration import Timing
from scheduler.gate import Limits
from scheduler.messages import Request, Sampling
from scheduler.model import ModelShape
from scheduler.roofline import step_work
from worker.engine import Engine

SHORT, LONG = 32, 512  # tokens of context
SHORTEST = 2  # of context, where computing SHORT ones would take too long
MAIN = (  # sequences that decode, their context, prompt tokens, the position these start at
    (1, SHORT, 0, 0),
    (0, 0, 8, 0),
    (8, SHORT, 0, 0),
    (0, 0, 32, 0),
    (32, SHORT, 0, 0),
    (0, 0, 128, 0),
    (4, LONG, 0, 0),
    (0, 0, 512, 0),
    (1, LONG, 0, 0),
    (0, 0, 64, LONG),
    (8, SHORT, 64, 0),
    (128, SHORT, 0, 0),
)
BATCHES = (2, 4, 16, 64)
LONG_BATCHES = (16,)
CHUNKS = (16, 64, 256)
LONG_CHUNKS = (16, 256)
MIXES = ((4, 16), (16, 16), (32, 64))  # decodes and prompt tokens in one step
REPEATS = 5
GREEDY = Sampling(temperature=0.0)
SECONDS = 5.0  # for the whole sweep
CASE_SHARE = 0.15  # of the time that is left: what a case may take to be repeated; a single step may take
SINGLE_SHARE = 0.7  # so much
SETUP_SECONDS = 0.5  # so much may go into SHORT contexts of sequences that decode
SETUP_TOKENS = 512  # in one step
FIRST_GROWTH = 3.0  # from one token to a few: most of a step is weights, which all of them share
LEAST_CONTEXT_TOKENS, LEAST_CACHE_TOKENS = 9, 128  # with less (the cache in whole blocks) no case fits
CORNER = 1.5  # a line through two sizes lies below a third where arithmetic begins to count


class Case(NamedTuple):
    """A step to be timed: sequences that decode, their context, prompt tokens, the position these start at."""

    decodes: int
    context: int
    chunk: int
    position: int

    @property
    def tokens(self) -> int:
        return self.decodes + self.chunk


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
        self._seconds: dict[int, float] = {}  # of a step, by the tokens it carries: the slowest kind

    def run(self) -> list[Timing]:
        """What is left out or repeated less where steps are slow: what others like it say that there is no time for."""
        self._seconds[1] = self._first_step()
        timings: list[Timing] = []
        for case in self._cases():
            case = self._shortened(case)
            repeats = self._repeats(case) or (0 if timings else 1)
            if repeats and self._fits(case):
                timings.append(timing := self._time(case, repeats))
                self._seconds[case.tokens] = max(timing.seconds, self._seconds.get(case.tokens, 0.0))
        return timings

    @staticmethod
    def _cases() -> Iterator[Case]:
        """Those that tell most first, and cheap ones before dear ones, whose seconds they foretell."""
        yield from map(Case._make, MAIN)
        for batch in BATCHES:
            yield Case(batch, SHORT, 0, 0)
        for chunk in CHUNKS:
            yield Case(0, 0, chunk, 0)
        for decodes, chunk in MIXES:
            yield Case(decodes, SHORT, chunk, 0)
        for batch in LONG_BATCHES:
            yield Case(batch, LONG, 0, 0)
        for chunk in LONG_CHUNKS:
            yield Case(0, 0, chunk, LONG)

    def _fits(self, case: Case) -> bool:
        decodes, context, chunk, position = case
        longest = max(context + REPEATS + 3, position + chunk + 1)
        total = decodes * (context + 2 * REPEATS + 32) + REPEATS * (position + chunk + 16)
        return longest <= self._limits.context_tokens and total <= self._capacity_tokens

    # --- the time there is --------------------------------------------------------------------------------------------

    def _first_step(self) -> float:
        """Of one token, after one that warms up."""
        keys = [self._start(1)[0] for _ in range(2)]
        seconds = [self._step([Entry(key, Kind.PREFILL, 0, 1, True)]) for key in keys]
        self._stop(keys)
        return seconds[-1]

    def _shortened(self, case: Case) -> Case:
        """With less context, where computing it would take the time of other cases. A large model's step is all weights."""
        if case.context == SHORT and self._setup_seconds(case, 0) > SETUP_SECONDS:
            return case._replace(context=SHORTEST)
        return case

    def _repeats(self, case: Case) -> int:
        """How often the step may be repeated after one that warms up; 1 also means that none does; 0: no time at all."""
        step, left = self._estimate(case.tokens), self._seconds_left
        for repeats in range(REPEATS, 1, -1):
            if self._setup_seconds(case, repeats + 1) + (repeats + 1) * step <= CASE_SHARE * left:
                return repeats
        return int(self._setup_seconds(case, 1) + step <= SINGLE_SHARE * left)

    def _setup_seconds(self, case: Case, prompts: int) -> float:
        tokens = case.decodes * case.context + prompts * case.position
        return self._estimate(min(tokens, SETUP_TOKENS)) * math.ceil(tokens / SETUP_TOKENS) if tokens else 0.0

    def _estimate(self, tokens: int) -> float:
        """Seconds of a step of so many tokens: along the line through the next smaller ones, never beyond proportion."""
        (after, most), *before = sorted(((t, s) for t, s in self._seconds.items() if t <= tokens), reverse=True)
        if tokens == after:
            return most
        in_proportion = most * tokens / after
        if not before:
            return min(in_proportion, FIRST_GROWTH * most)
        first, least = before[0]
        slope = max(0.0, most - least) / (after - first)
        return min(in_proportion, CORNER * (most + slope * (tokens - after)))

    @property
    def _seconds_left(self) -> float:
        return self._deadline - self._clock()

    # --- steps --------------------------------------------------------------------------------------------------------

    def _time(self, case: Case, repeats: int) -> Timing:
        """The median of several steps that are alike but for one token of context."""
        decodes, context, chunk, position = case
        steps = repeats + 1 if repeats > 1 else 1  # the first one warms up
        decoding = [self._start(context) for _ in range(decodes)]
        prompts = [self._start(position + chunk) for _ in range(steps)] if chunk else []
        self._compute([Entry(key, Kind.PREFILL, 0, tokens, True) for key, tokens in decoding])
        self._compute([Entry(key, Kind.PREFILL, 0, position, False) for key, _ in prompts if position])
        seconds = []
        for step in range(steps):
            entries = [Entry(key, Kind.DECODE, context + step, 1, True) for key, _ in decoding]
            if chunk:
                entries.append(Entry(prompts[step][0], Kind.PREFILL, position, chunk, True))
            seconds.append(self._step(entries))
        self._stop([key for key, _ in decoding + prompts])
        seconds = seconds[-repeats:]
        median = statistics.median(seconds)
        return Timing(step_work(self._shape, entries), median, _spread(seconds, median))

    def _compute(self, entries: list[Entry]) -> None:
        """Contexts, several in a step."""
        while entries:
            count = max(1, SETUP_TOKENS // entries[0].query_tokens)
            self._step(entries[:count])
            entries = entries[count:]

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
