"""What this machine can do: measured bandwidth per memory level, matmul rate, and how many threads pay."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from worker.native.loader import DTYPES

MEGABYTE = 1 << 20
DEFAULT_CACHES = {"L2": MEGABYTE // 4, "L3": 4 * MEGABYTE}  # where the system does not tell
DRAM_PROBE_LIMIT_BYTES = 512 * MEGABYTE
PROBE_SECONDS = 0.25  # per quantity; six of them at most
GAIN_NEEDED = 1.15  # what more threads must gain: they cost other processes their cores


@dataclass(frozen=True, slots=True)
class MachineMeasurement:
    """Highest rates seen. `levels` are (name, capacity in bytes, read bytes per second), from the smallest on.

    The capacity of the last level is that of the whole memory. Flops count a multiplication and an addition as two.
    """

    levels: tuple[tuple[str, int, float], ...]
    flops_per_second: float


def measure_machine(device_name: str, dtype_name: str) -> MachineMeasurement:
    """Names as an engine has them. Takes under 3 seconds. On a CPU: with torch's current number of threads."""
    device, dtype = torch.device(device_name), DTYPES[dtype_name]
    if device.type == "cuda":
        return _measure_cuda(device, dtype)
    caches = cpu_caches(torch.get_num_threads())
    levels = [(name, size, read_bandwidth(size // 2, device)) for name, size in caches.items()]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    probe = min(max(4 * max(caches.values()), 64 * MEGABYTE), DRAM_PROBE_LIMIT_BYTES, memory // 8)
    levels.append(("DRAM", memory, read_bandwidth(probe, device)))
    return MachineMeasurement(tuple(levels), matmul_rate(1024, device, dtype))


def _measure_cuda(device: torch.device, dtype: torch.dtype) -> MachineMeasurement:
    properties = torch.cuda.get_device_properties(device)
    cache, memory = int(properties.L2_cache_size), int(properties.total_memory)
    free, _ = torch.cuda.mem_get_info(device)
    probe = min(max(32 * cache, 1024 * MEGABYTE), free // 4)
    levels = (("L2", cache, read_bandwidth(cache // 2, device)), ("DRAM", memory, read_bandwidth(probe, device)))
    return MachineMeasurement(levels, matmul_rate(8192, device, dtype))


def read_bandwidth(size_bytes: int, device: torch.device) -> float:
    """Bytes per second of reading a float32 buffer again and again: the better of a sum and a dot product."""
    buffer = torch.ones(max(size_bytes // 4, 1024), device=device)
    calls: tuple[Callable[[], Tensor], ...] = (buffer.sum, lambda: torch.dot(buffer, buffer))
    seconds = min(best_seconds(call, device, PROBE_SECONDS / 2) for call in calls)
    return buffer.nbytes / seconds


def matmul_rate(size: int, device: torch.device, dtype: torch.dtype) -> float:
    """Flops per second of a square matrix product."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / best_seconds(lambda: a @ b, device, PROBE_SECONDS)


def best_seconds(call: Callable[[], object], device: torch.device, budget_seconds: float) -> float:
    """Seconds of one call in the best of several rounds, each long enough for the clock and short beside the budget.

    The budget is looked at between rounds: threads on busy cores can make a call a thousand times as long as the last.
    """
    end = time.perf_counter() + budget_seconds
    _round_seconds(call, 1, device)  # pages, kernels and libraries come into being
    once = _round_seconds(call, 1, device)
    calls = max(1, min(50, int(budget_seconds / 10 / max(once, 1e-7))))
    best = once
    for _ in range(10):
        if time.perf_counter() > end:
            break
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


def cpu_caches(threads: int, root: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> dict[str, int]:
    """Bytes of L2 and L3 that `threads` threads have together. A private cache counts once per thread.

    L1 is left out: the cost of a torch call hides it.
    """
    caches = {}
    for index in sorted(root.glob("index[0-9]*")):
        try:
            level, kind = (index / "level").read_text().strip(), (index / "type").read_text().strip()
            size = _parse_size((index / "size").read_text())
            private = len(parse_cpu_list((index / "shared_cpu_list").read_text())) == 1
        except (OSError, ValueError):
            continue  # a virtual machine may show half of it
        if kind != "Instruction" and level != "1":
            caches[f"L{level}"] = size * (threads if private else 1)
    return caches or DEFAULT_CACHES


def _parse_size(text: str) -> int:
    """'32768K' or '32M' in bytes."""
    text = text.strip()
    unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:])
    return int(text[:-1]) * unit if unit else int(text)


def parse_cpu_list(text: str) -> set[int]:
    """'0-3,8' as {0, 1, 2, 3, 8}."""
    cpus: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        cpus |= set(range(int(first), int(last or first) + 1))
    return cpus


def available_cpus() -> int:
    """CPUs this process may use: the smaller of its affinity and its control group's quota, at least 1."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min(affinity, cgroup_cpus())))


def cgroup_cpus(root: Path = Path("/sys/fs/cgroup"), groups: Path = Path("/proc/self/cgroup")) -> float:
    """CPUs' worth of time that the control group and those above it allow; infinite without a quota."""
    quotas = [float("inf")]
    try:
        lines = groups.read_text().splitlines()
    except OSError:
        return quotas[0]
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = root / controllers if controllers else root  # version 1 has a tree per controller
        here = base / path.strip("/")
        quotas += [_quota(group) for group in (here, *here.parents) if group.is_relative_to(base)]
    return min(quotas)


def _quota(group: Path) -> float:
    """CPUs' worth of one control group, of version 2 or 1."""
    try:
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
    except (OSError, ValueError):
        return float("inf")
    return float("inf") if quota in ("max", "-1") else float(quota) / float(period)


def choose_threads(step: Callable[[], object], available: int, budget_seconds: float = 0.6) -> int:
    """1, or all available, whichever runs `step` faster; more than one must gain 15 %. Leaves torch set to it.

    Rounds alternate between the two, because a shared machine changes from second to second.
    """
    counts = (1, available)
    best = dict.fromkeys(counts, float("inf"))
    end = time.perf_counter() + budget_seconds
    while available > 1:
        for count in counts:
            torch.set_num_threads(count)
            step()  # the threads come into being, caches are shared out anew
            best[count] = min(best[count], *(_round_seconds(step, 1, torch.device("cpu")) for _ in range(5)))
        if time.perf_counter() > end:
            break
    chosen = available if best[1] > GAIN_NEEDED * best[available] else 1
    torch.set_num_threads(chosen)
    return chosen
