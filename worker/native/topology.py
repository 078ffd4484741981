"""Which CPUs, caches and memory nodes this process has, and how it settles on them. Nothing here needs torch."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, MutableMapping
from dataclasses import dataclass
from pathlib import Path

from worker.amounts import in_bytes

MEGABYTE = 1 << 20
DEFAULT_CACHES = {"L2": MEGABYTE // 4, "L3": 4 * MEGABYTE}  # where the system does not tell
CPUS = Path("/sys/devices/system/cpu")
NODES = Path("/sys/devices/system/node")
GROUPS = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")
PASSIVE = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "2000"}  # of GNU OpenMP, which torch's Linux wheels bring


def wait_passively(environ: MutableMapping[str, str]) -> None:
    """Threads that wait for each other spin for some microseconds, then sleep. What the user set is left alone.

    To be called before torch is imported. A step of SmolLM2-135M on two cores, in ms, with the cores to itself and with
    another process on one of them (mean of 90): sleeping at once 26 and 28, 2,000 turns 17 and 42, libgomp's own 300,000
    turns 17 and 60, with every tenth step above 100.
    """
    if not PASSIVE.keys() & environ.keys():
        environ.update(PASSIVE)


def cpu_caches(threads: int, root: Path = CPUS / "cpu0" / "cache") -> dict[str, int]:
    """Bytes of L2 and L3 that `threads` threads have together, filling the CPUs that share one before the next.

    L1 is left out: the cost of a torch call hides it.
    """
    caches = {}
    for index in sorted(root.glob("index[0-9]*")):
        try:
            level, kind = (index / "level").read_text().strip(), (index / "type").read_text().strip()
            size = _parse_size((index / "size").read_text())
            shared = len(parse_cpu_list((index / "shared_cpu_list").read_text())) or 1
        except (OSError, ValueError):
            continue  # a virtual machine may show half of it
        if kind != "Instruction" and level != "1":
            caches[f"L{level}"] = size * math.ceil(threads / shared)
    return caches or DEFAULT_CACHES


def _parse_size(text: str) -> int:
    """'32768K' or '32M' in bytes."""
    text = text.strip()
    unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:])
    return int(text[:-1]) * unit if unit else int(text)


def parse_cpu_list(text: str) -> set[int]:
    """'0-3,8' as {0, 1, 2, 3, 8}."""
    cpus: set[int] = set()
    for part in text.strip().split(",") if text.strip() else ():
        first, _, last = part.partition("-")
        cpus |= set(range(int(first), int(last or first) + 1))
    return cpus


def allowed_cpus() -> set[int]:
    """By this thread's affinity."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def available_cpus() -> int:
    """CPUs this process may use: the smaller of its affinity and its control group's quota, at least 1."""
    return max(1, int(min(len(allowed_cpus()), cgroup_cpus())))


def control_groups(controller: str, root: Path = GROUPS, own: Path = OWN_GROUPS) -> Iterator[Path]:
    """The folders of this process's control group and of those above it, of version 2, or 1 with this controller."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        base = root / controllers if controllers else root  # version 1 has a tree per controller
        here = base / path.strip("/")
        # A container may see a path that only its host has, and its own group as the root.
        yield from (group for group in (here, *here.parents) if group.is_relative_to(base))


def cgroup_cpus(root: Path = GROUPS, own: Path = OWN_GROUPS) -> float:
    """CPUs' worth of time that the control group and those above it allow; infinite without a quota."""
    return min(map(_quota, control_groups("cpu", root, own)), default=float("inf"))


def cgroup_free_bytes(root: Path = GROUPS, own: Path = OWN_GROUPS) -> float:
    """Memory that the control group and those above it leave; infinite without a limit."""
    return min(map(_left_bytes, control_groups("memory", root, own)), default=float("inf"))


def _left_bytes(group: Path) -> float:
    """Files that a group keeps in memory are given up when memory is needed; what lies in a tmpfs is not."""
    second = (group / "memory.max").exists()
    limit, used = ("max", "current") if second else ("limit_in_bytes", "usage_in_bytes")
    files, kept = ("file", "shmem") if second else ("total_cache", "total_shmem")
    try:
        most = (group / f"memory.{limit}").read_text().strip()
        held = int((group / f"memory.{used}").read_text())
        lines = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        can_go = int(lines[files]) - int(lines.get(kept, 0))
        return float("inf") if most == "max" else max(0.0, float(most) - held + can_go)
    except (OSError, ValueError, KeyError):
        return float("inf")


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


def thread_counts(available: int, cores: int) -> list[int]:
    """The numbers of threads worth timing, most first: all CPUs, one for each core, half of them, one."""
    return sorted({available, min(cores, available), max(1, available // 2), 1}, reverse=True)


def physical_cores(cpus: Iterable[int], root: Path = CPUS) -> int:
    """Cores that these CPUs belong to; a CPU whose core is not known counts as one."""
    return len({_core(root / f"cpu{cpu}" / "topology") or cpu for cpu in cpus})


def _core(topology: Path) -> tuple[str, str] | None:
    try:
        return (topology / "physical_package_id").read_text(), (topology / "core_id").read_text()
    except OSError:
        return None


# --- memory nodes -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Node:
    """A memory node: the allowed CPUs that are close to it, and what can be had of its memory."""

    number: int
    cpus: frozenset[int]
    free_bytes: int


def memory_nodes(allowed: Iterable[int], root: Path = NODES) -> list[Node]:
    """Nodes that have allowed CPUs: the one with most of them first, among equals the one with most free memory."""
    found = []
    for folder in root.glob("node[0-9]*"):
        try:
            cpus = parse_cpu_list((folder / "cpulist").read_text()) & set(allowed)
            node = Node(int(folder.name.removeprefix("node")), frozenset(cpus), _free_bytes(folder / "meminfo"))
        except (OSError, ValueError, KeyError):
            continue
        if node.cpus:
            found.append(node)
    return sorted(found, key=lambda node: (-len(node.cpus), -node.free_bytes, node.number))


def _free_bytes(meminfo: Path) -> int:
    """What is free, and what only caches files: 'Node 0 MemFree:  1024 kB'."""
    kilobytes = {}
    for line in meminfo.read_text().splitlines():
        _, _, name, amount, *_ = line.split()
        kilobytes[name.rstrip(":")] = int(amount)
    return 1024 * (kilobytes["MemFree"] + kilobytes.get("FilePages", 0) - kilobytes.get("Shmem", 0))


def choose_node(needed_bytes: float, threads: int = 0, root: Path = NODES) -> tuple[Node | None, str]:
    """The memory node that a model is to be served from, and what is to be said of it; nothing where there is one node.

    A model that does not fit the node, or more `threads` asked for than it has CPUs, need all nodes.
    """
    nodes = memory_nodes(allowed_cpus(), root) if hasattr(os, "sched_setaffinity") else []
    if len(nodes) < 2:
        return None, ""
    node = nodes[0]
    if needed_bytes > node.free_bytes:
        free, needed = in_bytes(node.free_bytes), in_bytes(needed_bytes)
        return None, f"on all {len(nodes)} NUMA nodes: node {node.number} has {free} free, the model takes {needed}"
    if threads > len(node.cpus):
        return None, f"on all {len(nodes)} NUMA nodes: node {node.number} has {len(node.cpus)} CPUs"
    return node, f"on NUMA node {node.number}"


def bind_to(node: Node) -> None:
    """Binds this thread, and those it will start, to a node's CPUs: memory is then taken from there."""
    os.sched_setaffinity(0, node.cpus)
