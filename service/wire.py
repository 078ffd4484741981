"""The connection under a request, shown to the application: tokens are written to it past the ASGI layers.

Writing a chunk through ASGI costs a coroutine and three wrappers; writing it to the transport costs the system call. Start,
end and every answer that may have to wait stay ordinary ASGI.
"""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.errors import invalid

EXTENSION = "headgate.wire"

Address = tuple[str, int]  # host and port


class Owner(Protocol):
    """Who is being answered on a connection right now."""

    def lost(self) -> None:
        """The client has left."""


class Wire:
    """A connection's transport and flow state. Requests of one connection are answered one at a time: one owner."""

    __slots__ = ("flow", "is_for_metrics", "is_whole", "owner", "transport")

    def __init__(self, transport: asyncio.Transport, flow: FlowControl, is_for_metrics: bool = False) -> None:
        self.transport = transport
        self.flow = flow
        self.is_for_metrics = is_for_metrics  # it came in where only metrics and probes are answered
        self.owner: Owner | None = None
        self.is_whole = False  # the last request that began to arrive is here to its end

    def release(self, owner: Owner) -> None:
        if self.owner is owner:  # the next request of the connection may have taken over already
            self.owner = None


def is_at(server: tuple[str, int | None] | None, listener: Address | None) -> bool:
    """Whether a connection's own end, `server`, belongs to a listener, which may listen on all addresses."""
    if server is None or listener is None:
        return False
    return server[1] == listener[1] and listener[0] in (server[0], "0.0.0.0", "::")


class OpenProtocol(HttpToolsProtocol):
    """uvicorn's own protocol, which puts a `Wire` into every scope and says at once when the client leaves."""

    wire: Wire

    def __init__(self, *, metrics_at: Address | None = None, **settings: Any) -> None:
        super().__init__(**settings)
        self._metrics_at = metrics_at

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.wire = Wire(transport, self.flow, is_at(self.server, self._metrics_at))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.wire.is_whole = False
        self.scope["extensions"] = {EXTENSION: self.wire}  # type: ignore[dict-item]

    def on_message_complete(self) -> None:
        self.wire.is_whole = True
        super().on_message_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self.wire.owner is not None:
            self.wire.owner.lost()

    def send_400_response(self, msg: str) -> None:
        """Not even HTTP: no application sees it, but the client shall read the shape it expects."""
        body = invalid(msg).body()
        head = f"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        self.transport.write(head.encode() + b"connection: close\r\n\r\n" + body)
        self.transport.close()
