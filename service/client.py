"""One worker as its gateway sees it: requests go out over a pool, and one step stream brings all tokens back.

The step stream is read by a hand-written protocol. It cuts, deals, detokenizes and writes inside `data_received`, so a token
wakes no task; several frames in one read become one delivery per request.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Protocol, cast

from httptools import HttpResponseParser

from scheduler.messages import (
    REASONS,
    AnyFrame,
    CachedFrame,
    Decision,
    Finish,
    FrameReader,
    Logprobs,
    LogprobsFrame,
    Reason,
    Refuse,
    Request,
    Snapshot,
    StepFrame,
    WorkerInfo,
    decode_decision,
)
from service.errors import unavailable
from service.exchange import Pool, connect, request_head

logger = logging.getLogger(__name__)

FIRST_BACKOFF_SECONDS = 0.05
LAST_BACKOFF_SECONDS = 1.0
CONNECT_SECONDS = 10.0  # for /model and for the head of /steps
SILENCE_SECONDS = 30.0  # a worker says something every second; one that is silent for so long is gone
FRAME_LIMIT_BYTES = 16 << 20  # a step that carries 16384 requests has a hundredth of it
LOGPROBS_FRAMES_AT_ONCE = 2  # dealt before others have their turn: 3 ms each when they are written down at once
WORKER_FAILED = (REASONS.index(Reason.WORKER_FAILED), 1000)
MOST_ID = 0xFFFFFFFF
UNFIT = "a step frame whose columns do not fit together"

Frames = list[AnyFrame]


class Receiver(Protocol):
    """Who gets a request's tokens."""

    withdrawn: bool  # nobody wants its tokens any more
    last_at: float  # when its last tokens came; 0 before any
    cached_tokens: int  # of its prompt, known before its first token comes

    def take_logprobs(self, rows: Sequence[Logprobs]) -> None:
        """Of tokens that are about to be taken. Must not wait."""
        ...

    def take(self, ids: Sequence[int], finish: int, now: float) -> None:
        """Must not wait. From REFUSED on, `ids` holds [reason, retry-after in ms]."""
        ...


class StepStream(asyncio.Protocol):
    """Reads GET /steps. `opened` tells the status, `closed` that no more will come."""

    def __init__(self, request: bytes, deliver: Callable[[Frames], None]) -> None:
        loop = asyncio.get_running_loop()
        self.opened: asyncio.Future[int] = loop.create_future()
        self.closed: asyncio.Future[None] = loop.create_future()
        self.heard_at = time.monotonic()
        self.transport: asyncio.Transport | None = None
        self._request = request
        self._deliver = deliver
        self._parser = HttpResponseParser(self)
        self._reader = FrameReader(FRAME_LIMIT_BYTES)
        self._frames: Frames = []
        self._has_paused = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but name
        self.transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
            if self._frames:
                self.heard_at = time.monotonic()  # whole frames count: bytes may be the endless middle of a bad one
                self._pass_on()
        except Exception as error:
            self._fail(error)

    def _pass_on(self) -> None:
        """Log probabilities take long to write down: after some of them nothing is read before others had their turn."""
        frames, self._frames = first_turn(self._frames)
        self._deliver(frames)
        if self._frames and not self._has_paused:
            assert self.transport is not None
            self.transport.pause_reading()
            self._has_paused = True
            asyncio.get_running_loop().call_soon(self._go_on)

    def _go_on(self) -> None:
        self._has_paused = False
        if self.transport is None or self.transport.is_closing():
            return
        self.transport.resume_reading()
        try:
            self._pass_on()
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        """Not our protocol: the connection ends, and with it all requests, each with an error."""
        logger.error("the step stream brought what is not a frame: %r", error)
        self.close()

    def on_headers_complete(self) -> None:
        if not self.opened.done():
            self.opened.set_result(self._parser.get_status_code())

    def on_body(self, body: bytes) -> None:
        if self._parser.get_status_code() == 200:
            self._frames += self._reader.feed(body)

    def on_message_complete(self) -> None:
        self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.opened.done():
            self.opened.set_exception(ConnectionResetError("the worker closed the step stream"))
        if not self.closed.done():
            self.closed.set_result(None)

    def close(self) -> None:
        if self.transport is not None:
            self.transport.abort()


class Unusable(Exception):
    """The worker is there, but not for this gateway."""


class Loading(ConnectionError):
    """The worker is there, and not yet what it will be."""


class WorkerClient:
    """Keeps the step stream open, for ever; submits, withdraws, deals.

    `first_id` and `id_step` let the clients of one gateway take ids that no other of them takes.
    """

    def __init__(
        self,
        address: str,
        gateway: int,
        learn: Callable[[WorkerInfo], Coroutine[Any, Any, None]],
        *,
        connections: int,
        submit_seconds: float,
        secret: str = "",
        first_id: int = 1,
        id_step: int = 1,
    ) -> None:
        self.address = address
        self.gateway = gateway
        self.connected = False
        self.fault = ""  # why the worker that is there cannot be used
        self.absence = ""  # why none is there
        self._told_absence = ""
        self.snapshot: Snapshot | None = None
        self.snapshot_at = 0.0
        self._secret = secret
        self._learn = learn
        self._pool = Pool(address, secret, connections)
        self._submit_seconds = submit_seconds
        self._open: dict[int, Receiver] = {}
        self._first_id = first_id
        self._id_step = id_step
        self._last_id = first_id - id_step
        self._fresh: set[int] = set()  # ids that wait for their first token
        self._held: list[StepFrame] = []  # dealt in the next turn of the loop, or before the next step
        self._withdrawals: set[asyncio.Task[None]] = set()

    # --- requests

    def next_id(self) -> int:
        """Counts up and wraps within uint32, past requests that are still open."""
        while True:
            self._last_id += self._id_step
            if self._last_id > MOST_ID:
                self._last_id = self._first_id
            if self._last_id not in self._open:
                return self._last_id

    @property
    def open_requests(self) -> int:
        return len(self._open)

    async def submit(self, request: Request, receiver: Receiver) -> Decision:
        """Raises ApiError (503) when the worker cannot be asked. Tokens may reach the receiver before this returns."""
        if not self.connected:
            raise unavailable("The model's worker is not there at the moment. Please retry.")
        self._open[request.id] = receiver
        self._fresh.add(request.id)
        try:
            decision = await self._ask(request)
        except BaseException:
            self.withdraw(request.id)  # it may have been taken all the same
            raise
        if isinstance(decision, Refuse):
            self._open.pop(request.id, None)
            self._fresh.discard(request.id)
        elif receiver.withdrawn and not receiver.last_at:  # our DELETE may have overtaken the request
            self._spawn(self._delete(request.id))
        return decision

    async def _ask(self, request: Request) -> Decision:
        try:
            async with asyncio.timeout(self._submit_seconds):
                status, body = await self._pool.exchange("POST", f"/requests?gateway={self.gateway}", request.encode())
            if status == 200:
                return decode_decision(body)
            logger.error("the worker at %s answered a request with status %d", self.address, status)
        except TimeoutError:
            logger.error("the worker at %s did not decide within %g s", self.address, self._submit_seconds)
        except (OSError, ValueError, TypeError) as error:
            logger.error("the worker at %s could not be asked: %r", self.address, error)
        raise unavailable("The model's worker does not answer at the moment. Please retry.")

    def withdraw(self, id: int) -> None:
        """The client left, or has all it wanted: the worker forgets the request. Returns at once."""
        self._fresh.discard(id)
        receiver = self._open.pop(id, None)
        if receiver is not None:
            receiver.withdrawn = True
            if self.connected:  # a worker that lost our step stream has forgotten our requests already
                self._spawn(self._delete(id))

    async def _delete(self, id: int) -> None:
        try:
            async with asyncio.timeout(self._submit_seconds):
                await self._pool.exchange("DELETE", f"/requests/{self.gateway}/{id}")
        except OSError as error:  # TimeoutError is one. The request then runs to its end, and nobody reads it
            logger.warning("could not withdraw request %d: %r", id, error)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._withdrawals.add(task)
        task.add_done_callback(self._withdrawals.discard)

    # --- tokens

    def deliver(self, frames: Frames) -> None:
        """What one read brought. Raises ValueError on columns that do not fit together."""
        steps = []
        for frame in frames:
            if isinstance(frame, StepFrame):
                steps.append(frame)
            elif isinstance(frame, LogprobsFrame):
                self._deal_logprobs(frame)
            elif isinstance(frame, CachedFrame):
                for id, tokens in zip(frame.ids, frame.tokens, strict=True):
                    if id in self._open:
                        self._open[id].cached_tokens = tokens
            elif frame["kind"] == "snapshot":
                self.snapshot, self.snapshot_at = Snapshot.from_json(frame), time.monotonic()
        if len(steps) > 1 and not any(map(has_failure, steps)):
            steps = [merge(steps)]
        for step in steps:
            self._deal_held()  # what a step left behind comes before the next step: tokens keep their order
            if self._fresh.isdisjoint(step.ids):
                self._deal(step)
            else:
                self._deal_first_tokens_first(step)

    def _deal_logprobs(self, frame: LogprobsFrame) -> None:
        for id, rows in frame.rows():
            receiver = self._open.get(id)
            if receiver is not None:
                try:
                    receiver.take_logprobs(rows)
                except Exception:  # as in `_deal`: nobody else's request ends
                    logger.exception("delivering log probabilities to request %d failed", id)
                    self._give_up(id, receiver, time.monotonic())

    def _deal_first_tokens_first(self, step: StepFrame) -> None:
        """A first token is written by its request's task; the others of the step follow when that task has run."""
        first, held = StepFrame(step.step, [], [], []), StepFrame(step.step, [], [], [])
        at = 0
        for id, word in zip(step.ids, step.info, strict=True):
            part = first if id in self._fresh else held
            part.ids.append(id)
            part.info.append(word)
            part.tokens.extend(step.tokens[at : at + (word & 0xFFFF)])
            at += word & 0xFFFF
        if at != len(step.tokens):
            raise ValueError(UNFIT)
        self._fresh.difference_update(first.ids)
        self._deal(first)
        self._held.append(held)
        asyncio.get_running_loop().call_soon(self._deal_held)  # behind the tasks that were just woken

    def _deal_held(self) -> None:
        held, self._held = self._held, []
        for step in held:
            self._deal(step)

    def _deal(self, step: StepFrame) -> None:
        now, at, receivers = time.monotonic(), 0, self._open
        tokens = step.tokens
        for id, word in zip(step.ids, step.info, strict=True):
            count = word & 0xFFFF
            receiver = receivers.get(id)
            if receiver is not None:
                finish = word >> 16
                if finish:
                    del receivers[id]
                try:
                    receiver.take(tokens[at : at + count], finish, now)
                except Exception:  # our own mistake must not reach the others of this step: this request ends
                    logger.exception("delivering to request %d failed", id)
                    self._give_up(id, receiver, now)
            at += count
        if at != len(tokens):
            raise ValueError(UNFIT)

    def _give_up(self, id: int, receiver: Receiver, now: float) -> None:
        self.withdraw(id)
        receiver.take(WORKER_FAILED, Finish.ERROR, now)

    def _break(self) -> None:
        """The step stream is gone: so are its requests, here and at the worker."""
        self._deal_held()
        self._pool.close()  # they may lead to where the worker was
        self.connected = False
        self._fresh.clear()
        receivers, self._open = self._open, {}
        now = time.monotonic()
        for receiver in receivers.values():
            receiver.withdrawn = True
            receiver.take(WORKER_FAILED, Finish.ERROR, now)

    # --- the connection

    async def run(self) -> None:
        backoff_seconds = FIRST_BACKOFF_SECONDS
        while True:
            try:
                await self._follow()
                backoff_seconds = FIRST_BACKOFF_SECONDS
                logger.warning("the step stream of the worker at %s broke", self.address)
            except OSError as error:
                self.fault = ""  # whoever had it is gone
                self._find_absence(f"{error}" or repr(error), isinstance(error, Loading))
            except Unusable as error:
                self._find_fault(f"{error}")
            except Exception as error:  # its word is of no use (tokenizer, template); no request is open, so ask again
                self._find_fault(f"{error}" or repr(error), error)
            await asyncio.sleep(backoff_seconds)
            backoff_seconds = min(2 * backoff_seconds, LAST_BACKOFF_SECONDS)

    def _find_fault(self, fault: str, error: Exception | None = None) -> None:
        """It is asked again every second; what is wrong with it is told once."""
        if fault != self.fault:
            logger.error("the worker at %s cannot be used: %s", self.address, fault, exc_info=error)
        self.fault = fault

    def _find_absence(self, absence: str, is_usual: bool) -> None:
        """Told once, when it is found twice in a row: a worker that ends at its start says itself why."""
        if absence == self.absence != self._told_absence and not is_usual:
            logger.info("no worker at %s: %s", self.address, absence)
            self._told_absence = absence
        self.absence = absence

    async def _follow(self) -> None:
        """From learning the model to the end of the step stream. Raises when it did not come to a stream."""
        async with asyncio.timeout(CONNECT_SECONDS):
            status, body = await self._pool.exchange("GET", "/model")
        if status == 401:
            raise Unusable("it does not take this gateway's secret" if self._secret else "it wants a secret")
        if 400 <= status < 500:
            raise Unusable(f"no worker for gateways is there: /model answered {status}")
        if status != 200:
            raise Loading(f"/model answered {status}")
        await self._learn(WorkerInfo.decode(body))
        stream = await self._open_stream()
        try:
            self.connected, self.fault, self.absence, self._told_absence = True, "", "", ""
            while not stream.closed.done():
                await asyncio.wait([stream.closed], timeout=1.0)
                if time.monotonic() - stream.heard_at > SILENCE_SECONDS:
                    logger.error("the worker at %s has been silent for %g s", self.address, SILENCE_SECONDS)
                    break
        finally:
            stream.close()
            self._break()

    async def _open_stream(self) -> StepStream:
        request = request_head("GET", f"/steps?gateway={self.gateway}", self._secret)
        async with asyncio.timeout(CONNECT_SECONDS):
            stream = await connect(lambda: StepStream(request, self.deliver), self.address)
            try:
                status = await stream.opened
            except BaseException:
                stream.close()
                raise
        if status != 200:
            stream.close()
            raise ConnectionError(f"/steps answered {status}")
        return stream

    def close(self) -> None:
        self._pool.close()


def first_turn(frames: Frames) -> tuple[Frames, Frames]:
    """What is dealt now, and what later. Only log probabilities are worth a break."""
    if len(frames) > LOGPROBS_FRAMES_AT_ONCE:
        places = [place for place, frame in enumerate(frames) if isinstance(frame, LogprobsFrame)]
        if len(places) > LOGPROBS_FRAMES_AT_ONCE:
            cut = places[LOGPROBS_FRAMES_AT_ONCE]
            return frames[:cut], frames[cut:]
    return frames, []


def has_failure(step: StepFrame) -> bool:
    """Failing events keep a reason in the token column, so they must not be merged with tokens."""
    return any(word >> 16 >= Finish.REFUSED for word in step.info)


def merge(steps: Sequence[StepFrame]) -> StepFrame:
    """Several steps as one: a lagging loop or a coalescing worker costs its readers one write."""
    finishes: dict[int, int] = {}
    tokens: dict[int, list[int]] = {}
    for step in steps:
        at = 0
        for id, word in zip(step.ids, step.info, strict=True):
            count = word & 0xFFFF
            tokens.setdefault(id, []).extend(step.tokens[at : at + count])
            finishes[id] = word >> 16
            at += count
        if at != len(step.tokens):
            raise ValueError(UNFIT)
    info = [len(tokens[id]) | finish << 16 for id, finish in finishes.items()]
    return StepFrame(steps[-1].step, list(finishes), info, [token for new in tokens.values() for token in new])
