"""Every request enters and leaves here: it gets its id, is counted, and is turned away when the house is full or closing."""

from __future__ import annotations

import logging
import re
import secrets
import time
from typing import Protocol

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from scheduler.messages import Reason
from service.body import Bodies, Held
from service.config import GatewayConfig
from service.errors import ApiError, overloaded, shutting_down
from service.metrics import Metrics
from service.wire import EXTENSION, Wire

logger = logging.getLogger(__name__)

VISIT = "headgate.visit"
GENERATING = frozenset({"/v1/chat/completions", "/v1/completions"})
READY = "/readyz"  # a closing house is not ready, whatever its workers are
SANE_ID = re.compile(rb"[\x21-\x7e]{1,128}")


class Ending(Protocol):
    """An answer under way, as the door sees it."""

    def abandon(self, outcome: str) -> None:
        """Ends it, wherever it is; without effect when it has ended."""
        ...

    def fail(self, error: ApiError) -> None: ...


class Visit:
    """One request, from its head to its last byte."""

    __slots__ = ("answer", "arrived_at", "body", "id", "model", "outcome", "retry_after_seconds", "tier", "wire")

    def __init__(self, id: bytes, wire: Wire) -> None:
        self.id = id
        self.arrived_at = time.monotonic()
        self.wire = wire
        self.model = ""
        self.tier = ""
        self.outcome = ""
        self.retry_after_seconds: float | None = None
        self.body = Held()
        self.answer: Ending | None = None

    def settle(self, outcome: str) -> None:
        """The first to say how it ended is right: what follows is a consequence."""
        self.outcome = self.outcome or outcome

    def settle_error(self, error: ApiError) -> None:
        if not self.outcome:
            self.retry_after_seconds = error.retry_after_seconds
        self.settle(error.outcome)

    def lost(self) -> None:
        """The client has left (called by the connection)."""
        self.settle("cancelled")
        if self.answer is not None:
            self.answer.abandon("cancelled")

    @property
    def gone(self) -> bool:
        return self.outcome == "cancelled"


class Door:
    """The outermost application. Wraps the framework, so that nothing a request does can keep it from leaving."""

    def __init__(self, app: ASGIApp, config: GatewayConfig, bodies: Bodies, metrics: Metrics) -> None:
        self._app = app
        self._bodies = bodies
        self._max_open_requests = config.max_open_requests
        self._metrics = metrics
        self._inside: set[Visit] = set()
        self._closing = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        visit = Visit(request_id(scope), scope["extensions"][EXTENSION])  # served by service.server only
        scope[VISIT] = visit

        async def stamped(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], (b"x-request-id", visit.id)]}
            await send(message)

        if scope["method"] == "POST" and scope["path"] in GENERATING:
            await self._generate(visit, scope, receive, stamped)
        elif self._closing and (scope["path"].startswith("/v1/") or scope["path"] == READY):
            await self._turn_away(shutting_down(), scope, receive, stamped)
        else:
            await self._app(scope, receive, stamped)

    async def _generate(self, visit: Visit, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal()
        if refusal is not None:
            self._metrics.count_request("", "", refusal.outcome)
            await self._turn_away(refusal, scope, receive, send)
            return
        self._inside.add(visit)
        self._metrics.requests_open += 1
        visit.wire.owner = visit
        try:
            await self._app(scope, receive, send)
        finally:
            visit.wire.release(visit)
            self._leave(visit)

    def _leave(self, visit: Visit) -> None:
        if visit.answer is not None:
            visit.answer.abandon("error")  # only if the application did not get to its end
        self._bodies.release(visit.body)
        self._inside.discard(visit)
        self._metrics.requests_open -= 1
        outcome = visit.outcome or "error"
        self._metrics.count_request(visit.model, visit.tier, outcome)
        seconds = time.monotonic() - visit.arrived_at
        self._metrics.durations.of(visit.model, visit.tier).observe(seconds)
        if outcome == "refused" and visit.retry_after_seconds is not None:
            self._metrics.retry_after.of(visit.model, visit.tier).observe(visit.retry_after_seconds)
        if outcome == "cancelled":
            logger.debug("request %s: 499, the client left after %.3f s", visit.id.decode(), seconds)

    def _refusal(self) -> ApiError | None:
        if self._closing:
            return shutting_down()
        if len(self._inside) >= self._max_open_requests:
            return overloaded(Reason.QUEUE_FULL, 1.0)
        return None

    async def _turn_away(self, error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
        response = error.response()
        if self._closing:
            response.headers["connection"] = "close"
        await response(scope, receive, send)

    # --- the end

    def close(self) -> None:
        """From now on nobody enters."""
        self._closing = True

    @property
    def empty(self) -> bool:
        return not self._inside

    def end_all(self) -> None:
        """Time is up: whoever is still inside gets an error."""
        for visit in tuple(self._inside):
            if visit.answer is not None:
                visit.answer.fail(shutting_down())


def request_id(scope: Scope) -> bytes:
    """The client's own, if it can be put into a header and a log line; else a fresh one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and SANE_ID.fullmatch(value):
            return bytes(value)
    return b"req_" + secrets.token_hex(12).encode()
