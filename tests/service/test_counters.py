"""Token buckets: never more than they may give, and the time told is exact."""

from __future__ import annotations

import asyncio
import copy
import math
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.averages import Averages
from service.counters import Bucket, MemoryCounters, Taken

KEY = Bucket("tokens", "key a", 60)  # one a second
TENANT = Bucket("tokens", "tenant t", 120)

MOVES = st.lists(
    st.tuples(st.floats(-5, 40), st.integers(1, 60)), min_size=1, max_size=40
)  # time passed, amount wanted


def take(counters: MemoryCounters, amount: float, now: float, *buckets: Bucket) -> Taken:
    return asyncio.run(counters.take([(bucket, amount) for bucket in buckets or (KEY,)], now))


def charge(counters: MemoryCounters, amount: float, now: float, *buckets: Bucket) -> None:
    asyncio.run(counters.charge(buckets or (KEY,), amount, now))


def left(counters: MemoryCounters, now: float, bucket: Bucket = KEY) -> float:
    reading = take(counters, 0, now, bucket).readings[0]
    return bucket.per_minute - reading.missing_at(now)


def test_bucket_gives_a_minutes_worth_at_once_and_then_as_it_is_refilled() -> None:
    counters = MemoryCounters()
    assert take(counters, 60, 100.0).wait_seconds == 0
    assert take(counters, 1, 100.0).wait_seconds == 1.0
    assert take(counters, 1, 100.5).wait_seconds == 0.5
    assert take(counters, 1, 101.0).wait_seconds == 0
    assert left(counters, 1000.0) == 60


def test_what_the_bucket_never_holds_is_never_given() -> None:
    assert take(MemoryCounters(), 61, 0.0).wait_seconds == math.inf


def test_either_all_buckets_give_or_none() -> None:
    counters = MemoryCounters()
    take(counters, 100, 0.0, TENANT)
    taken = take(counters, 30, 0.0, KEY, TENANT)
    assert (taken.wait_seconds, taken.tightest) == (5.0, 1)
    assert (left(counters, 0.0, KEY), left(counters, 0.0, TENANT)) == (60, 20)
    assert take(counters, 30, 5.0, KEY, TENANT).wait_seconds == 0
    assert (left(counters, 5.0, KEY), left(counters, 5.0, TENANT)) == (30, 0)


def test_two_at_once_for_the_last_one_and_exactly_one_gets_it() -> None:
    async def race() -> list[float]:
        counters = MemoryCounters()
        await counters.charge([KEY], 59, 0.0)
        both = await asyncio.gather(*(counters.take([(KEY, 1)], 0.0) for _ in range(2)))
        return sorted(taken.wait_seconds for taken in both)

    assert asyncio.run(race()) == [0.0, 1.0]


def test_debt_is_refilled_first() -> None:
    counters = MemoryCounters()
    charge(counters, 90, 0.0)
    assert left(counters, 0.0) == -30
    assert take(counters, 10, 0.0).wait_seconds == 40.0
    assert take(counters, 0, 0.0).wait_seconds == 0, "reading is always allowed"
    assert take(counters, 10, 40.0).wait_seconds == 0


def test_what_is_given_back_fills_the_bucket_and_no_more() -> None:
    counters = MemoryCounters()
    charge(counters, 50, 0.0)
    charge(counters, -20, 0.0)
    assert left(counters, 0.0) == 30
    charge(counters, -50, 0.0)
    assert left(counters, 0.0) == 60


def test_old_time_refills_nothing_twice() -> None:
    counters = MemoryCounters()
    take(counters, 60, 100.0)
    assert take(counters, 5, 98.0).wait_seconds == 7.0, "five seconds after the newest time"
    for _ in range(10):  # ten requests that looked at the clock before they waited for something
        take(counters, 60, 98.0)
        take(counters, 60, 101.0)
    assert left(counters, 101.0) == 1


def test_clock_set_back_for_good_refills_nothing_and_goes_on() -> None:
    counters = MemoryCounters()
    take(counters, 60, 10_000.0)
    assert take(counters, 1, 50.0).wait_seconds == 1.0
    assert take(counters, 1, 51.0).wait_seconds == 0


def test_raised_limit_makes_room_at_once() -> None:
    counters = MemoryCounters()
    take(counters, 60, 0.0)
    raised = KEY._replace(per_minute=100)
    assert take(counters, 40, 0.0, raised).wait_seconds == 0
    assert take(counters, 5, 0.0, raised).wait_seconds == 3.0


def test_lowered_limit_holds_at_once_and_nobody_waits_for_what_was_allowed_before() -> None:
    counters = MemoryCounters()
    take(counters, 58, 0.0)
    lowered = KEY._replace(per_minute=6)
    assert take(counters, 1, 0.0, lowered).wait_seconds == 10.0
    assert left(counters, 60.0, lowered) == 6


def test_who_settles_under_an_old_limit_does_not_bring_it_back() -> None:
    counters = MemoryCounters()
    lowered = KEY._replace(per_minute=6)
    take(counters, 6, 0.0, lowered)
    charge(counters, 1, 0.0, KEY)
    assert take(counters, 1, 0.0, lowered).wait_seconds == 20.0


def test_full_buckets_are_forgotten() -> None:
    async def many() -> tuple[int, int]:
        counters = MemoryCounters()
        for number in range(10_000):
            await counters.take([(Bucket("requests", f"key {number}", 60), 1)], number * 0.001)
        most = len(counters)
        for number in range(10_000):
            await counters.take([(KEY, 1)], 1000.0 + number)
        return most, len(counters)

    most, last = asyncio.run(many())
    assert most < 2500, "those of the last second, and as many again"
    assert last == 1


def test_keys_in_debt_are_remembered_while_others_are_forgotten() -> None:
    counters = MemoryCounters()
    charge(counters, 600, 0.0)
    for second in range(1, 100):
        take(counters, 1, float(second * 2), TENANT)
    assert left(counters, 200.0) == 60 - 600 + 200


@settings(deadline=None)
@given(MOVES)
def test_no_window_gives_more_than_the_bucket_and_its_refill(moves: Sequence[tuple[float, int]]) -> None:
    counters, now, passed = MemoryCounters(), 1000.0, 0.0
    grants: list[tuple[float, int]] = []
    for seconds, amount in moves:
        now += seconds
        passed += max(0.0, seconds)
        if take(counters, amount, now).wait_seconds == 0:
            grants.append((passed, amount))
    for first in range(len(grants)):
        total = 0
        for at, amount in grants[first:]:
            total += amount
            assert total <= 60 + (at - grants[first][0]) + 1e-5


@settings(deadline=None)
@given(MOVES, st.integers(1, 60), st.floats(0, 1e9))
def test_time_told_is_exact(moves: Sequence[tuple[float, int]], wanted: int, start: float) -> None:
    counters, now = MemoryCounters(), start
    for seconds, amount in moves:
        now += seconds
        take(counters, amount, now, KEY, TENANT)
    charge(counters, 37, now)
    wait_seconds = take(counters, wanted, now, KEY, TENANT).wait_seconds
    if wait_seconds > 0.001:
        assert take(copy.deepcopy(counters), wanted, now + wait_seconds - 0.001, KEY, TENANT).wait_seconds > 0
        assert take(counters, wanted, now + wait_seconds, KEY, TENANT).wait_seconds == 0


@pytest.mark.parametrize("per_minute", [1, 7, 60, 100_000_007])
def test_time_told_is_exact_for_small_and_large_limits(per_minute: int) -> None:
    bucket, now = KEY._replace(per_minute=per_minute), 1e6 / 3
    counters = MemoryCounters()
    take(counters, per_minute, now, bucket)
    amount = math.ceil(per_minute / 3)
    wait_seconds = take(counters, amount, now, bucket).wait_seconds
    assert wait_seconds == pytest.approx(amount * 60 / per_minute)
    assert take(counters, amount, now + wait_seconds - 0.001, bucket).wait_seconds > 0
    assert take(counters, amount, now + wait_seconds, bucket).wait_seconds == 0


def test_average_follows_what_is_usual_lately_and_forgets_the_unheard_of() -> None:
    averages = Averages(max_names=2)
    for value in [100.0] * 50 + [10.0] * 50:
        averages.observe("a", value)
    usual = averages.of("unknown", "a")
    assert usual is not None and usual.mean == pytest.approx(10, abs=0.5) and usual.deviation < 1
    averages.observe("b", 1.0)
    averages.observe("a", 10.0)
    averages.observe("c", 1.0)
    assert averages.of("b") is None and averages.of("a") is not None
