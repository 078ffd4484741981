"""What fits into memory, computed from a config before anything is allocated."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from scheduler.model import DTYPE_BYTES, ModelShape
from worker.config import WorkerConfig
from worker.native.config import DecoderConfig
from worker.native.linear import can_pack
from worker.native.loader import DTYPES, tensor_shapes
from worker.native.runner import auto_dtype

CPU_SHARE = 0.25  # of the memory that the weights leave, for the KV cache
CUDA_SHARE = 0.85
PACKING_SHARE = 0.5  # of what two copies of the weights leave; where the cache takes more, there is one copy
FULL_CONTEXTS = 64  # more than so many full sequences of KV cache help nobody on a CPU
LEAST_CONTEXT_TOKENS = 2048  # with room for less, or than the model's own context, nobody is served


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    kv_cache_bytes: int
    packs: bool  # there is room for a second copy of the weights, in the order that products of many rows want


@dataclass(frozen=True, slots=True)
class Need:
    """What a model takes at least, and what there is."""

    name: str
    parameters: int
    dtype: str
    kv_bytes: float
    kv_reason: str
    free_bytes: int

    @property
    def weight_bytes(self) -> float:
        return self.parameters * DTYPE_BYTES[self.dtype]

    def spare_bytes(self, copies: int = 1) -> float:
        """What so many copies of the weights leave."""
        return self.free_bytes - copies * self.weight_bytes

    def check(self) -> None:
        """Raises ValueError, with the arithmetic, when it does not fit."""
        if self.kv_bytes > self.spare_bytes():
            raise ValueError(
                f"{self.name} needs {_gb(self.weight_bytes)} for its weights in {self.dtype} ({_count(self.parameters)} "
                f"parameters x {DTYPE_BYTES[self.dtype]} bytes) and {_gb(self.kv_bytes)} for a KV cache {self.kv_reason}, "
                f"but {_gb(self.free_bytes)} are free; choose {', or '.join(self._ways_out())}"
            )

    def _ways_out(self) -> list[str]:
        ways = ["a smaller model"]
        if self.dtype == "float32":
            ways.append("--dtype bfloat16")
        if self.kv_reason.startswith("of --"):
            ways.append(f"less {self.kv_reason.split()[1]}")
        return ways


def plan_memory(
    config: Mapping[str, Any], decoder: DecoderConfig, stored_dtype: str, name: str, wanted: WorkerConfig
) -> MemoryPlan:
    """How much KV cache there will be: what is asked for, else a sensible share of what the weights leave.

    Raises ValueError with a sentence when the device is not there, or weights and cache do not fit it.
    """
    device = _device(wanted.device)
    parameters = sum(math.prod(size) for size in tensor_shapes(decoder).values())
    dtype = wanted.dtype if wanted.dtype != "auto" else auto_dtype(device, stored_dtype, parameters)
    shape = decoder.model_shape(name, dtype)
    need = Need(name, parameters, dtype, *_kv_need(shape, wanted), _free_bytes(device))
    need.check()
    packs = can_pack(device, DTYPES[dtype]) and need.kv_bytes <= PACKING_SHARE * need.spare_bytes(2)
    useful = FULL_CONTEXTS * shape.kv_bytes(wanted.context_tokens or shape.context_tokens)
    if device.type == "cuda":
        shared = CUDA_SHARE * need.spare_bytes()
    else:
        shared = min(CPU_SHARE * need.spare_bytes(2 if packs else 1), useful)
    return MemoryPlan(wanted.kv_cache_bytes or int(max(shared, min(need.kv_bytes, useful))), packs)


def _kv_need(shape: ModelShape, wanted: WorkerConfig) -> tuple[float, str]:
    """The least KV cache to start with, and of what it is."""
    if wanted.kv_cache_bytes:
        return wanted.kv_cache_bytes, "of --kv-cache"
    tokens = min(shape.context_tokens, wanted.context_tokens or LEAST_CONTEXT_TOKENS)
    return shape.kv_bytes(tokens), f"of --context {tokens:,}" if wanted.context_tokens else f"of {tokens:,} tokens"


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device, seen = torch.device(name), torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= seen:
        raise ValueError(f"--device {name}: torch sees {seen or 'no'} CUDA device{'s' if seen > 1 else ''} here")
    return device


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return free_memory_bytes()


def free_memory_bytes(meminfo: Path = Path("/proc/meminfo"), group: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory that can be had: the system's, or what the control group leaves."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if meminfo.is_file():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    limit = group / "memory.max"
    if limit.is_file() and (text := limit.read_text().strip()) != "max":
        free = min(free, max(0, int(text) - _held_bytes(group)))
    return free


def _held_bytes(group: Path) -> int:
    """What the processes of a control group have; files that it keeps in memory are given up when memory is needed."""
    lines = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    return int((group / "memory.current").read_text()) - int(lines["file"])


def _gb(amount: float) -> str:
    return f"{amount / 1e9:.1f} GB" if amount >= 1e8 else f"{amount / 1e6:.1f} MB"


def _count(number: float) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.1f} M"
