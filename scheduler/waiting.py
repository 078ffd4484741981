"""The waiting list: by tier, then by tenant, then in order of arrival."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile

from scheduler.fairness import Account
from scheduler.messages import Finish, Request
from scheduler.prefix import Prefix
from scheduler.sequence import Ended, Sequence
from scheduler.tiers import Tier


@dataclass(frozen=True, slots=True)
class Waiting:
    """A request that has not started, or that was preempted and starts again.

    `footprint_bytes`: of all that it will hold. `needed_bytes` and `uncached_tokens`: what of it and of its prompt was
    not in the prefix cache when it came; both are estimates as soon as others come and go.
    """

    request: Request
    tier: Tier
    order: int
    arrived_at: float
    footprint_bytes: float
    reserved_output: int
    prefix: Prefix
    needed_bytes: float
    uncached_tokens: int
    sequence: Sequence | None = None  # what it had become before it was preempted

    def is_late(self, now: float) -> bool:
        return now - self.arrived_at > self.tier.max_wait_seconds

    def outcome(self, finish: Finish, now: float) -> Ended:
        return Ended(
            tier=self.tier.name,
            finish=finish,
            prompt_tokens=len(self.request.prompt),
            output_tokens=len(self.sequence.generated) if self.sequence else 0,
            queue_seconds=now - self.arrived_at,
            ttft_seconds=None,
            utps=None,
            floor_utps=self.tier.floor_utps,
        )


@dataclass(slots=True)
class Queued:
    """What some waiting requests amount to."""

    count: int = 0
    kv_bytes: float = 0.0  # beyond what is cached
    tokens: int = 0
    uncached_tokens: int = 0

    def add(self, waiting: Waiting, sign: int) -> None:
        self.count += sign
        self.kv_bytes = self.kv_bytes + sign * waiting.needed_bytes if self.count else 0.0
        self.tokens += sign * len(waiting.request.prompt)
        self.uncached_tokens += sign * waiting.uncached_tokens


class WaitingList:
    """Iterates over the keys of those who wait. Sums are kept along the way: 10,000 may arrive at once."""

    def __init__(self) -> None:
        self._by_key: dict[int, Waiting] = {}
        self._queues: dict[int, dict[str, deque[int]]] = {}  # rank -> tenant -> keys
        self._queued: dict[int, Queued] = {}  # rank -> its requests, added up

    def __len__(self) -> int:
        return len(self._by_key)

    def __iter__(self) -> Iterator[int]:
        return iter(self._by_key)

    def __contains__(self, key: int) -> bool:
        return key in self._by_key

    def __getitem__(self, key: int) -> Waiting:
        return self._by_key[key]

    @property
    def tokens(self) -> int:
        """Prompt tokens of all who wait."""
        return sum(queued.tokens for queued in self._queued.values())

    def up_to(self, rank: int) -> Queued:
        """Those whom a newcomer of this rank finds before it."""
        ahead = [queued for other, queued in self._queued.items() if other <= rank]
        return Queued(
            sum(q.count for q in ahead),
            sum(q.kv_bytes for q in ahead),
            sum(q.tokens for q in ahead),
            sum(q.uncached_tokens for q in ahead),
        )

    def add(self, waiting: Waiting, first: bool = False) -> None:
        """At the end of its tenant's queue, or before all others."""
        key, rank = waiting.request.key, waiting.tier.rank
        self._by_key[key] = waiting
        queue = self._queues.setdefault(rank, {}).setdefault(waiting.request.tenant, deque())
        if first:
            queue.appendleft(key)
        else:
            queue.append(key)
        self._queued.setdefault(rank, Queued()).add(waiting, 1)

    def remove(self, key: int) -> Waiting:
        waiting = self._by_key.pop(key)
        rank, tenant = waiting.tier.rank, waiting.request.tenant
        queue = self._queues[rank][tenant]
        if queue[0] == key:
            queue.popleft()
        else:
            queue.remove(key)
        if not queue:
            del self._queues[rank][tenant]
        self._queued[rank].add(waiting, -1)
        return waiting

    def firsts(self, account: Account) -> Iterator[Waiting]:
        """The first of each tier, best tier first: of the tenant that has used the fewest step seconds."""
        for rank in sorted(self._queues):
            if tenants := self._queues[rank]:
                tenant = min(tenants, key=account.used_seconds)
                yield self._by_key[tenants[tenant][0]]

    def late(self, now: float) -> list[Waiting]:
        """Who has waited longer than the tier allows, but for the preempted: they have started, and are owed an answer."""
        late: list[Waiting] = []
        for tenants in self._queues.values():
            for queue in tenants.values():  # the first of a queue has waited longest
                in_order = (self._by_key[key] for key in queue)
                late += [w for w in takewhile(lambda w: w.is_late(now), in_order) if w.sequence is None]
        return late
