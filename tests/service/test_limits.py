"""What a key and its tenant may use: charged, predicted, settled, told, and refused with the time to come back."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.averages import Averages
from service.counters import MemoryCounters
from service.errors import ApiError
from service.keys import NO_DIGEST, OPEN, Key, Limits
from service.limits import UNKNOWN_ANSWER_TOKENS, Allowance, Limiter, duration

Tenants = Mapping[str, Limits]


def key(id: str = "a", requests: int | None = None, tokens: int | None = None, tenant: str = "acme") -> Key:
    return Key(id=id, tenant=tenant, digest=NO_DIGEST, created_at=0.0, limits=Limits(requests, tokens))


def limiter_of(tenants: Tenants | None = None, now: float = 0.0) -> Limiter:
    return Limiter(MemoryCounters(), tenants or {}, lambda: now)


async def enter(limiter: Limiter, key: Key, now: float) -> Allowance:
    allowance = limiter.allowance(key)
    await allowance.enter(now)
    return allowance


async def refusal_of(limiter: Limiter, key: Key, now: float, tokens: int = 0) -> ApiError:
    """Of one more request; with `tokens`, of its reservation."""
    with pytest.raises(ApiError) as caught:
        await (await enter(limiter, key, now)).reserve(tokens, 0, 1, now)
    return caught.value


def told(allowance: Allowance, now: float) -> dict[str, str]:
    return {name.decode().removeprefix("x-ratelimit-"): value.decode() for name, value in allowance.headers(now)}


async def left_tokens(limiter: Limiter, key: Key, now: float) -> str:
    allowance = limiter.allowance(key)
    await allowance.look(now)
    return told(allowance, now)["remaining-tokens"]


# --- requests


def test_request_too_many_is_refused_in_openais_shape_with_the_time_to_come_back() -> None:
    async def scenario() -> None:
        limiter, one = limiter_of(), key(requests=40)
        for _ in range(40):
            await enter(limiter, one, 10.0)
        error = await refusal_of(limiter, one, 10.0)
        assert (error.status, error.type, error.code, error.outcome) == (
            429,
            "requests",
            "rate_limit_exceeded",
            "refused",
        )
        assert dict(error.headers) == {"retry-after": "2", "retry-after-ms": "1500"}
        assert error.message == (
            "Rate limit reached for key a on requests per minute: limit 40, used 40, requested 1. "
            "Please retry after 1.5 s."
        )
        assert (await refusal_of(limiter, one, 11.499)).retry_after_seconds == 0.001
        await enter(limiter, one, 11.5)

    asyncio.run(scenario())


def test_many_at_once_and_no_more_than_the_limit_get_in() -> None:
    async def scenario() -> list[object]:
        limiter = limiter_of({"acme": Limits(requests_per_minute=7)})
        keys = [key(str(number % 3), requests=5) for number in range(30)]
        return await asyncio.gather(*(enter(limiter, one, 0.0) for one in keys), return_exceptions=True)

    assert sum(isinstance(result, Allowance) for result in asyncio.run(scenario())) == 7


def test_tenants_limit_is_shared_by_its_keys_and_named_in_the_refusal() -> None:
    async def scenario() -> None:
        limiter = limiter_of({"acme": Limits(requests_per_minute=2)})
        await enter(limiter, key("a", requests=9), 0.0)
        await enter(limiter, key("b"), 0.0)
        error = await refusal_of(limiter, key("a", requests=9), 0.0)
        assert "tenant acme on requests per minute: limit 2" in error.message
        assert told(await enter(limiter, key("a", requests=9), 30.0), 30.0)["remaining-requests"] == "0"
        await enter(limiter, key("z", tenant="other"), 0.0)

    asyncio.run(scenario())


def test_limits_that_change_hold_for_the_next_request() -> None:
    async def scenario() -> None:
        limiter = limiter_of({"acme": Limits(requests_per_minute=1)})
        await enter(limiter, key(), 0.0)
        limiter.tenants = {"acme": Limits(requests_per_minute=2)}
        await enter(limiter, key(), 0.0)
        limiter.tenants = {"acme": Limits(requests_per_minute=1)}
        assert (await refusal_of(limiter, key(), 0.0)).retry_after_seconds == 60
        limiter.tenants = {}
        assert told(await enter(limiter, key(), 0.0), 0.0) == {}
        assert (await refusal_of(limiter, key(tokens=5), 0.0, tokens=6)).type == "tokens"

    asyncio.run(scenario())


# --- tokens


def test_prompt_is_charged_exactly_and_the_answer_as_predicted_then_settled() -> None:
    async def scenario() -> None:
        limiter, one = limiter_of(), key(tokens=10_000)
        first = await enter(limiter, one, 0.0)
        await first.reserve(100, 5000, 2, 0.0)
        assert told(first, 0.0)["remaining-tokens"] == str(10_000 - 100 - 2 * UNKNOWN_ANSWER_TOKENS)
        await first.settle(80, 0.0)
        assert told(first, 0.0)["remaining-tokens"] == "9820"
        await first.settle(80, 0.0)
        await first.refund(0.0)
        assert await left_tokens(limiter, one, 0.0) == "9820", "once only"

    asyncio.run(scenario())


def test_answers_are_predicted_from_those_of_the_key_or_else_of_its_tenant() -> None:
    async def reserved(limiter: Limiter, one: Key, max_tokens: int) -> int:
        before = int(await left_tokens(limiter, one, 0.0))
        allowance = await enter(limiter, one, 0.0)
        await allowance.reserve(0, max_tokens, 1, 0.0)
        after = int(await left_tokens(limiter, one, 0.0))
        await allowance.refund(0.0)
        return before - after

    async def scenario() -> None:
        limiter, one = limiter_of(), key(tokens=10**9)
        assert await reserved(limiter, one, 10) == 10
        assert await reserved(limiter, one, 10_000) == UNKNOWN_ANSWER_TOKENS
        for number in range(100):
            allowance = await enter(limiter, one, 0.0)
            await allowance.reserve(5, 10_000, 2, 0.0)
            await allowance.settle(2 * (500 if number % 2 else 700), 0.0)
        predicted = await reserved(limiter, one, 10_000)
        assert 650 <= predicted <= 750, "the mean of 600 and a deviation of 100"
        assert await reserved(limiter, key("new", tokens=10**9), 10_000) == predicted
        assert await reserved(limiter, key("b", tokens=10**9, tenant="other"), 10_000) == UNKNOWN_ANSWER_TOKENS

    asyncio.run(scenario())


def test_more_than_was_predicted_is_a_debt_that_the_next_one_waits_for() -> None:
    async def scenario() -> None:
        limiter, one = limiter_of(), key(tokens=600)
        first = await enter(limiter, one, 0.0)
        await first.reserve(100, 1000, 1, 0.0)
        await first.settle(800, 0.0)
        assert told(first, 0.0) == {"limit-tokens": "600", "remaining-tokens": "0", "reset-tokens": "1m30s"}
        error = await refusal_of(limiter, one, 0.0, tokens=50)
        assert (error.type, error.retry_after_seconds) == ("tokens", 35.0)
        assert "limit 600, used 900, requested 50" in error.message
        assert (await refusal_of(limiter, one, 34.999, tokens=50)).retry_after_seconds == 0.001
        await (await enter(limiter, one, 35.0)).reserve(50, 0, 1, 35.0)

    asyncio.run(scenario())


def test_prompt_that_never_fits_is_refused_for_good() -> None:
    async def scenario() -> None:
        limiter, one = limiter_of({"acme": Limits(tokens_per_minute=100)}), key(requests=1, tokens=500)
        error = await refusal_of(limiter, one, 0.0, tokens=101)
        assert (error.status, error.code, error.headers) == (429, "rate_limit_exceeded", (("x-should-retry", "false"),))
        assert "tenant acme" in error.message and "never fit" in error.message
        allowance = await enter(limiter, one, 0.0)  # nothing was used: neither the request nor tokens
        await allowance.reserve(100, 1000, 4, 0.0)
        assert told(allowance, 0.0)["remaining-tokens"] == "0"

    asyncio.run(scenario())


def test_refused_reservation_gives_the_request_back() -> None:
    async def scenario() -> None:
        limiter, one = limiter_of(), key(requests=1, tokens=60)
        await (await enter(limiter, key(tokens=60), 0.0)).reserve(60, 0, 1, 0.0)
        error = await refusal_of(limiter, one, 0.0, tokens=20)
        assert error.retry_after_seconds == 20.0
        await (await enter(limiter, one, 20.0)).reserve(20, 0, 1, 20.0)

    asyncio.run(scenario())


def test_who_was_refused_by_the_worker_has_used_nothing() -> None:
    async def scenario() -> None:
        limiter, one = limiter_of({"acme": Limits(tokens_per_minute=900)}), key(requests=1, tokens=1000)
        for _ in range(3):
            allowance = await enter(limiter, one, 0.0)
            await allowance.reserve(300, 400, 1, 0.0)
            await allowance.refund(0.0)
            await allowance.refund(0.0)
            await allowance.settle(10, 0.0)
        assert told(allowance, 0.0) | {"limit-requests": "1", "remaining-requests": "1"} == told(allowance, 0.0)
        assert told(allowance, 0.0)["remaining-tokens"] == "900"

    asyncio.run(scenario())


def test_settling_and_leaving_need_no_reservation() -> None:
    async def scenario() -> None:
        limiter = limiter_of()
        allowance = await enter(limiter, OPEN, 0.0)
        await allowance.settle(5, 0.0)
        await allowance.reserve(10**9, 10**9, 9, 0.0)
        await allowance.settle(5, 0.0)
        await allowance.refund(0.0)
        allowance.leave()
        assert allowance.headers(0.0) == []

    asyncio.run(scenario())


LENGTHS = st.tuples(st.integers(0, 500), st.integers(0, 900), st.integers(1, 3), st.integers(0, 1500))


@settings(deadline=None)
@given(st.lists(LENGTHS, max_size=20))
def test_what_was_reserved_and_settled_is_what_was_used(requests: Sequence[tuple[int, int, int, int]]) -> None:
    async def scenario() -> None:
        limiter = limiter_of({"acme": Limits(tokens_per_minute=10**6)})
        used, open = 0, []
        for prompt_tokens, max_tokens, choices, completion_tokens in requests:
            allowance = await enter(limiter, key(tokens=10**7), 0.0)
            await allowance.reserve(prompt_tokens, max_tokens, choices, 0.0)
            open.append((allowance, completion_tokens))
            used += prompt_tokens + completion_tokens
        for allowance, completion_tokens in reversed(open):
            await allowance.settle(completion_tokens, 0.0)
        assert await left_tokens(limiter, key(), 0.0) == str(10**6 - used)
        assert await left_tokens(limiter, key(tokens=10**7, tenant=""), 0.0) == str(10**7 - used)

    asyncio.run(scenario())


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0, 20), LENGTHS), max_size=30))
def test_while_no_answer_is_longer_than_predicted_no_window_uses_more_than_the_limit(
    requests: Sequence[tuple[float, tuple[int, int, int, int]]],
) -> None:
    async def scenario() -> None:
        limiter, one, now = limiter_of(), key(tokens=3000), 0.0
        used: list[tuple[float, int]] = []
        for seconds, (prompt_tokens, max_tokens, _, completion_tokens) in requests:
            now += seconds
            generated = min(max_tokens, completion_tokens, UNKNOWN_ANSWER_TOKENS)
            limiter.answer_tokens = Averages()  # nothing is known of answers: as many are reserved as may come here
            allowance = await enter(limiter, one, now)
            try:
                await allowance.reserve(prompt_tokens, max_tokens, 1, now)
            except ApiError:
                continue
            used.append((now, prompt_tokens + generated))
            await allowance.settle(generated, now + 1)
        for first in range(len(used)):
            window = used[first:]
            for last in range(len(window)):
                total = sum(tokens for _, tokens in window[: last + 1])
                assert total <= 3000 + 50 * (window[last][0] - window[0][0] + 1) + 1e-3

    asyncio.run(scenario())


# --- what is told


def test_headers_tell_of_the_one_nearer_to_its_end() -> None:
    async def scenario() -> None:
        limiter = limiter_of({"acme": Limits(requests_per_minute=600, tokens_per_minute=100)})
        allowance = await enter(limiter, key(requests=60, tokens=6000), 0.0)
        await allowance.reserve(40, 10, 1, 0.0)
        assert told(allowance, 0.0) == {
            "limit-requests": "60",
            "remaining-requests": "59",
            "reset-requests": "1s",
            "limit-tokens": "100",
            "remaining-tokens": "50",
            "reset-tokens": "30s",
        }
        assert told(allowance, 0.88)["reset-requests"] == "120ms"
        assert told(allowance, 15.0)["remaining-tokens"] == "75"
        assert told(allowance, 1e6)["reset-tokens"] == "0s"

    asyncio.run(scenario())


def test_looking_costs_nothing() -> None:
    async def scenario() -> None:
        allowance = limiter_of().allowance(key(requests=3))
        assert allowance.headers(0.0) == []
        await allowance.look(0.0)
        assert told(allowance, 0.0) == {"limit-requests": "3", "remaining-requests": "3", "reset-requests": "0s"}

    asyncio.run(scenario())


def test_family_without_limit_is_not_told() -> None:
    async def scenario() -> None:
        assert told(await enter(limiter_of(), key(tokens=5), 0.0), 0.0).keys() == {
            f"{what}-tokens" for what in ("limit", "remaining", "reset")
        }

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *((-1, "0s"), (0, "0s"), (0.0171, "18ms"), (0.12, "120ms"), (1, "1s"), (8.64, "8.64s"), (59.9995, "1m0s")),
        *((60, "1m0s"), (360, "6m0s"), (89.2, "1m30s"), (3600, "1h0m0s"), (7325, "2h2m5s")),
    ],
)
def test_durations_read_as_openais(seconds: float, text: str) -> None:
    assert duration(seconds) == text


# --- concurrent requests


def narrow(id: str = "a", concurrent: int | None = 1) -> Key:
    return replace(key(id), limits=Limits(concurrent_requests=concurrent))


async def breathe() -> None:
    """Until everybody who can go on has gone on."""
    for _ in range(5):
        await asyncio.sleep(0)


def test_refused_slot_names_the_limit_and_gives_the_request_back() -> None:
    async def scenario() -> None:
        limiter = limiter_of()
        one = replace(narrow(), limits=Limits(requests_per_minute=2, concurrent_requests=1))
        holder = await enter(limiter, one, 0.0)
        await holder.slot(0)
        await holder.slot(0)  # has it already
        for _ in range(3):
            refused = await enter(limiter, one, 0.0)
            with pytest.raises(ApiError, match="concurrent requests for key a: limit 1, all in use") as caught:
                await refused.slot(0)
            assert (caught.value.status, caught.value.code) == (429, "concurrency_limit")
            assert "retry-after" in dict(caught.value.headers)
        holder.leave()
        await (await enter(limiter, one, 0.0)).slot(0)

    asyncio.run(scenario())


def test_retry_after_follows_from_how_long_slots_are_held_and_who_is_ahead() -> None:
    async def scenario() -> None:
        now = 0.0
        limiter = Limiter(MemoryCounters(), {}, lambda: now)
        for _ in range(40):
            allowance = limiter.allowance(narrow(concurrent=2))
            await allowance.slot(0)
            now += 6.0
            allowance.leave()
        holders = [limiter.allowance(narrow(concurrent=2)) for _ in range(2)]
        for holder in holders:
            await holder.slot(0)
        seconds = []
        for _ in range(3):
            with pytest.raises(ApiError) as caught:
                await limiter.allowance(narrow(concurrent=2)).slot(0)
            seconds.append(caught.value.retry_after_seconds)
            waiting = asyncio.ensure_future(limiter.allowance(narrow(concurrent=2)).slot(math.inf))
            await breathe()
        assert seconds == pytest.approx([3.0, 6.0, 9.0])
        waiting.cancel()

    asyncio.run(scenario())


def test_slots_are_given_in_order_of_arrival() -> None:
    async def scenario() -> None:
        limiter = limiter_of({"acme": Limits(concurrent_requests=1)})
        order: list[int] = []
        holder = limiter.allowance(narrow())
        await holder.slot(0)

        async def visit(number: int) -> None:
            allowance = limiter.allowance(narrow(str(number % 3), None))
            await allowance.slot(math.inf)
            order.append(number)
            await breathe()
            allowance.leave()

        visits = [asyncio.ensure_future(visit(number)) for number in range(9)]
        await breathe()
        assert order == []
        holder.leave()
        newcomer = limiter.allowance(narrow("z", None))
        with pytest.raises(ApiError):
            await newcomer.slot(0)  # the slot is the first one's, even before that one has heard of it
        await asyncio.gather(*visits)
        assert order == list(range(9))

    asyncio.run(scenario())


def test_who_waits_for_its_keys_slot_does_not_hold_up_others_of_the_tenant() -> None:
    async def scenario() -> None:
        limiter = limiter_of({"acme": Limits(concurrent_requests=2)})
        holder = limiter.allowance(narrow("a"))
        await holder.slot(0)
        waiting = asyncio.ensure_future(limiter.allowance(narrow("a")).slot(math.inf))
        await breathe()
        other = limiter.allowance(narrow("b"))
        await other.slot(0)
        third = asyncio.ensure_future(limiter.allowance(narrow("c")).slot(math.inf))
        await breathe()
        other.leave()  # frees one of the tenant: the first in line still waits for its key
        await asyncio.wait_for(third, 1)
        assert not waiting.done()
        holder.leave()
        await asyncio.wait_for(waiting, 1)

    asyncio.run(scenario())


def test_wait_that_is_too_long_ends_with_a_refusal() -> None:
    async def scenario() -> None:
        limiter = limiter_of()
        holder = limiter.allowance(narrow())
        await holder.slot(0)
        with pytest.raises(ApiError, match="concurrent"):
            await limiter.allowance(narrow()).slot(0.005)
        holder.leave()
        await limiter.allowance(narrow()).slot(0)

    asyncio.run(scenario())


def test_line_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        limiter = limiter_of()
        await limiter.allowance(narrow()).slot(0)
        waiting = [asyncio.ensure_future(limiter.allowance(narrow()).slot(math.inf)) for _ in range(3)]
        await breathe()
        with pytest.raises(ApiError, match="and 3 waiting"):
            await limiter.allowance(narrow()).slot(math.inf)
        for task in waiting:
            task.cancel()

    monkeypatch.setattr("service.slots.MAX_WAITING_PER_KEY", 3)
    asyncio.run(scenario())


def test_cancelled_waiter_swallows_no_slot() -> None:
    async def scenario() -> None:
        limiter = limiter_of()
        holder = limiter.allowance(narrow())
        await holder.slot(0)
        first, second, third = (asyncio.ensure_future(limiter.allowance(narrow()).slot(math.inf)) for _ in range(3))
        await breathe()
        first.cancel()  # has not heard of it when the slot becomes free
        holder.leave()
        second.cancel()  # was given the slot, and has not heard of either
        await asyncio.wait_for(third, 1)
        assert first.cancelled() and second.cancelled()

    asyncio.run(scenario())


def test_leaving_is_safe_at_any_time() -> None:
    async def scenario() -> None:
        limiter = limiter_of()
        before, during, given = (limiter.allowance(narrow()) for _ in range(3))
        before.leave()
        with pytest.raises(ApiError):
            await before.slot(math.inf)
        holder = limiter.allowance(narrow())
        await holder.slot(0)
        waiting = [asyncio.ensure_future(allowance.slot(math.inf)) for allowance in (during, given)]
        await breathe()
        during.leave()
        holder.leave()  # the next one is given the slot …
        given.leave()  # … and leaves before it hears of it
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert all(isinstance(result, ApiError) for result in results)
        for allowance in (before, during, given, holder):
            allowance.leave()
        await limiter.allowance(narrow()).slot(0)

    asyncio.run(scenario())


def test_new_limits_hold_for_those_waiting() -> None:
    async def scenario() -> None:
        limiter = limiter_of({"acme": Limits(concurrent_requests=1)})
        holders = [limiter.allowance(narrow()) for _ in range(4)]
        tasks = [asyncio.ensure_future(holder.slot(math.inf)) for holder in holders]

        async def num_started() -> int:
            await breathe()
            return sum(task.done() for task in tasks)

        assert await num_started() == 1
        limiter.tenants = {"acme": Limits(concurrent_requests=3)}
        assert await num_started() == 1, "the key has one slot only"
        limiter.update_keys(lambda id: None)  # the key was deleted: what it has it keeps
        assert await num_started() == 1
        limiter.update_keys({"a": narrow(concurrent=2)}.get)
        assert await num_started() == 2
        limiter.update_keys({"a": narrow(concurrent=1)}.get)
        holders[0].leave()
        assert await num_started() == 2, "there were more than are allowed now"
        holders[1].leave()
        assert await num_started() == 3
        limiter.tenants = {}
        limiter.update_keys({"a": narrow(concurrent=None)}.get)
        assert await num_started() == 4

    asyncio.run(scenario())


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["go", "leave", "cancel"])), max_size=80))
def test_limits_hold_whatever_happens_and_nobody_is_forgotten(moves: Sequence[tuple[int, str]]) -> None:
    async def scenario() -> None:
        limiter = limiter_of({"acme": Limits(concurrent_requests=3)})
        keys = [narrow("a", 1), narrow("b", 2), narrow("c", 5), narrow("d", None)]
        visits: list[tuple[Key, Allowance, asyncio.Future[None]]] = []

        def check() -> None:
            running = [
                key.id for key, _, task in visits if task.done() and not task.cancelled() and not task.exception()
            ]
            waiting = [key for key, _, task in visits if not task.done()]
            full = {key.id for key in keys if running.count(key.id) == (key.limits.concurrent_requests or 99)}
            assert len(running) <= 3 and running.count("a") <= 1 and running.count("b") <= 2
            assert len(running) == 3 or all(key.id in full for key in waiting)

        for number, move in moves:
            if move == "go":
                allowance = limiter.allowance(keys[number])
                visits.append((keys[number], allowance, asyncio.ensure_future(allowance.slot(math.inf))))
            elif visits:
                _, allowance, task = visits.pop(number % len(visits))
                task.cancel() if move == "cancel" else None
                await breathe() if number % 2 else None
                allowance.leave()
                await asyncio.gather(task, return_exceptions=True)
            await breathe()
            check()
        while visits:
            _, allowance, task = visits.pop()
            allowance.leave()
            await asyncio.gather(task, return_exceptions=True)
        assert limiter.slots.is_empty

    asyncio.run(scenario())
