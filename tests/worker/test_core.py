"""The loop of the engine process, on a real socket pair with an engine of twenty lines."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

import worker.app
import worker.core
from scheduler.batch import StepPlan
from scheduler.messages import Accept, Finish, Reason, Refuse, Sampling, TokenEvent, Wait, decode_frame
from worker.core import Outbox, joined, with_logprobs
from worker.engine import StepResult
from worker.link import Command, cut_answers


class Clock:
    """A clock that only the engine moves: what a step takes is known exactly."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(worker.core, "clock", lambda: self.now)

    def steps_take(self, seconds: float) -> Callable[[StepPlan], None]:
        def advance(plan: StepPlan) -> None:
            if plan.entries:
                self.now += seconds

        return advance


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


# --- a request's life


def test_a_request_is_decided_computed_and_told_to_its_gateway(run_core: Any, tools: Any) -> None:
    core = run_core()
    decision = core.submit(tools.request(1, prompt=(10, 20, 30), max_tokens=5))
    assert isinstance(decision, Accept)
    core.read_until(lambda: core.ended(1))
    tokens = [token for new, _ in core.deliveries(1) for token in new]
    assert tokens == [31, 32, 33, 34, 35]
    assert [finish for _, finish in core.deliveries(1)][-1] == Finish.LENGTH


def test_the_models_end_ids_stop_a_request_unless_it_ignores_them(run_core: Any, tools: Any) -> None:
    core = run_core()
    core.submit(tools.request(1, prompt=(tools.EOS - 2,), max_tokens=9))
    core.submit(tools.request(2, prompt=(tools.EOS - 2,), max_tokens=9, ignore_eos=True))
    core.read_until(lambda: core.ended(1) and core.ended(2))
    assert [t for new, _ in core.deliveries(1) for t in new] == [tools.EOS - 1, tools.EOS]
    assert core.deliveries(1)[-1][1] == Finish.STOP
    assert len([t for new, _ in core.deliveries(2) for t in new]) == 9


def test_every_gateway_hears_of_its_own_requests_only(run_core: Any, tools: Any) -> None:
    core = run_core()
    core.submit(tools.request(1, gateway=7))
    core.submit(tools.request(1, gateway=8, prompt=(500,)))
    core.read_until(lambda: core.ended(1, 7) and core.ended(1, 8))
    assert [t for new, _ in core.deliveries(1, 7) for t in new] == [101, 102, 103, 104]
    assert [t for new, _ in core.deliveries(1, 8) for t in new] == [501, 502, 503, 504]


@pytest.mark.parametrize("body", [b"", b"{}", b"[]\n", b"\xff\n", b'{"v": 99, "gateway": 7}\n', b"no request\n123"])
def test_what_is_no_request_is_refused_and_the_loop_goes_on(run_core: Any, tools: Any, body: bytes) -> None:
    core = run_core()
    core.tell(Command.SUBMIT, 77, body=body)
    (decision,) = core.read_until(lambda: core.decisions(77))
    assert decision == Refuse(Reason.BAD_REQUEST, 0.0)
    assert isinstance(core.submit(tools.request(1)), Accept)


@pytest.mark.parametrize("token", [-1, 1000])
def test_a_bias_for_what_is_no_token_is_refused(run_core: Any, tools: Any, token: int) -> None:
    core = run_core()
    asked = replace(tools.request(1), sampling=Sampling(logit_bias=((5, 1.0), (token, 1.0))))
    assert core.submit(asked) == Refuse(Reason.BAD_REQUEST, 0.0)
    assert isinstance(core.submit(replace(asked, sampling=Sampling(logit_bias=((999, 1.0),)))), Accept)


def test_a_key_that_is_already_here_is_refused(run_core: Any, tools: Any, engine: Any) -> None:
    engine.may_go.clear()
    core = run_core()
    core.submit(tools.request(1))
    assert core.submit(tools.request(1)) == Refuse(Reason.BAD_REQUEST, 0.0)


def test_arrivals_are_decided_while_a_step_runs(run_core: Any, tools: Any, engine: Any) -> None:
    engine.may_go.clear()
    core = run_core(sequences=1)
    assert isinstance(core.submit(tools.request(1)), Accept)
    tools.wait_until(lambda: engine.plans)  # the step has begun, and cannot end
    assert isinstance(core.submit(tools.request(2)), Wait)
    engine.may_go.set()
    core.read_until(lambda: core.ended(1) and core.ended(2))


# --- cancelling


def test_a_cancellation_is_taken_before_the_running_step_ends(run_core: Any, tools: Any, engine: Any) -> None:
    engine.may_go.clear()
    core = run_core()
    kept, left = tools.request(1, max_tokens=3), tools.request(2, max_tokens=3)
    core.submit(kept)
    core.submit(left)
    tools.wait_until(lambda: engine.plans)
    core.tell(Command.CANCEL, 7, 2)
    tools.wait_until(lambda: left.key not in core.gate.running)
    assert len(engine.plans) == 1, "the step still runs"
    assert core.gate.ledger.reserved_bytes == core.gate.ledger.held_bytes(kept.key)
    engine.may_go.set()
    core.read_until(lambda: core.ended(1))
    tools.wait_until(lambda: engine.held == {})
    assert core.deliveries(2) == [] and core.gate.ledger.reserved_bytes == 0


def test_the_kv_of_a_cancelled_request_is_free_with_the_next_plan(run_core: Any, tools: Any, engine: Any) -> None:
    engine.may_go.clear()
    core = run_core(sequences=2)
    asked = [tools.request(id, max_tokens=8) for id in (1, 2, 3)]
    core.submit(asked[0])
    tools.wait_until(lambda: engine.plans)  # it is in the engine
    core.submit(asked[1])
    assert isinstance(core.submit(asked[2]), Wait)
    core.tell(Command.CANCEL, 7, 1)
    tools.wait_until(lambda: asked[0].key not in core.gate.running)
    engine.may_go.set()
    core.read_until(lambda: core.ended(2) and core.ended(3))
    assert engine.plans[1].stop == (asked[0].key,)
    assert [request.key for request in engine.plans[1].start] == [asked[1].key, asked[2].key]  # its place is taken


def test_a_waiting_request_can_be_cancelled(run_core: Any, tools: Any, engine: Any) -> None:
    engine.may_go.clear()
    core = run_core(sequences=1)
    core.submit(tools.request(1))
    core.submit(tools.request(2))
    core.tell(Command.CANCEL, 7, 2)
    tools.wait_until(lambda: not core.gate.waiting)
    engine.may_go.set()
    core.read_until(lambda: core.ended(1))
    assert core.deliveries(2) == []


def test_cancelling_what_is_not_there_does_nothing(run_core: Any, tools: Any) -> None:
    core = run_core()
    core.tell(Command.CANCEL, 7, 99)
    core.tell(Command.GATEWAY_GONE, 99)
    assert isinstance(core.submit(tools.request(1)), Accept)


def test_a_gateway_that_is_gone_takes_all_its_requests_along(run_core: Any, tools: Any, engine: Any) -> None:
    engine.may_go.clear()
    core = run_core(sequences=3)
    for id in range(1, 6):
        core.submit(tools.request(id, gateway=7, max_tokens=100))
    core.submit(tools.request(1, gateway=8))
    core.tell(Command.GATEWAY_GONE, 7)
    tools.wait_until(lambda: {key >> 32 for key in [*core.gate.running, *core.gate.waiting]} == {8})
    engine.may_go.set()
    core.read_until(lambda: core.ended(1, 8))
    tools.wait_until(lambda: engine.held == {})
    assert core.steps(7) == [] and core.gate.ledger.reserved_bytes == 0


def test_without_a_front_the_loop_ends_even_while_a_step_is_stuck(run_core: Any, tools: Any, engine: Any) -> None:
    engine.may_go.clear()
    core = run_core()
    core.submit(tools.request(1))
    tools.wait_until(lambda: engine.plans)
    core.close()


# --- an engine that fails


def failing(times: int) -> Callable[[StepPlan], None]:
    """Raises in the first so many steps that compute something."""
    left = [times]

    def before(plan: StepPlan) -> None:
        if plan.entries and left[0]:
            left[0] -= 1
            raise RuntimeError("this engine is broken")

    return before


def test_an_engine_that_raises_ends_what_runs_and_serves_the_next(
    run_core: Any, tools: Any, engine: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    engine.before = failing(1)
    engine.may_go.clear()
    core = run_core(sequences=2)
    for id in (1, 2, 3):
        core.submit(tools.request(id))
    engine.may_go.set()
    core.read_until(lambda: all(core.ended(id) for id in (1, 2, 3)))
    ends = {id: core.deliveries(id)[-1] for id in (1, 2, 3)}
    # who was in the step that failed is told so; who waited for a place is served
    assert ends[1] == ([list(Reason).index(Reason.WORKER_FAILED), 0], Finish.ERROR)
    assert ends[3][1] == Finish.LENGTH
    core.submit(tools.request(4))
    core.read_until(lambda: core.ended(4))
    assert core.deliveries(4)[-1][1] == Finish.LENGTH
    tools.wait_until(lambda: engine.held == {})
    assert core.gate.ledger.reserved_bytes == 0
    assert "this engine is broken" in capfd.readouterr().err


def test_three_failures_in_a_row_end_the_process_after_everybody_was_told(
    run_core: Any, tools: Any, engine: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    engine.before = failing(100)
    core = run_core()
    for id in (1, 2, 3):
        core.submit(tools.request(id))
        core.read_until(lambda id=id: core.ended(id))
        assert core.deliveries(id)[-1][1] == Finish.ERROR
    core.thread.join(20)
    assert not core.thread.is_alive()
    assert capfd.readouterr().err.count("RuntimeError: this engine is broken") == 3


def test_a_step_that_works_lets_failures_count_from_the_start(
    run_core: Any, tools: Any, engine: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    core = run_core()
    for id in range(1, 7):
        engine.before = failing(id % 3)  # two bad ones, then a good one
        core.submit(tools.request(id))
        core.read_until(lambda id=id: core.ended(id))
    assert isinstance(core.submit(tools.request(9)), Accept)


# --- lines: how tokens leave


class Wire:
    """A link that remembers."""

    def __init__(self) -> None:
        self.lines: list[dict[int, list[int]]] = []

    def send(self, message: bytes) -> None:
        ((_, frame),), _ = cut_answers(message)
        step = decode_frame(frame[4:])
        line, at = {}, 0
        for id, word in zip(step.ids, step.info, strict=True):
            line[id] = step.tokens[at : at + (word & 0xFFFF)]
            at += word & 0xFFFF
        self.lines.append(line)


def event(id: int, *tokens: int, finish: Finish = Finish.RUNNING) -> TokenEvent:
    return TokenEvent(7 << 32 | id, tokens, finish)


def test_the_first_token_leaves_at_once_and_fast_steps_leave_as_one_line() -> None:
    wire = Wire()
    outbox = Outbox(wire, coalesce_seconds=0.5)
    for step in range(8):
        outbox.add([event(1, step)])
        outbox.flush(now=1.0 + step * 0.125, next_step_seconds=0.125)
    outbox.flush(now=9.0, next_step_seconds=1.0)
    assert wire.lines == [{1: [0]}, {1: [1, 2, 3]}, {1: [4, 5, 6]}, {1: [7]}]


def test_steps_slower_than_the_limit_leave_one_by_one() -> None:
    wire = Wire()
    outbox = Outbox(wire, coalesce_seconds=0.005)
    for step in range(5):
        outbox.add([event(1, step)])
        outbox.flush(now=1.0 + step * 0.01, next_step_seconds=0.01)
    assert wire.lines == [{1: [step]} for step in range(5)]


def test_a_first_or_last_token_takes_what_is_held_along() -> None:
    wire = Wire()
    outbox = Outbox(wire, coalesce_seconds=10.0)
    outbox.add([event(1, 10)])
    outbox.flush(1.0, 0.001)
    outbox.add([event(1, 11)])
    outbox.flush(1.001, 0.001)
    assert wire.lines == [{1: [10]}]
    outbox.add([event(1, 12), event(2, 20)])
    outbox.flush(1.002, 0.001)
    assert wire.lines[1:] == [{1: [11, 12], 2: [20]}]
    outbox.add([event(1, 13), event(2, 21, finish=Finish.LENGTH)])
    outbox.flush(1.003, 0.001)
    assert wire.lines[2:] == [{1: [13], 2: [21]}]


def test_what_is_held_of_a_cancelled_request_is_dropped() -> None:
    wire = Wire()
    outbox = Outbox(wire, coalesce_seconds=10.0)
    outbox.add([event(1, 10), event(2, 20)])
    outbox.flush(1.0, 0.001)
    outbox.add([event(1, 11), event(2, 21)])
    outbox.drop(7 << 32 | 1)
    outbox.flush(99.0, 0.001)
    assert wire.lines == [{1: [10], 2: [20]}, {2: [21]}]


def test_log_probabilities_leave_in_front_of_their_tokens_for_the_same_gateway() -> None:
    sent = bytearray()
    outbox = Outbox(SimpleNamespace(send=sent.extend), coalesce_seconds=0.0)  # type: ignore[arg-type]
    outbox.add([event(1, 10, 11)._replace(logprobs=[[(10, -0.5)], [(11, -1.0)]]), event(2, 20)])
    outbox.flush(1.0, 0.001)
    messages, rest = cut_answers(bytes(sent))
    assert [gateway for gateway, _ in messages] == [7, 7] and not rest
    logprobs, step = (decode_frame(frame[4:]) for _, frame in messages)
    assert dict(logprobs.rows()) == {1: [[(10, -0.5)], [(11, -1.0)]]}
    assert (step.ids, step.tokens) == ([1, 2], [10, 11, 20])


@pytest.mark.parametrize("width", [1, 6, 21])
def test_scores_of_the_longest_prompt_drop_no_gateway(width: int) -> None:
    """65,536 of them, what the API gives at most: several such steps fit into what a gateway may lag behind."""
    sent = bytearray()
    outbox = Outbox(SimpleNamespace(send=sent.extend), coalesce_seconds=0.0)  # type: ignore[arg-type]
    outbox.add([event(1, 10)._replace(logprobs=[[(id, -0.5)] * width for id in range(65536 // width)])])
    outbox.flush(1.0, 0.001)
    assert len(sent) < worker.app.STREAM_LIMIT_BYTES / 8
    messages, rest = cut_answers(bytes(sent))
    assert {gateway for gateway, _ in messages} == {7} and not rest
    *frames, step = (decode_frame(frame[4:]) for _, frame in messages)
    assert sum(len(frame.widths) for frame in frames) == 65536 // width and step.tokens == [10]


def test_log_probabilities_of_tokens_that_the_gate_cut_are_not_told() -> None:
    rows = [[(token, -1.0)] for token in (8, 9, 10, 11, 12)]  # the first two are of the prompt
    result = StepResult({7 << 32 | 1: [10, 11, 12], 7 << 32 | 2: [20], 7 << 32 | 3: [30]}, {7 << 32 | 1: rows})
    told = with_logprobs([event(1, 10), event(2, 20), event(3, finish=Finish.ERROR)], result)
    assert [one.logprobs for one in told] == [rows[:3], (), ()]


def test_log_probabilities_of_steps_that_leave_together_are_joined() -> None:
    first, second = (event(1, token)._replace(logprobs=[[(token, -0.5)]]) for token in (10, 11))
    both = joined(first, second)
    assert (both.tokens, both.logprobs) == ([10, 11], [[(10, -0.5)], [(11, -0.5)]])


def test_a_burst_of_tokens_from_a_coalescing_core_is_whole(run_core: Any, tools: Any, engine: Any) -> None:
    core = run_core(coalesce_seconds=0.005)
    for id in range(1, 9):
        core.submit(tools.request(id, prompt=(id * 100,), max_tokens=60))
    core.read_until(lambda: all(core.ended(id) for id in range(1, 9)))
    for id in range(1, 9):
        tokens = [token for new, _ in core.deliveries(id) for token in new]
        assert tokens == list(range(id * 100 + 1, id * 100 + 61))
        assert len(core.deliveries(id)[0][0]) == 1, "the first token did not wait for others"
    numbers = [step.step for step in core.steps()]
    assert numbers == sorted(set(numbers))


def test_several_tokens_of_one_step_are_one_delivery(run_core: Any, tools: Any, engine: Any) -> None:
    engine.tokens_each = 4
    core = run_core()
    core.submit(tools.request(1, prompt=(100,), max_tokens=10))
    core.read_until(lambda: core.ended(1))
    assert [new for new, _ in core.deliveries(1)] == [[101, 102, 103, 104], [105, 106, 107, 108], [109, 110]]


# --- what the loop says of itself


@pytest.fixture
def quick_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker.core, "SNAPSHOT_SECONDS", 0.01)
    monkeypatch.setattr(worker.core, "HEARTBEAT_SECONDS", 0.02)


def test_snapshots_come_while_nothing_happens(run_core: Any, quick_reports: None) -> None:
    core = run_core()
    core.read_until(lambda: len(core.snapshots()) >= 4)
    assert {snapshot["stalled_seconds"] for snapshot in core.snapshots()} == {0.0}
    assert {snapshot["running"] for snapshot in core.snapshots()} == {0}


def test_snapshots_tell_how_long_a_step_is_stuck(run_core: Any, tools: Any, engine: Any, quick_reports: None) -> None:
    engine.may_go.clear()
    core = run_core()
    core.submit(tools.request(1, max_tokens=2))
    core.read_until(lambda: len([s for s in core.snapshots() if s["stalled_seconds"] > 0]) >= 4)
    stalled = [s["stalled_seconds"] for s in core.snapshots() if s["stalled_seconds"] > 0]
    assert stalled == sorted(set(stalled)), "it grows"
    assert core.snapshots()[-1]["running"] == 1
    engine.may_go.set()
    core.read_until(lambda: core.ended(1) and core.snapshots()[-1]["running"] == 0)
    assert core.snapshots()[-1]["stalled_seconds"] == 0.0


def test_snapshots_and_metrics_come_together(run_core: Any, tools: Any, quick_reports: None) -> None:
    core = run_core()
    core.submit(tools.request(1))
    state = core.read_until(lambda: [m for m in core.metrics() if m["counters"].get("generation_tokens") == 4])[0]
    assert state["counters"]["admissions/accepted/"] == 1
    assert abs(len(core.metrics()) - len(core.snapshots())) <= 1


# --- the loop measures


def gauges_after(core: Any, tools: Any, tokens: int) -> SimpleNamespace:
    core.submit(tools.request(1, max_tokens=tokens))
    core.read_until(lambda: core.ended(1))
    tools.wait_until(lambda: not core.gate.has_work)
    state = core.core.meter.state(worker.core.clock())
    return SimpleNamespace(**state)


def test_an_engine_slowed_twofold_halves_the_limit_ratio(run_core: Any, tools: Any, engine: Any, clock: Clock) -> None:
    """Nobody asks the engine how long it took."""
    ratios = []
    for seconds in (0.01, 0.02):
        engine.before = clock.steps_take(seconds)
        core = run_core()
        ratios.append(gauges_after(core, tools, tokens=40).gauges["limit_ratio"])
        core.close()
    assert ratios[0] == pytest.approx(2 * ratios[1], rel=0.02)  # the contexts of the last second differ a little
    assert 0 < ratios[1] < 1


def test_seconds_by_cause_sum_to_the_wall_clock_of_the_loop(
    run_core: Any, tools: Any, engine: Any, clock: Clock
) -> None:
    engine.before = clock.steps_take(0.01)
    began = clock.now
    core = run_core()
    for id in range(1, 6):
        tools.wait_until(lambda: not core.core._busy)
        clock.now += 0.5  # idle
        core.submit(tools.request(id, max_tokens=7))
        core.read_until(lambda id=id: core.ended(id))
    tools.wait_until(lambda: not core.gate.has_work)
    counters = core.core.meter.state(clock.now)["counters"]
    causes = {key: value for key, value in counters.items() if key.startswith("step_seconds/")}
    assert sum(causes.values()) == pytest.approx(clock.now - began, rel=1e-9)
    assert causes["step_seconds/idle"] == pytest.approx(5 * 0.5)
    assert sum(causes.values()) - causes["step_seconds/idle"] == pytest.approx(35 * 0.01)


def test_measured_step_seconds_are_those_of_the_clock(run_core: Any, tools: Any, engine: Any, clock: Clock) -> None:
    engine.before = clock.steps_take(0.03)
    core = run_core()
    counts, total = gauges_after(core, tools, tokens=10).histograms["step_measured_seconds"]
    assert sum(counts) == 10 and total[0] == pytest.approx(0.3)


def test_the_threads_of_an_engine_never_overlap(run_core: Any, tools: Any, engine: Any) -> None:
    inside = threading.Semaphore(1)

    def alone(plan: StepPlan) -> None:
        assert inside.acquire(blocking=False)
        inside.release()

    engine.before = alone
    core = run_core()
    for id in range(1, 20):
        core.submit(tools.request(id))
    core.read_until(lambda: all(core.ended(id) for id in range(1, 20)))
    assert {finish for id in range(1, 20) for _, finish in core.deliveries(id)} == {Finish.RUNNING, Finish.LENGTH}
