"""Slots for concurrent requests, by key and by tenant: who finds none free waits in line.

A request needs a slot of its key and one of its tenant, and gets both at once or none: it holds nothing while it waits, so
nobody blocks another one. Whoever may start does so at once, so there is nobody in line whom a newcomer could overtake.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from service.averages import Averages
from service.keys import Key, Limits

MAX_WAITING_PER_KEY = 256  # more are refused at once
LONGEST_TIMER_SECONDS = 86_400.0  # who would wait longer waits as long as it takes
UNKNOWN_HOLD_SECONDS = 1.0  # until the first slot was given back


@dataclass(slots=True, eq=False)
class _Pool:
    owner: str  # "key ID" or "tenant NAME"
    limit: int | None
    held: int = 0

    @property
    def has_room(self) -> bool:
        return self.limit is None or self.held < self.limit


@dataclass(slots=True, eq=False)
class _Line(_Pool):
    """The slots of one key, and who waits for one."""

    waiting: deque[Place] = field(default_factory=deque)


@dataclass(slots=True, eq=False)
class _House(_Pool):
    """The slots of one tenant, and its keys in use."""

    lines: dict[str, _Line] = field(default_factory=dict)

    @property
    def num_waiting(self) -> int:
        """For one of these slots, not for one of their key."""
        return sum(len(line.waiting) for line in self.lines.values() if line.has_room)


class Place:
    """One request's: outside, in line, or holding a slot."""

    __slots__ = ("answer", "house", "line", "number", "since", "state")

    def __init__(self, house: _House, line: _Line) -> None:
        self.house = house
        self.line = line
        self.state: Literal["outside", "waiting", "holding"] = "outside"
        self.number = 0  # in the order of arrival
        self.since = 0.0
        self.answer: asyncio.Future[None] | None = None  # comes when it need not wait any more

    @property
    def is_holding(self) -> bool:
        return self.state == "holding"


class Full(NamedTuple):
    """Why there was no slot."""

    owner: str
    limit: int
    num_waiting: int
    retry_after_seconds: float


class Slots:
    """All slots of this process."""

    def __init__(self, tenants: Mapping[str, Limits], clock: Callable[[], float]) -> None:
        self._tenants = tenants
        self._clock = clock
        self._houses: dict[str, _House] = {}
        self._hold_seconds = Averages()
        self._arrivals = 0

    @property
    def is_empty(self) -> bool:
        """Nobody is here, and nothing is remembered of anybody but how long slots were held."""
        return not self._houses

    # --- limits that change

    def limit_tenants(self, tenants: Mapping[str, Limits]) -> None:
        self._tenants = tenants
        for name, house in self._houses.items():
            house.limit = self._limit_of(name)
            self._hand_out(house)

    def keys_inside(self) -> list[str]:
        """The ids of the keys that hold a slot or wait for one."""
        return [id for house in self._houses.values() for id in house.lines]

    def limit_key(self, key: Key) -> None:
        house = self._houses.get(key.tenant)
        line = house.lines.get(key.id) if house is not None else None
        if house is not None and line is not None and line.limit != key.limits.concurrent_requests:
            line.limit = key.limits.concurrent_requests
            self._hand_out(house)

    def _limit_of(self, tenant: str) -> int | None:
        limits = self._tenants.get(tenant)
        return limits.concurrent_requests if limits is not None else None

    # --- one request

    def place(self, key: Key) -> Place:
        """Outside still: `take` is to follow at once."""
        house = self._houses.get(key.tenant)
        if house is None:
            house = self._houses[key.tenant] = _House(f"tenant {key.tenant}", self._limit_of(key.tenant))
        line = house.lines.get(key.id)
        if line is None:
            line = house.lines[key.id] = _Line(f"key {key.id}", key.limits.concurrent_requests)
        return Place(house, line)

    async def take(self, place: Place, wait_seconds: float) -> bool:
        """Whether it got one in that time."""
        house, line = place.house, place.line
        if house.has_room and line.has_room:
            self._grant(place)
            return True
        if wait_seconds <= 0 or len(line.waiting) >= MAX_WAITING_PER_KEY:
            return False
        return await self._wait(place, wait_seconds)

    async def _wait(self, place: Place, wait_seconds: float) -> bool:
        loop = asyncio.get_running_loop()
        place.answer = loop.create_future()
        place.state = "waiting"
        self._arrivals += 1
        place.number = self._arrivals
        place.line.waiting.append(place)
        ends = wait_seconds < LONGEST_TIMER_SECONDS
        timer = loop.call_later(wait_seconds, self._withdraw, place) if ends else None
        try:
            await place.answer
            return place.is_holding  # not so where it left before it heard of its slot
        except asyncio.CancelledError:
            self.release(place)  # also the slot that it was given before it heard of it
            raise
        finally:
            if timer is not None:
                timer.cancel()

    def release(self, place: Place) -> None:
        """Gives back what it has: the slot, the place in line, or nothing."""
        if place.is_holding:
            place.state = "outside"
            place.line.held -= 1
            place.house.held -= 1
            seconds = self._clock() - place.since
            self._hold_seconds.observe(place.line.owner, seconds)
            self._hold_seconds.observe(place.house.owner, seconds)
            self._hand_out(place.house)
        else:
            self._withdraw(place)
        self._tidy(place)

    def full(self, place: Place) -> Full:
        """What the one who got none is told. Call before `release`."""
        house, line = place.house, place.line
        pool: _Pool = house if line.has_room else line
        num_waiting = house.num_waiting if pool is house else len(line.waiting)
        limit = pool.limit or 1
        usual = self._hold_seconds.of(pool.owner, house.owner)
        hold_seconds = usual.mean if usual is not None else UNKNOWN_HOLD_SECONDS
        turns = max(1, pool.held - limit + 1 + num_waiting)  # slots to be given back before one is for a newcomer
        return Full(pool.owner, limit, num_waiting, turns * hold_seconds / limit)

    # --- the line

    def _grant(self, place: Place) -> None:
        place.state = "holding"
        place.since = self._clock()
        place.line.held += 1
        place.house.held += 1
        if place.answer is not None:
            place.answer.set_result(None)

    def _withdraw(self, place: Place) -> None:
        if place.state != "waiting":
            return
        place.state = "outside"
        place.line.waiting.remove(place)
        if place.answer is not None and not place.answer.done():
            place.answer.set_result(None)

    def _hand_out(self, house: _House) -> None:
        while house.has_room:
            heads = [line.waiting[0] for line in house.lines.values() if line.waiting and line.has_room]
            if not heads:
                return
            self._call(min(heads, key=lambda place: place.number))

    def _call(self, place: Place) -> None:
        """The first in line: it may start, unless it was cancelled and only has not heard of it yet."""
        place.line.waiting.popleft()
        if place.answer is not None and place.answer.done():
            place.state = "outside"
        else:
            self._grant(place)

    def _tidy(self, place: Place) -> None:
        """Keys and tenants without requests need no memory."""
        house, line = place.house, place.line
        if not line.held and not line.waiting and house.lines.get(_id(line)) is line:
            del house.lines[_id(line)]
        if not house.lines and self._houses.get(_id(house)) is house:
            del self._houses[_id(house)]


def _id(pool: _Pool) -> str:
    return pool.owner.partition(" ")[2]
