"""Ledger, footprint, fairness, admission and tiers: one small thing each."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.admission import FLOOR_SHARE, MOST_SEQUENCES, Drain, Load, keeps_floors, room
from scheduler.calibration import CostModel
from scheduler.fairness import MOST_TENANTS, Account
from scheduler.footprint import ENOUGH, GROUPS, GROWTH_TOKENS, HEADROOM, RECENT, LengthHistory, Lengths, grown
from scheduler.hardware import CATALOGUE
from scheduler.ledger import Ledger
from scheduler.messages import Request
from scheduler.model import SHAPES
from scheduler.roofline import StepWork
from scheduler.tenants import MOST_NAMES, TenantLabels
from scheduler.tiers import Tier, default_tiers

# --- ledger -----------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.sampled_from(["reserve", "grow", "release"]), st.integers(0, 6), st.floats(0, 60))))
def test_the_ledger_never_promises_more_than_there_is(moves: list[tuple[str, int, float]]) -> None:
    ledger, held = Ledger(100.0), {}
    for move, key, amount in moves:
        if move == "reserve" and key not in held and ledger.can_reserve(amount):
            ledger.reserve(key, amount)
            held[key] = amount
        elif move == "grow" and key in held and amount >= held[key] and ledger.can_grow(key, amount):
            ledger.grow(key, amount)
            held[key] = amount
        elif move == "release" and key in held:
            ledger.release(key)
            del held[key]
        assert ledger.reserved_bytes == pytest.approx(sum(held.values()))
        assert ledger.reserved_bytes <= 100.0
        assert ledger.free_bytes == 100.0 - ledger.reserved_bytes
        assert all(ledger.held_bytes(key) == amount for key, amount in held.items())
    for key in held:
        ledger.release(key)
    assert ledger.reserved_bytes == 0.0


def test_the_ledger_believes_in_its_own_state() -> None:
    ledger = Ledger(100.0)
    ledger.reserve(1, 60.0)
    for move in (
        lambda: ledger.reserve(1, 1.0),
        lambda: ledger.reserve(2, 41.0),
        lambda: ledger.reserve(2, -1.0),
        lambda: ledger.grow(1, 101.0),
        lambda: ledger.grow(1, 59.0),
    ):
        with pytest.raises(AssertionError):
            move()
    with pytest.raises(KeyError):
        ledger.release(2)
    assert ledger.reserved_bytes == 60.0
    assert ledger.can_grow(1, 100.0) and not ledger.can_grow(1, 100.5)


# --- footprint --------------------------------------------------------------------------------------------------------


def request(tenant: str = "a", prompt: int = 100, max_tokens: int = 4000) -> Request:
    return Request(1, 1, [0] * prompt, max_tokens, tenant=tenant)


def test_without_a_history_everything_that_was_asked_for_is_reserved() -> None:
    history = LengthHistory()
    for _ in range(ENOUGH - 1):
        history.record(request(), 10)
    assert history.reserve_tokens(request()) == history.expected_tokens(request()) == 4000


def test_with_a_history_the_reservation_covers_nearly_all_answers_and_a_little_more() -> None:
    history = LengthHistory()
    for length in range(1, 101):
        history.record(request(), length)
    reserved = history.reserve_tokens(request())
    assert 98 * HEADROOM <= reserved <= 100 * HEADROOM + GROWTH_TOKENS
    assert history.expected_tokens(request()) == 50
    assert history.reserve_tokens(request(max_tokens=20)) == history.expected_tokens(request(max_tokens=20)) == 20


def test_a_tenants_own_history_counts_before_that_of_all() -> None:
    history = LengthHistory()
    for _ in range(100):
        history.record(request("short"), 10)
        history.record(request("long"), 1000)
    assert history.expected_tokens(request("short")) == 10
    assert history.expected_tokens(request("long")) == 1000
    assert history.expected_tokens(request("new")) == 505
    assert history.expected_tokens(request("short", prompt=5000)) == 505


def test_histories_are_bounded_and_the_least_recent_are_forgotten() -> None:
    history = LengthHistory()
    for number in range(3 * GROUPS):
        history.record(request(f"t{number}"), 10)
    assert len(history._groups) == GROUPS
    assert (f"t{3 * GROUPS - 1}", (100).bit_length()) in history._groups


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=3 * RECENT))
@settings(max_examples=25)
def test_the_mean_is_that_of_the_recent_answers(outputs: list[int]) -> None:
    lengths = Lengths()
    for output in outputs:
        lengths.add(output)
    recent = outputs[-RECENT:]
    assert len(lengths) == len(recent) and lengths.mean() == sum(recent) // len(recent)
    assert lengths.bound() >= sorted(recent)[int(0.98 * (len(recent) - 1))]


def test_the_bound_follows_answers_that_become_longer() -> None:
    lengths = Lengths()
    for _ in range(100):
        lengths.add(10)
    before = lengths.bound()
    for _ in range(100):
        lengths.add(1000)
    assert before < 100 < 1000 <= lengths.bound()


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_growth_goes_on_until_the_limit_and_not_beyond(reserved: int, more: int) -> None:
    limit = reserved + more
    steps = 0
    while reserved < limit:
        next_reserved = grown(reserved, limit)
        assert reserved < next_reserved <= limit
        assert next_reserved == limit or next_reserved >= reserved + GROWTH_TOKENS
        reserved, steps = next_reserved, steps + 1
    assert steps < 80 and grown(limit, limit) == limit


# --- fairness ---------------------------------------------------------------------------------------------------------


def test_a_tenant_that_returns_is_lifted_to_the_least_of_the_active() -> None:
    account = Account()
    account.enter("early")
    account.enter("busy")
    account.charge("early", 1.0)
    account.charge("busy", 50.0)
    account.leave("early")
    account.charge("busy", 10.0)
    account.enter("early")
    account.enter("new")
    assert [account.used_seconds(name) for name in ("early", "new", "busy")] == [60.0, 60.0, 60.0]
    account.charge("busy", 5.0)
    account.enter("newer")
    account.leave("early")
    account.leave("new")
    account.leave("newer")
    account.enter("newest")
    assert account.used_seconds("newest") == 65.0


def test_a_tenant_that_used_more_than_the_active_is_not_let_off() -> None:
    account = Account()
    account.enter("heavy")
    account.enter("light")
    account.charge("heavy", 50.0)
    account.charge("light", 1.0)
    account.leave("heavy")
    account.enter("heavy")
    assert account.used_seconds("heavy") == 50.0


def test_the_account_is_empty_when_nobody_is_here() -> None:
    account = Account()
    account.enter("a")
    account.enter("a")
    account.charge("a", 3.0)
    account.leave("a")
    assert account.used_seconds("a") == 3.0
    account.leave("a")
    assert account.used_seconds("a") == 0.0


def test_tenants_that_are_gone_are_forgotten_in_time() -> None:
    account = Account()
    account.enter("stays")
    for number in range(3 * MOST_TENANTS):
        account.enter(f"t{number}")
        account.charge(f"t{number}", 1.0)
        account.leave(f"t{number}")
    assert len(account._seconds) <= MOST_TENANTS + 3


def test_what_is_charged_is_told_once_also_of_who_has_left() -> None:
    account = Account()
    account.enter("a")
    account.charge("a", 1.0)
    account.charge("a", 2.0)
    account.leave("a")
    account.enter("b")
    account.charge("b", 4.0)
    assert account.take_charged() == {"a": 3.0, "b": 4.0}
    assert account.take_charged() == {}


def test_tenants_have_a_bounded_number_of_labels_that_they_keep() -> None:
    labels = TenantLabels(["zebra", "ant"])
    names = [f"t{number}" for number in range(MOST_NAMES)]
    assert [labels.of(name) for name in names] == [*names[:-2], "other", "other"]
    assert [labels.of(name) for name in ("zebra", "ant", "t0", names[-1])] == ["zebra", "ant", "t0", "other"]
    assert TenantLabels(f"{number:03}" for number in range(300, 0, -1)).of("100") == "100", "the first by name"


@given(st.lists(st.tuples(st.sampled_from(["enter", "leave", "charge"]), st.sampled_from("abcd"), st.floats(0, 9))))
def test_nobody_active_is_ever_behind_by_having_been_away(moves: list[tuple[str, str, float]]) -> None:
    account, here = Account(), []
    for move, name, seconds in moves:
        least = min((account.used_seconds(other) for other in here), default=0.0)
        if move == "enter":
            account.enter(name)
            here.append(name)
            assert account.used_seconds(name) >= least
        elif name in here:
            before = account.used_seconds(name)
            if move == "charge":
                account.charge(name, seconds)
                assert account.used_seconds(name) == before + seconds
            else:
                account.leave(name)
                here.remove(name)


# --- admission --------------------------------------------------------------------------------------------------------

COST = CostModel(CATALOGUE["h100"], SHAPES["llama-3.1-8b"])
EACH = COST.shape.kv_bytes(1000)


def test_a_drain_gives_back_bytes_and_places_in_the_order_of_endings() -> None:
    drain = Drain([(3.0, 30.0), (1.0, 10.0), (2.0, 20.0)])
    assert [drain.wait_seconds(missing, 0) for missing in (0.0, 5.0, 10.0, 11.0, 30.0, 31.0, 60.0)] == [
        0.0, 1.0, 1.0, 2.0, 2.0, 3.0, 3.0,
    ]  # fmt: skip
    assert [drain.wait_seconds(0.0, places) for places in (-4, 0, 1, 2, 3)] == [0.0, 0.0, 1.0, 2.0, 3.0]
    assert drain.wait_seconds(5.0, 3) == 3.0 and drain.wait_seconds(60.0, 1) == 3.0


def test_beyond_its_end_a_drain_repeats() -> None:
    drain = Drain([(1.0, 10.0), (2.0, 20.0), (3.0, 30.0)])
    assert drain.wait_seconds(65.0, 0) == 4.0 and drain.wait_seconds(125.0, 0) == 7.0
    assert drain.wait_seconds(0.0, 4) == 4.0 and drain.wait_seconds(0.0, 9) == 9.0


def test_where_nothing_runs_there_is_nothing_to_wait_for() -> None:
    assert Drain([]).wait_seconds(100.0, 5) == 0.0
    assert Drain([(2.0, 0.0)]).wait_seconds(100.0, 0) == 2.0


@given(
    st.lists(st.tuples(st.floats(0, 100), st.floats(1, 1e6)), min_size=1, max_size=30),
    st.lists(st.floats(0, 1e7), min_size=2, max_size=10),
    st.lists(st.integers(0, 90), min_size=2, max_size=10),
)
def test_who_misses_more_waits_longer(endings, missing_bytes: list[float], missing_places: list[int]) -> None:
    drain = Drain(endings)
    by_bytes = [drain.wait_seconds(missing, 0) for missing in sorted(missing_bytes)]
    by_places = [drain.wait_seconds(0.0, missing) for missing in sorted(missing_places)]
    assert by_bytes == sorted(by_bytes) and by_places == sorted(by_places)


@given(st.integers(0, 300), st.floats(0, 4e10), st.floats(1e-3, 0.2))
def test_room_is_the_most_that_keeps_the_floors(sequences: int, kv_bytes: float, gap_seconds: float) -> None:
    load = Load(sequences, kv_bytes, gap_seconds)
    places = room(COST, load, EACH)
    more = Load(sequences + places, kv_bytes + places * EACH, gap_seconds)
    one_too_many = Load(sequences + places + 1, kv_bytes + (places + 1) * EACH, gap_seconds)
    assert places == 0 or keeps_floors(COST, more)
    assert places >= MOST_SEQUENCES // 2 or not keeps_floors(COST, one_too_many)


@given(st.floats(5e-3, 0.2), st.floats(5e-3, 0.2))
def test_a_stricter_floor_leaves_no_more_room(a: float, b: float) -> None:
    assert room(COST, Load(0, 0.0, min(a, b)), EACH) <= room(COST, Load(0, 0.0, max(a, b)), EACH)
    assert room(COST, Load(0, 0.0, a), 2 * EACH) <= room(COST, Load(0, 0.0, a), EACH)
    assert room(COST, Load(9, 9 * EACH, a), EACH) <= room(COST, Load(0, 0.0, a), EACH)


def test_without_a_floor_there_is_always_room() -> None:
    endless = Load(10_000, 1e15, math.inf)
    assert keeps_floors(COST, endless) and room(COST, endless, EACH) == MOST_SEQUENCES


def test_floors_are_kept_with_the_models_own_margin_of_error() -> None:
    load = Load(1, EACH, 1.0)
    seconds = COST.seconds(StepWork(1, 17, EACH, 0.0, 0.0)) / FLOOR_SHARE
    assert keeps_floors(COST, Load(load.sequences, load.kv_bytes, 1.08 * seconds))
    unsure = CostModel(COST.device, COST.shape, margin=0.5)
    assert not keeps_floors(unsure, Load(load.sequences, load.kv_bytes, 1.08 * seconds))


# --- tiers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solo_utps", [0.5, 4.0, 50.0, 1000.0])
def test_the_default_tiers_promise_shares_of_a_single_users_speed_and_never_more_than_it(solo_utps: float) -> None:
    tiers = {tier.name: tier for tier in default_tiers(solo_utps)}
    assert [tier.rank for tier in tiers.values()] == [0, 1, 2, 3]
    assert tiers["default"].floor_utps == max(min(3.0, solo_utps), 0.2 * solo_utps) <= solo_utps
    assert tiers["priority"].floor_utps == max(min(3.0, solo_utps), 0.5 * solo_utps) <= solo_utps
    assert tiers["flex"].floor_utps == tiers["batch"].floor_utps == 0.0
    assert tiers["default"].max_wait_seconds == 60.0 and tiers["flex"].max_wait_seconds == math.inf


def test_the_gap_of_a_tier_is_one_over_its_floor() -> None:
    assert Tier("t", 0, 20.0, 1.0, 1.0).gap_seconds == 0.05
    assert Tier("t", 0, 0.0, 1.0, 1.0).gap_seconds == math.inf
