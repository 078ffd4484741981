"""Loads the torch engine for a worker: how much KV cache it gets, and what was measured of the machine."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from scheduler.hardware import Device, MemoryLevel
from scheduler.model import ModelShape
from worker.config import WorkerConfig
from worker.files import read_config
from worker.native.machine import measure_machine
from worker.native.runner import NativeEngine

CPU_SHARE = 0.25  # of the memory that is free, for the KV cache
CUDA_SHARE = 0.85  # of the memory that the weights leave
FULL_CONTEXTS = 64  # more than so many full sequences of KV cache help nobody on a CPU


@dataclass(frozen=True, slots=True)
class Native:
    engine: NativeEngine
    shape: ModelShape
    device: Device  # as measured, with every share at 1
    threads_note: str


def load(folder: Path, config: WorkerConfig) -> Native:
    """Raises ValueError with a sentence when the checkpoint or the device cannot be used."""
    kv_bytes = config.kv_cache_bytes or _kv_cache_bytes(folder, config)
    engine = NativeEngine.load(folder, config.device, config.dtype, kv_bytes, config.threads or None)
    shape = ModelShape.from_config(engine.config, config.model, engine.dtype, engine.dtype)
    measured = measure_machine(engine.device, engine.dtype)
    levels = tuple(MemoryLevel(name, capacity, speed) for name, capacity, speed in measured.levels)
    device = Device(engine.device, levels, measured.flops_per_second, source="measured at start")
    threads = torch.get_num_threads()
    note = f", {threads} thread{'s' if threads > 1 else ''}" if engine.device == "cpu" else ""
    return Native(engine, shape, device, note)


def _kv_cache_bytes(folder: Path, config: WorkerConfig) -> int:
    if config.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {config.device}: torch sees no CUDA device here")
    on_cpu = config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available())
    dtype = config.dtype if config.dtype != "auto" else "float32" if on_cpu else "bfloat16"
    shape = ModelShape.from_config(read_config(folder), config.model, dtype, dtype)
    useful = int(FULL_CONTEXTS * shape.kv_bytes(config.context_tokens or shape.context_tokens))
    if on_cpu:
        return min(int(CPU_SHARE * _free_memory_bytes()), useful)
    index = torch.device("cuda" if config.device == "auto" else config.device)
    free, _ = torch.cuda.mem_get_info(index)
    return int(CUDA_SHARE * (free - shape.resident_bytes))


def _free_memory_bytes() -> int:
    """Memory that can be had: the system's, or what a cgroup leaves."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()) != "max":
        free = min(free, int(text))
    return free
