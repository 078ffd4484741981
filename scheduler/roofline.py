"""Bytes, operations and seconds of one step, by cause; the limit; the ridge.

    t = t_host + t_seq·B + phases·t_phase + mix(W(T)/BW_w, F(T)/peak) + KV/BW_kv + A/peak_attn
    mix(a, b) = (a⁴ + b⁴)^(1/4)

B counts the rows whose logits are wanted. Reading weights and multiplying overlap, so the larger of the two counts,
with a soft corner; attention over the context follows and overlaps with neither. Used for prediction, limit, loss by
cause, ridge and planning alike.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from scheduler.batch import Entry
from scheduler.hardware import Device
from scheduler.model import ModelShape

CAUSES = ("weights", "kv", "compute", "comm", "phases", "host", "interference", "idle", "unexplained")


@dataclass(frozen=True, slots=True)
class StepWork:
    """What a step carries, as far as its cost goes."""

    outputs: int  # rows whose logits are wanted: one per token drawn, and all of a prompt that is told
    query_tokens: int
    kv_read_bytes: float
    kv_write_bytes: float
    attention_flops: float

    def plus_chunk(self, shape: ModelShape, position: int, tokens: int, outputs: int) -> StepWork:
        """This work and a prefill chunk of `tokens` tokens that starts at `position`."""
        if tokens == 0:
            return self
        return StepWork(
            self.outputs + outputs,
            self.query_tokens + tokens,
            self.kv_read_bytes + shape.kv_bytes(position + tokens),
            self.kv_write_bytes + shape.kv_bytes(tokens),
            self.attention_flops + shape.attention_flops(tokens, position),
        )


NO_WORK = StepWork(0, 0, 0.0, 0.0, 0.0)


def step_work(shape: ModelShape, entries: Iterable[Entry]) -> StepWork:
    work = NO_WORK
    for entry in entries:
        work = work.plus_chunk(shape, entry.position, entry.query_tokens, entry.outputs)
    return work


def decode_work(shape: ModelShape, sequences: int, kv_bytes: float) -> StepWork:
    """A step that decodes one token for each of `sequences` sequences, which hold `kv_bytes` in all."""
    flops = shape.decode_attention_flops(kv_bytes)
    return StepWork(sequences, sequences, kv_bytes, sequences * shape.kv_bytes(1), flops)


@dataclass(frozen=True, slots=True)
class StepCost:
    """Predicted seconds of a step, by cause."""

    weights: float
    compute: float  # what arithmetic adds to the weight read, and attention
    kv: float
    phases: float
    host: float

    @property
    def seconds(self) -> float:
        return self.weights + self.compute + self.kv + self.phases + self.host


def step_cost(device: Device, shape: ModelShape, work: StepWork) -> StepCost:
    """The formula at the head of this file. `device` is a catalogue entry or a fitted one."""
    level = device.level_for(shape.resident_bytes + work.kv_read_bytes)
    bandwidth = level.bytes_per_second
    weights = shape.weight_bytes(work.query_tokens) / (bandwidth * device.weight_share)
    flops = shape.matmul_flops(work.query_tokens, work.outputs)
    arithmetic = flops / (device.flops_per_second * device.flops_share)
    attention = work.attention_flops / (device.flops_per_second * device.attention_share)
    kv = (work.kv_read_bytes + work.kv_write_bytes) / (bandwidth * device.kv_share)
    return StepCost(
        weights=weights,
        compute=mix(weights, arithmetic) - weights + attention,
        kv=kv,
        phases=shape.phases * device.phase_seconds,
        host=device.host_seconds + device.sequence_seconds * work.outputs,
    )


def mix(memory_seconds: float, compute_seconds: float) -> float:
    """Two overlapping costs: the larger one, with a soft corner where they are alike."""
    larger, smaller = max(memory_seconds, compute_seconds), min(memory_seconds, compute_seconds)
    if larger == 0:
        return 0.0
    ratio = smaller / larger
    ratio *= ratio
    return float(larger * (1 + ratio * ratio) ** 0.25)


def step_bytes(shape: ModelShape, work: StepWork) -> dict[str, float]:
    return {
        "weights": shape.weight_bytes(work.query_tokens),
        "kv_read": work.kv_read_bytes,
        "kv_write": work.kv_write_bytes,
    }


def step_flops(shape: ModelShape, work: StepWork) -> float:
    return shape.matmul_flops(work.query_tokens, work.outputs) + work.attention_flops


def limit_seconds(device: Device, shape: ModelShape, work: StepWork) -> float:
    """What physics allows: all bytes at full bandwidth, or all operations at full peak, whichever takes longer."""
    level = device.level_for(shape.resident_bytes + work.kv_read_bytes)
    return max(_least_bytes(shape, work) / level.bytes_per_second, step_flops(shape, work) / device.flops_per_second)


def _least_bytes(shape: ModelShape, work: StepWork) -> float:
    """What the step cannot do without: one that draws no token does not read the head."""
    unread = 0.0 if work.outputs else shape.head_parameters * shape.weight_bytes_each
    return sum(step_bytes(shape, work).values()) - unread


class Limit:
    """What physics allows a step, by the highest rates seen in this run: by a probe at start, or by any own step.

    `device` carries those rates; its shares play no part. A step faster than its limit shows that a probe was low.
    """

    def __init__(self, device: Device, shape: ModelShape) -> None:
        self.device = device
        self.shape = shape

    @property
    def bytes_per_second(self) -> float:
        """Of the memory level that holds the weights."""
        return self.device.level_for(self.shape.resident_bytes).bytes_per_second

    def seconds(self, work: StepWork) -> float:
        return limit_seconds(self.device, self.shape, work)

    def observe(self, work: StepWork, seconds: float) -> None:
        """Takes in what a step took: the limit can never be slower than that."""
        if seconds < self.seconds(work):
            working_set = self.shape.resident_bytes + work.kv_read_bytes
            bytes_moved, flops = _least_bytes(self.shape, work), step_flops(self.shape, work)
            self.device = self.device.raised(working_set, bytes_moved / seconds, flops / seconds)


def ridge_tokens(device: Device, shape: ModelShape, most: int = 8192) -> int:
    """The fewest tokens per step at which arithmetic takes as long as reading the weights."""
    bandwidth = device.level_for(shape.resident_bytes).bytes_per_second * device.weight_share
    peak = device.flops_per_second * device.flops_share

    def is_compute_bound(tokens: int) -> bool:
        return shape.matmul_flops(tokens, 0) / peak >= shape.weight_bytes(tokens) / bandwidth

    low, high = 1, most
    while low < high:
        middle = (low + high) // 2
        if is_compute_bound(middle):
            high = middle
        else:
            low = middle + 1
    return low
