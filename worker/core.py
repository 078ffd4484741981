"""The engine process: one loop that reads gate.plan → engine.run → gate.observe → line.

The loop has a thread beside the engine's, so that arrivals are decided and cancellations taken while a step runs. The loop
measures every step; neither engine nor model is asked how long it took.
"""

from __future__ import annotations

import gc
import math
import os
import select
import socket
import sys
import threading
import time
import traceback
from collections.abc import Sequence

from scheduler.batch import StepPlan
from scheduler.gate import Gate
from scheduler.messages import (
    Reason,
    Refuse,
    Request,
    TokenEvent,
    encode_decision,
    encode_events,
    split_key,
    words_to_bytes,
)
from worker.build import Built, StartFailed, build
from worker.config import WorkerConfig
from worker.engine import Engine, StepResult
from worker.link import ALL, Answer, Command, EngineLink, LinkClosed, encode_answer, encode_json_answer
from worker.metrics import Meter

SNAPSHOT_SECONDS = 0.25
HEARTBEAT_SECONDS = 1.0  # between snapshots when nothing happens
MOST_FAILURES = 3  # steps in a row that may fail before a fresh process is the better bet

clock = time.monotonic


class Stepper:
    """Runs the engine in the thread that calls `run`, for a loop in another one, and says when it is done.

    That should be the thread that loaded it: OpenMP gives each thread that computes a pool of its own, and waits badly with
    more of them than there are CPUs (a step of SmolLM2-135M on two: 27 ms instead of 16).
    """

    def __init__(self, engine: Engine, link: EngineLink) -> None:
        self._engine = engine
        self._link = link
        self._go = threading.Semaphore(0)
        self._plan = StepPlan()
        self.began = 0.0  # of the step that runs, or of the last one
        self.ended = 0.0
        self.result: StepResult | None = None
        self.error: Exception | None = None

    def start(self, plan: StepPlan) -> None:
        self._plan, self.result, self.error = plan, None, None
        self.began = clock()
        self._go.release()

    @property
    def is_done(self) -> bool:
        return self.result is not None or self.error is not None

    def run(self) -> None:
        """For ever."""
        while True:
            self._go.acquire()
            result, error = None, None
            try:
                result = self._engine.run(self._plan)
            except Exception as raised:  # every running request is told, see Core.run_engine
                error = raised
            self.ended = clock()
            self.result, self.error = result, error
            self._link.wake()


class Outbox:
    """Tokens on their way to the gateways. Several steps of a fast engine leave as one line."""

    def __init__(self, link: EngineLink, coalesce_seconds: float) -> None:
        self._link = link
        self._coalesce_seconds = coalesce_seconds  # lines are this far apart unless they carry a first or last token
        self._held: dict[int, dict[int, TokenEvent]] = {}  # gateway -> key -> what it gets
        self._known: set[int] = set()  # keys that have had their first token
        self._sent_at = 0.0
        self._urgent = False
        self._lines = 0

    def add(self, events: Sequence[TokenEvent]) -> None:
        for event in events:
            key = event.key
            held = self._held.setdefault(key >> 32, {})
            before = held.get(key)
            held[key] = event if before is None else joined(before, event)
            if event.finish:
                self._known.discard(key)
                self._urgent = True
            elif key not in self._known:
                self._known.add(key)
                self._urgent = True

    def drop(self, key: int) -> None:
        """The request was cancelled: nobody waits for what is held of it."""
        self._known.discard(key)
        self._held.get(key >> 32, {}).pop(key, None)

    def flush(self, now: float, next_step_seconds: float) -> None:
        """Sends what is held, unless the next step ends before it is late."""
        if self._held and (self._urgent or now + next_step_seconds >= self._sent_at + self._coalesce_seconds):
            self._send(now)

    def flush_urgent(self, now: float) -> None:
        """First and last tokens do not wait for the next step to be planned."""
        if self._urgent:
            self._send(now)

    def _send(self, now: float) -> None:
        self._lines += 1
        for gateway, events in self._held.items():
            if events:
                to = words_to_bytes([gateway])
                self._link.send(b"".join([to + frame for frame in encode_events(self._lines, list(events.values()))]))
        self._held = {}
        self._sent_at, self._urgent = now, False


def joined(before: TokenEvent, event: TokenEvent) -> TokenEvent:
    return event._replace(
        tokens=[*before.tokens, *event.tokens],
        logprobs=[*before.logprobs, *event.logprobs] if before.logprobs else event.logprobs,
    )


class Core:
    """One worker's gate and engine, driven by the commands of its front."""

    def __init__(self, link: EngineLink, built: Built) -> None:
        self.link = link
        self.gate: Gate = built.gate
        self.meter = Meter(built.gate)
        self.stepper = Stepper(built.engine, link)
        self.outbox = Outbox(link, built.info.coalesce_seconds)
        self._eos_ids = frozenset(built.info.eos_ids)
        self._idle_since = self._ready_at = clock()
        self._busy = False
        self._told_at = 0.0
        self._changed = True
        self._failures = 0

    def run(self) -> None:
        """Until the front is gone, or the engine fails again and again."""
        while self._failures < MOST_FAILURES:
            self.receive()
            if self.gate.has_work:
                self.step()
            else:
                self.rest()

    def step(self) -> None:
        """One forward pass, or a plan that only frees what was cancelled."""
        if not self._busy:
            self._busy, self._ready_at = True, clock()
            self.meter.idle(self._ready_at - self._idle_since)
        plan = self.gate.plan(clock())
        self.refuse(plan.refused)
        self.outbox.flush(clock(), plan.predicted_seconds if plan.entries else math.inf)
        result = self.run_engine(plan)
        if result is not None and plan.entries:
            self.report(result)
        self.outbox.flush_urgent(clock())
        self.tell()

    def run_engine(self, plan: StepPlan) -> StepResult | None:
        """Computes the plan and goes on taking commands meanwhile. None when the engine failed."""
        self.stepper.start(plan)
        while not self.stepper.is_done:
            self.link.wait(SNAPSHOT_SECONDS)
            self.receive()
            self.tell()
        if self.stepper.error is not None:
            traceback.print_exception(self.stepper.error, file=sys.stderr)
            self.outbox.add(self.gate.fail_running())
            self._failures += 1
            return None
        if plan.entries:  # a step that only frees says nothing about the engine's health
            self._failures = 0
        return self.stepper.result

    def report(self, result: StepResult) -> None:
        began, ended = self.stepper.began, self.stepper.ended
        outcome = self.gate.observe(result.tokens, ended - began, began - self._ready_at, clock())
        self._ready_at = ended
        self.outbox.add(with_logprobs(outcome.events, result) if result.logprobs else outcome.events)
        self.meter.step(outcome.report, ended)
        for one in outcome.ended:
            self.meter.ended(one)
        self._changed = True

    def rest(self) -> None:
        """Nothing to do: waits for a command, and says now and then that this process lives."""
        if self._busy:
            self._busy, self._idle_since = False, self._ready_at  # not now: seconds by cause sum to the wall clock
        self.tell()
        self.link.wait(SNAPSHOT_SECONDS if self._changed else HEARTBEAT_SECONDS)

    # --- commands -----------------------------------------------------------------------------------------------------

    def receive(self) -> None:
        for command, payload in self.link.commands():
            self._changed = True
            match command:
                case Command.SUBMIT:
                    self.submit(int.from_bytes(payload[:4], "little"), payload[4:])
                case Command.CANCEL:
                    self.cancel(int.from_bytes(payload[:4], "little") << 32 | int.from_bytes(payload[4:8], "little"))
                case Command.GATEWAY_GONE:
                    self.forget_gateway(int.from_bytes(payload[:4], "little"))

    def submit(self, ticket: int, body: bytes) -> None:
        try:
            request = Request.decode(body)
            if names_unknown_tokens(request, self.gate.shape.vocabulary):
                raise ValueError("a token id beyond the model's vocabulary")  # it would fail everybody's step
            eos = frozenset() if request.ignore_eos else self._eos_ids
            decision = self.gate.arrive(request.with_stop_ids(eos), clock())
        except ValueError:
            decision = Refuse(Reason.BAD_REQUEST, 0.0)
        self.meter.decision(decision)
        self.link.send(encode_answer(Answer.DECISION, encode_decision(decision), ticket))

    def cancel(self, key: int) -> None:
        if self.gate.cancel(key, clock()):
            self.outbox.drop(key)

    def forget_gateway(self, gateway: int) -> None:
        for key in [*self.gate.waiting, *self.gate.running]:
            if split_key(key)[0] == gateway:
                self.cancel(key)

    def refuse(self, events: Sequence[TokenEvent]) -> None:
        for event in events:
            self.meter.refused_late(event.reason or "")
        self.outbox.add(events)

    # --- what others may know -----------------------------------------------------------------------------------------

    def tell(self) -> None:
        """A snapshot for the gateways and the metrics for the front, a few times a second."""
        now = clock()
        since = now - self._told_at
        if since < SNAPSHOT_SECONDS or (since < HEARTBEAT_SECONDS and not self._changed):
            return
        for one in self.gate.take_ended():
            self.meter.ended(one)
        stalled = now - self.stepper.began if not self.stepper.is_done and self._busy else 0.0
        self.link.send(words_to_bytes([ALL]) + self.gate.snapshot(stalled).encode())
        self.link.send(encode_json_answer(Answer.METRICS, self.meter.state(now)))
        self._told_at, self._changed = now, False


def names_unknown_tokens(request: Request, vocabulary: int) -> bool:
    """Its prompt or its biases hold an id that is no token of the model."""
    biased = [token for token, _ in request.sampling.logit_bias]
    return max((*biased, max(request.prompt, default=0))) >= vocabulary or min(biased, default=0) < 0


def with_logprobs(events: Sequence[TokenEvent], result: StepResult) -> list[TokenEvent]:
    """The gate may have cut what was drawn, at a stop id or a limit: then the last ones have no token."""
    told = []
    for event in events:
        rows = result.logprobs.get(event.key, ())
        cut = len(result.tokens.get(event.key, ())) - len(event.tokens)
        told.append(event._replace(logprobs=rows[: len(rows) - cut]) if event.tokens else event)
    return told


def end_with(link_fd: int) -> None:
    """Ends this process when the front is gone, also while a model is being loaded or a step computed."""
    poll = select.poll()
    poll.register(link_fd, 0)  # a hang-up is told without being asked for
    poll.poll()
    os._exit(0)


def drive(core: Core) -> None:
    """The loop, and with it the process, to its end."""
    try:
        core.run()
    except LinkClosed:
        pass
    except Exception:  # a bug: this process ends, and with it every request, each with an error
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(0)  # a step may still be running, and nobody is left to want it


def main(link_fd: int, config: WorkerConfig) -> None:
    """Runs until the front closes its end, which also ends a step that is being computed."""
    link = EngineLink(socket.socket(fileno=link_fd))
    threading.Thread(target=end_with, args=(link_fd,), name="lifeline", daemon=True).start()
    try:
        built = build(config)
    except StartFailed as error:
        link.send(encode_json_answer(Answer.FAILED, {"sentence": str(error)}))
        return
    link.send(encode_answer(Answer.INFO, built.info.encode()))
    gc.collect()
    gc.freeze()
    core = Core(link, built)
    threading.Thread(target=drive, args=(core,), name="loop", daemon=True).start()
    core.stepper.run()


if __name__ == "__main__":
    main(int(sys.argv[1]), WorkerConfig.decode(sys.argv[2]))
