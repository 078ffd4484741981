"""The worker's front: HTTP for gateways and scrapers, with the engine process behind it.

    POST   /requests?gateway=N    an encoded Request             -> the gate's decision
    DELETE /requests/GATEWAY/ID   forget it                      -> 204
    GET    /steps?gateway=N       every token of that gateway's requests, as frames; closing it cancels them all
    GET    /model                 WorkerInfo, 503 until the engine is ready
    GET    /metrics /healthz /readyz

On one machine it listens on a Unix socket; on loopback TCP it answers only the last line. In a fleet it listens on TCP, and
answers everything but the last line only to who knows the secret. Frames from the engine process are passed on unread.
"""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from types import FrameType
from typing import Any, cast

import uvicorn

from scheduler.messages import WorkerInfo, words_to_bytes
from worker.config import WorkerConfig
from worker.guard import METRICS_ONLY, Guard
from worker.link import ALL, FRONT, Answer, Command, cut_answers, encode_command, link_pair
from worker.metrics import WorkerCollector, render
from worker.submission import FrontProtocol, Reply

PROBE_SECONDS = 0.05  # between two looks at how late the event loop is
STREAM_LIMIT_BYTES = 8 << 20  # that a gateway may lag behind before it is dropped

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class StepStream:
    """The frames on their way to one gateway. Whoever puts never waits; over its bound the stream is closed."""

    def __init__(self) -> None:
        self._frames: list[bytes] = []
        self._bytes = 0
        self._changed = asyncio.Event()
        self.is_closed = False

    def put(self, frame: bytes) -> None:
        self._frames.append(frame)
        self._bytes += len(frame)
        if self._bytes > STREAM_LIMIT_BYTES:
            self._frames.clear()
            self.is_closed = True
        self._changed.set()

    def close(self) -> None:
        self.is_closed = True
        self._changed.set()

    async def take(self) -> bytes:
        """Everything that has gathered; empty once the stream is closed."""
        await self._changed.wait()
        if self.is_closed:
            return b""
        self._changed.clear()
        frames, self._frames, self._bytes = self._frames, [], 0
        return b"".join(frames)


class EngineProcess(asyncio.Protocol):
    """The engine process and the pipe to it. Deals its answers inside `data_received`: no task is woken per step."""

    module = "worker.core"  # what the process runs; benchmarks put one there that also says what it sees

    def __init__(self, config: WorkerConfig, on_death: Callable[[str], None]) -> None:
        self._config = config
        self._on_death = on_death
        self._rest = b""
        self._tickets: dict[int, Reply] = {}  # submissions that wait for their decision
        self._next_ticket = 0
        self._process: asyncio.subprocess.Process | None = None
        self._transport: asyncio.Transport | None = None
        self.streams: dict[int, StepStream] = {}
        self.info: bytes | None = None
        self.collector: WorkerCollector | None = None
        self.sentence = "the engine process died"
        self.exit_status = 1  # of the front, once the engine process is gone

    async def start(self) -> None:
        front, engine = link_pair()
        fd = engine.fileno()
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", self.module, str(fd), self._config.encode()),  # -P: nothing from this folder
            pass_fds=(fd,),
            stdin=asyncio.subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the front, which ends it
        )
        engine.close()
        front.setblocking(False)
        await asyncio.get_running_loop().create_connection(lambda: self, sock=front)

    async def stop(self) -> None:
        """The engine process ends when its end of the pipe closes, whatever it is doing."""
        self._on_death = lambda sentence: None
        if self._transport is not None:
            self._transport.close()
        if self._process is not None:
            await self._process.wait()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but name

    def data_received(self, data: bytes) -> None:
        messages, self._rest = cut_answers(self._rest + data if self._rest else data)
        for destination, frame in messages:
            if destination == FRONT:
                self._take(frame)
            elif destination == ALL:
                for gateway in tuple(self.streams):
                    self._put(gateway, frame)
            elif destination in self.streams:
                self._put(destination, frame)

    def _put(self, gateway: int, frame: bytes) -> None:
        """A gateway that lags too far is forgotten at once: its connection may never take another byte."""
        stream = self.streams[gateway]
        stream.put(frame)
        if stream.is_closed:
            self.close_stream(gateway, stream)

    def connection_lost(self, exc: Exception | None) -> None:
        self.info = None  # while this front ends, no gateway shall take it for a worker
        tickets, self._tickets = self._tickets, {}
        for reply in tickets.values():
            reply(503, self.sentence.encode())
        for stream in self.streams.values():
            stream.close()
        self._on_death(self.sentence)

    def _take(self, frame: bytes) -> None:
        kind = int.from_bytes(frame[4:8], "little")
        if kind == Answer.DECISION:
            reply = self._tickets.pop(int.from_bytes(frame[8:12], "little"), None)
            if reply is not None:
                reply(200, frame[12:])
        elif kind == Answer.METRICS and self.collector is not None:
            self.collector.state = json.loads(frame[8:])
        elif kind == Answer.INFO:
            self.info = frame[8:]
            self.collector = WorkerCollector(WorkerInfo.decode(self.info).model, socket.gethostname())
        elif kind == Answer.FAILED:
            self.sentence = json.loads(frame[8:])["sentence"]
            self.exit_status = 2

    # --- what gateways ask --------------------------------------------------------------------------------------------

    def submit(self, body: bytes, reply: Reply) -> None:
        """The gate's decision, as JSON; 503 when the engine process is gone."""
        self._next_ticket = (self._next_ticket + 1) & 0xFFFFFFFF
        self._tickets[self._next_ticket] = reply
        try:
            self._command(Command.SUBMIT, words_to_bytes([self._next_ticket]) + body)
        except ConnectionError as error:
            del self._tickets[self._next_ticket]
            reply(503, str(error).encode())

    def cancel(self, gateway: int, request: int) -> None:
        with suppress(ConnectionError):  # an engine process that is gone has forgotten it
            self._command(Command.CANCEL, words_to_bytes([gateway, request]))

    def open_stream(self, gateway: int) -> StepStream:
        """A gateway that connects again has lost what it had: its old stream ends, and so do its requests."""
        self.close_stream(gateway, self.streams.get(gateway))
        stream = self.streams[gateway] = StepStream()
        return stream

    def close_stream(self, gateway: int, stream: StepStream | None) -> None:
        if stream is not None and self.streams.get(gateway) is stream:
            stream.close()
            del self.streams[gateway]
            with suppress(ConnectionError):
                self._command(Command.GATEWAY_GONE, words_to_bytes([gateway]))

    def _command(self, kind: Command, payload: bytes) -> None:
        if self._transport is None or self._transport.is_closing():
            raise ConnectionError(self.sentence)
        self._transport.write(encode_command(kind, payload))


class Front:
    """The ASGI application."""

    def __init__(self, engine: EngineProcess, guard: Guard) -> None:
        self.engine = engine
        self.guard = guard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        path, method = scope["path"], scope["method"]
        refusal = self.guard.refusal(scope["server"], scope["headers"])
        if method == "GET" and path in ("/metrics", "/healthz", "/readyz"):
            await self._observe(path, send)
        elif refusal is not None:
            await _answer(send, *refusal)
        elif method == "GET" and path == "/model":
            await self._model(send)
        elif method == "GET" and path == "/steps":
            await self._steps(scope, receive, send)
        elif method == "DELETE" and path.startswith("/requests/"):
            await self._cancel(path, send)
        else:
            await _answer(send, 404, b"not found")

    async def _observe(self, path: str, send: Send) -> None:
        if path == "/metrics":
            body, content_type = render(self.engine.collector)
            await _answer(send, 200, body, content_type)
        elif path == "/readyz" and self.engine.info is None:
            await _answer(send, 503, b"starting, or ending")
        else:
            await _answer(send, 200, b"ok")

    async def _model(self, send: Send) -> None:
        if self.engine.info is None:
            await _answer(send, 503, b"starting, or ending")
        else:
            await _answer(send, 200, self.engine.info, b"application/json")

    def submit(self, gateway: bytes, body: bytes, reply: Reply) -> None:
        """POST /requests; see `worker.submission`."""
        if self.engine.info is None:
            reply(503, b"starting, or ending")
        elif _gateway_of(gateway) not in self.engine.streams:  # one that has died would never cancel it
            reply(409, b"open GET /steps first")
        else:
            self.engine.submit(body, reply)

    async def _cancel(self, path: str, send: Send) -> None:
        gateway, _, request = path.removeprefix("/requests/").partition("/")
        if not (gateway.isdecimal() and request.isdecimal() and max(int(gateway), int(request)) <= 0xFFFFFFFF):
            return await _answer(send, 400, b"expected /requests/GATEWAY/ID")
        self.engine.cancel(int(gateway), int(request))
        await send({"type": "http.response.start", "status": 204, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    async def _steps(self, scope: Scope, receive: Receive, send: Send) -> None:
        gateway = _gateway_of(scope["query_string"].removeprefix(b"gateway="))
        if gateway is None:
            return await _answer(send, 400, b"expected ?gateway=N, a number between 1 and 2^32-2")
        if self.engine.info is None:
            return await _answer(send, 503, b"starting, or ending")
        stream = self.engine.open_stream(gateway)
        watcher = asyncio.create_task(_close_on_disconnect(receive, stream))
        try:
            headers = [(b"content-type", b"application/octet-stream")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            while frames := await stream.take():
                await send({"type": "http.response.body", "body": frames, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            watcher.cancel()
            self.engine.close_stream(gateway, stream)


async def _close_on_disconnect(receive: Receive, stream: StepStream) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    stream.close()


def _gateway_of(number: bytes) -> int | None:
    """None when it is not a gateway's number."""
    return int(number) if number.isdigit() and ALL < int(number) < FRONT else None


async def _answer(send: Send, status: int, body: bytes, content_type: bytes = b"text/plain; charset=utf-8") -> None:
    headers = [(b"content-type", content_type), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class FrontServer(uvicorn.Server):
    """Ends the step streams before it waits for connections to finish."""

    def __init__(self, config: uvicorn.Config, engine: EngineProcess) -> None:
        super().__init__(config)
        self.engine = engine

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Unlike uvicorn's, it does not raise the signal again at the end: who was told to end has ended well."""
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for stream in self.engine.streams.values():
            stream.close()
        await super().shutdown(sockets)


async def watch_the_loop(engine: EngineProcess) -> None:
    """Measures how late the event loop runs a timer, for ever."""
    while True:
        asked_at = time.monotonic()
        await asyncio.sleep(PROBE_SECONDS)
        if engine.collector is not None:
            engine.collector.stalled(max(0.0, time.monotonic() - asked_at - PROBE_SECONDS))


async def serve(config: WorkerConfig, sockets: list[socket.socket], guard: Guard) -> int:
    """Serves until SIGTERM or until the engine process dies. Returns the exit status."""
    status = 0

    def died(sentence: str) -> None:
        nonlocal status
        status = engine.exit_status
        print(f"headgate: worker: {sentence}", file=sys.stderr, flush=True)
        server.should_exit = True

    engine = EngineProcess(config, died)
    settings = uvicorn.Config(
        Front(engine, guard),
        http=FrontProtocol,
        proxy_headers=False,
        lifespan="off",
        log_level="warning",
        access_log=False,
        timeout_keep_alive=3600,  # gateways keep their connections
        timeout_graceful_shutdown=5,
        backlog=4096,
    )
    server = FrontServer(settings, engine)
    await engine.start()
    watcher = asyncio.create_task(watch_the_loop(engine))
    try:
        await server.serve(sockets=sockets)
    finally:
        watcher.cancel()
        await engine.stop()
    return status


def run(config: WorkerConfig, sockets: list[socket.socket], guard: Guard = METRICS_ONLY) -> int:
    """The worker's front process. `sockets` are bound already: a Unix socket, and TCP; `guard` says who may use that."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(serve(config, sockets, guard))
    return uvloop.run(serve(config, sockets, guard))
