"""The gate of one worker: arrivals and step results in, decisions and step plans out.

One pure object, driven alike by the engine process and by a simulator. `now` is always an argument (seconds of any steady
clock), refusals are values, and the same calls give the same answers. Between `plan` and `observe` a step is in flight;
requests may arrive and be cancelled meanwhile.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from scheduler.admission import keeps_floors
from scheduler.batch import Kept, Kind, Shared, StepPlan
from scheduler.calibration import CostModel
from scheduler.fairness import Account
from scheduler.fill import Filled, fill_step, largest, sort_out
from scheduler.footprint import LengthHistory, grown
from scheduler.ledger import Ledger
from scheduler.messages import (
    Accept,
    Decision,
    Finish,
    Reason,
    Refuse,
    Request,
    Snapshot,
    StepReport,
    TokenEvent,
    Wait,
)
from scheduler.model import ModelShape
from scheduler.outlook import Outlook
from scheduler.prefix import Node, Prefix, PrefixIndex, Sharing, charged_bytes, held_bytes
from scheduler.roofline import CAUSES, StepCost, step_bytes, step_flops
from scheduler.sequence import Ended, Sequence, outcome
from scheduler.tiers import Tier
from scheduler.waiting import Waiting, WaitingList

KV_GATE = 0.7  # share of the KV capacity above which chunks no longer grow by need


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds that keep a worker within its own means."""

    context_tokens: int
    block_tokens: int = 16  # KV is handed out in blocks, so footprints are rounded up to them
    sequences: int = 256
    waiting: int = 16384
    waiting_tokens: int = 32 << 20  # prompt tokens in the waiting list


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """What a step brought: tokens for their owners, a record for calibration and metrics, and who is done."""

    events: list[TokenEvent]
    report: StepReport
    ended: list[Ended]


@dataclass(frozen=True, slots=True)
class Flight:
    """The step that is being computed. It holds the sequences: a key may be cancelled and come back meanwhile."""

    filled: Filled
    predicted_seconds: float
    safe_seconds: float


class Gate:
    """Owns ledger, prefix index, waiting list, fairness account and length history of one worker."""

    def __init__(
        self,
        cost: CostModel,
        capacity_bytes: float,
        tiers: tuple[Tier, ...],
        limits: Limits,
        sharing: Sharing = Sharing.NOBODY,
    ) -> None:
        self.cost = cost
        self.shape = cost.shape
        self.limits = limits
        self.ledger = Ledger(capacity_bytes)
        self.prefixes = PrefixIndex(sharing, limits.block_tokens, self._block_bytes, self.ledger)
        self.history = LengthHistory()
        self.account = Account()
        self.tiers = {tier.name: tier for tier in tiers}
        self.most_tokens = most_tokens(self.shape, capacity_bytes, limits)
        self.running: dict[int, Sequence] = {}
        self.waiting = WaitingList()
        self.preemptions = 0
        self._orders = 0
        self._turn = 0  # where the round of best-effort sequences goes on
        self._step = 0
        self._start: list[Request] = []
        self._stop: list[int] = []
        self._kept: list[Kept] = []
        self._evicted: list[int] = []
        self._shared: list[Shared] = []
        self._ended: list[Ended] = []
        self._flight: Flight | None = None
        self._outlook: Outlook | None = None

    # --- arrivals -----------------------------------------------------------------------------------------------------

    def arrive(self, request: Request, now: float) -> Decision:
        """Accepts, queues or refuses. Raises ValueError when the key is already known here."""
        if request.key in self.running or request.key in self.waiting:
            raise ValueError(f"request {request.id} of gateway {request.gateway} is already here")
        tier = self.tiers.get(request.tier)
        if tier is None:
            return Refuse(Reason.UNKNOWN_TIER, 0.0)
        room = self.most_tokens - len(request.prompt)
        if not request.prompt or room < 1 or request.max_tokens < 1:
            return Refuse(Reason.TOO_LARGE, 0.0)
        request = replace(request, max_tokens=min(request.max_tokens, room))
        ahead = self.waiting.up_to(tier.rank)
        if ahead.count and self._is_full(request):
            return self._refuse_full(request, tier, now)  # before its prompt is hashed
        prefix = self.prefixes.prefix(request)
        hits = self.prefixes.hits(prefix)
        candidate = self._candidate(request, tier, now, prefix, hits)
        obstacle = self._obstacle(candidate, hits)
        if obstacle is not None or ahead.count:
            return self._wait_or_refuse(candidate, obstacle or Reason.TIME_BUDGET)
        self.account.enter(request.tenant)
        self._admit(candidate, hits, now)
        outlook = self._outlook_now()
        return Accept(outlook.prefill_seconds(tier.rank, ahead), outlook.utps)

    def _candidate(self, request: Request, tier: Tier, now: float, prefix: Prefix, hits: list[Node]) -> Waiting:
        self._orders += 1
        output = self.history.reserve_tokens(request)
        return self._waiting(request, tier, self._orders, now, output, prefix, hits)

    def _waiting(
        self,
        request: Request,
        tier: Tier,
        order: int,
        arrived_at: float,
        output: int,
        prefix: Prefix,
        hits: list[Node],
        sequence: Sequence | None = None,
    ) -> Waiting:
        footprint = self._bytes(len(request.prompt) + output)
        needed = footprint - charged_bytes(hits)
        uncached = prefix.known - len(hits) * self.limits.block_tokens
        return Waiting(request, tier, order, arrived_at, footprint, output, prefix, needed, uncached, sequence)

    def _wait_or_refuse(self, candidate: Waiting, obstacle: Reason) -> Decision:
        wait = self._predicted_wait(candidate)
        request, longest = candidate.request, candidate.tier.max_wait_seconds
        if self._is_full(request):
            return _queue_full(wait)
        if wait > longest:
            return Refuse(obstacle, max(1.0, wait - longest), wait)
        self.account.enter(request.tenant)
        self.waiting.add(candidate)
        return Wait(wait, obstacle)

    def _is_full(self, request: Request) -> bool:
        tokens = self.waiting.tokens + len(request.prompt)
        return len(self.waiting) >= self.limits.waiting or tokens > self.limits.waiting_tokens

    def _refuse_full(self, request: Request, tier: Tier, now: float) -> Refuse:
        """Its wait is told as if nothing of it were cached."""
        candidate = self._candidate(request, tier, now, self.prefixes.prefix(request), [])
        return _queue_full(self._predicted_wait(candidate))

    def cancel(self, key: int, now: float) -> bool:
        """Forgets a request; its KV is free with the next plan. False when it is not here (any more)."""
        if key in self.waiting:
            self._end_waiting(self.waiting.remove(key), Finish.CANCELLED, now)
            return True
        if key in self.running:
            self._end(self.running[key], Finish.CANCELLED)
            return True
        return False

    def fail_running(self) -> list[TokenEvent]:
        """The engine failed: every running request ends with an error, and no cached block is trusted. Those that wait
        stay."""
        self._flight = None
        events = [self._fail(sequence) for sequence in list(self.running.values())]
        while self._evict():
            pass
        return events

    # --- the step -----------------------------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting or self._stop)

    def plan(self, now: float) -> StepPlan:
        """What the next step carries. Its entries are in flight until `observe` or `fail_running`."""
        assert self._flight is None
        self._admit_waiting(now)
        refused = self._refuse_late(now)
        self._make_room_to_grow()
        may_grow = self.ledger.reserved_bytes < KV_GATE * self.ledger.capacity_bytes
        promised, best_effort, prefilling = sort_out(self.running.values())
        prefilling = self._reuse(prefilling)
        filled = fill_step(self.cost, promised, best_effort, prefilling, self._turn, may_grow, now)
        self._turn += filled.best_effort
        self._take_blocks(filled)
        start, self._start = tuple(self._start), []
        stop, self._stop = tuple(self._stop), []
        kept, self._kept = tuple(self._kept), []
        evicted, self._evicted = tuple(self._evicted), []
        shared, self._shared = tuple(self._shared), []
        predicted = self.cost.seconds(filled.work) if filled.entries else 0.0
        if filled.entries:
            self._flight = Flight(filled, predicted, predicted * (1 + self.cost.margin))
        return StepPlan(filled.entries, start, stop, tuple(refused), predicted, kept, evicted, shared)

    def observe(self, tokens: dict[int, list[int]], seconds: float, host_seconds: float, now: float) -> StepOutcome:
        """Takes in the step that was in flight: its tokens, the engine's seconds, and the loop's before it.

        Users see both, so the cost model learns their sum.
        """
        flight, self._flight = self._flight, None
        assert flight is not None
        self._outlook = None
        self._step += 1
        measured = seconds + host_seconds
        cost, work = self.cost.cost(flight.filled.work), flight.filled.work
        self.cost.observe(work, measured)
        slow = measured > flight.safe_seconds
        per_kv_byte, per_token = _rates(cost, work.kv_read_bytes, work.query_tokens, measured)
        events, block = [], self.limits.block_tokens
        for (key, _, position, query_tokens, delivers, _), sequence in zip(
            flight.filled.entries, flight.filled.sequences, strict=True
        ):
            if self.running.get(key) is not sequence:
                continue  # cancelled (and perhaps come back) while the step ran
            kv_bytes = self.shape.kv_bytes(position + query_tokens)
            self.account.charge(sequence.request.tenant, per_token * query_tokens + per_kv_byte * kv_bytes)
            sequence.computed += query_tokens
            if query_tokens > 1 or sequence.computed % block == 0:
                self._publish(sequence)
            if delivers:
                events.append(self._deliver(sequence, tokens.get(key, []), now, slow))
        delivered = sum(len(event.tokens) for event in events)
        return StepOutcome(events, self._report(flight, cost, seconds, host_seconds, delivered), self.take_ended())

    def snapshot(self, stalled_seconds: float) -> Snapshot:
        tier = self.tiers.get("default") or next(iter(self.tiers.values()))
        request = Request(0, 0, (0,), 1)
        nobody = self._waiting(request, tier, 0, 0.0, 1, self.prefixes.prefix(request), [])
        return Snapshot(
            running=len(self.running),
            waiting=len(self.waiting),
            kv_reserved_bytes=int(self.ledger.reserved_bytes),
            kv_capacity_bytes=int(self.ledger.capacity_bytes),
            stalled_seconds=stalled_seconds,
            predicted_wait_seconds=self._predicted_wait(nobody),
            prefix_marks=self.prefixes.marks,
        )

    def take_ended(self) -> list[Ended]:
        """Outcomes since they were last taken."""
        ended, self._ended = self._ended, []
        return ended

    # --- memory -------------------------------------------------------------------------------------------------------

    def _make_room_to_grow(self) -> None:
        """A sequence that outlives its prediction reserves more; where that does not fit, somebody gives way."""
        for sequence in [s for s in self.running.values() if len(s.generated) >= s.reserved_output]:
            key = sequence.key
            if key not in self.running:
                continue  # it gave way to another
            sequence.reserved_output = grown(sequence.reserved_output, sequence.request.max_tokens)
            footprint = self._bytes(sequence.prompt_tokens + sequence.reserved_output)
            more = footprint - sequence.footprint_bytes
            while key in self.running and not self.ledger.can_reserve(more):
                self._preempt(max(self.running.values(), key=lambda s: (s.tier.rank, s.order)))
            if key in self.running:
                self.ledger.grow(key, self.ledger.held_bytes(key) + more)
                sequence.footprint_bytes = footprint
                self._outlook = None

    def _preempt(self, sequence: Sequence) -> None:
        """The last rung: drops the KV of a sequence and queues it for recomputation, before all others of its tier.

        On a CPU host memory is the same memory, so there is nowhere to move it to.
        """
        self.preemptions += 1
        sequence.restarts += 1
        self._remove(sequence)
        sequence.computed = sequence.held_tokens = 0
        again = self._waiting(
            sequence.request,
            sequence.tier,
            sequence.order,
            sequence.arrived_at,
            sequence.reserved_output,
            sequence.prefix,
            self.prefixes.hits(sequence.prefix),
            sequence,
        )
        self.waiting.add(again, first=True)

    def _remove(self, sequence: Sequence) -> None:
        """Out of the running ones: its KV is free from the next plan on."""
        key = sequence.key
        del self.running[key]
        shareable = self._bytes(len(sequence.prefix.nodes) * self.limits.block_tokens)
        self.ledger.used_bytes -= self._bytes(sequence.held_tokens) - shareable
        self.ledger.release(key)
        self.prefixes.release(sequence.prefix)
        self._outlook = None
        if any(request.key == key for request in self._start):
            self._start = [request for request in self._start if request.key != key]  # the engine never saw it
            self._shared = [shared for shared in self._shared if shared.key != key]
        else:
            self._stop.append(key)

    def _bytes(self, tokens: int) -> float:
        block = self.limits.block_tokens
        return self.shape.kv_bytes(-(-tokens // block) * block)

    def _block_bytes(self, block: int) -> float:
        """Of the n-th block of a sequence."""
        tokens = block * self.limits.block_tokens
        return self._bytes(tokens + 1) - self._bytes(tokens)

    # --- the prefix cache ---------------------------------------------------------------------------------------------

    def _reuse(self, prefilling: list[Sequence]) -> list[Sequence]:
        """Takes over what others have computed by now. Who would compute the same block as another before it waits for
        that one: the same prompt many times at once is computed once.
        """
        ready, coming = [], set()
        for sequence in prefilling:
            prefix = sequence.prefix
            if prefix.may_go_on(sequence.computed) and (hits := self.prefixes.hits(prefix)):
                self.ledger.give_back(sequence.key, held_bytes(hits))
                self._take_over(sequence, hits)
            block = prefix.coming(sequence.computed)
            if block not in coming or not prefix.may_go_on(sequence.computed):
                ready.append(sequence)
            if block is not None:
                coming.add(block)
        return ready

    def _take_over(self, sequence: Sequence, hits: list[Node]) -> None:
        self.prefixes.hold(sequence.prefix, hits)
        self._shared.append(Shared(sequence.key, tuple(node.number for node in hits)))
        tokens = len(hits) * self.limits.block_tokens
        sequence.computed += tokens
        sequence.held_tokens += tokens
        if not sequence.restarts:
            sequence.cached_tokens += tokens
        self._outlook = None

    def _publish(self, sequence: Sequence) -> None:
        for place, number in self.prefixes.publish(sequence.prefix, sequence.computed):
            self._kept.append(Kept(sequence.key, place, number))

    def _take_blocks(self, filled: Filled) -> None:
        """The step's tokens need blocks; where too few are free, idle ones are evicted."""
        for (_, _, position, query_tokens, _, _), sequence in zip(filled.entries, filled.sequences, strict=True):
            stop = position + query_tokens
            if stop > sequence.held_tokens:
                self.ledger.used_bytes += self._bytes(stop) - self._bytes(sequence.held_tokens)
                sequence.held_tokens = -(-stop // self.limits.block_tokens) * self.limits.block_tokens
        while self.ledger.used_bytes > self.ledger.capacity_bytes and self._evict():
            pass

    def _evict(self) -> bool:
        node = self.prefixes.evict()
        if node is None:
            return False
        self.ledger.used_bytes -= node.held_bytes
        self._evicted.append(node.number)
        return True

    # --- waiting and starting -----------------------------------------------------------------------------------------

    def _obstacle(self, candidate: Waiting, hits: list[Node]) -> Reason | None:
        """What keeps a request, which would begin with these blocks, from starting now, if anything does."""
        if not self.ledger.can_reserve(candidate.footprint_bytes - charged_bytes(hits)):
            return Reason.KV_FOOTPRINT
        if len(self.running) >= self.limits.sequences:
            return Reason.TIME_BUDGET
        if not candidate.tier.floor_utps:
            return None  # it takes what the others leave, step by step
        load = self._outlook_now().load
        more = load.plus(candidate.footprint_bytes, candidate.tier.gap_seconds)
        if load.sequences and not keeps_floors(self.cost, more):
            return Reason.TIME_BUDGET
        return None

    def _admit(self, waiting: Waiting, hits: list[Node], now: float) -> None:
        request = waiting.request
        sequence = waiting.sequence or Sequence(
            key=request.key,
            request=request,
            tier=waiting.tier,
            order=waiting.order,
            arrived_at=waiting.arrived_at,
            started_at=now,
            reserved_output=waiting.reserved_output,
            prompt_tokens=len(request.prompt),
            footprint_bytes=waiting.footprint_bytes,
            prefix=waiting.prefix,
            generated=waiting.prefix.generated,
        )
        sequence.footprint_bytes = waiting.footprint_bytes  # of who was preempted, it may have grown
        self.ledger.reserve(request.key, waiting.footprint_bytes - held_bytes(hits))
        self.prefixes.query_tokens += sequence.known
        if hits:
            self._take_over(sequence, hits)
        self.running[request.key] = sequence
        if sequence.generated:
            prompt = [*request.prompt, *sequence.generated]
            request = replace(request, prompt=prompt, resumed_tokens=len(sequence.generated))
        self._start.append(request)
        self._outlook = None

    def _admit_waiting(self, now: float) -> None:
        while (found := self._startable()) is not None:
            waiting, hits = found
            self._admit(self.waiting.remove(waiting.request.key), hits, now)

    def _startable(self) -> tuple[Waiting, list[Node]] | None:
        """The first who may start, and what it begins with. Where a floor stands in the way, tiers without one may pass: they take what is left."""
        is_passing = False
        for waiting in self.waiting.firsts(self.account):
            if is_passing and waiting.tier.floor_utps:
                continue
            hits = self.prefixes.hits(waiting.prefix)  # others have come and gone since it arrived
            obstacle = self._obstacle(waiting, hits)
            if obstacle is None:
                return waiting, hits
            if obstacle is Reason.KV_FOOTPRINT:
                return None  # memory that comes free is for who is first
            is_passing = True
        return None

    def _refuse_late(self, now: float) -> list[TokenEvent]:
        refused = []
        for waiting in self.waiting.late(now):
            retry_after = max(1.0, self._predicted_wait(waiting))
            self._end_waiting(self.waiting.remove(waiting.request.key), Finish.REFUSED, now)
            reason = Reason.TTFT_UNREACHABLE
            refused.append(TokenEvent(waiting.request.key, (), Finish.REFUSED, reason, retry_after))
        return refused

    def _predicted_wait(self, candidate: Waiting) -> float:
        return self._outlook_now().wait_seconds(candidate, self.waiting.up_to(candidate.tier.rank))

    def _outlook_now(self) -> Outlook:
        if self._outlook is None:
            self._outlook = Outlook(self.running, self.ledger, self.cost, self.history, self.limits.sequences)
        return self._outlook

    # --- results ------------------------------------------------------------------------------------------------------

    def _deliver(self, sequence: Sequence, tokens: list[int], now: float, slow: bool) -> TokenEvent:
        """Hands over what the step drew, cut at a stop id and at the limit."""
        if not tokens:
            return self._fail(sequence)  # an engine that delivers nothing would be asked for ever
        request = sequence.request
        sequence.first_at = sequence.first_at or now
        sequence.last_at = now
        is_first = not sequence.generated
        left = request.max_tokens - len(sequence.generated)
        taken = tokens[:left]
        finish = Finish.LENGTH if len(taken) == left else Finish.RUNNING
        if not request.stop_ids.isdisjoint(taken):
            taken = taken[: 1 + next(at for at, token in enumerate(taken) if token in request.stop_ids)]
            finish = Finish.STOP
        sequence.generated += taken
        if finish:
            self.history.record(request, len(sequence.generated))
            self._end(sequence, finish, slow)
        event = TokenEvent(sequence.key, taken, finish)
        return event._replace(cached_tokens=sequence.cached_tokens) if is_first else event

    def _fail(self, sequence: Sequence) -> TokenEvent:
        self._end(sequence, Finish.ERROR)
        return TokenEvent(sequence.key, (), Finish.ERROR, Reason.WORKER_FAILED)

    def _end(self, sequence: Sequence, finish: Finish, slow: bool = False) -> None:
        self._remove(sequence)
        self.account.leave(sequence.request.tenant)
        self._ended.append(outcome(sequence, finish, slow))

    def _end_waiting(self, waiting: Waiting, finish: Finish, now: float) -> None:
        self.account.leave(waiting.request.tenant)
        self._ended.append(waiting.outcome(finish, now))

    def _report(
        self, flight: Flight, cost: StepCost, seconds: float, host_seconds: float, delivered: int
    ) -> StepReport:
        work = flight.filled.work
        decodes = sum(entry.kind is Kind.DECODE for entry in flight.filled.entries)
        return StepReport(
            step=self._step,
            sequences=sum(entry.delivers for entry in flight.filled.entries),
            prefill_tokens=work.query_tokens - decodes,
            decode_tokens=decodes,
            delivered_tokens=delivered,
            bytes_moved=step_bytes(self.shape, work),
            flops=step_flops(self.shape, work),
            seconds=seconds_by_cause(cost, seconds, host_seconds),
            predicted_seconds=flight.predicted_seconds,
            measured_seconds=seconds + host_seconds,
            limit_seconds=self.cost.limit.seconds(work),
            budget_seconds=flight.filled.budget_seconds,
        )


def _queue_full(wait_seconds: float) -> Refuse:
    return Refuse(Reason.QUEUE_FULL, max(1.0, min(wait_seconds, 60.0)), wait_seconds)


def seconds_by_cause(cost: StepCost, seconds: float, host_seconds: float) -> dict[str, float]:
    """The model's split of the engine's seconds, cut to what was measured; the loop's own time is host time."""
    scale = min(1.0, seconds / cost.seconds)
    split = dict.fromkeys(CAUSES, 0.0)
    split["weights"] = cost.weights * scale
    split["kv"] = cost.kv * scale
    split["compute"] = cost.compute * scale
    split["phases"] = cost.phases * scale
    split["host"] = cost.host * scale + host_seconds
    split["unexplained"] = seconds - cost.seconds * scale
    return split


def _rates(cost: StepCost, kv_bytes: float, query_tokens: int, seconds: float) -> tuple[float, float]:
    """What a tenant is charged per KV byte read and per token computed; over the step they sum to its seconds."""
    kv_seconds = seconds * cost.kv / cost.seconds
    return kv_seconds / kv_bytes if kv_bytes else 0.0, (seconds - kv_seconds) / query_tokens


def most_tokens(shape: ModelShape, capacity_bytes: float, limits: Limits) -> int:
    """The longest sequence, prompt and output, that can ever run: by context and by memory, in whole blocks."""
    block = limits.block_tokens
    blocks = largest(
        lambda count: shape.kv_bytes(count * block) <= capacity_bytes, 0, limits.context_tokens // block + 1
    )
    return min(limits.context_tokens, blocks * block)
