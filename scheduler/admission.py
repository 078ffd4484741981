"""Who may start: by seconds, so that every floor holds, and how long until memory or seconds come free."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass

from scheduler.calibration import CostModel
from scheduler.roofline import decode_work

FLOOR_SHARE = 0.95  # of the strictest floor's step time that a plan may use
MIN_CHUNK = 16  # prompt tokens that every step has room for, so that prefill never starves
MOST_SEQUENCES = 1 << 14


@dataclass(frozen=True, slots=True)
class Load:
    """What the sequences with a floor would ask of every step if all grew to their reservation."""

    sequences: int
    kv_bytes: float
    gap_seconds: float  # the strictest floor's; infinite without one

    def plus(self, kv_bytes: float, gap_seconds: float) -> Load:
        return Load(self.sequences + 1, self.kv_bytes + kv_bytes, min(self.gap_seconds, gap_seconds))


def keeps_floors(cost: CostModel, load: Load) -> bool:
    """Whether decoding the whole load and a minimal piece of prefill stays within the strictest floor."""
    if load.gap_seconds == math.inf:
        return True
    mean_context = int(load.kv_bytes / max(1, load.sequences) / max(1.0, cost.shape.kv_bytes(1)))
    work = decode_work(cost.shape, load.sequences, load.kv_bytes)
    work = work.plus_chunk(cost.shape, mean_context, MIN_CHUNK, outputs=0)
    return cost.safe_seconds(work) <= FLOOR_SHARE * load.gap_seconds


def room(cost: CostModel, load: Load, kv_bytes_each: float) -> int:
    """How many more sequences of `kv_bytes_each` the floors leave room for."""
    if load.gap_seconds == math.inf:
        return MOST_SEQUENCES

    def fits(more: int) -> bool:
        return keeps_floors(cost, Load(load.sequences + more, load.kv_bytes + more * kv_bytes_each, load.gap_seconds))

    if not fits(0):
        return 0
    low, high = 0, 1
    while high < MOST_SEQUENCES and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


class Drain:
    """When running sequences will have ended, and what they give back: a curve of seconds, bytes and places.

    Beyond its end the curve repeats: who is let in then holds as much, for as long, as those who run now.
    """

    def __init__(self, endings: Iterable[tuple[float, float]]) -> None:
        """`endings`: (seconds until it ends, bytes it holds), in any order."""
        self._seconds: list[float] = []
        self._bytes: list[float] = []
        total = 0.0
        for seconds, held_bytes in sorted(endings):
            total += held_bytes
            self._seconds.append(seconds)
            self._bytes.append(total)

    def wait_seconds(self, missing_bytes: float, missing_places: int) -> float:
        """Seconds until so many bytes and places more than are free now will have been given back."""
        if missing_bytes <= 0 and missing_places <= 0:
            return 0.0
        if not self._seconds:
            return 0.0
        by_bytes = self._at(missing_bytes / self._bytes[-1] if self._bytes[-1] else 0.0, missing_bytes)
        by_places = self._at_place(missing_places)
        return max(by_bytes, by_places)

    def _at(self, rounds: float, missing_bytes: float) -> float:
        if missing_bytes <= 0:
            return 0.0
        whole = max(0, math.ceil(rounds) - 1)
        rest = missing_bytes - whole * self._bytes[-1]
        index = min(bisect_left(self._bytes, rest), len(self._seconds) - 1)
        return whole * self._seconds[-1] + self._seconds[index]

    def _at_place(self, missing_places: int) -> float:
        if missing_places <= 0:
            return 0.0
        whole, rest = divmod(missing_places - 1, len(self._seconds))
        return whole * self._seconds[-1] + self._seconds[rest]
