"""Token buckets behind one interface: in memory here, in Redis where several gateways share them.

A bucket holds one minute's worth and is refilled continuously. What is kept of it is how much is missing, so a full bucket
needs no memory, and a raised limit makes room at once. More may be missing than the bucket holds: a debt, refilled first.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

GRAIN_SECONDS = 1e-6  # who comes so much too early is not: below it, floating point decides
STALE_SECONDS = 10.0  # a `now` may be so much older than the last one: taken before something else was awaited
LOOKED_AT = 2  # buckets looked at, per bucket asked for, whether they are full and can be forgotten


class Bucket(NamedTuple):
    family: str  # what it counts: "requests" or "tokens"
    owner: str  # "key ID" or "tenant NAME"
    per_minute: int


class Reading(NamedTuple):
    """A bucket as it was."""

    bucket: Bucket
    missing: float  # of a full one
    at: float

    def missing_at(self, now: float) -> float:
        """If nobody took anything since."""
        return max(0.0, self.missing - max(0.0, now - self.at) * self.bucket.per_minute / 60)


class Taken(NamedTuple):
    wait_seconds: float  # 0: taken, from all. Else nothing was, and so long until all would have enough; inf: never
    tightest: int  # which of the buckets asked for that is due to
    readings: list[Reading]  # afterwards, in the order asked for


class Counters(Protocol):
    """`now` is monotonic seconds. Each call is atomic."""

    async def take(self, wants: Sequence[tuple[Bucket, float]], now: float) -> Taken:
        """From all the buckets or from none. An amount of 0 only reads. A bucket whose limit has changed follows here."""
        ...

    async def charge(self, buckets: Sequence[Bucket], amount: float, now: float) -> list[Reading]:
        """Takes the amount from each, into debt if need be; gives it back when it is negative, up to a full bucket."""
        ...


@dataclass(slots=True)
class _Level:
    """One bucket's state."""

    per_minute: int
    missing: float
    at: float

    def refill(self, now: float) -> None:
        passed = now - self.at
        if passed >= 0:
            self.missing = max(0.0, self.missing - passed * self.per_minute / 60)
            self.at = now
        elif passed < -STALE_SECONDS:
            self.at = now  # the clock was set back: nothing is refilled, and time goes on from there

    def follow(self, per_minute: int) -> None:
        """A raised limit makes room at once. Under a lowered one nobody waits for what was allowed before it."""
        if per_minute < self.per_minute:
            self.missing = min(self.missing, per_minute)
        self.per_minute = per_minute

    def wait_seconds(self, amount: float, now: float) -> float:
        lacking = self.missing + amount - self.per_minute
        if amount <= 0 or lacking <= 0:
            return 0.0
        if amount > self.per_minute:
            return math.inf
        seconds = lacking * 60 / self.per_minute + self.at - now
        return 0.0 if seconds <= GRAIN_SECONDS else round(seconds, 6)


class MemoryCounters:
    """The counters of one process. No call suspends."""

    def __init__(self) -> None:
        self._levels: OrderedDict[tuple[str, str], _Level] = OrderedDict()

    def __len__(self) -> int:
        return len(self._levels)

    async def take(self, wants: Sequence[tuple[Bucket, float]], now: float) -> Taken:
        self._forget_full_ones(LOOKED_AT * len(wants), now)
        levels = []
        longest, tightest = 0.0, 0
        for index, (bucket, amount) in enumerate(wants):
            level = self._level(bucket, now)
            level.follow(bucket.per_minute)
            levels.append(level)
            wait_seconds = level.wait_seconds(amount, now)
            if wait_seconds > longest:
                longest, tightest = wait_seconds, index
        if longest == 0:
            for level, (bucket, amount) in zip(levels, wants, strict=True):
                self._add(bucket, level, amount)
        readings = [Reading(bucket, level.missing, level.at) for level, (bucket, _) in zip(levels, wants, strict=True)]
        return Taken(longest, tightest, readings)

    async def charge(self, buckets: Sequence[Bucket], amount: float, now: float) -> list[Reading]:
        levels = [self._level(bucket, now) for bucket in buckets]
        for level, bucket in zip(levels, buckets, strict=True):
            self._add(bucket, level, amount)
        return [Reading(bucket, level.missing, level.at) for level, bucket in zip(levels, buckets, strict=True)]

    def _level(self, bucket: Bucket, now: float) -> _Level:
        level = self._levels.get(bucket[:2])
        if level is None:
            return _Level(bucket.per_minute, 0.0, now)
        level.refill(now)
        return level

    def _add(self, bucket: Bucket, level: _Level, amount: float) -> None:
        if amount:
            level.missing = max(0.0, level.missing + amount)
            self._levels[bucket[:2]] = level

    def _forget_full_ones(self, count: int, now: float) -> None:
        """Goes round, a few at each call, so that no call has to look at all of them."""
        for _ in range(min(count, len(self._levels))):
            name, level = next(iter(self._levels.items()))
            level.refill(now)
            if level.missing > 0:
                self._levels.move_to_end(name)
            else:
                del self._levels[name]
