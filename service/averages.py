"""What was usual lately, by name: how long answers are, how long slots are held. Bounded: who is not heard of is forgotten."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

WEIGHT = 1 / 8  # of the newest value, once there are eight: about the last sixteen count
MAX_NAMES = 20_000


@dataclass(slots=True)
class Average:
    mean: float
    deviation: float  # mean absolute
    count: int = 1

    def observe(self, value: float) -> None:
        self.count += 1
        weight = max(WEIGHT, 1 / self.count)
        self.deviation += weight * (abs(value - self.mean) - self.deviation)
        self.mean += weight * (value - self.mean)


class Averages:
    """Exponentially weighted, the least recently observed forgotten first."""

    def __init__(self, max_names: int = MAX_NAMES) -> None:
        self._max_names = max_names
        self._averages: OrderedDict[str, Average] = OrderedDict()

    def observe(self, name: str, value: float) -> None:
        average = self._averages.get(name)
        if average is None:
            self._averages[name] = Average(value, value / 2)  # one value says little of how far the next one is
            if len(self._averages) > self._max_names:
                self._averages.popitem(last=False)
        else:
            average.observe(value)
            self._averages.move_to_end(name)

    def of(self, *names: str) -> Average | None:
        """Of the first of the names that is known."""
        return next((self._averages[name] for name in names if name in self._averages), None)
