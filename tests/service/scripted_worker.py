"""A fake worker: a real server on a Unix socket that speaks the wire, and whose every token the test dictates.

No engine can be made to emit exact tokens, so what depends on exact tokens (stop strings, split characters, refusals that
come late, deaths) is tested against this.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import socket
import threading
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import parse_qs

import uvicorn

from scheduler.messages import (
    Accept,
    Decision,
    Finish,
    Logprobs,
    Reason,
    Request,
    Snapshot,
    TokenEvent,
    WorkerInfo,
    encode_decision,
    encode_events,
)

PATIENCE_SECONDS = 10.0
Script = Sequence[Sequence[int]]  # a delivery per item


def row_of(token: int, alternatives: int) -> Logprobs:
    """Itself, and then the likeliest; it is one of them. Some value for every token, exact in JSON."""
    own = -(token % 32) / 8
    return [(token, own), *((token + n, own - n / 4) for n in range(alternatives))]


class ScriptedWorker:
    """Answers every request with `script`, or, when that is None, says nothing until the test calls `emit`."""

    def __init__(self, path: str, worker: WorkerInfo) -> None:
        self.path = path
        self.worker = worker
        self.stalled_seconds = 0.0
        self.asked = 0  # how often for its model
        self.reset()
        self._streams: dict[int, asyncio.Queue[bytes | None]] = {}
        self._step = 0

    def reset(self) -> None:
        self.script: Script | None = [[]]
        self.finish = Finish.STOP
        self.decide: Callable[[Request], Decision] = lambda request: Accept()
        self.status = 200
        self.tokens_first = False
        self.undecided = False  # while it is, requests get no answer
        self.row_of: Callable[[int, int], Logprobs] | None = row_of  # None: it knows of no probabilities
        self._rows_of_prompts_sent: set[int] = set()
        self.requests: queue.Queue[Request] = queue.Queue()
        self.cancelled: queue.Queue[int] = queue.Queue()
        self.connected = threading.Event()

    # --- what tests call, from their own thread

    def next_request(self) -> Request:
        return self.requests.get(timeout=PATIENCE_SECONDS)

    def next_cancelled(self) -> int:
        return self.cancelled.get(timeout=PATIENCE_SECONDS)

    def emit(
        self,
        request: Request,
        tokens: Sequence[int] = (),
        finish: Finish = Finish.RUNNING,
        reason: Reason | None = None,
        retry_after_seconds: float = 0.0,
        cached_tokens: int = 0,
    ) -> None:
        rows = self._rows(request, tokens)
        event = TokenEvent(request.key, list(tokens), finish, reason, retry_after_seconds, rows, cached_tokens)
        self.raw(b"".join(encode_events(0, [event])), request.gateway)

    def _rows(self, request: Request, tokens: Sequence[int]) -> list[Logprobs]:
        """Of these tokens; in front of the first ones those of the prompt, where they are wanted."""
        count = request.logprobs
        if count is None or self.row_of is None or not tokens:
            return []
        before: Sequence[int] = ()
        if request.prompt_logprobs and request.key not in self._rows_of_prompts_sent:
            before = request.prompt[1:]
            self._rows_of_prompts_sent.add(request.key)
        return [self.row_of(token, count) for token in (*before, *tokens)]

    def raw(self, data: bytes | None, gateway: int | None = None) -> None:
        """Bytes into the step stream of one gateway, or of all; None ends the stream."""

        def put() -> None:
            for number, stream in self._streams.items():
                if gateway in (None, number):
                    stream.put_nowait(data)

        self._loop.call_soon_threadsafe(put)

    def start(self) -> None:
        sock = socket.socket(socket.AF_UNIX)
        sock.bind(self.path)
        config = uvicorn.Config(self, http="httptools", ws="none", lifespan="off", log_config=None, access_log=False)
        config.timeout_graceful_shutdown = 1
        self._server = uvicorn.Server(config)
        started = threading.Event()

        async def serve() -> None:
            self._loop = asyncio.get_running_loop()
            started.set()
            await self._server.serve(sockets=[sock])

        self._thread = threading.Thread(target=lambda: asyncio.run(serve()))
        self._thread.start()
        started.wait(PATIENCE_SECONDS)

    def stop(self) -> None:
        """Dies: all connections are cut."""
        self.raw(None)
        self._server.should_exit = True
        self.undecided = False
        self._thread.join(PATIENCE_SECONDS)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)

    # --- the server

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        method, path = scope["method"], scope["path"]
        if path == "/model":
            self.asked += 1
            await respond(send, 200, self.worker.encode())
        elif path == "/steps":
            await self._steps(int(parse_qs(scope["query_string"].decode())["gateway"][0]), receive, send)
        elif method == "POST":
            await self._request(await read(receive), send)
        elif method == "DELETE":
            self.cancelled.put(int(path.rsplit("/", 1)[1]))
            await respond(send, 204, b"")

    async def _request(self, body: bytes, send: Any) -> None:
        request = Request.decode(body)
        decision = self.decide(request)
        self.requests.put(request)
        while self.undecided:  # noqa: ASYNC110 (set from another thread)
            await asyncio.sleep(0.005)
        if self.tokens_first:
            self._play(request)
            await asyncio.sleep(0.02)  # so that the tokens really are first
        await respond(send, self.status, encode_decision(decision))
        if not self.tokens_first and isinstance(decision, Accept):
            self._play(request)

    def _play(self, request: Request) -> None:
        if self.script is None:
            return
        for number, tokens in enumerate(self.script, 1):
            finish = self.finish if number == len(self.script) else Finish.RUNNING
            self._step += 1
            event = TokenEvent(request.key, list(tokens), finish, logprobs=self._rows(request, tokens))
            frame = b"".join(encode_events(self._step, [event]))
            if request.gateway in self._streams:
                self._streams[request.gateway].put_nowait(frame)

    async def _steps(self, gateway: int, receive: Any, send: Any) -> None:
        frames: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._streams[gateway] = frames
        await send({"type": "http.response.start", "status": 200, "headers": []})
        reporter = asyncio.create_task(self._report(frames))
        gone = asyncio.create_task(wait_for_disconnect(receive, frames))
        self.connected.set()
        while (frame := await frames.get()) is not None:
            await send({"type": "http.response.body", "body": frame, "more_body": True})
        reporter.cancel()
        gone.cancel()
        self._streams.pop(gateway, None)
        await send({"type": "http.response.body", "body": b""})

    async def _report(self, frames: asyncio.Queue[bytes | None]) -> None:
        while True:
            frames.put_nowait(Snapshot(0, 0, 0, 1, self.stalled_seconds, 0.0).encode())
            await asyncio.sleep(0.25)


async def wait_for_disconnect(receive: Any, frames: asyncio.Queue[bytes | None]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    frames.put_nowait(None)


async def read(receive: Any) -> bytes:
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            return body


async def respond(send: Any, status: int, body: bytes) -> None:
    headers = [] if status == 204 else [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
