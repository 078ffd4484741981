"""What must hold for the gate whatever arrives: tried with random requests, machines, sizes and cancellations."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial

from gate_world import LLAMA, SMALL, WINDOWED, World, make_request, solo_utps
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.gate import Limits
from scheduler.hardware import CATALOGUE
from scheduler.messages import Finish, Request
from scheduler.model import ModelShape
from scheduler.prefix import Sharing
from scheduler.tiers import Tier, default_tiers

TIERS = ("priority", "default", "flex", "batch")
MACHINES = (
    ("h100", LLAMA),
    ("rtx-4090", LLAMA),
    ("h100", SMALL),
    ("laptop-cpu", SMALL),
    ("l4", LLAMA),
    ("l4", WINDOWED),
    ("laptop-cpu", WINDOWED),
)


@dataclass(frozen=True)
class Visit:
    """One request: who asks for what, after how many steps, and when he leaves early (in steps after arriving)."""

    after_steps: int
    in_flight: bool
    prompt: int
    max_tokens: int
    tier: str
    tenant: str
    stop_ids: frozenset[int]
    leaves_after: int | None
    comes_back: bool
    shared: int = 0

    def request(self, number: int) -> Request:
        return make_request(number, self.prompt, self.max_tokens, self.tier, self.tenant, self.stop_ids, self.shared)


@dataclass(frozen=True)
class Setting:
    machine: tuple[str, ModelShape]
    capacity_tokens: int
    limits: Limits
    margin: float
    strictness: float  # 1 is the usual floors; 2 twice as fast
    sharing: Sharing

    def world(self) -> World:
        name, shape = self.machine
        device = CATALOGUE[name]
        tiers = default_tiers(solo_utps(device, shape) * self.strictness)
        return World(device, shape, self.capacity_tokens, self.limits, tiers, self.margin, sharing=self.sharing)


visits = st.builds(
    Visit,
    after_steps=st.sampled_from([0, 0, 0, 1, 2, 5, 30]),
    in_flight=st.booleans(),
    prompt=st.integers(1, 300) | st.integers(1, 1100),
    max_tokens=st.integers(1, 80) | st.integers(1, 600),
    tier=st.sampled_from(TIERS),
    tenant=st.sampled_from(["a", "b", "c"]),
    stop_ids=st.sampled_from([frozenset(), frozenset(), frozenset({7}), frozenset(range(10))]),
    leaves_after=st.none() | st.integers(0, 60),
    comes_back=st.booleans(),
    shared=st.sampled_from([0, 5, 40, 160, 600]),
)
sittings = st.builds(
    Setting,
    machine=st.sampled_from(MACHINES),
    capacity_tokens=st.integers(16, 400) | st.integers(400, 12_000),
    limits=st.builds(
        Limits,
        context_tokens=st.sampled_from([200, 1000, 2048]),
        block_tokens=st.sampled_from([1, 16]),
        sequences=st.integers(1, 48),
        waiting=st.sampled_from([3, 1000, 1000]),
    ),
    margin=st.sampled_from([0.02, 0.05, 0.3, 1.0]),
    strictness=st.sampled_from([1.0, 1.7, 4.0]),
    sharing=st.sampled_from([Sharing.NOBODY, Sharing.TENANT, Sharing.EVERYBODY]),
)


def play(world: World, script: list[Visit], snapshots: bool = False) -> World:
    """Lets the visits happen, some of them between the steps and some while one is in flight."""
    leaving: dict[int, int] = {}  # step -> key

    def leave() -> None:
        for key in [key for key, step in leaving.items() if step <= world.steps]:
            del leaving[key]
            story = world.stories[key]
            visit = script[story.request.id % 100_000]
            if world.cancel(key) and visit.comes_back and visit.leaves_after:
                back = visit.request(story.request.id + 100_000)
                world.arrive(back)

    def come(number: int) -> None:
        world.arrive(script[number].request(number))
        leaves_after = script[number].leaves_after
        if leaves_after is not None:
            leaving[script[number].request(number).key] = world.steps + leaves_after
        leave()
        if snapshots:
            world.gate.snapshot(0.0)

    at = 0
    for number, visit in enumerate(script):
        at += visit.after_steps
        while world.steps < at and world.gate.has_work:
            world.step(during=leave)
        if visit.in_flight and world.gate.has_work:
            world.step(during=partial(come, number))
        else:
            come(number)
    for _ in range(100):
        if leaving and world.gate.has_work:
            world.step(during=leave)
    world.run()
    return world


@settings(max_examples=50)
@given(sittings, st.lists(visits, min_size=1, max_size=15) | st.lists(visits, min_size=25, max_size=60))
def test_every_request_ends_once_with_its_tokens_and_nothing_is_left(setting: Setting, script: list[Visit]) -> None:
    play(setting.world(), script).check_nothing_is_left()


@settings(max_examples=30)
@given(sittings, st.lists(visits, min_size=20, max_size=60))
def test_floors_are_kept_wherever_they_can_be(setting: Setting, script: list[Visit]) -> None:
    world = play(setting.world(), script)
    if not world.gate.preemptions:
        assert not world.late


@settings(max_examples=20)
@given(sittings, st.lists(visits, min_size=10, max_size=40))
def test_the_same_calls_give_the_same_answers_and_looking_changes_nothing(
    setting: Setting, script: list[Visit]
) -> None:
    once = play(setting.world(), script)
    again = play(setting.world(), script, snapshots=True)
    assert once.trace == again.trace


@settings(max_examples=12)
@given(st.lists(visits, min_size=8, max_size=30), st.integers(600, 3000))
def test_answers_that_outgrow_their_history_are_preempted_and_go_on_with_the_same_tokens(
    script: list[Visit], capacity_tokens: int
) -> None:
    """A history of short answers makes reservations small; the answers that follow are long."""
    world = World(CATALOGUE["h100"], SMALL, capacity_tokens, Limits(2048, sequences=24), sharing=Sharing.TENANT)
    for number in range(40):
        world.gate.history.record(make_request(number), 4)
    long = [replace(visit, max_tokens=500, stop_ids=frozenset(), prompt=visit.prompt % 60 + 1) for visit in script]
    play(world, long).check_nothing_is_left()
    assert all(ended.violation in (None, "footprint") for ended in world.ended)


@settings(max_examples=25)
@given(st.lists(visits, min_size=10, max_size=60), st.integers(2, 64))
def test_promised_requests_end_at_their_floor_or_above(script: list[Visit], sequences: int) -> None:
    """Here every floor can be kept, so no excuse counts: on this machine a least chunk costs next to nothing."""
    device = CATALOGUE["h100"]
    world = World(device, LLAMA, 100_000, Limits(2048, sequences=sequences), default_tiers(solo_utps(device, LLAMA)))
    play(world, [replace(visit, max_tokens=visit.max_tokens % 64 + 1) for visit in script])
    assert not world.late and not world.gate.preemptions
    for ended in world.ended:
        assert ended.violation is None
        assert ended.utps is None or ended.utps >= ended.floor_utps


@settings(max_examples=8)
@given(st.lists(visits, min_size=20, max_size=40), st.floats(0.5, 2.0))
def test_a_machine_slower_or_faster_than_predicted_loses_no_request(script: list[Visit], slowness: float) -> None:
    world = World(CATALOGUE["l4"], SMALL, 4000, Limits(2048), slowness=lambda step: slowness if step > 20 else 1.0)
    play(world, script).check_nothing_is_left()


@settings(max_examples=15)
@given(st.lists(visits, min_size=5, max_size=30), st.integers(0, 40))
def test_an_engine_that_fails_ends_all_that_run_and_none_that_wait(script: list[Visit], steps: int) -> None:
    world = World(CATALOGUE["h100"], SMALL, 1500, Limits(2048, sequences=4), sharing=Sharing.EVERYBODY)
    for number, visit in enumerate(script):
        world.arrive(visit.request(number))
    for _ in range(steps):
        if world.gate.has_work:
            world.step()
    running, waiting = set(world.gate.running), set(world.gate.waiting)
    if running:
        world.engine.change_hands(world.gate.plan(world.now)) if not waiting else None
    events = world.gate.fail_running()
    failed = {event.key for event in events}
    world.take(events)
    assert all(event.finish is Finish.ERROR for event in events)
    assert running <= failed and not world.gate.running and waiting - failed <= set(world.gate.waiting)
    world.run()
    world.check_nothing_is_left()


def test_floors_bind_in_these_worlds() -> None:
    """The properties above would hold in an empty world too; this one is full enough that steps touch their budget."""
    device = CATALOGUE["h100"]
    tiers = (Tier("default", 1, 0.7 * solo_utps(device, LLAMA), 10.0, math.inf),)
    world = World(device, LLAMA, 100_000, Limits(4096), tiers)
    for number in range(200):
        world.arrive(make_request(number, 600, 50))
    world.run()
    world.check_nothing_is_left()
    assert not world.late
    slowest = min(ended.utps for ended in world.ended if ended.utps)
    assert tiers[0].floor_utps <= slowest <= 1.2 * tiers[0].floor_utps
