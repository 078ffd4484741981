"""What the gate does, scene by scene."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import count

import pytest
from gate_world import LLAMA, SMALL, World, expected_output, make_request, next_token, solo_utps

from scheduler.admission import MIN_CHUNK
from scheduler.batch import Kind, StepPlan
from scheduler.gate import Limits
from scheduler.hardware import CATALOGUE
from scheduler.messages import Accept, Decision, Finish, Reason, Refuse, StepReport, TokenEvent, Wait
from scheduler.roofline import CAUSES, step_work
from scheduler.tiers import Tier

H100 = CATALOGUE["h100"]
ROOMY = (Tier("default", 1, 5.0, 10.0, 60.0), Tier("flex", 2, 0.0, 60.0, math.inf))


def small_world(capacity_tokens: int = 4000, **values: object) -> World:
    return World(H100, SMALL, capacity_tokens, **values)


# --- arriving ---------------------------------------------------------------------------------------------------------


def test_a_request_that_can_never_run_is_refused_as_too_large() -> None:
    world = small_world(320)
    assert world.gate.most_tokens == 320
    assert world.arrive(make_request(1, prompt=320)) == Refuse(Reason.TOO_LARGE, 0.0)
    assert world.arrive(make_request(2, prompt=0)) == Refuse(Reason.TOO_LARGE, 0.0)
    assert world.arrive(make_request(3, max_tokens=0)) == Refuse(Reason.TOO_LARGE, 0.0)
    assert isinstance(world.arrive(make_request(4, prompt=319, max_tokens=1000)), Accept)
    world.run()
    assert len(world.stories[make_request(4).key].output) == 1


def test_a_context_that_is_no_multiple_of_a_block_can_be_used_to_its_end() -> None:
    world = small_world(4000, limits=Limits(context_tokens=100))
    world.arrive(make_request(1, prompt=90, max_tokens=1000))
    world.run()
    assert len(world.stories[make_request(1).key].output) == 10
    world.check_nothing_is_left()


def test_an_unknown_tier_is_refused_by_name() -> None:
    assert small_world().arrive(make_request(1, tier="gold")) == Refuse(Reason.UNKNOWN_TIER, 0.0)


def test_the_same_key_twice_is_an_error_of_the_caller() -> None:
    world = small_world()
    world.arrive(make_request(1))
    with pytest.raises(ValueError, match="request 1 of gateway 1"):
        world.gate.arrive(make_request(1), 0.0)


@pytest.mark.parametrize("margin", [0.02, 0.05, 1.0])
@pytest.mark.parametrize("tier", ["priority", "default", "flex", "batch"])
@pytest.mark.parametrize(("device", "shape"), [("h100", LLAMA), ("laptop-cpu", SMALL), ("l4", LLAMA)])
def test_a_single_user_is_never_refused_and_never_waits(device: str, shape: object, tier: str, margin: float) -> None:
    world = World(CATALOGUE[device], shape, 3000, Limits(2048), margin=margin)
    for number in range(5):
        decision = world.arrive(make_request(number, prompt=200 * number + 1, max_tokens=40, tier=tier))
        assert isinstance(decision, Accept)
        world.run()
    world.check_nothing_is_left()


def test_a_floor_that_cannot_be_kept_even_alone_does_not_keep_a_single_user_out() -> None:
    tiers = (Tier("default", 1, 1e6, 10.0, 60.0),)
    world = small_world(tiers=tiers)
    assert isinstance(world.arrive(make_request(1)), Accept)
    assert isinstance(world.arrive(make_request(2)), Wait)
    world.run()
    world.check_nothing_is_left()
    assert [ended.violation for ended in world.ended] == ["schedule", "schedule"]


def test_sixty_four_short_requests_at_once_all_succeed_on_a_small_model() -> None:
    world = World(CATALOGUE["laptop-cpu"], SMALL, 20_000, Limits(2048))
    for number in range(64):
        assert not isinstance(world.arrive(make_request(number, 32, 16)), Refuse)
    world.run()
    world.check_nothing_is_left()
    assert {ended.finish for ended in world.ended} == {Finish.LENGTH}
    assert not any(ended.violation for ended in world.ended)


def test_ten_thousand_at_once_stay_within_the_bounds_of_the_waiting_list() -> None:
    limits = Limits(8192, sequences=256, waiting=2000, waiting_tokens=100_000)
    world = World(limits=limits, tiers=(Tier("default", 1, 5.0, 10.0, math.inf),))
    decisions = [world.gate.arrive(make_request(n, 50 + n % 50, 100, tenant=f"t{n}"), 0.0) for n in range(10_000)]
    kinds = [type(decision) for decision in decisions]
    full = [decision for decision in decisions if isinstance(decision, Refuse)]
    waiting_tokens = sum(len(world.gate.waiting[key].request.prompt) for key in world.gate.waiting)
    assert kinds.count(Accept) == len(world.gate.running) <= 256
    assert kinds.count(Wait) == len(world.gate.waiting) <= 2000
    assert 99_900 <= waiting_tokens <= 100_000
    assert len(full) > 8000
    assert all(refusal.reason is Reason.QUEUE_FULL and 1 <= refusal.retry_after_seconds <= 60 for refusal in full)
    for number in range(10_000):
        world.gate.cancel(make_request(number).key, 0.0)
    assert not world.gate.running and not world.gate.waiting and not world.gate.account._seconds


# --- waiting and refusing ---------------------------------------------------------------------------------------------


def crowd(world: World, tier: str, size: int = 3000, max_tokens: int = 400) -> list[Decision]:
    return [world.arrive(make_request(number, 200, max_tokens, tier)) for number in range(size)]


def test_refusals_begin_where_the_predicted_wait_passes_the_bound_of_the_tier() -> None:
    world = World(capacity_tokens=60_000)
    decisions = crowd(world, "default")
    waits = [d.predicted_wait_seconds for d in decisions if isinstance(d, Wait)]
    refusals = [d for d in decisions if isinstance(d, Refuse)]
    assert isinstance(decisions[0], Accept) and waits and refusals
    assert waits == sorted(waits)
    assert waits[-1] <= 60.0 < refusals[0].predicted_wait_seconds
    assert refusals[0].reason in (Reason.KV_FOOTPRINT, Reason.TIME_BUDGET)
    assert all(r.retry_after_seconds == max(1.0, r.predicted_wait_seconds - 60.0) for r in refusals)


def test_the_predicted_wait_is_near_the_one_that_follows() -> None:
    """Once histories say how long answers are; memory-bound and time-bound alike."""
    for capacity_tokens, floor in ((20_000, 5.0), (400_000, 130.0)):
        world = World(capacity_tokens=capacity_tokens, tiers=(Tier("default", 1, floor, 10.0, math.inf),))
        predicted = {}
        for number in range(300):
            decision = world.arrive(make_request(number, 300, 200))
            if isinstance(decision, Wait):
                predicted[make_request(number).key] = decision.predicted_wait_seconds
        assert len(predicted) > 50
        started: dict[int, float] = {}
        while world.gate.has_work:
            world.step()
            for key in world.gate.running:
                started.setdefault(key, world.now)
        longest = max(predicted, key=predicted.__getitem__)
        assert predicted[longest] == pytest.approx(started[longest], rel=0.5)


def test_who_comes_back_at_the_stated_time_is_not_refused_again() -> None:
    world = World(capacity_tokens=60_000)
    refusal = next(d for d in crowd(world, "default") if isinstance(d, Refuse))
    while world.now < refusal.retry_after_seconds:
        world.step()
    assert not isinstance(world.arrive(make_request(9_999, 200, 400)), Refuse)


def test_a_wait_that_lasts_too_long_ends_in_a_late_refusal() -> None:
    world = World(
        capacity_tokens=1000,
        tiers=(Tier("default", 1, 5.0, 10.0, 60.0),),
        slowness=lambda step: 1.0 if step < 9 else 30,
    )
    first, second = make_request(1, 32, 700), make_request(2, 32, 700)
    world.arrive(first)
    assert isinstance(world.arrive(second), Wait)
    while not world.stories[second.key].ends:
        world.step()
    assert world.stories[second.key].ends == [Finish.REFUSED]
    refused = [plan.refused for plan in world.trace if getattr(plan, "refused", ())]
    assert refused[0][0].reason is Reason.TTFT_UNREACHABLE and refused[0][0].retry_after_seconds >= 1
    assert world.now > 60
    world.run()
    world.check_nothing_is_left()


def test_flex_waits_as_long_as_it_takes() -> None:
    world = World(capacity_tokens=2000)
    decisions = crowd(world, "flex", size=100)
    assert not any(isinstance(decision, Refuse) for decision in decisions)
    world.run()
    world.check_nothing_is_left()


def test_a_preempted_request_is_owed_its_answer_but_those_behind_it_are_not() -> None:
    world = small_world(480, tiers=(Tier("default", 1, 5.0, 10.0, 60.0),))
    for number in range(40):
        world.gate.history.record(make_request(number), 4)
    grows, gives_way, waits = make_request(50, 32, 400), make_request(51, 32, 400), make_request(52, 300, 100)
    for request in (grows, gives_way, waits):
        world.arrive(request)
    while not world.gate.preemptions:
        world.step()
    assert list(world.gate.waiting) == [waits.key, gives_way.key]
    world.now += 100
    world.step()
    assert world.stories[waits.key].ends == [Finish.REFUSED]
    assert not world.stories[gives_way.key].ends
    world.run()
    world.check_nothing_is_left()
    assert len(world.stories[gives_way.key].output) == 400


def test_priority_starts_before_default_and_default_before_flex() -> None:
    world = small_world(640, limits=Limits(2048, sequences=1))
    world.arrive(make_request(0, tier="flex"))
    tiers = ["batch", "flex", "default", "priority", "flex", "default", "priority"]
    for number, tier in enumerate(tiers, 1):
        assert isinstance(world.arrive(make_request(number, tier=tier)), Wait)
    started: list[str] = []
    while world.gate.has_work:
        world.step()
        for sequence in world.gate.running.values():
            if sequence.request.id not in started:
                started.append(sequence.request.id)
    assert started == [0, 4, 7, 3, 6, 2, 5, 1]


def test_a_glance_at_the_gate_changes_no_prediction() -> None:
    """A snapshot asks for a short request; the next long one is not measured by it."""
    predicted = []
    for is_looked_at in (False, True):
        world = World(capacity_tokens=400_000, tiers=(Tier("default", 1, 100.0, 10.0, math.inf),))
        number = 0
        while isinstance(world.arrive(make_request(number, 2000, 3000)), Accept):
            number += 1
        world.cancel(make_request(0).key)
        world.cancel(make_request(1).key)
        if is_looked_at:
            world.gate.snapshot(0.0)
        decision = world.arrive(make_request(number + 1, 2000, 6000))
        assert isinstance(decision, Wait)
        predicted.append(decision)
    assert predicted[0] == predicted[1]


def test_a_better_tier_does_not_queue_behind_a_lesser_one() -> None:
    world = World(capacity_tokens=10_000)
    crowd(world, "flex", size=500, max_tokens=4000)
    waiting_flex = len(world.gate.waiting)
    assert waiting_flex > 100
    of_flex = world.gate.snapshot(0.0)
    assert of_flex.predicted_wait_seconds < 60.0  # of a default request: the flex ones are not ahead of it


def test_one_step_frees_what_a_cancelled_request_held() -> None:
    world = small_world(480)
    first, second = make_request(1, 300, 100), make_request(2, 300, 100)
    world.arrive(first)
    assert isinstance(world.arrive(second), Wait)
    world.step(during=lambda: world.cancel(first.key))
    plan = world.gate.plan(world.now)
    assert plan.stop == (first.key,) and [request.key for request in plan.start] == [second.key]


def test_cancelling_before_the_engine_saw_a_request_tells_the_engine_nothing() -> None:
    world = small_world()
    world.arrive(make_request(1))
    assert world.cancel(make_request(1).key) and not world.cancel(make_request(1).key)
    assert not world.gate.has_work
    plan = world.gate.plan(0.0)
    assert not plan.start and not plan.stop and not plan.entries


def test_a_request_that_comes_back_under_its_key_while_its_step_runs_starts_anew() -> None:
    world = small_world()
    request = make_request(1, 32, 8)
    world.arrive(request)
    plan = world.gate.plan(0.0)
    world.engine.change_hands(plan)
    drawn = world.engine.compute(plan)
    assert world.gate.cancel(request.key, 0.0)
    assert isinstance(world.gate.arrive(request, 0.0), Accept)
    outcome = world.gate.observe(drawn, 0.01, 0.0, 0.01)
    assert outcome.events == []
    plan = world.gate.plan(0.01)
    assert plan.stop == (request.key,) and plan.start[0].key == request.key
    assert plan.entries[0].position == 0


def test_waiting_requests_that_leave_are_not_counted_any_more() -> None:
    world = World(capacity_tokens=2000)
    world.arrive(make_request(0, 200, 400, "flex"))
    alone = world.gate.snapshot(0.0).predicted_wait_seconds
    decisions = [world.arrive(make_request(number, 500, 400)) for number in range(1, 40)]
    assert any(isinstance(decision, Wait) for decision in decisions)
    assert world.gate.snapshot(0.0).predicted_wait_seconds > alone
    for number in range(1, 40):
        world.gate.cancel(make_request(number).key, 0.0)
    assert world.gate.snapshot(0.0).predicted_wait_seconds == alone


# --- steps ------------------------------------------------------------------------------------------------------------


def test_an_answer_ends_at_its_limit_to_the_token() -> None:
    world = small_world()
    for number, max_tokens in enumerate((1, 2, 15, 16, 17, 64)):
        world.arrive(make_request(number, 16, max_tokens))
    world.run()
    world.check_nothing_is_left()
    assert [len(story.output) for story in world.stories.values()] == [1, 2, 15, 16, 17, 64]


def test_an_answer_ends_with_its_stop_id() -> None:
    world = small_world()
    request = replace(make_request(3, 20, 200), stop_ids=frozenset({next_token(3, 20 + 4)}))
    world.arrive(request)
    world.run()
    story = world.stories[request.key]
    assert (story.output, story.ends[0]) == expected_output(request, world.gate.most_tokens)
    assert story.ends == [Finish.STOP] and len(story.output) == 5


def test_several_tokens_of_one_step_are_cut_at_a_stop_id_and_at_the_limit() -> None:
    world = small_world()
    stops, ends = make_request(1, 16, 100, stop_ids=frozenset({9})), make_request(2, 16, 3)
    world.arrive(stops)
    world.arrive(ends)
    world.gate.plan(0.0)
    outcome = world.gate.observe({stops.key: [5, 9, 9, 4], ends.key: [1, 2, 3, 4, 5]}, 0.01, 0.0, 0.01)
    assert outcome.events == [
        TokenEvent(stops.key, [5, 9], Finish.STOP),
        TokenEvent(ends.key, [1, 2, 3], Finish.LENGTH),
    ]


def test_a_stop_id_on_the_last_allowed_token_counts_as_a_stop() -> None:
    world = small_world()
    request = make_request(1, 16, 2, stop_ids=frozenset({9}))
    world.arrive(request)
    world.gate.plan(0.0)
    (event,) = world.gate.observe({request.key: [5, 9]}, 0.01, 0.0, 0.01).events
    assert event == TokenEvent(request.key, [5, 9], Finish.STOP)


def test_prefill_goes_on_when_decodes_alone_exceed_the_ridge() -> None:
    world = World(CATALOGUE["laptop-cpu"], SMALL, 50_000, Limits(2048))
    assert world.cost.ridge < 20
    for number in range(40):
        world.arrive(make_request(number, 4, 400, "flex"))
    for _ in range(60):
        world.step()
    assert len(world.gate.running) == 40
    late = make_request(99, 1000, 4, "flex")
    world.arrive(late)
    steps = 0
    while not world.stories[late.key].output:
        outcome = world.step()
        assert outcome.report.prefill_tokens >= MIN_CHUNK or world.stories[late.key].output
        assert outcome.report.decode_tokens == 40
        steps += 1
    assert steps <= math.ceil(1000 / MIN_CHUNK)


def test_prefill_goes_on_when_decodes_leave_no_time_for_it() -> None:
    """A priority user alone whose floor leaves nothing: the newcomer of a lesser tier still moves."""
    tiers = (Tier("priority", 0, 1e5, 2.0, 2.0), Tier("flex", 2, 0.0, 60.0, math.inf))
    world = small_world(tiers=tiers)
    world.arrive(make_request(1, 32, 300, "priority"))
    world.step()
    world.arrive(make_request(2, 200, 5, "flex"))
    plan = world.gate.plan(world.now)
    assert [(entry.kind, entry.query_tokens) for entry in plan.entries] == [(Kind.DECODE, 1), (Kind.PREFILL, MIN_CHUNK)]


def test_chunks_grow_with_the_need_but_never_beyond_the_floor() -> None:
    gap = 0.02
    patient = World(tiers=(Tier("default", 1, 1 / gap, 1000.0, 60.0),))
    pressed = World(tiers=(Tier("default", 1, 1 / gap, 0.5, 60.0),))
    largest = {}
    for world in (patient, pressed):
        world.arrive(make_request(0, 16, 500))
        world.step()
        world.step()
        for number in range(1, 20):
            assert isinstance(world.arrive(make_request(number, 1500, 4)), Accept)
        outcome = world.step()
        largest[world] = outcome.report.prefill_tokens
        assert outcome.report.measured_seconds <= 0.95 * gap
    assert largest[patient] < largest[pressed]


def first_chunk(floor_utps: float, is_told: bool) -> tuple[StepPlan, StepReport]:
    """Of a long prompt that comes to a laptop, alone or beside somebody with a floor."""
    tiers = (Tier("default", 1, floor_utps, 0.3, 60.0), Tier("flex", 2, 0.0, 0.3, 60.0))
    world = World(CATALOGUE["laptop-cpu"], SMALL, 20_000, Limits(4096), tiers)
    if floor_utps:
        world.arrive(make_request(1, 16, 300))
        world.step()
    logprobs = 3 if is_told else None
    world.arrive(replace(make_request(2, 3000, 5, "flex"), logprobs=logprobs, prompt_logprobs=is_told))
    plan = world.gate.plan(world.now)
    drawn = {entry.key: [0] for entry in plan.entries if entry.delivers}
    return plan, world.gate.observe(drawn, world.seconds(plan), 0.0, world.now).report


@pytest.mark.parametrize("floor_utps", [0.0, 8.0])
def test_a_chunk_of_a_prompt_that_is_told_is_smaller_because_each_of_its_tokens_needs_the_head(
    floor_utps: float,
) -> None:
    (plain, plain_report), (told, told_report) = (first_chunk(floor_utps, is_told) for is_told in (False, True))
    tokens = told.entries[-1].query_tokens
    assert not plain.entries[-1].is_told and told.entries[-1].is_told
    assert MIN_CHUNK < tokens < 0.9 * plain.entries[-1].query_tokens
    assert told.predicted_seconds == pytest.approx(plain.predicted_seconds, rel=0.05), "both fill the same time"
    decodes = len(told.entries) - 1
    work = step_work(SMALL, told.entries)
    assert work.outputs == decodes + tokens
    flops = SMALL.matmul_flops(decodes + tokens, decodes + tokens) + work.attention_flops
    assert told_report.flops == pytest.approx(flops, rel=1e-4)
    assert told_report.sequences == plain_report.sequences == decodes, "no token of it is drawn yet"


def test_a_preempted_request_is_told_of_its_prompt_only_while_it_has_no_token() -> None:
    world = small_world()
    request = replace(make_request(1, 40, 50), logprobs=0, prompt_logprobs=True)
    world.arrive(request)
    plan = world.gate.plan(world.now)
    assert [entry.outputs for entry in plan.entries] == [40]
    world.gate.observe({request.key: [7]}, 0.01, 0.0, 0.01)
    world.gate._preempt(world.gate.running[request.key])
    plan = world.gate.plan(world.now)
    assert [(entry.query_tokens, entry.outputs) for entry in plan.entries] == [(41, 1)]


def test_best_effort_takes_turns_in_what_the_promised_leave() -> None:
    solo = solo_utps(H100, LLAMA)
    tiers = (Tier("default", 1, 0.9 * solo, 10.0, 60.0), Tier("flex", 2, 0.0, 60.0, math.inf))
    world = World(device=H100, tiers=tiers, capacity_tokens=200_000, margin=0.02)
    for number in range(20):
        world.arrive(make_request(number, 2000, 3000, "flex"))
    while any(not sequence.is_decoding for sequence in world.gate.running.values()):
        world.step()
    world.arrive(make_request(100, 16, 600))
    before = {
        key: len(sequence.generated) for key, sequence in world.gate.running.items() if not sequence.tier.floor_utps
    }
    shares = [world.step().report.decode_tokens for _ in range(200)]
    gained = [len(world.gate.running[key].generated) - tokens for key, tokens in before.items()]
    assert not world.late
    assert min(shares[5:]) < 21, "the floor left room for all"
    assert min(gained) > 0 and max(gained) - min(gained) <= 5


def test_the_seconds_of_a_step_by_cause_sum_to_what_was_measured() -> None:
    world = small_world(slowness=lambda step: 0.5 + step % 3)
    for number in range(8):
        world.arrive(make_request(number))
    while (outcome := world.step()) is not None:
        report = outcome.report
        assert set(report.seconds) == set(CAUSES) and min(report.seconds.values()) >= 0
        assert sum(report.seconds.values()) == pytest.approx(report.measured_seconds)
        assert report.prefill_tokens + report.decode_tokens > 0
        assert report.delivered_tokens == sum(len(event.tokens) for event in outcome.events)


def test_a_margin_as_large_as_the_step_itself_halves_the_company_but_keeps_the_work_going() -> None:
    floor = 0.4 * solo_utps(H100, LLAMA)
    tiers = (Tier("default", 1, floor, 10.0, math.inf),)
    admitted = {}
    for margin in (0.02, 1.0):
        world = World(tiers=tiers, margin=margin)
        for number in range(200):
            world.arrive(make_request(number, 1000, 100))
        admitted[margin] = len(world.gate.running)
        world.run()
        world.check_nothing_is_left()
        assert not world.late
    assert 1 <= admitted[1.0] < admitted[0.02] / 2


# --- memory -----------------------------------------------------------------------------------------------------------


def overgrown_world() -> World:
    """Answers were short so far; those that come now are long, and memory is not enough for all of them."""
    world = small_world(1200, tiers=ROOMY)
    for number in range(40):
        world.gate.history.record(make_request(number), 4)
    for number in range(50, 60):
        world.arrive(make_request(number, 40, 500))
    return world


def test_preempted_answers_go_on_with_the_same_tokens() -> None:
    world = overgrown_world()
    world.run()
    world.check_nothing_is_left()
    assert world.gate.preemptions > 0
    assert {len(story.output) for story in world.stories.values()} == {500}


def test_the_newest_of_the_lowest_tier_gives_way_first() -> None:
    world = small_world(600, tiers=ROOMY)
    for number in range(40):
        world.gate.history.record(make_request(number), 4)
    world.arrive(make_request(50, 40, 500, "flex"))
    world.arrive(make_request(51, 40, 500, "default"))
    world.arrive(make_request(52, 40, 500, "flex"))
    world.arrive(make_request(53, 40, 500, "default"))
    assert len(world.gate.running) == 4
    gone: list[int] = []
    while len(gone) < 3:
        world.step()
        gone += [key & 0xFFFF for key in world.gate.waiting if key & 0xFFFF not in gone]
    assert gone == [52, 50, 53]


def test_a_preempted_request_starts_again_before_others_of_its_tenant() -> None:
    world = small_world(640, tiers=ROOMY)
    for number in range(40):
        world.gate.history.record(make_request(number), 4)
    for number in range(50, 58):
        world.arrive(make_request(number, 40, 300))
    while not world.gate.preemptions:
        world.step()
    preempted = next(key for key in world.gate.waiting if world.gate.waiting[key].sequence is not None)
    others = {key for key in world.gate.waiting if world.gate.waiting[key].sequence is None}
    assert others
    while preempted in world.gate.waiting:
        world.step()
        if preempted in world.gate.waiting:
            assert others <= set(world.gate.waiting)


def test_a_preempted_request_can_be_cancelled_while_it_waits() -> None:
    world = overgrown_world()
    while not world.gate.preemptions:
        world.step()
    key = next(key for key in world.gate.waiting if world.gate.waiting[key].sequence is not None)
    assert world.cancel(key)
    world.run()
    world.check_nothing_is_left()


def test_a_floor_lost_to_a_wrong_prediction_of_memory_is_put_down_to_the_footprint() -> None:
    world = small_world(700, tiers=(Tier("default", 1, 0.3 * solo_utps(H100, SMALL), 10.0, math.inf),))
    for number in range(40):
        world.gate.history.record(make_request(number), 4)
    for number in range(50, 56):
        world.arrive(make_request(number, 40, 400))
    world.run()
    assert {ended.violation for ended in world.ended} == {None, "footprint"}


# --- failure ----------------------------------------------------------------------------------------------------------


def test_an_engine_failure_ends_the_running_and_leaves_the_waiting() -> None:
    world = small_world(480)
    first, second = make_request(1, 300, 100), make_request(2, 300, 100)
    world.arrive(first)
    world.arrive(second)
    world.step()
    world.gate.plan(world.now)
    events = world.gate.fail_running()
    assert events == [TokenEvent(first.key, (), Finish.ERROR, Reason.WORKER_FAILED)]
    world.take(events)
    assert list(world.gate.waiting) == [second.key]
    world.run()
    world.check_nothing_is_left()
    assert world.stories[second.key].ends == [Finish.LENGTH]


# --- fairness ---------------------------------------------------------------------------------------------------------


def jain(values: list[float]) -> float:
    return sum(values) ** 2 / (len(values) * sum(value * value for value in values))


@pytest.mark.parametrize("prompts", [(100, 100), (100, 3000)])
def test_tenants_of_equal_demand_get_equal_step_seconds(prompts: tuple[int, int]) -> None:
    """Each has as many waiting at any time; one may have much longer prompts, and then gets fewer answers."""
    world = World(limits=Limits(8192, sequences=24), tiers=(Tier("default", 1, 10.0, 10.0, math.inf),))
    numbers = count()
    prompt = dict(zip("ab", prompts, strict=True))

    def send(tenant: str) -> None:
        world.arrive(make_request(next(numbers), prompt[tenant], 60, tenant=tenant))

    for tenant in "a" * 40 + "b" * 40:
        send(tenant)
    for _ in range(1500):
        outcome = world.step()
        for event in outcome.events:
            if event.finish:
                send(world.stories[event.key].request.tenant)
    assert jain([world.gate.account.used_seconds(tenant) for tenant in "ab"]) >= 0.95


def test_a_tenant_with_one_request_is_not_kept_waiting_by_one_with_a_thousand() -> None:
    world = World(limits=Limits(8192, sequences=8), tiers=(Tier("default", 1, 10.0, 10.0, math.inf),))
    for number in range(1000):
        world.arrive(make_request(number, 100, 50, tenant="crowd"))
    for _ in range(20):
        world.step()
    single = make_request(5000, 100, 50, tenant="single")
    world.arrive(single)
    for _ in range(200):
        world.step()
    assert world.stories[single.key].ends == [Finish.LENGTH]
    assert len(world.gate.waiting) > 900


def test_what_the_gate_remembers_does_not_grow_with_the_number_of_requests() -> None:
    world = small_world(4000)
    for number in range(3000):
        world.gate.arrive(make_request(number, 4, 1, tenant=f"t{number}"), world.now)
        plan = world.gate.plan(world.now)
        world.gate.observe({entry.key: [1] for entry in plan.entries}, 0.001, 0.0, world.now)
    gate = world.gate
    assert not gate.running and not gate.waiting and not gate.account._seconds
    assert len(gate.history._groups) <= 256 and len(gate.cost._errors) <= 512 and len(gate.cost._log_cells) < 500


def test_an_engine_that_delivers_nothing_ends_the_request_with_an_error() -> None:
    world = small_world()
    request = make_request(1, 20, 10)
    world.gate.arrive(request, 0.0)
    world.gate.plan(0.0)
    outcome = world.gate.observe({}, 0.01, 0.0, 0.01)
    assert outcome.events == [TokenEvent(request.key, (), Finish.ERROR, Reason.WORKER_FAILED)]
    assert not world.gate.running and world.gate.ledger.reserved_bytes == 0


def test_a_tenant_with_long_contexts_is_charged_for_reading_them() -> None:
    world = World(H100, LLAMA, 400_000, limits=Limits(context_tokens=131072))
    for number, tenant, prompt in ((1, "short", 16), (2, "long", 50_000)):
        world.arrive(make_request(number, prompt, 5000, tier="flex", tenant=tenant))
    while len(world.gate.running) < 2 or not all(s.is_decoding for s in world.gate.running.values()):
        world.step()
    before = {tenant: world.gate.account.used_seconds(tenant) for tenant in ("short", "long")}
    for _ in range(10):
        world.step()
    used = {tenant: world.gate.account.used_seconds(tenant) - before[tenant] for tenant in before}
    assert used["long"] > 1.5 * used["short"]
