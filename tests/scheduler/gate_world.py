"""A gate, an engine that only keeps books, and a clock that moves by what each step should take."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from scheduler.admission import MIN_CHUNK
from scheduler.batch import Kind, StepPlan
from scheduler.calibration import CostModel
from scheduler.gate import Gate, Limits, StepOutcome
from scheduler.hardware import CATALOGUE, Device
from scheduler.messages import Accept, Decision, Finish, Refuse, Request, TokenEvent, Wait
from scheduler.model import SHAPES, LayerGroup, ModelShape
from scheduler.prefix import Sharing
from scheduler.roofline import StepWork, step_cost, step_work
from scheduler.sequence import Ended
from scheduler.tiers import Tier, default_tiers

SMALL = SHAPES["smollm2-135m"]
LLAMA = SHAPES["llama-3.1-8b"]
WINDOWED = ModelShape(
    "windowed", 12, 512, 8, 4, 64, 2048, 32000, 4096, groups=(LayerGroup(10, window=128), LayerGroup(2))
)
VOCABULARY = 50


def next_token(request_id: int, position: int) -> int:
    """What the engine draws: it depends on the request and the position alone, so a restart draws the same again."""
    return (request_id * 1_000_003 + position * 7919) % VOCABULARY


def expected_output(request: Request, most_tokens: int) -> tuple[list[int], Finish]:
    output: list[int] = []
    longest = min(request.max_tokens, most_tokens - len(request.prompt))
    while True:
        output.append(next_token(request.id, len(request.prompt) + len(output)))
        if output[-1] in request.stop_ids:
            return output, Finish.STOP
        if len(output) == longest:
            return output, Finish.LENGTH


def make_request(
    number: int,
    prompt: int = 32,
    max_tokens: int = 16,
    tier: str = "default",
    tenant: str = "",
    stop_ids: frozenset[int] = frozenset(),
    shared: int = 0,
) -> Request:
    """The first `shared` tokens of its prompt are as those of others."""
    shared = min(shared, prompt)
    tokens = [*range(shared), *[number % VOCABULARY] * (prompt - shared)]
    return Request(number, 1, tokens, max_tokens, tier, tenant, stop_ids=stop_ids)


def solo_utps(device: Device, shape: ModelShape) -> float:
    return 1 / step_cost(device, shape, StepWork(1, 1, 0.0, 0.0, 0.0)).seconds


@dataclass(slots=True)
class Held:
    """A sequence in the engine: its known tokens, how many of them are in the KV cache, and in which blocks."""

    request_id: int
    tenant: str
    tokens: list[int]
    computed: int = 0
    blocks: list[Block] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Block:
    """What its slots were computed from: all tokens of the sequence up to its end, and whose they were."""

    tenant: str
    tokens: list[int]


class EngineModel:
    """Holds a plan to the contract between gate and engine."""

    def __init__(self, limits: Limits, sharing: Sharing) -> None:
        self.limits = limits
        self.sharing = sharing
        self.sequences: dict[int, Held] = {}
        self.kept: dict[int, Block] = {}

    def change_hands(self, plan: StepPlan) -> None:
        size = self.limits.block_tokens
        for key, place, number in plan.kept:
            block = self.sequences[key].blocks[place]
            assert number not in self.kept and len(block.tokens) == (place + 1) * size, "kept twice, or not full"
            self.kept[number] = block
        for key in plan.stop:
            assert self.sequences.pop(key, None) is not None, "stopped without having been started"
        for number in plan.evicted:
            del self.kept[number]
        for request in plan.start:
            assert request.key not in self.sequences, "started twice"
            self.sequences[request.key] = Held(request.id, request.tenant, list(request.prompt))
        for key, numbers in plan.shared:
            held = self.sequences[key]
            assert held.computed == size * len(held.blocks)
            held.blocks += (blocks := [self.kept[number] for number in numbers])
            held.computed = size * len(held.blocks)
            assert held.computed < len(held.tokens), "nothing is left to draw from"
            assert blocks[-1].tokens == held.tokens[: held.computed], "other tokens than these"
            assert self.sharing is Sharing.EVERYBODY or all(block.tenant == held.tenant for block in blocks)

    @property
    def blocks(self) -> set[Block]:
        """All that hold something."""
        return {block for held in self.sequences.values() for block in held.blocks} | set(self.kept.values())

    def compute(self, plan: StepPlan) -> dict[int, list[int]]:
        assert len({entry.key for entry in plan.entries}) == len(plan.entries), "a sequence has two entries"
        drawn: dict[int, list[int]] = {}
        for key, kind, position, query_tokens, delivers, _ in plan.entries:
            held = self.sequences[key]
            assert query_tokens > 0 and position == held.computed, "a gap or an overlap in the positions"
            assert kind is Kind.PREFILL or query_tokens == 1
            held.computed += query_tokens
            self._write(held, position)
            assert held.computed <= len(held.tokens), "computes tokens that nobody knows"
            assert delivers == (held.computed == len(held.tokens))
            assert len(held.tokens) <= self.limits.context_tokens
            if delivers:
                drawn[key] = [next_token(held.request_id, len(held.tokens))]
                held.tokens += drawn[key]
        return drawn

    def _write(self, held: Held, position: int) -> None:
        size = self.limits.block_tokens
        for place in range(position // size, -(-held.computed // size)):
            if place == len(held.blocks):
                held.blocks.append(Block(held.tenant, []))
            block = held.blocks[place]
            assert len(block.tokens) < (place + 1) * size, "writes into a full block, which others may use"
            block.tokens = held.tokens[: min(held.computed, (place + 1) * size)]


@dataclass(slots=True)
class Story:
    """All that happened to one request."""

    request: Request
    decision: Decision
    output: list[int] = field(default_factory=list)
    ends: list[Finish] = field(default_factory=list)


class World:
    """Drives a gate as a worker would, and checks after every call what must always hold."""

    def __init__(
        self,
        device: Device = CATALOGUE["h100"],
        shape: ModelShape = LLAMA,
        capacity_tokens: int = 100_000,
        limits: Limits | None = None,
        tiers: tuple[Tier, ...] | None = None,
        margin: float = 0.05,
        slowness: Callable[[int], float] = lambda step: 1.0,
        sharing: Sharing = Sharing.NOBODY,
    ) -> None:
        self.device, self.shape = device, shape
        self.limits = limits or Limits(context_tokens=8192)
        self.cost = CostModel(device, shape, margin)
        capacity = self.limits.block_tokens * (capacity_tokens // self.limits.block_tokens) * shape.kv_bytes(1)
        tiers = tiers or default_tiers(solo_utps(device, shape))
        self.gate = Gate(self.cost, capacity, tiers, self.limits, sharing)
        self.engine = EngineModel(self.limits, sharing)
        self.slowness = slowness
        self.now = 0.0
        self.steps = 0
        self.stories: dict[int, Story] = {}
        self.ended: list[Ended] = []
        self.late: list[float] = []  # by how many seconds steps with floors took too long, where nothing excuses it
        self.trace: list[object] = []

    # --- what a worker does -------------------------------------------------------------------------------------------

    def arrive(self, request: Request) -> Decision:
        decision = self.gate.arrive(request, self.now)
        self.trace.append(decision)
        self.stories[request.key] = Story(request, decision)
        if isinstance(decision, Refuse):
            assert decision.retry_after_seconds >= 0
            self.stories[request.key].ends.append(Finish.REFUSED)
        self.check_books()
        return decision

    def cancel(self, key: int) -> bool:
        was_here = self.gate.cancel(key, self.now)
        assert was_here == (key in self.stories and not self.stories[key].ends)
        if was_here:
            self.stories[key].ends.append(Finish.CANCELLED)
        self.check_books()
        return was_here

    def step(self, during: Callable[[], None] | None = None) -> StepOutcome | None:
        """One step; `during` happens while it is in flight."""
        plan = self.gate.plan(self.now)
        self.trace.append(plan)
        self.check_books()
        self.take(list(plan.refused))
        self.engine.change_hands(plan)
        self.check_prefill(plan)
        drawn = self.engine.compute(plan)
        self.check_memory()
        if during is not None:
            during()
        if not plan.entries:
            self.ended += self.gate.take_ended()
            return None
        seconds = self.seconds(plan)
        self.check_floors(plan, seconds)
        self.steps += 1
        seconds *= self.slowness(self.steps)
        self.now += seconds
        outcome = self.gate.observe(drawn, seconds, 0.0, self.now)
        self.trace.append(outcome)
        self.take(outcome.events)
        self.ended += outcome.ended
        self.check_books()
        return outcome

    def run(self, most_steps: int = 20_000) -> None:
        """Until nobody is left."""
        for _ in range(most_steps):
            if not self.gate.has_work:
                self.ended += self.gate.take_ended()  # of those who left before any step
                return
            self.step()
        raise AssertionError(f"still busy after {most_steps} steps")

    def take(self, events: list[TokenEvent]) -> None:
        for event in events:
            story = self.stories[event.key]
            assert not story.ends, "an event after the end"
            story.output += event.tokens
            if event.finish:
                story.ends.append(event.finish)

    def seconds(self, plan: StepPlan) -> float:
        return step_cost(self.device, self.shape, step_work(self.shape, plan.entries)).seconds

    # --- what must always hold ----------------------------------------------------------------------------------------

    def check_books(self) -> None:
        gate, ledger = self.gate, self.gate.ledger
        held = math.fsum(ledger.held_bytes(key) for key in gate.running)
        pinned = ledger.pinned_bytes
        assert math.isclose(held + pinned, ledger.reserved_bytes, rel_tol=1e-9, abs_tol=1e-3)
        assert pinned >= 0 and ledger.reserved_bytes <= ledger.capacity_bytes
        assert ledger.used_bytes - gate.prefixes.idle_bytes <= ledger.reserved_bytes * (1 + 1e-9)
        assert len(gate.running) <= self.limits.sequences
        assert len(gate.waiting) <= self.limits.waiting or gate.preemptions
        assert gate.running.keys().isdisjoint(gate.waiting)

    def check_memory(self) -> None:
        """What the engine holds, in whole blocks, is covered sequence by sequence, and all of it is what the ledger says."""
        size, ledger = self.limits.block_tokens, self.gate.ledger
        for key, held in self.engine.sequences.items():
            assert self.shape.kv_bytes(len(held.blocks) * size) <= self.gate.running[key].footprint_bytes * (1 + 1e-9)
        places = [-(-len(block.tokens) // size) * size for block in self.engine.blocks]
        used = math.fsum(self.shape.kv_bytes(stop) - self.shape.kv_bytes(stop - size) for stop in places)
        assert math.isclose(used, ledger.used_bytes, rel_tol=1e-9, abs_tol=1e-3)
        assert ledger.used_bytes <= ledger.capacity_bytes

    def check_prefill(self, plan: StepPlan) -> None:
        """Every step moves the prompts on, whatever else it carries."""
        left, lefts = 0, [0]
        for key, held in self.engine.sequences.items():
            is_decoding = held.computed == len(held.tokens) - 1 >= len(self.stories[key].request.prompt)
            lefts.append(0 if is_decoding else len(held.tokens) - held.computed)
        if self.engine.sharing is Sharing.NOBODY:
            left = sum(lefts)
        elif any(lefts):  # who waits for a block of another does not count
            left = min(filter(None, lefts))
        moved = sum(entry.query_tokens for entry in plan.entries if entry.kind is Kind.PREFILL)
        assert moved >= min(MIN_CHUNK, left)

    def check_floors(self, plan: StepPlan, seconds: float) -> None:
        """No step outlasts the strictest floor in it, but for a sequence alone and the least chunk of prefill."""
        decodes = [entry for entry in plan.entries if entry.kind is Kind.DECODE]
        gaps = [s.tier.gap_seconds for e in decodes if (s := self.gate.running.get(e.key)) and s.tier.floor_utps]
        prefilled = sum(entry.query_tokens for entry in plan.entries if entry.kind is Kind.PREFILL)
        if not gaps or seconds <= min(gaps):
            return
        is_alone = len(gaps) == 1
        is_least_chunk = 0 < prefilled <= MIN_CHUNK
        if not (is_alone or is_least_chunk):
            self.late.append(seconds - min(gaps))

    def check_nothing_is_left(self) -> None:
        """After the last request: every story has one end, and the gate has forgotten all of them."""
        gate = self.gate
        for story in self.stories.values():
            assert len(story.ends) == 1, story
            output, finish = expected_output(story.request, gate.most_tokens) if story.output else ([], None)
            if story.ends[0] in (Finish.STOP, Finish.LENGTH):
                assert (story.output, story.ends[0]) == (output, finish)
            else:
                assert story.output == output[: len(story.output)]
        taken_in = sum(isinstance(story.decision, Accept | Wait) for story in self.stories.values())
        assert len(self.ended) == taken_in
        finishes = Counter(story.ends[0] for story in self.stories.values() if not isinstance(story.decision, Refuse))
        assert Counter(ended.finish for ended in self.ended) == finishes
        assert not gate.has_work and not gate.running and not gate.waiting
        assert gate.ledger.used_bytes == gate.prefixes.idle_bytes, "what is left is cached"
        while gate._evict():
            pass
        assert gate.ledger.used_bytes == gate.prefixes.idle_bytes == gate.ledger.pinned_bytes == 0
        assert not len(gate.prefixes) and set(gate._evicted) == set(self.engine.kept)
        assert gate.ledger.reserved_bytes == 0 and not self.engine.sequences
        assert not any(queues for queues in gate.waiting._queues.values())
        assert all(
            (queued.count, queued.kv_bytes, queued.tokens) == (0, 0.0, 0) for queued in gate.waiting._queued.values()
        )
        assert not gate.account._active and not gate.account._seconds
        assert not gate._start and not gate._stop and not gate._ended and gate._flight is None
