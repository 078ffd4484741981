"""Service tiers: the speed a request is promised, and how long it may wait for it."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tier:
    """What a tier promises. Tiers are served in the order of `rank`, lowest first.

    `floor_utps` 0 is no floor. `max_wait_seconds` bounds the wait before the first step, and is infinite for tiers that
    wait as long as it takes.
    """

    name: str
    rank: int
    floor_utps: float
    ttft_target_seconds: float
    max_wait_seconds: float

    @property
    def gap_seconds(self) -> float:
        """The longest a step may take without breaking the floor."""
        return 1 / self.floor_utps if self.floor_utps else math.inf


def default_tiers(solo_utps: float) -> tuple[Tier, ...]:
    """The tiers on any machine, from the measured UTPS of a single user.

    `default` promises a fifth of it (at least 3 tokens per second, which is reading speed), `priority` half of it; `flex`
    and `batch` take what is left.
    """
    reading_speed = min(3.0, solo_utps)
    return (
        Tier("priority", 0, max(reading_speed, 0.5 * solo_utps), 2.0, 2.0),
        Tier("default", 1, max(reading_speed, 0.2 * solo_utps), 10.0, 60.0),
        Tier("flex", 2, 0.0, 60.0, math.inf),
        Tier("batch", 3, 0.0, 600.0, math.inf),
    )
