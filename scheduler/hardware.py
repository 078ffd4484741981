"""Devices: how fast memory is read, how fast numbers are multiplied, how much fits.

A `Device` holds what a datasheet or a measurement says, and the shares of it that kernels reach in practice. The
catalogue's shares are those of serving kernels on H100/H200 and an RTX 4090 (vLLM 0.19–0.24): 0.93 of bandwidth for
weights, 0.8 for KV, 0.9 of peak flops, 1.5 ms host time a step.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

GB = 1e9
GIB = 2**30


@dataclass(frozen=True, slots=True)
class MemoryLevel:
    """A cache or a memory: what fits into `capacity_bytes` is read at `bytes_per_second`."""

    name: str
    capacity_bytes: float
    bytes_per_second: float


@dataclass(frozen=True, slots=True)
class Device:
    """One device. `levels` go from the smallest and fastest to main memory, whose capacity is the device's."""

    name: str
    levels: tuple[MemoryLevel, ...]
    flops_per_second: float  # dense, in the format the engine computes in
    host_seconds: float = 0.0015  # per step, whatever it carries
    sequence_seconds: float = 0.0  # per sequence and step
    phase_seconds: float = 0.0  # per kernel phase (about five a layer)
    weight_share: float = 1.0  # of bandwidth, reading weights
    kv_share: float = 1.0  # of bandwidth, reading KV
    flops_share: float = 1.0  # of peak, matrix products
    attention_share: float = 1.0  # of peak, attention over the context
    source: str = ""
    # Told to people and to Prometheus, not used by any formula; empty where nothing was measured.
    flops_per_dtype: tuple[tuple[str, float], ...] = ()
    weights_bytes_per_second: float = 0.0  # reading the model's own weights
    call_seconds: float = 0.0  # of the smallest operation: host time

    @property
    def memory(self) -> MemoryLevel:
        return self.levels[-1]

    def level_for(self, working_set_bytes: float) -> MemoryLevel:
        """The smallest level that holds the working set; a model that fits a cache is not bound by main memory."""
        for level in self.levels:
            if working_set_bytes <= level.capacity_bytes:
                return level
        return self.memory

    def raised(self, working_set_bytes: float, bytes_per_second: float, flops_per_second: float = 0.0) -> Device:
        """This device, with these rates where they are above its own: those of the level that holds the working set."""
        held = self.level_for(working_set_bytes)
        faster = replace(held, bytes_per_second=max(held.bytes_per_second, bytes_per_second))
        levels = tuple(faster if level is held else level for level in self.levels)
        return replace(self, levels=levels, flops_per_second=max(self.flops_per_second, flops_per_second))


_SERVING: dict[str, Any] = {"weight_share": 0.93, "kv_share": 0.8, "flops_share": 0.9, "attention_share": 0.5}


def _gpu(name: str, memory_gib: float, gb_per_second: float, l2_mib: float, tflops: float, source: str) -> Device:
    # L2 read bandwidth of NVIDIA cards is 2.5–4 times that of their memory; 3 is used where no measurement is at hand.
    levels = (
        MemoryLevel("L2", l2_mib * 2**20, 3 * gb_per_second * GB),
        MemoryLevel("memory", memory_gib * GIB, gb_per_second * GB),
    )
    return Device(name, levels, tflops * 1e12, source=source, **_SERVING)


CATALOGUE: dict[str, Device] = {
    device.name: device
    for device in (
        _gpu("a100", 80, 2039, 40, 312, "NVIDIA A100 80GB SXM datasheet, bf16 dense"),
        _gpu("h100", 80, 3350, 50, 989, "NVIDIA H100 SXM datasheet, bf16 dense"),
        _gpu("h200", 141, 4800, 50, 989, "NVIDIA H200 datasheet, bf16 dense"),
        _gpu("b200", 180, 8000, 126, 2250, "NVIDIA HGX B200 datasheet, bf16 dense"),
        _gpu("l40s", 48, 864, 96, 362, "NVIDIA L40S datasheet, bf16 dense"),
        _gpu("l4", 24, 300, 48, 121, "NVIDIA L4 datasheet, bf16 dense"),
        _gpu("rtx-3090", 24, 936, 6, 71, "NVIDIA GA102 whitepaper, bf16 dense"),
        _gpu("rtx-4090", 24, 1008, 72, 165, "NVIDIA Ada whitepaper, bf16 with fp32 accumulation, dense"),
        _gpu("rtx-5090", 32, 1792, 96, 210, "NVIDIA Blackwell RTX whitepaper, bf16 with fp32 accumulation, dense"),
        _gpu(
            "mi300x", 192, 5300, 256, 1307, "AMD Instinct MI300X datasheet, bf16 dense; 256 MiB is its Infinity Cache"
        ),
        Device(
            "laptop-cpu",
            (MemoryLevel("L3", 16 * 2**20, 200 * GB), MemoryLevel("memory", 16 * GIB, 60 * GB)),
            5e11,
            source="a dual-channel DDR5 laptop, rounded",
        ),
    )
}


ABOVE_ZERO = ("flops_per_second", "weight_share", "kv_share", "flops_share", "attention_share")


def device_from_json(text: str) -> Device:
    """A device of one's own, from JSON with the fields of `Device`. Raises ValueError with the field that is wrong.

    Fields that are left out have the values of a perfect device: every share 1, no host time.
    """
    try:
        data: dict[str, Any] = json.loads(text)
        levels = tuple(MemoryLevel(**level) for level in data.pop("levels"))
        device = Device(levels=levels, **{"host_seconds": 0.0, **data})
        above_zero = {name: getattr(device, name) > 0 for name in ABOVE_ZERO}
        are_levels_sane = all(level.bytes_per_second > 0 and level.capacity_bytes > 0 for level in levels)
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"not a device description: {error}") from error
    if not levels or not are_levels_sane:
        raise ValueError("not a device description: every memory level needs a capacity and a bandwidth above 0")
    if not all(above_zero.values()):
        wrong = ", ".join(name for name, is_above in above_zero.items() if not is_above)
        raise ValueError(f"not a device description: {wrong} must be above 0")
    return replace(device, levels=tuple(sorted(levels, key=lambda level: level.capacity_bytes)))
