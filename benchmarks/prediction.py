"""How well the cost model predicts the seconds of a step on this CPU: the native engine with the model that ships.

Everything is built and driven as in a worker: a sweep at the start, slow corrections while serving, arrivals through the
gate, every step through the engine process's own loop. Between the loads identical steps are repeated: no prediction can be
better than their spread.
"""

from __future__ import annotations

import random
import statistics
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from queue import Queue

from benchmarks.figures import Figure, over_rounds, print_table, save, single
from scheduler.batch import Entry, Kind, StepPlan
from scheduler.messages import Request, Sampling, StepReport
from worker.build import Built, build
from worker.config import WorkerConfig
from worker.core import Core, clock
from worker.link import EngineLink, link_pair
from worker.metrics import Meter

ROUNDS = 5
REGIMES = ("decode", "mixed", "prefill")
LEAST_TARGET = 15.0  # per cent
SPREADS = 1.5

REPEATS = 12
IDENTICAL = {"decode": (8, 0), "mixed": (8, 64), "prefill": (0, 256)}  # sequences that decode, prompt tokens
CONTEXT_TOKENS = 128

BATCHES = (1, 4, 12, 24)
MIXED_STEPS = 100
MIXED_ARRIVALS = 0.12  # per step
PREFILL_STEPS = 60


def regime_of(report: StepReport) -> str:
    if not report.prefill_tokens:
        return "decode"
    return "mixed" if report.decode_tokens else "prefill"


@dataclass(slots=True)
class Errors:
    """Per round and regime: relative errors of predictions. Per regime: seconds of identical steps, a list per series."""

    rounds: list[dict[str, list[float]]] = field(default_factory=list)
    identical: dict[str, list[list[float]]] = field(default_factory=lambda: {regime: [] for regime in REGIMES})

    def add(self, report: StepReport) -> None:
        error = abs(report.predicted_seconds / report.measured_seconds - 1)
        self.rounds[-1].setdefault(regime_of(report), []).append(error)

    def mape(self, regime: str) -> Figure:
        rounds = [100 * statistics.fmean(errors[regime]) for errors in self.rounds if regime in errors]
        everything = [error for errors in self.rounds for error in errors.get(regime, [])]
        target = max(LEAST_TARGET, SPREADS * self.spread(regime))
        name = f"{regime}, mean error of {len(everything)} steps"
        return Figure(name, "%", 100 * statistics.fmean(everything), min(rounds), max(rounds), target)

    def median(self, regime: str) -> Figure:
        """Without what interrupted single steps."""
        rounds = [100 * statistics.median(errors[regime]) for errors in self.rounds if regime in errors]
        return over_rounds(f"{regime}, median error", "%", rounds)

    def spread(self, regime: str) -> float:
        """Of identical steps anywhere in the run."""
        return deviation([one for series in self.identical[regime] for one in series])

    def spread_at_once(self, regime: str) -> Figure:
        """Of identical steps that follow each other."""
        series = [deviation(one) for one in self.identical[regime]]
        return over_rounds(f"{regime}, spread of identical steps in a row", "%", series)


def deviation(seconds: Sequence[float]) -> float:
    """Mean deviation from the median, in per cent: the error of the best constant."""
    median = statistics.median(seconds)
    return 100 * statistics.fmean(abs(one - median) for one in seconds) / median


class Recorder(Meter):
    """The worker's meter, which also keeps the errors."""

    def __init__(self, built: Built, errors: Errors) -> None:
        super().__init__(built.gate)
        self._errors = errors

    def step(self, report: StepReport, now: float) -> None:
        super().step(report, now)
        self._errors.add(report)


def run_engine(link: EngineLink, ready: Queue[tuple[Built, Core]]) -> None:
    """The engine computes in the thread that loaded it, as in a worker."""
    built = build(WorkerConfig())
    core = Core(link, built)
    ready.put((built, core))
    core.stepper.run()


class Worker:
    """A worker's engine process without its front: requests are put into the gate, tokens are thrown away."""

    def __init__(self, errors: Errors) -> None:
        self._front, link = link_pair()
        self._front.setblocking(False)
        ready: Queue[tuple[Built, Core]] = Queue()
        threading.Thread(target=run_engine, args=(EngineLink(link), ready), daemon=True).start()
        built, self._core = ready.get()
        self._core.meter = Recorder(built, errors)
        self._vocabulary = built.gate.shape.vocabulary
        self._usual = Sampling(built.info.temperature, built.info.top_p, built.info.top_k)
        self._random = random.Random(0)
        self._ids = 0

    def arrive(self, prompt_tokens: int, max_tokens: int, tier: str = "default") -> None:
        request = self._request(1, prompt_tokens, max_tokens)
        self._core.gate.arrive(replace(request, tier=tier), clock())

    def step(self) -> bool:
        """One step; False when there is nothing to do."""
        if not self._core.gate.has_work:
            return False
        self._core.step()
        with suppress(BlockingIOError):
            while self._front.recv(1 << 20):
                pass
        return True

    def identical_steps(self, decodes: int, chunk: int) -> Iterator[float]:
        """Seconds of steps that are alike but for one token of context."""
        decoding = [self._request(2, CONTEXT_TOKENS, REPEATS + 2) for _ in range(decodes)]
        prompts = [self._request(2, chunk, 2) for _ in range(REPEATS)] if chunk else []
        self._run(StepPlan(start=(*decoding, *prompts)))
        if decoding:
            self._run(StepPlan(tuple(Entry(r.key, Kind.PREFILL, 0, CONTEXT_TOKENS, True) for r in decoding)))
        for repeat in range(REPEATS):
            entries = [Entry(r.key, Kind.DECODE, CONTEXT_TOKENS + repeat, 1, True) for r in decoding]
            if chunk:
                entries.append(Entry(prompts[repeat].key, Kind.PREFILL, 0, chunk, True))
            yield self._run(StepPlan(tuple(entries)))
        self._run(StepPlan(stop=tuple(r.key for r in (*decoding, *prompts))))

    def _run(self, plan: StepPlan) -> float:
        result = self._core.run_engine(plan)
        assert result is not None, "the engine failed"
        return self._core.stepper.ended - self._core.stepper.began

    def _request(self, gateway: int, prompt_tokens: int, max_tokens: int) -> Request:
        self._ids += 1
        prompt = [self._random.randrange(self._vocabulary) for _ in range(prompt_tokens)]
        return Request(
            self._ids, gateway, prompt, max_tokens, sampling=replace(self._usual, seed=self._ids), ignore_eos=True
        )


def decode_load(worker: Worker, rng: random.Random) -> None:
    """Batches of several sizes, each until its answers have ended; without a floor, so that none of them waits."""
    for batch in BATCHES:
        for _ in range(batch):
            worker.arrive(rng.randint(16, 64), rng.randint(12, 24), "flex")
        while worker.step():
            pass


def mixed_load(worker: Worker, rng: random.Random) -> None:
    """Conversations that come at random while others run."""
    for _ in range(MIXED_STEPS):
        if rng.random() < MIXED_ARRIVALS:
            tier = rng.choice(("default", "flex"))
            worker.arrive(min(1500, round(rng.lognormvariate(5.5, 0.7))), rng.randint(20, 80), tier)
        worker.step()
    while worker.step():
        pass


def prefill_load(worker: Worker, rng: random.Random) -> None:
    """Prompts whose answer is one token, as for a classification."""
    for _ in range(PREFILL_STEPS):
        for _ in range(rng.randint(1, 3)):
            worker.arrive(min(1500, round(rng.lognormvariate(5.0, 0.9))), 1)
        worker.step()
    while worker.step():
        pass


def all_loads(worker: Worker, errors: Errors, rounds: int) -> None:
    rng = random.Random(1)
    for number in range(rounds):
        errors.rounds.append({})
        for load in (decode_load, mixed_load, prefill_load):
            load(worker, rng)
            for regime, (decodes, chunk) in IDENTICAL.items():
                errors.identical[regime].append(list(worker.identical_steps(decodes, chunk)))
        print(f"round {number + 1} of {rounds}", flush=True)


def main(rounds: int = ROUNDS) -> list[Figure]:
    errors = Errors()
    worker = Worker(errors)
    all_loads(worker, errors, rounds)
    figures = []
    for regime in REGIMES:
        figures += [errors.mape(regime), errors.median(regime)]
        figures.append(single(f"{regime}, spread of identical steps over the run", "%", errors.spread(regime)))
        figures.append(errors.spread_at_once(regime))
    print_table("Step time predicted against measured, on this CPU", figures)
    milliseconds = {
        regime: [[round(1e3 * one, 3) for one in series] for series in errors.identical[regime]] for regime in REGIMES
    }
    save("prediction", figures, identical_steps_ms=milliseconds)
    return figures


if __name__ == "__main__":
    main()
