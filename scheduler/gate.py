"""The gate of one worker: arrivals and step results in, decisions and step plans out.

One pure object, driven alike by the engine process and by a simulator. `now` is always an argument (seconds of any steady
clock), refusals are values, and the same calls give the same answers. Between `plan` and `observe` a step is in flight;
requests may arrive and be cancelled meanwhile.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import takewhile

from scheduler import admission
from scheduler.admission import FLOOR_SHARE, MIN_CHUNK, Drain, Load, keeps_floors
from scheduler.batch import Entry, Kind, StepPlan
from scheduler.calibration import CostModel
from scheduler.fairness import Account
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
from scheduler.roofline import CAUSES, StepWork, decode_work, limit_seconds, step_bytes, step_flops
from scheduler.tiers import Tier

RIDGE_SHARE = 1.3  # tokens per step, as a multiple of the ridge, that prefill fills a step up to
TTFT_SHARE = 0.5  # of the TTFT target that the queue's prefill may take before chunks grow
LEAST_TTFT_SECONDS = 0.2
KV_GATE = 0.7  # share of the KV capacity above which chunks no longer grow by need
MOST_CHUNK = 8192
LONELY_STEP_SECONDS = 0.1  # a step that carries no decode may take this long: who arrives meanwhile waits for its end


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds that keep a worker within its own means."""

    context_tokens: int
    block_tokens: int = 16  # KV is handed out in blocks, so footprints are rounded up to them
    sequences: int = 256
    waiting: int = 16384
    waiting_tokens: int = 32 << 20  # prompt tokens in the waiting list


@dataclass(slots=True)
class Sequence:
    """A running request. `computed` tokens of it are in the KV cache; `generated` ones are known."""

    key: int
    request: Request
    tier: Tier
    order: int
    arrived_at: float
    started_at: float
    reserved_output: int
    prompt_tokens: int  # of the first start; a recomputed sequence has its output in request.prompt as well
    generated: list[int] = field(default_factory=list)
    computed: int = 0
    first_at: float = 0.0
    last_at: float = 0.0
    restarts: int = 0

    @property
    def known(self) -> int:
        return self.prompt_tokens + len(self.generated)

    @property
    def is_decoding(self) -> bool:
        generated = len(self.generated)
        return generated > 0 and self.computed == self.prompt_tokens + generated - 1

    @property
    def uncached_prefill(self) -> int:
        return 0 if self.is_decoding else self.known - self.computed


@dataclass(frozen=True, slots=True)
class Waiting:
    request: Request
    tier: Tier
    order: int
    arrived_at: float
    footprint_bytes: float
    reserved_output: int
    sequence: Sequence | None = None  # what it had become before it was preempted


@dataclass(slots=True)
class Queued:
    """What the waiting requests of one rank amount to."""

    count: int = 0
    kv_bytes: float = 0.0
    tokens: int = 0

    def add(self, waiting: Waiting, sign: int) -> None:
        self.count += sign
        self.kv_bytes = self.kv_bytes + sign * waiting.footprint_bytes if self.count else 0.0
        self.tokens += sign * len(waiting.request.prompt)


@dataclass(frozen=True, slots=True)
class Ended:
    """The outcome of one request, for the metrics."""

    tier: str
    finish: Finish
    prompt_tokens: int
    output_tokens: int
    queue_seconds: float
    ttft_seconds: float | None
    utps: float | None
    floor_utps: float
    violation: str | None = None  # the cause, where the floor was not kept over the request's life


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """What a step brought: tokens for their owners, a record for calibration and metrics, and who is done."""

    events: list[TokenEvent]
    report: StepReport
    ended: list[Ended]


@dataclass(frozen=True, slots=True)
class Flight:
    """The step that is being computed."""

    entries: tuple[Entry, ...]
    sequences: tuple[Sequence, ...]  # whose they are: a key may be cancelled and come back while the step runs
    work: StepWork
    predicted_seconds: float
    safe_seconds: float
    budget_seconds: float


class Outlook:
    """What the running sequences mean for those who come: each part is computed when asked for; valid until they change."""

    def __init__(self, running: dict[int, Sequence], ledger: Ledger, cost: CostModel, history: LengthHistory) -> None:
        self._running = running
        self._ledger = ledger
        self._cost = cost
        self._history = history
        self.room: dict[tuple[str, float], int] = {}  # (tier, footprint) -> places that the floors leave

    @cached_property
    def load(self) -> Load:
        promised = [s for s in self._running.values() if s.tier.floor_utps]
        held = sum(self._ledger.held_bytes(s.key) for s in promised)
        return Load(len(promised), held, min((s.tier.gap_seconds for s in promised), default=math.inf))

    @cached_property
    def decode_work(self) -> StepWork:
        """Of a step with everybody who decodes now; of one short sequence where nobody does."""
        decoding = [s for s in self._running.values() if s.is_decoding]
        return _add_decodes(self._cost.shape, NO_WORK, decoding) if decoding else StepWork(1, 1, 0.0, 0.0, 0.0)

    @cached_property
    def drain(self) -> Drain:
        step = self._cost.seconds(self.decode_work)
        return Drain(
            (step * max(1, self._expected_output(s) - len(s.generated)), self._ledger.held_bytes(s.key))
            for s in self._running.values()
        )

    @cached_property
    def prefill_tokens(self) -> dict[int, int]:
        """By rank: prompt tokens that running sequences still have to compute."""
        tokens: dict[int, int] = {}
        for sequence in self._running.values():
            rank = sequence.tier.rank
            tokens[rank] = tokens.get(rank, 0) + sequence.uncached_prefill
        return tokens

    def _expected_output(self, sequence: Sequence) -> int:
        """Output tokens at its end: the mean of the history, and for those who outlived it half as much again."""
        expected = self._history.expected_tokens(sequence.request)
        return min(sequence.request.max_tokens, max(expected, len(sequence.generated) * 3 // 2))


class Gate:
    """Owns ledger, waiting list, fairness account and length history of one worker."""

    def __init__(self, cost: CostModel, capacity_bytes: float, tiers: tuple[Tier, ...], limits: Limits) -> None:
        self.cost = cost
        self.shape = cost.shape
        self.limits = limits
        self.ledger = Ledger(capacity_bytes)
        self.history = LengthHistory()
        self.account = Account()
        self.tiers = {tier.name: tier for tier in tiers}
        self.most_tokens = _most_tokens(self.shape, capacity_bytes, limits)
        self.running: dict[int, Sequence] = {}
        self.waiting: dict[int, Waiting] = {}
        self.preemptions = 0
        self._queues: dict[int, dict[str, deque[int]]] = {}  # rank -> tenant -> keys, in order of arrival
        self._queued: dict[int, Queued] = {}  # rank -> its waiting requests, added up
        self._orders = 0
        self._turn = 0  # where the round of best-effort sequences goes on
        self._step = 0
        self._start: list[Request] = []
        self._stop: list[int] = []
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
        reserved_output = self.history.reserve_tokens(request)
        footprint = self._footprint(request, reserved_output)
        candidate = Waiting(request, tier, self._next_order(), now, footprint, reserved_output)
        obstacle = self._obstacle(candidate)
        if obstacle is None and not self._is_anybody_ahead(tier.rank):
            self.account.enter(request.tenant)
            self._admit(candidate, now)
            return Accept(self._prefill_seconds(tier.rank), 1 / self.cost.seconds(self._outlook_now().decode_work))
        return self._wait_or_refuse(candidate, obstacle or Reason.TIME_BUDGET)

    def _is_anybody_ahead(self, rank: int) -> bool:
        return any(queued.count for other, queued in self._queued.items() if other <= rank)

    def _wait_or_refuse(self, candidate: Waiting, obstacle: Reason) -> Decision:
        wait = self._predicted_wait(candidate)
        tier, tokens = candidate.tier, len(candidate.request.prompt)
        waiting_tokens = sum(queued.tokens for queued in self._queued.values())
        if len(self.waiting) >= self.limits.waiting or waiting_tokens + tokens > self.limits.waiting_tokens:
            return Refuse(Reason.QUEUE_FULL, max(1.0, min(wait, 60.0)), wait)
        if wait > tier.max_wait_seconds:
            return Refuse(obstacle, max(1.0, wait - tier.max_wait_seconds), wait)
        self._enqueue(candidate)
        return Wait(wait, obstacle)

    def cancel(self, key: int, now: float) -> bool:
        """Forgets a request; its KV is free with the next plan. False when it is not here (any more)."""
        if key in self.waiting:
            self._end_waiting(self._dequeue(key), Finish.CANCELLED, now)
            return True
        if key in self.running:
            self._end(self.running[key], Finish.CANCELLED)
            return True
        return False

    def fail_running(self) -> list[TokenEvent]:
        """The engine failed: every running request ends with an error. Those that wait stay."""
        self._flight = None
        events = []
        for sequence in list(self.running.values()):
            events.append(TokenEvent(sequence.request.key, (), Finish.ERROR, Reason.WORKER_FAILED))
            self._end(sequence, Finish.ERROR)
        return events

    # --- the step -----------------------------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting or self._stop)

    def plan(self, now: float) -> StepPlan:
        """What the next step carries. Its entries are in flight until `observe` or `fail_running`."""
        assert self._flight is None
        refused = self._refuse_late(now)
        self._admit_waiting(now)
        self._make_room_to_grow()
        entries, sequences, work, budget = self._fill_step(now)
        start, self._start = tuple(self._start), []
        stop, self._stop = tuple(self._stop), []
        if entries:
            predicted = self.cost.seconds(work)
            safe = predicted * (1 + self.cost.margin)
            self._flight = Flight(tuple(entries), tuple(sequences), work, predicted, safe, budget)
        return StepPlan(tuple(entries), start, stop, tuple(refused))

    def observe(self, tokens: dict[int, list[int]], seconds: float, host_seconds: float, now: float) -> StepOutcome:
        """Takes in the step that was in flight: its tokens, the engine's seconds, and the loop's before it.

        Users see both, so the cost model learns their sum.
        """
        flight, self._flight = self._flight, None
        assert flight is not None
        self._outlook = None
        self._step += 1
        measured = seconds + host_seconds
        self.cost.observe(flight.work, measured)
        slow = measured > flight.safe_seconds
        events = []
        delivered = 0
        token_seconds = seconds / flight.work.query_tokens
        for (key, _, _, query_tokens, delivers), sequence in zip(flight.entries, flight.sequences, strict=True):
            if self.running.get(key) is not sequence:
                continue  # cancelled (and perhaps come back) while the step ran
            self.account.charge(sequence.request.tenant, token_seconds * query_tokens)
            sequence.computed += query_tokens
            if delivers:
                event = self._deliver(sequence, tokens.get(key, []), now, slow)
                delivered += len(event.tokens)
                events.append(event)
        report = self._report(flight, seconds, host_seconds, delivered)
        return StepOutcome(events, report, self.take_ended())

    def snapshot(self, stalled_seconds: float) -> Snapshot:
        tier = self.tiers.get("default") or next(iter(self.tiers.values()))
        nobody = Waiting(Request(0, 0, (0,), 1), tier, 0, 0.0, self._bytes(self.limits.block_tokens), 1)
        return Snapshot(
            running=len(self.running),
            waiting=len(self.waiting),
            kv_reserved_bytes=int(self.ledger.reserved_bytes),
            kv_capacity_bytes=int(self.ledger.capacity_bytes),
            stalled_seconds=stalled_seconds,
            predicted_wait_seconds=self._predicted_wait(nobody),
        )

    def take_ended(self) -> list[Ended]:
        """Outcomes since they were last taken."""
        ended, self._ended = self._ended, []
        return ended

    # --- filling a step -----------------------------------------------------------------------------------------------

    def _fill_step(self, now: float) -> tuple[list[Entry], list[Sequence], StepWork, float]:
        promised, best_effort, prefilling = self._sort_running()
        gap = min((s.tier.gap_seconds for s in promised), default=math.inf)
        budget = FLOOR_SHARE * gap
        work = _add_decodes(self.shape, NO_WORK, promised)
        taken = self._best_effort(best_effort, work, budget, MIN_CHUNK if prefilling else 0)
        work = _add_decodes(self.shape, work, taken)
        sequences = promised + taken
        entries = [Entry(s.key, Kind.DECODE, s.computed, 1, True) for s in sequences]
        if prefilling:
            for entry in _deal(prefilling, self._chunk_tokens(prefilling, work, budget, now)):
                entries.append(entry)
                sequences.append(self.running[entry.key])
                work = work.plus_chunk(self.shape, entry.position, entry.query_tokens, entry.delivers)
        return entries, sequences, work, budget

    def _sort_running(self) -> tuple[list[Sequence], list[Sequence], list[Sequence]]:
        """Those who decode with a floor, those who decode without one, and those who prefill, first come first."""
        promised: list[Sequence] = []
        best_effort: list[Sequence] = []
        prefilling: list[Sequence] = []
        for sequence in self.running.values():
            if not sequence.is_decoding:
                prefilling.append(sequence)
            elif sequence.tier.floor_utps:
                promised.append(sequence)
            else:
                best_effort.append(sequence)
        return promised, best_effort, sorted(prefilling, key=lambda s: (s.tier.rank, s.order))

    def _best_effort(self, sequences: list[Sequence], work: StepWork, budget: float, reserve: int) -> list[Sequence]:
        """As many sequences without a floor as the budget leaves room for, taking turns."""
        if not sequences or budget == math.inf:
            return sequences
        turn = self._turn % len(sequences)
        ordered = sequences[turn:] + sequences[:turn]

        def fits(count: int) -> bool:
            more = _add_decodes(self.shape, work, ordered[:count])
            return self.cost.safe_seconds(more.plus_chunk(self.shape, 0, reserve, False)) <= budget

        count = _largest(fits, 0, len(ordered))
        self._turn = turn + count
        return ordered[:count]

    def _chunk_tokens(self, prefilling: list[Sequence], work: StepWork, budget: float, now: float) -> int:
        """Prompt tokens for this step: about the ridge, more by need, never beyond the strictest floor."""
        queued = sum(s.uncached_prefill for s in prefilling)
        most = min(queued, MOST_CHUNK)

        def seconds(tokens: int) -> float:
            total = work
            for entry in _deal(prefilling, tokens):
                total = total.plus_chunk(self.shape, entry.position, entry.query_tokens, entry.delivers)
            return self.cost.safe_seconds(total)

        if not work.sequences:
            return max(MIN_CHUNK, _largest(lambda c: seconds(c) <= LONELY_STEP_SECONDS, MIN_CHUNK, most))
        ridge = self.cost.ridge
        low = max(math.ceil(RIDGE_SHARE * ridge) - work.sequences, ridge, MIN_CHUNK)
        if low < most and self.ledger.reserved_bytes < KV_GATE * self.ledger.capacity_bytes:
            rate = _needed_rate(prefilling, now)
            low = most - _largest(lambda less: (most - less) / seconds(most - less) >= rate, 0, most - low)
        return max(MIN_CHUNK, _largest(lambda c: seconds(c) <= budget, MIN_CHUNK, min(low, most)))

    # --- memory -------------------------------------------------------------------------------------------------------

    def _make_room_to_grow(self) -> None:
        """A sequence that outlives its prediction reserves more; where that does not fit, somebody gives way."""
        for sequence in [s for s in self.running.values() if len(s.generated) >= s.reserved_output]:
            key = sequence.key
            if key not in self.running:
                continue  # it gave way to another
            sequence.reserved_output = grown(sequence.reserved_output, sequence.request.max_tokens)
            needed = self._bytes(sequence.prompt_tokens + sequence.reserved_output)
            while key in self.running and not self.ledger.can_grow(key, needed):
                self._preempt(max(self.running.values(), key=lambda s: (s.tier.rank, s.order)))
            if key in self.running:
                self.ledger.grow(key, needed)
                self._outlook = None

    def _preempt(self, sequence: Sequence) -> None:
        """The last rung: drops the KV of a sequence and queues it for recomputation, before all others of its tier.

        On a CPU host memory is the same memory, so there is nowhere to move it to.
        """
        self.preemptions += 1
        sequence.restarts += 1
        request, output = sequence.request, sequence.reserved_output
        self._remove(sequence)
        sequence.computed = 0
        footprint = self._footprint(request, output)
        waiting = Waiting(request, sequence.tier, sequence.order, sequence.arrived_at, footprint, output, sequence)
        self._enqueue(waiting, first=True)

    def _remove(self, sequence: Sequence) -> None:
        """Out of the running ones: its KV is free from the next plan on."""
        key = sequence.key
        del self.running[key]
        self.ledger.release(key)
        self._outlook = None
        if any(request.key == key for request in self._start):
            self._start = [request for request in self._start if request.key != key]  # the engine never saw it
        else:
            self._stop.append(key)

    def _bytes(self, tokens: int) -> float:
        block = self.limits.block_tokens
        return self.shape.kv_bytes(-(-tokens // block) * block)

    def _footprint(self, request: Request, output_tokens: int) -> float:
        return self._bytes(len(request.prompt) + output_tokens)

    # --- waiting and starting -----------------------------------------------------------------------------------------

    def _obstacle(self, candidate: Waiting) -> Reason | None:
        """What keeps a request from starting now, if anything does."""
        if not self.ledger.can_reserve(candidate.footprint_bytes):
            return Reason.KV_FOOTPRINT
        if len(self.running) >= self.limits.sequences:
            return Reason.TIME_BUDGET
        if not candidate.tier.floor_utps:
            return None  # it takes what the others leave, step by step
        load = self._outlook_now().load
        if load.sequences and not keeps_floors(
            self.cost, load.plus(candidate.footprint_bytes, candidate.tier.gap_seconds)
        ):
            return Reason.TIME_BUDGET
        return None

    def _admit(self, waiting: Waiting, now: float) -> None:
        request, sequence = waiting.request, waiting.sequence
        if sequence is None:
            sequence = Sequence(
                request.key,
                request,
                waiting.tier,
                waiting.order,
                waiting.arrived_at,
                now,
                waiting.reserved_output,
                len(request.prompt),
            )
        self.ledger.reserve(request.key, waiting.footprint_bytes)
        self.running[request.key] = sequence
        self._start.append(replace(request, prompt=[*request.prompt, *sequence.generated]))
        self._outlook = None

    def _admit_waiting(self, now: float) -> None:
        while (waiting := self._next_waiting()) is not None and self._obstacle(waiting) is None:
            self._dequeue(waiting.request.key)
            self._admit(waiting, now)

    def _next_waiting(self) -> Waiting | None:
        """The first of the best tier; within it, of the tenant that has used the fewest step seconds."""
        for rank in sorted(self._queues):
            heads = [tenant for tenant, queue in self._queues[rank].items() if queue]
            if heads:
                tenant = min(heads, key=self.account.used_seconds)
                return self.waiting[self._queues[rank][tenant][0]]
        return None

    def _refuse_late(self, now: float) -> list[TokenEvent]:
        """Those who have waited longer than their tier allows. Within a tenant's queue the first has waited longest."""

        def is_late(waiting: Waiting) -> bool:
            return now - waiting.arrived_at > waiting.tier.max_wait_seconds

        refused = []
        for queues in self._queues.values():
            for queue in list(queues.values()):
                for waiting in list(takewhile(is_late, map(self.waiting.__getitem__, queue))):
                    if waiting.sequence is not None:
                        continue  # it has started once, and is owed its answer
                    retry = max(1.0, self._predicted_wait(waiting))
                    self._end_waiting(self._dequeue(waiting.request.key), Finish.REFUSED, now)
                    reason = Reason.TTFT_UNREACHABLE
                    refused.append(TokenEvent(waiting.request.key, (), Finish.REFUSED, reason, retry))
        return refused

    def _enqueue(self, waiting: Waiting, first: bool = False) -> None:
        request, rank = waiting.request, waiting.tier.rank
        self.waiting[request.key] = waiting
        queue = self._queues.setdefault(rank, {}).setdefault(request.tenant, deque())
        if first:
            queue.appendleft(request.key)
        else:
            queue.append(request.key)
            self.account.enter(request.tenant)
        self._queued.setdefault(rank, Queued()).add(waiting, 1)

    def _dequeue(self, key: int) -> Waiting:
        waiting = self.waiting.pop(key)
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

    # --- predictions --------------------------------------------------------------------------------------------------

    def _predicted_wait(self, candidate: Waiting) -> float:
        """Seconds until a request that came now would start: its place in the line, memory and seconds that come free.

        Its own prompt is left out: counting it would refuse the long ones.
        """
        ahead = Queued()
        for rank, queued in self._queued.items():
            if rank <= candidate.tier.rank:
                ahead.count += queued.count
                ahead.kv_bytes += queued.kv_bytes
        missing_bytes = ahead.kv_bytes + candidate.footprint_bytes - self.ledger.free_bytes
        missing_places = ahead.count + 1 - self._free_places(candidate)
        drain = self._outlook_now().drain.wait_seconds(missing_bytes, missing_places)
        return drain + self._prefill_seconds(candidate.tier.rank)

    def _free_places(self, candidate: Waiting) -> int:
        places = self.limits.sequences - len(self.running)
        if not candidate.tier.floor_utps:
            return places
        outlook = self._outlook_now()
        kind = candidate.tier.name, candidate.footprint_bytes
        free = outlook.room.get(kind)
        if free is None:
            load = replace(outlook.load, gap_seconds=min(outlook.load.gap_seconds, candidate.tier.gap_seconds))
            free = admission.room(self.cost, load, candidate.footprint_bytes)
            outlook.room[kind] = free
        return min(places, free if outlook.load.sequences else max(1, free))

    def _outlook_now(self) -> Outlook:
        """What follows from the running sequences as they are; a burst of arrivals computes it once."""
        if self._outlook is None:
            self._outlook = Outlook(self.running, self.ledger, self.cost, self.history)
        return self._outlook

    def _prefill_seconds(self, rank: int) -> float:
        """Time to compute the prompts that are ahead of a request of this rank."""
        outlook = self._outlook_now()
        tokens = sum(count for other, count in outlook.prefill_tokens.items() if other <= rank)
        tokens += sum(queued.tokens for other, queued in self._queued.items() if other <= rank)
        if not tokens:
            return 0.0
        chunk = max(MIN_CHUNK, math.ceil(RIDGE_SHARE * self.cost.ridge))
        step = self.cost.seconds(outlook.decode_work.plus_chunk(self.shape, 0, chunk, False))
        return tokens / chunk * step

    # --- results ------------------------------------------------------------------------------------------------------

    def _deliver(self, sequence: Sequence, tokens: list[int], now: float, slow: bool) -> TokenEvent:
        """Hands over what the step drew, cut at a stop id and at the limit."""
        request = sequence.request
        sequence.first_at = sequence.first_at or now
        sequence.last_at = now
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
        return TokenEvent(sequence.key, taken, finish)

    def _end(self, sequence: Sequence, finish: Finish, slow: bool = False) -> None:
        self._remove(sequence)
        self.account.leave(sequence.request.tenant)
        output, first, last = len(sequence.generated), sequence.first_at, sequence.last_at
        utps = (output - 1) / (last - first) if output > 1 and last > first else None
        floor = sequence.tier.floor_utps
        violation = None
        if utps is not None and utps < floor:
            violation = "footprint" if sequence.restarts else "machine" if slow else "schedule"
        self._ended.append(
            Ended(
                tier=sequence.tier.name,
                finish=finish,
                prompt_tokens=sequence.prompt_tokens,
                output_tokens=output,
                queue_seconds=sequence.started_at - sequence.arrived_at,
                ttft_seconds=first - sequence.arrived_at if output else None,
                utps=utps,
                floor_utps=floor,
                violation=violation,
            )
        )

    def _end_waiting(self, waiting: Waiting, finish: Finish, now: float) -> None:
        self.account.leave(waiting.request.tenant)
        self._ended.append(
            Ended(
                tier=waiting.tier.name,
                finish=finish,
                prompt_tokens=len(waiting.request.prompt),
                output_tokens=len(waiting.sequence.generated) if waiting.sequence else 0,
                queue_seconds=now - waiting.arrived_at,
                ttft_seconds=None,
                utps=None,
                floor_utps=waiting.tier.floor_utps,
            )
        )

    def _report(self, flight: Flight, seconds: float, host_seconds: float, delivered: int) -> StepReport:
        decodes = sum(entry.kind is Kind.DECODE for entry in flight.entries)
        return StepReport(
            step=self._step,
            sequences=flight.work.sequences,
            prefill_tokens=flight.work.query_tokens - decodes,
            decode_tokens=decodes,
            delivered_tokens=delivered,
            bytes_moved=step_bytes(self.shape, flight.work),
            flops=step_flops(self.shape, flight.work),
            seconds=self._seconds_by_cause(flight.work, seconds, host_seconds),
            predicted_seconds=flight.predicted_seconds,
            measured_seconds=seconds + host_seconds,
            limit_seconds=limit_seconds(self.cost.device, self.shape, flight.work),
            budget_seconds=flight.budget_seconds,
        )

    def _seconds_by_cause(self, work: StepWork, seconds: float, host_seconds: float) -> dict[str, float]:
        """The model's split of the engine's seconds, cut to what was measured; the loop's own time is host time."""
        cost = self.cost.cost(work)
        scale = min(1.0, seconds / cost.seconds)
        split = dict.fromkeys(CAUSES, 0.0)
        split["weights"] = cost.weights * scale
        split["kv"] = cost.kv * scale
        split["compute"] = cost.compute * scale
        split["phases"] = cost.phases * scale
        split["host"] = cost.host * scale + host_seconds
        split["unexplained"] = seconds - cost.seconds * scale
        return split

    def _next_order(self) -> int:
        self._orders += 1
        return self._orders


# --- pieces of a step -------------------------------------------------------------------------------------------------

NO_WORK = StepWork(0, 0, 0.0, 0.0, 0.0)


def _most_tokens(shape: ModelShape, capacity_bytes: float, limits: Limits) -> int:
    """The longest sequence, prompt and output, that can ever run: by context and by memory, in whole blocks."""
    block = limits.block_tokens
    blocks = _largest(
        lambda count: shape.kv_bytes(count * block) <= capacity_bytes, 0, limits.context_tokens // block + 1
    )
    return min(limits.context_tokens, blocks * block)


def _add_decodes(shape: ModelShape, work: StepWork, sequences: list[Sequence]) -> StepWork:
    """This work and one decoded token for each of the sequences."""
    more = decode_work(shape, len(sequences), shape.kv_bytes_of_all([s.computed + 1 for s in sequences]))
    return StepWork(
        work.sequences + more.sequences,
        work.query_tokens + more.query_tokens,
        work.kv_read_bytes + more.kv_read_bytes,
        work.kv_write_bytes + more.kv_write_bytes,
        work.attention_flops + more.attention_flops,
    )


def _deal(prefilling: list[Sequence], tokens: int) -> list[Entry]:
    """`tokens` prompt tokens dealt to the sequences in their order, each as much as it still needs."""
    entries = []
    for sequence in prefilling:
        if tokens <= 0:
            break
        piece = min(tokens, sequence.uncached_prefill)
        delivers = piece == sequence.uncached_prefill
        entries.append(Entry(sequence.key, Kind.PREFILL, sequence.computed, piece, delivers))
        tokens -= piece
    return entries


def _needed_rate(prefilling: list[Sequence], now: float) -> float:
    """Prompt tokens per second at which everybody in the line gets a first token within a share of the TTFT target."""
    rate, queued = 0.0, 0
    for sequence in prefilling:
        queued += sequence.uncached_prefill
        left = TTFT_SHARE * sequence.tier.ttft_target_seconds - (now - sequence.arrived_at)
        rate = max(rate, queued / max(left, LEAST_TTFT_SECONDS))
    return rate


def _largest(fits: Callable[[int], bool], low: int, high: int) -> int:
    """The largest number in low..high that fits, given that smaller ones fit too; `low` where none does."""
    if high <= low or fits(high):
        return max(low, high)
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low
