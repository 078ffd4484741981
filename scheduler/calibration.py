"""The cost model of one worker: the roofline formula, fitted to the machine, with its own error and margin.

Fitted once at start from a sweep of timed steps, then corrected slowly while serving: one factor for the whole machine
(clocks, a neighbour) and one per kind of step. The margin is the error that 95 % of recent steps stayed within.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from scheduler.hardware import Device
from scheduler.model import ModelShape
from scheduler.roofline import Limit, StepCost, StepWork, ridge_tokens, step_cost

Array = NDArray[np.float64]

GAIN_RATE = 0.02  # of the factor for the whole machine, per step
CELL_RATE = 0.1  # of the factor per kind of step
CELL_CLIP = math.log(1.3)
MARGIN_STEPS = 512
MARGIN_QUANTILE = 0.95
MARGIN_EVERY = 32  # steps between two looks at the quantile
OUTLIER = math.log(4)  # a step this far off was interrupted: it counts for the error, not for the correction
JUMP_STEPS = 8  # this many steps in a row, all off to the same side by JUMP and more: the machine has changed
JUMP = math.log(1.15)


@dataclass(frozen=True, slots=True)
class Timing:
    """One kind of step, timed: the median seconds of several identical runs, and their relative spread."""

    work: StepWork
    seconds: float
    spread: float = 0.0


class CostModel:
    """Predicts the seconds of a step. `device` carries the fitted shares."""

    def __init__(self, device: Device, shape: ModelShape, margin: float = 0.05) -> None:
        self.device = device
        self.shape = shape
        self.margin = margin
        self.ridge = ridge_tokens(device, shape)
        self.limit = Limit(device, shape)
        self.steps = 0
        self._log_gain = 0.0
        self._log_cells: dict[tuple[int, int], float] = {}
        self._errors: deque[float] = deque(maxlen=MARGIN_STEPS)
        self._last_errors: deque[float] = deque(maxlen=JUMP_STEPS)

    def prime(self, timings: Sequence[Timing]) -> None:
        """Takes the sweep's remaining errors as the first corrections, and their mean as the first margin."""
        if not timings:
            return
        for timing in timings:
            self.limit.observe(timing.work, timing.seconds)
        errors = [math.log(timing.seconds / self.cost(timing.work).seconds) for timing in timings]
        for timing, error in zip(timings, errors, strict=True):
            self._log_cells[_cell(timing.work, self.shape)] = min(CELL_CLIP, max(-CELL_CLIP, error))
        mean = sum(abs(error) + timing.spread for timing, error in zip(timings, errors, strict=True)) / len(errors)
        self.margin = min(0.5, max(0.05, math.expm1(mean)))

    def cost(self, work: StepWork) -> StepCost:
        """Seconds by cause, uncorrected: what the causes of a step are split by."""
        return step_cost(self.device, self.shape, work)

    def seconds(self, work: StepWork) -> float:
        """The best prediction: the formula times the slow corrections."""
        correction = self._log_gain + self._log_cells.get(_cell(work, self.shape), 0.0)
        return self.cost(work).seconds * math.exp(correction)

    def safe_seconds(self, work: StepWork) -> float:
        """A prediction that 95 % of steps stay under."""
        return self.seconds(work) * (1 + self.margin)

    def observe(self, work: StepWork, seconds: float) -> float:
        """Takes in a measured step and returns the log error its prediction had."""
        self.limit.observe(work, seconds)
        error = math.log(seconds / self.seconds(work))
        self._errors.append(abs(error))
        self.steps += 1
        if self.steps % MARGIN_EVERY == 0:
            self.margin = self._measured_margin()
        if abs(error) < OUTLIER:
            self._log_gain += GAIN_RATE * error
            cell = _cell(work, self.shape)
            log_cell = self._log_cells.get(cell, 0.0) + CELL_RATE * error
            self._log_cells[cell] = min(CELL_CLIP, max(-CELL_CLIP, log_cell))
        self._jump_if_changed(error)
        return error

    def _jump_if_changed(self, error: float) -> None:
        """Another process takes half the machine: the slow corrections would be long in coming."""
        last = self._last_errors
        last.append(error)
        if len(last) == JUMP_STEPS and (min(last) > JUMP or max(last) < -JUMP):
            self._log_gain += statistics.median(last)
            last.clear()

    def _measured_margin(self) -> float:
        quantile = float(np.quantile(self._errors, MARGIN_QUANTILE))
        return min(1.0, max(0.02, math.expm1(quantile)))


def _cell(work: StepWork, shape: ModelShape) -> tuple[int, int]:
    kv_tokens = work.kv_read_bytes / max(1.0, shape.kv_bytes(1))
    return int(work.query_tokens).bit_length(), int(kv_tokens).bit_length()


# --- the fit at start -------------------------------------------------------------------------------------------------

FLOPS_SHARES = np.geomspace(0.005, 2.0, 49)
WEIGHT_SHARES = (1.0, 0.7, 0.5, 0.35, 1.4, 2.0, 3.0)  # the first is the prior: a share above 1 means the probe was low
# A probe of a cache may be far too low. Main memory's has read the model's own weights: beyond a noisy moment nothing is
# faster, and what steps of any size take besides is host time.
MOST_OF_MEMORY = 1.4
# In units of the device's bandwidth and peak: what KV and attention cost where no timing tells. The weight is small beside
# any step of which they are a tenth, and large beside a sweep that had no time for long contexts.
PRIOR_KV, PRIOR_ATTENTION, PRIOR_WEIGHT = 1 / 0.8, 1 / 0.5, 0.01
OFF_PRIOR = 1.15  # how much better (in squared error) another weight share must be to be taken


def fit_device(device: Device, shape: ModelShape, timings: Sequence[Timing]) -> Device:
    """`device` with the shares and fixed costs that explain the timings best, in relative error; without any, as it is.

    The corner between reading weights and multiplying is found on a grid; what is left is linear in host seconds,
    seconds per sequence, KV bytes and attention operations, and none of them can be negative.
    """
    if not timings:
        return device
    seconds = np.array([timing.seconds for timing in timings])
    weights, arithmetic = np.array([_overlapping(device, shape, timing.work) for timing in timings]).T
    in_memory = device.level_for(shape.resident_bytes) == device.memory
    possible = [share for share in WEIGHT_SHARES if share <= MOST_OF_MEMORY or not in_memory]
    shares = np.array([(weight, flops) for weight in possible for flops in FLOPS_SHARES])
    base = ((weights / shares[:, :1]) ** 4 + (arithmetic / shares[:, 1:]) ** 4) ** 0.25  # [shares, timings], as `mix`
    linear = np.array([_linear_features(device, shape, timing.work) for timing in timings]) / seconds[:, None]
    linear = np.vstack((linear, PRIOR_WEIGHT * np.eye(4)[2:]))
    prior = np.broadcast_to(PRIOR_WEIGHT * np.array((PRIOR_KV, PRIOR_ATTENTION)), (len(shares), 2))
    errors, values = _nonnegative_fit(linear, np.hstack(((seconds - base) / seconds, prior)))
    best = np.argmin(errors * np.where(shares[:, 0] == WEIGHT_SHARES[0], 1.0, OFF_PRIOR))
    host, per_sequence, per_kv, per_attention = values[best]
    return replace(
        device,
        host_seconds=float(host),
        sequence_seconds=float(per_sequence),
        phase_seconds=0.0,  # not to be told from host seconds by timing whole steps
        weight_share=float(shares[best, 0]),
        flops_share=float(shares[best, 1]),
        kv_share=1 / max(float(per_kv), 1e-3),
        attention_share=1 / max(float(per_attention), 1e-3),
    )


def _overlapping(device: Device, shape: ModelShape, work: StepWork) -> tuple[float, float]:
    """Seconds of reading the weights at full bandwidth, and of the matrix products at full peak."""
    bandwidth = device.level_for(shape.resident_bytes + work.kv_read_bytes).bytes_per_second
    flops = shape.matmul_flops(work.query_tokens, work.outputs)
    return shape.weight_bytes(work.query_tokens) / bandwidth, flops / device.flops_per_second


def _linear_features(device: Device, shape: ModelShape, work: StepWork) -> tuple[float, float, float, float]:
    bandwidth = device.level_for(shape.resident_bytes + work.kv_read_bytes).bytes_per_second
    kv = (work.kv_read_bytes + work.kv_write_bytes) / bandwidth
    return 1.0, work.outputs, kv, work.attention_flops / device.flops_per_second


def _nonnegative_fit(features: Array, targets: Array) -> tuple[Array, Array]:
    """Least squares with no negative coefficient, for many targets [many, rows]: errors [many], values [many, columns].

    The best of all subsets of columns, which four columns allow to try.
    """
    columns = features.shape[1]
    least, best = np.square(targets).sum(1), np.zeros((len(targets), columns))
    for size in range(1, columns + 1):
        for subset in combinations(range(columns), size):
            chosen = features[:, subset]
            values = targets @ np.linalg.pinv(chosen).T
            errors = np.square(targets - values @ chosen.T).sum(1)
            better = (values >= 0).all(1) & (errors < least)
            least[better] = errors[better]
            best[better] = 0.0
            best[np.ix_(better, subset)] = values[better]
    return least, best
