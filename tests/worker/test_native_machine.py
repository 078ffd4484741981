"""Measuring the machine: that a measurement is one, and how many threads are taken."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from worker.native import machine
from worker.native.machine import (
    DRAM_PROBE_BYTES,
    call_seconds,
    choose_threads,
    dram_probe_bytes,
    flops_rates,
    matmul_rate,
    measure_machine,
    read_bandwidth,
    weights_bandwidth,
)

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that spin for each other on busy cores take a hundred times as long, and rates become implausible."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def paced(monkeypatch: pytest.MonkeyPatch) -> tuple[dict[int, float], list[int], list[int]]:
    """Seconds of a step by the number of threads; the number that is set; every number that was timed."""
    seconds: dict[int, float] = {}
    current, tried = [1], []

    def round_seconds(*_: object) -> float:
        tried.append(current[0])
        return seconds[current[0]]

    monkeypatch.setattr(torch, "set_num_threads", lambda count: current.__setitem__(0, count))
    monkeypatch.setattr("worker.native.machine._round_seconds", round_seconds)
    return seconds, current, tried


@pytest.mark.parametrize(("four", "expected"), [(0.5, 4), (0.9, 1), (1.5, 1)])
def test_more_threads_must_gain_enough(
    paced: tuple[dict[int, float], list[int], list[int]], four: float, expected: int
) -> None:
    seconds, current, _ = paced
    seconds.update({1: 1e-3, 4: four * 1e-3})
    assert choose_threads(lambda: None, (4, 1), torch.set_num_threads, budget_seconds=0.01) == expected == current[0]


def test_the_fewest_threads_near_the_fastest_are_taken(
    paced: tuple[dict[int, float], list[int], list[int]],
) -> None:
    seconds, _, tried = paced
    seconds.update({64: 1.1e-3, 32: 1.0e-3, 16: 1.1e-3, 1: 9e-3})
    assert choose_threads(lambda: None, (64, 32, 16, 1), torch.set_num_threads, budget_seconds=0.01) == 16
    assert set(tried) == {64, 32, 16, 1}


def test_a_step_that_outlasts_the_budget_is_run_once_with_all_threads(
    paced: tuple[dict[int, float], list[int], list[int]],
) -> None:
    seconds, _, tried = paced
    seconds.update({8: 5.0, 1: 40.0})
    assert choose_threads(lambda: None, (8, 1), torch.set_num_threads, budget_seconds=0.0) == 8
    assert tried == [8]


def test_where_there_is_one_cpu_nothing_is_timed(paced: tuple[dict[int, float], list[int], list[int]]) -> None:
    _, current, tried = paced
    assert choose_threads(lambda: None, (1,), torch.set_num_threads) == 1 == current[0]
    assert tried == []


def test_rates_are_of_a_plausible_size() -> None:
    """Of one thread, on anything from a slow shared core to the fastest: a wrong unit or factor of 1000 would show."""
    assert 1e9 < read_bandwidth(1 << 20, CPU) < 1e12
    assert 1e9 < matmul_rate(128, CPU, torch.float32) < 2e12
    assert 1e-7 < call_seconds(CPU) < 1e-4


@pytest.mark.parametrize(
    ("cache", "free", "probe"),
    [
        (4 << 20, 16 << 30, 64 << 20),
        (32 << 20, 16 << 30, 128 << 20),
        (256 << 20, 16 << 30, DRAM_PROBE_BYTES),
        (768 << 20, 64 << 30, 1536 << 20),
        (768 << 20, 2 << 30, 512 << 20),
        (4 << 20, 100 << 20, 25 << 20),
    ],
)
def test_the_probe_of_memory_is_larger_than_the_cache_and_smaller_than_what_is_free(
    cache: int, free: int, probe: int
) -> None:
    assert dram_probe_bytes(cache, free) == probe


@pytest.mark.parametrize(("free", "name"), [(64 << 20, "DRAM"), (8 << 20, "DRAM (partly from a cache)")])
def test_a_probe_that_fits_a_cache_is_marked(free: int, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cpu_caches", lambda threads: {"L3": 4 << 20})
    monkeypatch.setattr(machine, "free_memory_bytes", lambda: free)
    monkeypatch.setattr(machine, "PROBE_SECONDS", 0.01)
    assert [level.name for level in machine._cpu_levels(CPU)] == ["L3", name]


def test_weights_are_read_whatever_they_hold_and_however_they_lie() -> None:
    nan = torch.full((512, 512), float("nan"), dtype=torch.bfloat16)
    transposed = torch.ones(256, 512).T
    for weights in ([nan], [transposed], [nan, transposed]):
        assert 1e9 < weights_bandwidth(weights, CPU) < 1e12


def test_what_cannot_be_read_in_words_or_is_no_matrix_is_left_out() -> None:
    norm = torch.ones(64)
    odd = torch.ones(99_999, dtype=torch.bfloat16)
    shifted = torch.ones(100_001, dtype=torch.bfloat16)[1:]
    gaps = torch.ones(512, 512)[:, ::2]
    assert weights_bandwidth([norm, odd, shifted, gaps], CPU) == weights_bandwidth([], CPU) == 0.0


def test_the_engines_own_format_comes_first_and_is_never_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    flops = {torch.float32: 1e11, torch.bfloat16: 5e11, torch.float16: 1e9}
    monkeypatch.setattr("worker.native.machine.matmul_rate", lambda size, device, dtype, budget=0: flops[dtype])
    assert list(flops_rates(CPU, "bfloat16").items()) == [("bfloat16", 5e11), ("float32", 1e11)]
    assert list(flops_rates(CPU, "float16").items()) == [("float16", 1e9), ("float32", 1e11), ("bfloat16", 5e11)]


def test_the_level_that_holds_the_weights_is_never_slower_than_they_were_read() -> None:
    weights = [torch.ones(256, 1024)]
    device = measure_machine("cpu", "float32", weights)
    held = device.level_for(weights[0].nbytes)
    assert held.bytes_per_second >= device.weights_bytes_per_second > 0
    assert device.flops_per_second == dict(device.flops_per_dtype)["float32"]
    assert [level.name for level in device.levels][-1].startswith("DRAM")
    assert device.call_seconds > 0
