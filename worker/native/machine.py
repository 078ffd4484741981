"""What this machine can do: measured bandwidth per memory level, matmul rates, a call's cost, and how many threads pay."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from scheduler.hardware import Device, MemoryLevel
from worker.native.loader import DTYPES
from worker.native.memory import free_memory_bytes
from worker.native.topology import MEGABYTE, cpu_caches

DRAM_PROBE_BYTES = 512 * MEGABYTE  # are enough, unless a cache is larger
WEIGHTS_LIMIT_BYTES = 1024 * MEGABYTE  # of a large model's weights so many are read: it shows in no cache anyway
MATRIX_BYTES = 16 << 10  # what is smaller would show what a call costs
PROBE_SECONDS = 0.25  # per quantity; seven of them at most
GLANCE_SECONDS = 0.02
ROUND_SECONDS = {"cpu": 50e-6, "cuda": 2e-3}  # beside the clock's own cost, or that of waiting for the device
HOPELESS = 1 / 8  # of the best format's rate: one that is emulated
GAIN_NEEDED = 1.15  # what more threads must gain: they cost other processes their cores


def measure_machine(
    device_name: str, dtype_name: str, weights: Sequence[Tensor] = (), own_flops: float = 0.0
) -> Device:
    """The highest rates seen. Takes about 2 seconds, 3 where cores are slow. On a CPU: with torch's number of threads.

    Names as an engine has them. `weights` are those that a step reads: the level that holds them gets their rate, if it
    is higher than the probe's. Flops count a multiplication and an addition as two. `own_flops` are those of an engine
    whose products are not torch's.
    """
    where = torch.device(device_name)
    levels = _cuda_levels(where) if where.type == "cuda" else _cpu_levels(where)
    rates = flops_rates(where, dtype_name if dtype_name in DTYPES else "float32")
    if own_flops:
        rates = {dtype_name: own_flops} | {name: rate for name, rate in rates.items() if name != dtype_name}
    own = weights_bandwidth(weights, where)
    device = Device(
        device_name,
        levels,
        rates[dtype_name],
        source="measured at start",
        flops_per_dtype=tuple(rates.items()),
        weights_bytes_per_second=own,
        call_seconds=call_seconds(where),
    )
    return device.raised(sum(tensor.nbytes for tensor in weights), own)


def _cpu_levels(device: torch.device) -> tuple[MemoryLevel, ...]:
    caches = cpu_caches(torch.get_num_threads())
    free, largest = free_memory_bytes(), max(caches.values())
    levels = [
        MemoryLevel(name, size, read_bandwidth(min(size // 2, free // 4), device)) for name, size in caches.items()
    ]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    probe = dram_probe_bytes(largest, free)
    name = "DRAM" if probe >= 2 * largest else "DRAM (partly from a cache)"
    return (*levels, MemoryLevel(name, memory, read_bandwidth(probe, device)))


def dram_probe_bytes(cache_bytes: int, free_bytes: int) -> int:
    """At least twice the cache, so that most of it is read from memory; what is free bounds it."""
    usual = min(max(4 * cache_bytes, 64 * MEGABYTE), DRAM_PROBE_BYTES)
    return min(max(usual, 2 * cache_bytes), free_bytes // 4)


def _cuda_levels(device: torch.device) -> tuple[MemoryLevel, ...]:
    properties = torch.cuda.get_device_properties(device)
    cache, memory = int(properties.L2_cache_size), int(properties.total_memory)
    free, _ = torch.cuda.mem_get_info(device)
    probe = min(max(32 * cache, 1024 * MEGABYTE), free // 4)
    return (
        MemoryLevel("L2", cache, read_bandwidth(cache // 2, device)),
        MemoryLevel("DRAM", memory, read_bandwidth(probe, device)),
    )


# --- probes -----------------------------------------------------------------------------------------------------------


def read_bandwidth(size_bytes: int, device: torch.device) -> float:
    """Bytes per second of reading a float32 buffer again and again: the better of a sum and a dot product."""
    buffer = torch.ones(max(size_bytes // 4, 1024), device=device)
    calls: tuple[Callable[[], Tensor], ...] = (buffer.sum, lambda: torch.dot(buffer, buffer))
    seconds = min(best_seconds(call, device, PROBE_SECONDS / 2) for call in calls)
    return buffer.nbytes / seconds


def weights_bandwidth(weights: Sequence[Tensor], device: torch.device) -> float:
    """Bytes per second of reading the matrices among these tensors one after the other, as a step does; 0 without any."""
    matrices: list[Tensor] = []
    for tensor in weights:
        if _is_matrix(tensor) and sum(matrix.nbytes for matrix in matrices) < WEIGHTS_LIMIT_BYTES:
            row = tensor.as_strided((tensor.numel(),), (1,))  # as it lies, transposed or not
            matrices.append(row.view(torch.int64))  # whatever the numbers are, reading is what takes time
    if not matrices:
        return 0.0

    def read() -> None:
        for matrix in matrices:
            matrix.sum()

    return sum(matrix.nbytes for matrix in matrices) / best_seconds(read, device, PROBE_SECONDS)


def _is_matrix(tensor: Tensor) -> bool:
    """Large, without gaps, and whole words of 8 bytes."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    offset = tensor.storage_offset() * tensor.element_size()
    return tensor.nbytes >= MATRIX_BYTES and span == tensor.numel() and tensor.nbytes % 8 == offset % 8 == 0


def flops_rates(device: torch.device, dtype_name: str) -> dict[str, float]:
    """Flops per second by format, the engine's first; others that are merely emulated are left out."""
    rates = {name: _peak_flops(device, DTYPES[name]) for name in (dtype_name, "float32", "bfloat16", "float16")}
    worth = HOPELESS * max(rates.values())
    return {name: rate for name, rate in rates.items() if rate >= worth or name == dtype_name}


def _peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    if device.type == "cuda":
        return matmul_rate(8192, device, dtype)
    glance = matmul_rate(256, device, dtype, GLANCE_SECONDS)
    return glance if 2 * 1024**3 / glance > PROBE_SECONDS else max(glance, matmul_rate(1024, device, dtype))


def matmul_rate(size: int, device: torch.device, dtype: torch.dtype, budget_seconds: float = PROBE_SECONDS) -> float:
    """Flops per second of a square matrix product."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / best_seconds(lambda: a @ b, device, budget_seconds)


def call_seconds(device: torch.device) -> float:
    """Seconds of the smallest operation: what every call costs the host."""
    number = torch.zeros(1, device=device)
    return best_seconds(lambda: number.add_(1.0), device, GLANCE_SECONDS)


def best_seconds(call: Callable[[], object], device: torch.device, budget_seconds: float) -> float:
    """Seconds of one call in the best of many rounds, each just long enough for the clock.

    Short rounds find the moments in which nobody else has the cores. The budget is looked at between rounds: threads on
    busy cores can make a call a thousand times as long as the last.
    """
    end = time.perf_counter() + budget_seconds
    _round_seconds(call, 1, device)  # pages, kernels and libraries come into being
    best = _round_seconds(call, 1, device)
    calls = max(1, min(50, int(ROUND_SECONDS[device.type] / max(best, 1e-7))))
    while time.perf_counter() < end:
        best = min(best, _round_seconds(call, calls, device) / calls)
    return best


def _round_seconds(call: Callable[[], object], calls: int, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


# --- threads ----------------------------------------------------------------------------------------------------------


def choose_threads(
    step: Callable[[], object],
    counts: Sequence[int],
    set_threads: Callable[[int], object],
    budget_seconds: float = 0.8,
) -> int:
    """The fewest threads that come within 15 % of the fastest. `counts` are tried most first; leaves the engine set to it.

    Rounds go through all counts, because a shared machine changes from second to second. Where a step is so long that the
    time is over before a count's turn, it is not tried: a large model is faster with many.
    """
    best = dict.fromkeys(counts, float("inf"))
    end = time.perf_counter() + budget_seconds
    while len(counts) > 1:
        for count in counts:
            if time.perf_counter() < end or count == counts[0]:
                best[count] = min(
                    best[count], _step_seconds(step, count, set_threads, budget_seconds / 2 / len(counts))
                )
        if time.perf_counter() > end:
            break
    chosen = min(count for count in counts if best[count] <= GAIN_NEEDED * min(best.values()))
    set_threads(chosen)
    return chosen


def _step_seconds(
    step: Callable[[], object], threads: int, set_threads: Callable[[int], object], budget_seconds: float
) -> float:
    """The best of up to 5 steps, as many as the budget allows, after one in which threads come and caches are shared out."""
    cpu = torch.device("cpu")
    set_threads(threads)
    first = _round_seconds(step, 1, cpu)
    repeats = min(5, int(budget_seconds / max(first, 1e-9)) - 1)
    return min([first, *(_round_seconds(step, 1, cpu) for _ in range(repeats))])
