"""What a key and its tenant may use: requests and tokens per minute, and concurrent requests.

The way of one request: `Allowance.enter` charges it, `reserve` charges its prompt and the answer as predicted,
`slot` lets it start, `settle` turns the prediction into what was generated, `leave` frees the slot. Who is refused on the
way has used nothing: who comes back after the time told finds what was missing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence

from service.averages import Averages
from service.counters import Bucket, Counters, Reading, Taken
from service.errors import ApiError, never_within_rate, rate_limited, too_many_at_once
from service.keys import Key, Limits
from service.slots import Place, Slots

UNKNOWN_ANSWER_TOKENS = 256  # predicted until the tenant's first answer has ended
NO_LIMITS = Limits()


class Limiter:
    """The limits of all keys and tenants. `clock` is only for how long slots are held."""

    def __init__(
        self, counters: Counters, tenants: Mapping[str, Limits], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.counters = counters
        self.clock = clock
        self.slots = Slots(tenants, clock)
        self.answer_tokens = Averages()
        self._tenants = tenants

    @property
    def tenants(self) -> Mapping[str, Limits]:
        return self._tenants

    @tenants.setter
    def tenants(self, tenants: Mapping[str, Limits]) -> None:
        """New limits hold at once, also for who waits for a slot."""
        self._tenants = tenants
        self.slots.limit_tenants(tenants)

    def update_keys(self, current: Callable[[str], Key | None]) -> None:
        """Keys have changed, `current` knows them by id: their new limits hold for who waits for one of their slots."""
        for id in self.slots.keys_inside():
            key = current(id)
            if key is not None:
                self.slots.limit_key(key)

    def allowance(self, key: Key) -> Allowance:
        """For one request; nothing is charged yet."""
        self.slots.limit_key(key)
        return Allowance(self, key, self._tenants.get(key.tenant, NO_LIMITS))


class Allowance:
    """What one request may use, and what it has used."""

    __slots__ = (
        "_charged_tokens",
        "_choices",
        "_counters",
        "_entered",
        "_key",
        "_left",
        "_limiter",
        "_place",
        "_prompt_tokens",
        "_request_readings",
        "_requests",
        "_token_readings",
        "_tokens",
    )

    def __init__(self, limiter: Limiter, key: Key, tenant: Limits) -> None:
        self._limiter = limiter
        self._counters = limiter.counters
        self._key = key
        self._requests: list[Bucket] = []
        self._tokens: list[Bucket] = []
        self._limit(f"key {key.id}", key.limits)
        self._limit(f"tenant {key.tenant}", tenant)
        self._request_readings: Sequence[Reading] = ()
        self._token_readings: Sequence[Reading] = ()
        self._entered = False  # its request is charged
        self._charged_tokens: int | None = None  # while there is a reservation
        self._prompt_tokens = 0
        self._choices = 1
        self._place: Place | None = None
        self._left = False

    def _limit(self, owner: str, limits: Limits) -> None:
        if limits.requests_per_minute is not None:
            self._requests.append(Bucket("requests", owner, limits.requests_per_minute))
        if limits.tokens_per_minute is not None:
            self._tokens.append(Bucket("tokens", owner, limits.tokens_per_minute))

    # --- requests and tokens per minute

    async def look(self, now: float) -> None:
        """Charges nothing: for the headers of an answer that costs nothing."""
        await self._take(0, now)

    async def enter(self, now: float) -> None:
        """Charges one request to key and tenant. Raises ApiError 429."""
        taken = await self._take(1, now)
        if taken is not None and taken.wait_seconds > 0:
            raise refusal(taken, 1, now)
        self._entered = True

    async def _take(self, num_requests: int, now: float) -> Taken | None:
        wants = [(bucket, num_requests) for bucket in self._requests] + [(bucket, 0) for bucket in self._tokens]
        if not wants:
            return None
        taken = await self._counters.take(wants, now)
        self._request_readings = taken.readings[: len(self._requests)]
        self._token_readings = taken.readings[len(self._requests) :]
        return taken

    async def reserve(self, prompt_tokens: int, max_tokens: int, choices: int, now: float) -> None:
        """Charges the prompts (together `prompt_tokens`), and `choices` answers of at most `max_tokens` each as predicted.

        Raises ApiError 429; the request has then used nothing.
        """
        if not self._tokens:
            return
        smallest = min(self._tokens, key=lambda bucket: bucket.per_minute)
        if prompt_tokens > smallest.per_minute:
            await self.refund(now)
            raise never_within_rate(smallest.owner, smallest.per_minute, prompt_tokens)
        # the bucket can hold no more, and who waits for more waits for ever
        amount = min(prompt_tokens + self._predicted(max_tokens) * choices, smallest.per_minute)
        taken = await self._counters.take([(bucket, amount) for bucket in self._tokens], now)
        self._token_readings = taken.readings
        if taken.wait_seconds > 0:
            await self.refund(now)
            raise refusal(taken, amount, now)
        self._charged_tokens, self._prompt_tokens, self._choices = amount, prompt_tokens, choices

    def _predicted(self, max_tokens: int) -> int:
        """Tokens of one answer: the usual ones of this key, or else of its tenant, and their usual deviation above it.

        With the mean alone every second reservation would be too small and the bucket in debt; several deviations would
        refuse requests for tokens that nobody generates. What is wrong with it is settled either way.
        """
        usual = self._limiter.answer_tokens.of(f"key {self._key.id}", f"tenant {self._key.tenant}")
        likely = UNKNOWN_ANSWER_TOKENS if usual is None else math.ceil(usual.mean + usual.deviation)
        return min(max_tokens, likely)

    async def settle(self, completion_tokens: int, now: float) -> None:
        """The request has ended, or was cancelled: what was reserved becomes what was used. Once only.

        For a request that the worker took; for one that it refused see `refund`.
        """
        charged, self._charged_tokens = self._charged_tokens, None
        if charged is None:
            return
        if completion_tokens:
            self._learn(completion_tokens / self._choices)
        difference = self._prompt_tokens + completion_tokens - charged
        self._token_readings = await self._counters.charge(self._tokens, difference, now)

    def _learn(self, answer_tokens: float) -> None:
        self._limiter.answer_tokens.observe(f"key {self._key.id}", answer_tokens)
        self._limiter.answer_tokens.observe(f"tenant {self._key.tenant}", answer_tokens)

    async def refund(self, now: float) -> None:
        """The request was refused after all (429 or 503 by the worker): it gets back its request and all its tokens.

        So whoever comes back at the time that the refusal tells is not refused by its own limits. Instead of `settle`, once
        only; a refusal by `reserve` or `slot` has done it already.
        """
        charged, self._charged_tokens = self._charged_tokens, None
        entered, self._entered = self._entered, False
        if charged is not None:
            self._token_readings = await self._counters.charge(self._tokens, -charged, now)
        if entered and self._requests:
            self._request_readings = await self._counters.charge(self._requests, -1, now)

    def headers(self, now: float) -> list[tuple[bytes, bytes]]:
        """x-ratelimit-*: of key or tenant, whichever has less left. Nothing about what has no limit.

        As of the last call of this allowance, so there are none before the first one.
        """
        headers: list[tuple[bytes, bytes]] = []
        for readings in (self._request_readings, self._token_readings):
            if readings:
                headers += rate_headers(readings, now)
        return headers

    # --- concurrent requests

    async def slot(self, wait_seconds: float) -> None:
        """One of the key's and the tenant's concurrent requests, waited for in order of arrival.

        0 waits for nothing, infinity as long as it takes. Raises ApiError 429; the request has then used nothing.
        """
        slots = self._limiter.slots
        if self._left:
            raise await self._no_slot(slots.place(self._key))
        place = self._place = self._place or slots.place(self._key)
        if place.state == "outside" and not await slots.take(place, wait_seconds):
            raise await self._no_slot(place)

    async def _no_slot(self, place: Place) -> ApiError:
        full = self._limiter.slots.full(place)
        self._limiter.slots.release(place)
        await self.refund(self._limiter.clock())
        return too_many_at_once(*full)

    def leave(self) -> None:
        """Gives back the slot, or the place in line. At any time, any number of times; from then on there is none to get."""
        self._left = True
        if self._place is not None:
            self._limiter.slots.release(self._place)


def refusal(taken: Taken, requested: int, now: float) -> ApiError:
    reading = taken.readings[taken.tightest]
    family, owner, per_minute = reading.bucket
    return rate_limited(family, owner, per_minute, reading.missing_at(now), requested, taken.wait_seconds)


def rate_headers(readings: Sequence[Reading], now: float) -> list[tuple[bytes, bytes]]:
    """Of the bucket that is nearest to its end. Remaining is what it would give at once; reset, when it is full again."""
    nearest = min(readings, key=lambda reading: reading.bucket.per_minute - reading.missing_at(now))
    bucket, missing = nearest.bucket, nearest.missing_at(now)
    left = bucket.per_minute - missing
    family = bucket.family.encode()
    return [
        (b"x-ratelimit-limit-" + family, b"%d" % bucket.per_minute),
        (b"x-ratelimit-remaining-" + family, b"%d" % max(0, math.floor(left + 1e-6))),
        (b"x-ratelimit-reset-" + family, duration(missing * 60 / bucket.per_minute).encode()),
    ]


def duration(seconds: float) -> str:
    """As OpenAI writes it: 0s, 120ms, 1.5s, 6m0s, 1h0m0s. Rounded up."""
    milliseconds = math.ceil(seconds * 1000 - 1e-3)
    if milliseconds <= 0:
        return "0s"
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    if milliseconds < 60_000:
        return f"{milliseconds / 1000:g}s"
    minutes, whole_seconds = divmod(math.ceil(milliseconds / 1000), 60)
    return f"{minutes}m{whole_seconds}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60}m{whole_seconds}s"
