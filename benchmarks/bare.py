"""The floor under every gateway in one event loop: a timer, and one write of a ready-made chunk per stream and step.

python -m benchmarks.bare SOCKET_FD STEP_SECONDS LIFELINE_FD
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from typing import Any, cast

import uvloop

from headgate.lifeline import watch

EVENT = (
    b'data: {"id":"chatcmpl-0000000000000001","object":"chat.completion.chunk","created":1700000000,"model":"bare-socket",'
    b'"system_fingerprint":"hg-simulated-00000000","service_tier":"default","choices":[{"index":0,"delta":{"content":"word"}'
    b',"logprobs":null,"finish_reason":null}]}\n\n'
)
CHUNK = b"%x\r\n%b\r\n" % (len(EVENT), EVENT)
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
READY = json.dumps({"models": ["bare-socket"]}).encode()


class Bare(asyncio.Protocol):
    def __init__(self, streams: dict[Bare, int]) -> None:
        self._streams = streams
        self.transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Requests are small: each comes in one piece."""
        if data.startswith(b"POST"):
            self._streams[self] = json.loads(data.partition(b"\r\n\r\n")[2])["max_tokens"]
            self.transport.write(HEAD)
        else:
            self.transport.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(READY), READY))

    def connection_lost(self, exc: Exception | None) -> None:
        self._streams.pop(self, None)


async def serve(listener: socket.socket, step_seconds: float) -> None:
    streams: dict[Bare, int] = {}
    loop = asyncio.get_running_loop()
    await loop.create_server(lambda: Bare(streams), sock=listener)
    next_at = loop.time()
    while True:
        next_at = max(next_at + step_seconds, loop.time())
        await asyncio.sleep(next_at - loop.time())
        for stream, left in list(streams.items()):
            stream.transport.write(CHUNK)
            streams[stream] = left - 1
            if left == 1:
                del streams[stream]
                stream.transport.write(b"0\r\n\r\n")


if __name__ == "__main__":
    watch(int(sys.argv[3]), "")
    uvloop.run(serve(socket.socket(fileno=int(sys.argv[1])), float(sys.argv[2])))
