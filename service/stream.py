"""From a request's tokens to the bytes of its answer: streamed as events, or collected.

`Choice.take` runs inside the step stream's `data_received` and writes to the client's socket itself. The request's own task
sleeps; it wakes for the first delivery, for a reader that lags, and for the end.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from scheduler.messages import Decision, Finish, Logprobs, Refuse, Request
from service.chunks import NOTHING_TOLD, Pieces, Shape
from service.client import WorkerClient
from service.config import GatewayConfig
from service.detokenize import Rendering, TracedRendering
from service.door import Visit
from service.errors import DONE, ApiError, failed, refused_by
from service.metrics import Metrics
from service.token_log import TokenLog

PART_BYTES = 256 << 10
PING = b": ping\n\n"
STREAM_START = {
    "type": "http.response.start",
    "status": 200,
    "headers": [
        (b"content-type", b"text/event-stream; charset=utf-8"),
        (b"cache-control", b"no-cache"),
        (b"x-accel-buffering", b"no"),
    ],
}


@dataclass(frozen=True, slots=True)
class Order:
    """What an answer is made of: the worker's requests, and how each becomes text."""

    requests: Sequence[Request]
    renderings: Sequence[Rendering]
    echoes: Sequence[bytes]  # escaped text in front of what is generated
    logs: Sequence[TokenLog]  # of what is told of single tokens; none where nobody asks
    shape: Shape
    include_usage: bool
    prompt_tokens: int


class Choice:
    """One sequence on its way from token ids to text."""

    def __init__(self, answer: Answer, index: int, rendering: Rendering) -> None:
        self.index = index
        self.tokens = 0
        self.finish_reason = ""
        self.withdrawn = False
        self.last_at = 0.0
        self._answer = answer
        self._rendering = rendering
        self._gaps = answer.gaps

    def take_logprobs(self, rows: Sequence[Logprobs]) -> None:
        """Nobody asked for them."""

    def told(self) -> Pieces:
        """Fields about its tokens: what is new since the last call."""
        return [NOTHING_TOLD]

    def take(self, ids: Sequence[int], finish: int, now: float) -> None:
        """What one delivery brought. Never waits."""
        answer = self._answer
        if finish >= Finish.REFUSED:
            answer.fail(failed(finish, ids))
            return
        if self.last_at:
            self._gaps.observe(now - self.last_at)
        elif ids:
            answer.begin(now)
        self.last_at = now
        self.tokens += len(ids)
        # the id that ended the sequence is counted, but is not text
        text = self._rendering.add(ids[:-1] if finish == Finish.STOP else ids)
        if finish or self._rendering.stopped:
            self._finish(text, finish)
        else:
            answer.show(self.index, text)

    def _finish(self, text: bytes, finish: int) -> None:
        rendering = self._rendering
        if rendering.stopped:  # what came after the stop string is neither shown nor counted
            self.tokens -= rendering.unused + (finish == Finish.STOP)
            finish = Finish.STOP
        self.finish_reason = "stop" if finish == Finish.STOP else "length"
        self._answer.finish(self.index, text + rendering.end())


class LoggedChoice(Choice):
    """A choice that also tells of single tokens."""

    def __init__(self, answer: Answer, index: int, rendering: TracedRendering, log: TokenLog) -> None:
        super().__init__(answer, index, rendering)
        self._trace = rendering
        self._log = log

    def take_logprobs(self, rows: Sequence[Logprobs]) -> None:
        """Of tokens that are about to be taken."""
        self._log.add_rows(rows)

    def take(self, ids: Sequence[int], finish: int, now: float) -> None:
        if finish < Finish.REFUSED:
            if self._log.only_prompt:
                ids, finish = (), finish and Finish.LENGTH
            self._log.add(ids)
        super().take(ids, finish, now)

    def _finish(self, text: bytes, finish: int) -> None:
        """The id that ended the sequence is a token like the others, unless a stop string ended it before."""
        if finish == Finish.STOP and not self._trace.stopped and self.tokens > len(self._trace.starts):
            self._trace.add_last()
        super()._finish(text, finish)

    def write_down(self) -> None:
        """What may be told by now: a part at a time, so that no end of an answer takes long."""
        self._log.write(self._trace.shown(), self._trace.starts)

    @property
    def has_news(self) -> bool:
        return self._log.has_news(*self._progress())

    def told(self) -> Pieces:
        return self._log.tell(*self._progress(), self._trace.starts)

    def _progress(self) -> tuple[int, int]:
        """Tokens whose text is shown, and tokens of which the ids may be told."""
        shown = self._trace.shown()
        return shown, self.tokens if self.finish_reason else shown


class Answer(Response, ABC):
    """One HTTP answer. It ends exactly once: finished, failed, or abandoned."""

    def __init__(
        self, visit: Visit, client: WorkerClient, order: Order, config: GatewayConfig, metrics: Metrics
    ) -> None:
        super().__init__()
        self.gaps = metrics.gaps.of(visit.model, visit.tier)
        self.visit = visit
        self.client = client
        self.shape = order.shape
        self.config = config
        self.metrics = metrics
        self.prompt_tokens = order.prompt_tokens
        self.choices = [self.choice(index, order) for index in range(len(order.requests))]
        self.ids = [request.id for request in order.requests]
        self.unfinished = len(self.choices)
        self.begun = False
        self.ended = False
        self.failure: ApiError | None = None
        self.wake = asyncio.Event()
        visit.answer = self

    def choice(self, index: int, order: Order) -> Choice:
        rendering = order.renderings[index]
        if not order.logs:
            return Choice(self, index, rendering)
        assert isinstance(rendering, TracedRendering)
        return LoggedChoice(self, index, rendering, order.logs[index])

    async def submit(self, requests: Sequence[Request]) -> None:
        """Raises ApiError when the worker does not take all of them; what it did take is then withdrawn."""
        self.visit.check()
        asked = [self.client.submit(request, choice) for request, choice in zip(requests, self.choices, strict=True)]
        decisions: list[Decision | BaseException]
        if len(asked) == 1:
            decisions = [await asked[0]]
        else:
            decisions = await asyncio.gather(*asked, return_exceptions=True)
        for decision in decisions:
            if isinstance(decision, BaseException):
                raise decision
            if isinstance(decision, Refuse):
                raise refused_by(decision)
        visit = self.visit
        self.metrics.prompt_tokens.add(visit.model, visit.tier, visit.key.tenant, amount=self.prompt_tokens)

    @property
    def completion_tokens(self) -> int:
        return sum(choice.tokens for choice in self.choices)

    # --- called while the step stream is dealt

    def begin(self, now: float) -> None:
        """The first token of any choice."""
        if not self.begun:
            self.begun = True
            self.metrics.ttft.of(self.visit.model, self.visit.tier).observe(now - self.visit.arrived_at)

    @abstractmethod
    def show(self, index: int, text: bytes) -> None:
        """More text of a choice; may be empty."""

    @abstractmethod
    def show_last(self, index: int, text: bytes) -> None:
        """The last text of a choice, which has its finish reason now."""

    def finish(self, index: int, text: bytes) -> None:
        self.client.withdraw(self.ids[index])  # without effect unless a stop string ended it
        self.unfinished -= 1
        self.show_last(index, text)
        if not self.unfinished and not self.ended:  # showing may have ended it: the reader was too slow
            self.end("ok")

    def fail(self, error: ApiError) -> None:
        """Ends the answer with an error: a status before the first byte, an event after it."""
        if not self.ended:
            self.failure = error
            self.visit.settle_error(error)
            self.end(error.outcome)

    def abandon(self, outcome: str) -> None:
        """Ends the answer without a word: nobody is there to hear it."""
        if not self.ended:
            self.end(outcome)

    # --- called by the request's task

    async def send_body(self, send: Send, body: bytes, more: bool) -> None:
        """Waits while the reader lags, but not for ever: it may lag without ever filling a backlog."""
        try:
            async with asyncio.timeout(self.config.reader_seconds):
                await send({"type": "http.response.body", "body": body, "more_body": more})
        except TimeoutError:
            self.drop_reader()
            await asyncio.sleep(0)  # until the server has noticed that the connection is gone

    def drop_reader(self) -> None:
        self.visit.settle("slow_reader")
        self.abandon("slow_reader")
        self.visit.wire.transport.abort()

    # --- the end

    def end(self, outcome: str) -> None:
        self.ended = True
        if outcome != "ok":  # that is known only when the last byte has been taken
            self.visit.settle(outcome)
        for id, choice in zip(self.ids, self.choices, strict=True):
            if not choice.finish_reason:
                choice.withdrawn = True
                self.client.withdraw(id)
        self.wake.set()


class CollectedAnswer(Answer):
    """The whole answer in one piece."""

    def __init__(
        self, visit: Visit, client: WorkerClient, order: Order, config: GatewayConfig, metrics: Metrics
    ) -> None:
        super().__init__(visit, client, order, config, metrics)
        self.texts = [[echo] for echo in order.echoes]

    def show(self, index: int, text: bytes) -> None:
        self.texts[index].append(text)

    def show_last(self, index: int, text: bytes) -> None:
        self.show(index, text)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.wake.wait()
        if self.failure is not None:
            await self.failure.response()(scope, receive, send)
            return
        choices = [
            (b"".join(texts), choice.told(), choice.finish_reason)
            for texts, choice in zip(self.texts, self.choices, strict=True)
        ]
        pieces = self.shape.whole(choices, self.prompt_tokens, self.completion_tokens)
        await self.respond(pieces, scope, receive, send)
        self.visit.settle("ok")

    async def respond(self, pieces: Pieces, scope: Scope, receive: Receive, send: Send) -> None:
        await Response(b"".join(pieces), media_type="application/json")(scope, receive, send)


class LoggedCollection(CollectedAnswer):
    """One that also tells of single tokens."""

    def show(self, index: int, text: bytes) -> None:
        super().show(index, text)
        choice = self.choices[index]
        assert isinstance(choice, LoggedChoice)
        choice.write_down()

    async def respond(self, pieces: Pieces, scope: Scope, receive: Receive, send: Send) -> None:
        """A part at a time, as the socket takes them: there may be megabytes."""
        length = b"%d" % sum(map(len, pieces))
        headers = [(b"content-type", b"application/json"), (b"content-length", length)]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for part in in_parts(pieces):
            await self.send_body(send, part, more=True)
        await self.send_body(send, b"", more=False)


def in_parts(pieces: Pieces) -> Iterator[bytes]:
    """The same bytes, in parts that are neither small nor large."""
    part = bytearray()
    for piece in pieces:
        for begin in range(0, len(piece), PART_BYTES):
            part += memoryview(piece)[begin : begin + PART_BYTES]
            if len(part) >= PART_BYTES:
                yield bytes(part)
                part.clear()
    yield bytes(part)


class StreamedAnswer(Answer):
    """Server-sent events. Nothing is sent before the first delivery, so that a refusal can still be a status.

    Between start and end a chunk is written to the connection at once, unless the reader lags: then chunks gather in
    `pending`, the request's task waits until the socket takes them, and a reader that lags too far is cut off.
    """

    def __init__(
        self, visit: Visit, client: WorkerClient, order: Order, config: GatewayConfig, metrics: Metrics
    ) -> None:
        super().__init__(visit, client, order, config, metrics)
        shape = order.shape
        self.include_usage = order.include_usage
        # text goes between these two; the first chunk of a choice has a role and the echo
        self.befores = [shape.opening(index) + echo for index, echo in enumerate(order.echoes)]
        self.fresh = [True] * len(self.befores)
        self.after = shape.after_text
        self.transport = visit.wire.transport
        self.flow = visit.wire.flow
        self.pinged_at = time.monotonic()
        self.pending: list[bytes] = []
        self.pending_bytes = 0
        self.backlog_bytes = config.reader_backlog_bytes
        self.direct = False  # started, and everything so far is written

    def show(self, index: int, text: bytes) -> None:
        if self.fresh[index]:
            self.open(index, text, self.after)
        elif text:
            self.put(b"%b%b%b" % (self.befores[index], text, self.after))

    def open(self, index: int, text: bytes, after: bytes) -> None:
        """The first chunk of a choice. It may hold a long prompt, which makes nobody a slow reader."""
        chunk = b"%b%b%b" % (self.befores[index], text, after)
        self.fresh[index] = False
        self.befores[index] = self.shape.before_text(index)
        self.backlog_bytes += len(chunk)
        self.put(chunk)

    def show_last(self, index: int, text: bytes) -> None:
        self.direct = False  # the last chunks wait for each other, and leave in one write
        self.show(index, text)
        self.put(self.shape.final(index, self.choices[index].finish_reason))

    def put(self, chunk: bytes) -> None:
        """Never waits."""
        if self.direct and not self.flow.write_paused:
            self.transport.write(b"%x\r\n%b\r\n" % (len(chunk), chunk))
            return
        self.direct = False
        self.pending.append(chunk)
        self.pending_bytes += len(chunk)
        self.wake.set()
        if self.pending_bytes > self.backlog_bytes:
            self.drop_reader()

    def end(self, outcome: str) -> None:
        super().end(outcome)
        self.direct = False
        if outcome == "ok":
            usage = self.shape.usage_chunk(self.prompt_tokens, self.completion_tokens) if self.include_usage else b""
            self.pending.append(usage + DONE)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        while not (self.pending or self.ended):
            await self.sleep()
        if self.failure is not None and not self.pending:
            await self.failure.response()(scope, receive, send)
            return
        await send(STREAM_START)
        while not self.ended:
            if self.pending:
                await self.send_pending(send, more=True)
            else:
                self.direct = True
                await self.sleep()
        if self.failure is not None:
            self.pending.append(self.failure.events())
        await self.send_pending(send, more=False)
        self.visit.settle("ok")

    async def send_pending(self, send: Send, more: bool) -> None:
        body = b"".join(self.pending)
        self.pending.clear()
        self.pending_bytes = 0
        await self.send_body(send, body, more)

    async def sleep(self) -> None:
        """Until there is something to do. A client that hears nothing for long gets a comment, so that nobody hangs up."""
        try:
            async with asyncio.timeout(self.seconds_to_ping(time.monotonic())):
                await self.wake.wait()
            self.wake.clear()
        except TimeoutError:
            now = time.monotonic()
            if self.seconds_to_ping(now) <= 0:  # else something was delivered in the meantime
                self.pinged_at = now
                self.put(PING)

    def seconds_to_ping(self, now: float) -> float:
        """Until it has been quiet for too long; deliveries wake nobody, so the one who sleeps has to look."""
        quiet_since = max(self.pinged_at, *(choice.last_at for choice in self.choices))
        return quiet_since + self.config.ping_seconds - now


class LoggedStream(StreamedAnswer):
    """A stream whose chunks also tell of single tokens."""

    def show(self, index: int, text: bytes) -> None:
        choice = self.choices[index]
        assert isinstance(choice, LoggedChoice)
        if self.fresh[index]:
            self.open(index, text, self.shape.after(b"".join(choice.told())))
        elif text or choice.has_news:
            self.put(b"%b%b%b" % (self.befores[index], text, self.shape.after(b"".join(choice.told()))))
