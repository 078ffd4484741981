"""The sweep at start, against an engine whose speed is known: the cost model fitted to it predicts it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from scheduler.batch import Entry, Kind, StepPlan
from scheduler.calibration import CostModel, Timing, fit_device
from scheduler.gate import Limits
from scheduler.hardware import CATALOGUE, Device, MemoryLevel
from scheduler.model import SHAPES
from scheduler.roofline import NO_WORK, StepWork, decode_work, step_cost, step_work
from worker.calibrate import GREEDY, LEAST_CACHE_TOKENS, LEAST_CONTEXT_TOKENS, SECONDS, Sweep
from worker.engine import StepResult
from worker.native import machine
from worker.simulated import SimulatedEngine

SHAPE = SHAPES["llama-3.2-1b"]
LIMITS = Limits(SHAPE.context_tokens)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Watched(SimulatedEngine):
    """Checks what a real engine relies on: keys are started before they appear, contexts are whole, all are stopped."""

    def __init__(self, device: Device, clock: Clock) -> None:
        super().__init__(device, SHAPE, [10], 2, 0, clock, clock.sleep)
        self.computed: dict[int, int] = {}
        self.most_tokens = 0

    def run(self, plan: StepPlan) -> StepResult:
        for key in plan.stop:
            del self.computed[key]
        for request in plan.start:
            self.computed[request.key] = 0
        for entry in plan.entries:
            assert self.computed[entry.key] == entry.position
            self.computed[entry.key] += entry.query_tokens
        self.most_tokens = max(self.most_tokens, sum(self.computed.values()))
        return super().run(plan)


def swept(
    device: Device, limits: Limits = LIMITS, capacity_tokens: int = 1 << 20
) -> tuple[Watched, list[Timing], Clock]:
    clock = Clock()
    engine = Watched(device, clock)
    return engine, Sweep(engine, SHAPE, limits, capacity_tokens, GREEDY, clock).run(), clock


def works() -> list[StepWork]:
    """Steps that the sweep did not time."""
    shapes = [(1, 100, 0), (3, 200, 0), (24, 64, 0), (48, 300, 0), (0, 0, 100), (6, 100, 50), (12, 400, 200)]
    return [
        step_work(
            SHAPE,
            [Entry(n, Kind.DECODE, context, 1, True) for n in range(decodes)]
            + ([Entry(99, Kind.PREFILL, 0, chunk, True)] if chunk else []),
        )
        for decodes, context, chunk in shapes
    ]


@pytest.mark.parametrize("name", ["l4", "rtx-4090", "h100", "mi300x"])
def test_the_sweep_recovers_the_device_within_a_few_per_cent(name: str) -> None:
    true = CATALOGUE[name]
    _, timings, _ = swept(true)
    datasheet = replace(true, host_seconds=0.0, weight_share=1.0, kv_share=1.0, flops_share=1.0, attention_share=1.0)
    fitted = fit_device(datasheet, SHAPE, timings)
    for work in works():
        assert step_cost(fitted, SHAPE, work).seconds == pytest.approx(step_cost(true, SHAPE, work).seconds, rel=0.05)


def test_a_primed_model_promises_with_a_small_margin() -> None:
    _, timings, _ = swept(CATALOGUE["l4"])
    model = CostModel(fit_device(CATALOGUE["l4"], SHAPE, timings), SHAPE)
    model.prime(timings)
    assert model.margin == pytest.approx(0.05)


def test_the_sweep_leaves_no_sequence_behind() -> None:
    engine, timings, _ = swept(CATALOGUE["h100"])
    assert timings and engine.computed == {} and engine._answers == {}


SLOW_CORES = Device(
    "two slow cores",
    (MemoryLevel("L3", 32e6, 80e9), MemoryLevel("DRAM", 16e9, 30e9)),
    3e11,
    host_seconds=0.005,
    weight_share=0.8,
    kv_share=0.5,
    flops_share=0.6,
    attention_share=0.3,
)
CRAWLING = replace(SLOW_CORES, weight_share=0.1, flops_share=0.05, host_seconds=0.2)


@pytest.mark.parametrize("slow", [SLOW_CORES, CRAWLING], ids=["slow", "crawling"])
def test_a_slow_engine_is_timed_on_the_cheap_steps_and_in_time(slow: Device) -> None:
    engine, timings, clock = swept(slow)
    _, all_timings, _ = swept(CATALOGUE["h100"])
    assert 1 <= len(timings) < len(all_timings)
    assert timings[0].work.query_tokens == 1
    assert engine.computed == {}
    assert clock.now < SECONDS + 3 * timings[-1].seconds


def test_a_fast_engine_is_timed_on_every_step() -> None:
    _, timings, clock = swept(CATALOGUE["h100"])
    assert len(timings) == sum(1 for _ in Sweep._cases())
    assert {1, 8, 32, 128, 512} <= {timing.work.query_tokens for timing in timings}
    assert clock.now < SECONDS


def test_large_steps_that_were_left_out_are_still_foretold() -> None:
    _, timings, _ = swept(SLOW_CORES)
    assert max(timing.work.query_tokens for timing in timings) < 512
    datasheet = replace(SLOW_CORES, host_seconds=0.0, weight_share=1.0, kv_share=1.0, flops_share=1.0)
    fitted = fit_device(datasheet, SHAPE, timings)
    for work in (*works(), NO_WORK.plus_chunk(SHAPE, 0, 512, True), NO_WORK.plus_chunk(SHAPE, 0, 2048, True)):
        assert step_cost(fitted, SHAPE, work).seconds == pytest.approx(
            step_cost(SLOW_CORES, SHAPE, work).seconds, rel=0.15
        )


def test_the_sweep_stays_within_memory_and_context() -> None:
    capacity = 2000
    engine, timings, _ = swept(CATALOGUE["h100"], Limits(context_tokens=128), capacity)
    assert timings and engine.most_tokens <= capacity
    assert max(timing.work.query_tokens for timing in timings) <= 128


@pytest.mark.parametrize("context", [LEAST_CONTEXT_TOKENS, 64])
def test_the_least_context_and_cache_are_enough_for_a_case_and_less_are_not(context: int) -> None:
    _, timings, _ = swept(SLOW_CORES, Limits(context), LEAST_CACHE_TOKENS)
    assert timings
    cases = list(Sweep._cases())
    for limits, capacity in ((LEAST_CONTEXT_TOKENS - 1, 1 << 20), (LEAST_CONTEXT_TOKENS, LEAST_CACHE_TOKENS - 16)):
        clock = Clock()
        narrow = Sweep(Watched(SLOW_CORES, clock), SHAPE, Limits(limits), capacity, GREEDY, clock)
        assert not any(narrow._fits(case) for case in cases)


def test_without_timings_the_device_stays_as_it_is() -> None:
    assert fit_device(SLOW_CORES, SHAPE, []) is SLOW_CORES
    model = CostModel(SLOW_CORES, SHAPE)
    model.prime([])
    assert model.margin == 0.05


@pytest.mark.parametrize("device", [CATALOGUE["h100"], CATALOGUE["laptop-cpu"], SLOW_CORES], ids=lambda d: d.name)
@pytest.mark.parametrize("call_seconds", [1e-6, 1e-3, 0.03])
def test_all_that_is_measured_at_start_takes_less_than_ten_seconds_together(
    device: Device, call_seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    engine = Watched(device, clock)
    threads: list[int] = []

    def round_seconds(call: Callable[[], object], calls: int, where: object) -> float:
        """Of a probe, whose calls all take the same; of the engine's step, what it takes."""
        began = clock()
        if call == step:
            step()
        else:
            clock.sleep(calls * call_seconds)
        return clock() - began

    def step() -> None:
        clock.sleep(step_cost(device, SHAPE, decode_work(SHAPE, 8, SHAPE.kv_bytes(8))).seconds)

    monkeypatch.setattr(machine, "time", SimpleNamespace(perf_counter=clock))
    monkeypatch.setattr(machine, "_round_seconds", round_seconds)
    monkeypatch.setattr(machine, "cpu_caches", lambda threads: {"L2": 1 << 20, "L3": 4 << 20})
    monkeypatch.setattr(machine.torch, "set_num_threads", threads.append)
    machine.measure_machine("cpu", "bfloat16", [torch.ones(256, 256)])
    machine.choose_threads(step, (64, 32, 1), torch.set_num_threads)
    Sweep(engine, SHAPE, LIMITS, 1 << 20, GREEDY, clock).run()
    assert 1.0 < clock() < 10.0
    assert threads


def test_every_timing_has_a_spread_of_nothing_where_nothing_varies() -> None:
    _, timings, _ = swept(CATALOGUE["h100"])
    assert all(timing.seconds > 0 and timing.spread < 0.01 for timing in timings)
