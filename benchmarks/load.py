"""A client that costs little: one hand-written protocol per connection, which counts chunks and notes when they came."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Sequence
from typing import Any, cast

CONTENT = b'"content":"'  # once in every chunk that carries text
LAST_BYTES = b"0\r\n\r\n"  # of a chunked answer
ANSWER_ID = re.compile(rb'"id":"chatcmpl-([0-9a-f]{16})"')

clock = time.monotonic  # the same for all processes of a machine


class Reply:
    """One streamed answer."""

    def __init__(self) -> None:
        self.sent_at = clock()
        self.first_at = 0.0
        self.chunks = 0  # that carry text
        self.key = 0  # of the request inside the worker, which the answer's id tells
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class Connection(asyncio.Protocol):
    """One request at a time, on a connection that is kept."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self._reply: Reply | None = None
        self._last = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def ask(self, request: bytes) -> Reply:
        assert self.transport is not None and (self._reply is None or self._reply.ended.done())
        self._last = b""
        reply = self._reply = Reply()
        self.transport.write(request)
        return reply

    def data_received(self, data: bytes) -> None:
        reply = self._reply
        if reply is None:
            return
        if not reply.chunks:
            self._first(reply, data)
        reply.chunks += data.count(CONTENT)
        self._last = data[-5:] if len(data) >= 5 else (self._last + data)[-5:]
        if self._last == LAST_BYTES and not reply.ended.done():
            reply.ended.set_result(None)

    def _first(self, reply: Reply, data: bytes) -> None:
        if data.startswith(b"HTTP/1.1 ") and not data.startswith(b"HTTP/1.1 200"):
            reply.ended.set_exception(ConnectionError(data.decode(errors="replace")))
        if CONTENT in data:
            reply.first_at = clock()
            match = ANSWER_ID.search(data)
            reply.key = int(match[1], 16) if match else 0

    def connection_lost(self, exc: Exception | None) -> None:
        if self._reply is not None and not self._reply.ended.done():
            self._reply.ended.set_exception(ConnectionError("the server closed the connection"))
            self._reply.ended.exception()  # whoever hung up on purpose does not ask for it

    def close(self) -> None:
        if self.transport is not None:
            self.transport.abort()


async def connect(port: int) -> Connection:
    _, connection = await asyncio.get_running_loop().create_connection(Connection, "127.0.0.1", port)
    return connection


async def connect_all(port: int, count: int) -> list[Connection]:
    return [await connect(port) for _ in range(count)]


def chat_request(model: str, prompt: str, max_tokens: int, key: str = "") -> bytes:
    """A whole HTTP request for a streamed answer of exactly so many tokens; `key`: the API key, where one is wanted."""
    body: dict[str, Any] = {
        "model": model,
        "messages": [
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": prompt},
        ],
        "stream": True,
        "max_tokens": max_tokens,
        "ignore_eos": True,
    }
    content = json.dumps(body).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    head += f"authorization: Bearer {key}\r\n" if key else ""
    return f"{head}content-length: {len(content)}\r\n\r\n".encode() + content


async def ended(replies: Sequence[Reply], seconds: float) -> None:
    """Until all have ended. TimeoutError when they have not in time; ConnectionError when one was not answered."""
    async with asyncio.timeout(seconds):
        for reply in replies:
            await reply.ended


async def begun(replies: Sequence[Reply], seconds: float = 10.0) -> None:
    """Until all have had their first token."""
    ends_at = clock() + seconds
    while not all(reply.first_at or reply.ended.done() for reply in replies):
        if clock() > ends_at:
            raise TimeoutError("not all streams began: were they admitted at once?")
        await asyncio.sleep(0.01)


async def get(port: int, path: str) -> bytes:
    """The body of a small GET."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n".encode())
    answer = await reader.read()
    writer.close()
    return answer.partition(b"\r\n\r\n")[2]
