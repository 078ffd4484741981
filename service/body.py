"""Reading bodies: bounded each, bounded together, and never for ever."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import orjson
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message

from scheduler.messages import Reason
from service.config import GatewayConfig
from service.errors import ApiError, invalid, overloaded
from service.wire import EXTENSION

COLLECT_UP_TO_BYTES = 256 << 10


class Held:
    """How many bytes of the common bound one request holds."""

    __slots__ = ("bytes",)

    def __init__(self) -> None:
        self.bytes = 0


class Bodies:
    """All bodies of this process that have begun to arrive and whose prompts are not yet with the worker."""

    def __init__(self, config: GatewayConfig) -> None:
        self._config = config
        self._bytes = 0

    async def read_json(self, request: Request, held: Held) -> dict[str, Any]:
        """The body as a JSON object. Raises ApiError, or ClientDisconnect when it never came whole."""
        if not is_json(request.headers.get("content-type", "")):
            raise ApiError(415, "Please send the body as JSON, with the header 'Content-Type: application/json'.")
        body = await self._read(request, held)
        try:
            value = loads(body)
        except orjson.JSONDecodeError as error:
            raise invalid(f"The body is not valid JSON: {error}.") from error
        if not isinstance(value, dict):
            raise invalid("The body must be a JSON object.")
        return value

    async def _read(self, request: Request, held: Held) -> bytes:
        limit = self._config.body_limit_bytes
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > limit:
            raise too_large(limit)
        pieces: list[bytes] = []
        more = True
        while more:
            message = await self._piece(request)
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            pieces.append(message.get("body", b""))
            self._hold(held, len(pieces[-1]))
            if held.bytes > limit:
                raise too_large(limit)
            # uvicorn stops reading at 64 KiB and goes on when more is asked for: nobody asks after the last piece, and who
            # does not read does not notice that a client leaves
            request.scope["extensions"][EXTENSION].flow.resume_reading()
            more = message.get("more_body", False)
        return b"".join(pieces)

    async def _piece(self, request: Request) -> Message:
        if request.scope["extensions"][EXTENSION].is_whole:
            return await request.receive()  # which has no need to wait, so no timer is needed
        try:
            async with asyncio.timeout(self._config.body_seconds):
                return await request.receive()
        except TimeoutError as error:
            message = f"The body did not go on within {self._config.body_seconds:g} s."
            raise ApiError(408, message, headers=(("connection", "close"),)) from error

    def _hold(self, held: Held, size: int) -> None:
        held.bytes += size
        self._bytes += size
        if self._bytes > self._config.bodies_limit_bytes:
            raise overloaded(Reason.QUEUE_FULL, 1.0)

    @contextmanager
    def set_aside(self, held: Held) -> Iterator[None]:
        """While it waits for its own tenant's requests, it takes nobody else's room. (`service.slots` bounds it.)"""
        self._bytes -= held.bytes
        try:
            yield
        finally:
            self._bytes += held.bytes

    def release(self, held: Held) -> None:
        """The worker has the prompt, or the request is over."""
        self._bytes -= held.bytes
        held.bytes = 0


def loads(body: bytes) -> Any:
    """The collector would look at a million small arrays again and again while they arise: 0.37 s instead of 0.11."""
    if len(body) <= COLLECT_UP_TO_BYTES:
        return orjson.loads(body)
    gc.disable()
    try:
        return orjson.loads(body)
    finally:
        gc.enable()


def is_json(content_type: str) -> bool:
    kind = content_type.partition(";")[0].strip().lower()
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))


def too_large(limit_bytes: int) -> ApiError:
    return ApiError(
        413, f"The body is larger than {limit_bytes} bytes, which is the limit here.", code="body_too_large"
    )
