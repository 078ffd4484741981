"""Every request enters and leaves here: it gets its id, its caller is known, it is charged and counted.

It is turned away when the house is full or closing, or when its caller may not come in, or not now.
"""

from __future__ import annotations

import logging
import re
import secrets
import time
from typing import Protocol

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from scheduler.messages import Reason
from service.access import API, METRICS, Access, is_guarded
from service.body import Bodies, Held
from service.config import GatewayConfig
from service.errors import ApiError, key_has_ended, overloaded, shutting_down
from service.keys import OPEN, Key
from service.limits import Allowance, Limiter
from service.metrics import Metrics
from service.wire import EXTENSION, Wire

logger = logging.getLogger(__name__)

VISIT = "headgate.visit"
GENERATING = frozenset({"/v1/chat/completions", "/v1/completions"})
REFUSALS = (429, 503)
PROBES = ("/healthz", "/readyz", METRICS)
READY = "/readyz"  # a closing house is not ready, whatever its workers are
SANE_ID = re.compile(rb"[\x21-\x7e]{1,128}")


class Ending(Protocol):
    """An answer under way, as the door sees it."""

    @property
    def completion_tokens(self) -> int: ...

    def abandon(self, outcome: str) -> None:
        """Ends it, wherever it is; without effect when it has ended."""
        ...

    def fail(self, error: ApiError) -> None: ...


class Visit:
    """One request, from its head to its last byte."""

    __slots__ = (
        *("allowance", "answer", "arrived_at", "body", "code", "failure", "id", "key", "model", "outcome"),
        *("retry_after_seconds", "status", "tier", "wire"),
    )

    def __init__(self, id: bytes, wire: Wire) -> None:
        self.id = id
        self.arrived_at = time.monotonic()
        self.wire = wire
        self.key: Key = OPEN
        self.allowance: Allowance | None = None  # from when its caller is known
        self.model = ""
        self.tier = ""
        self.outcome = ""
        self.code = ""  # of the error it ended with
        self.status = 0  # of what was sent
        self.failure: ApiError | None = None
        self.retry_after_seconds: float | None = None
        self.body = Held()
        self.answer: Ending | None = None

    def settle(self, outcome: str) -> None:
        """The first to say how it ended is right: what follows is a consequence."""
        self.outcome = self.outcome or outcome

    def settle_error(self, error: ApiError) -> None:
        if not self.outcome:
            self.retry_after_seconds = error.retry_after_seconds
            self.code = error.code or ""
        self.settle(error.outcome)

    def fail(self, error: ApiError) -> None:
        """Ends it with an error: at once where it has an answer or waits for one, else on its way there (see `check`)."""
        self.failure = self.failure or error
        if self.answer is not None:
            self.answer.fail(error)

    def check(self) -> None:
        """Raises what has ended it meanwhile."""
        if self.gone:
            raise ClientDisconnect
        if self.failure is not None:
            raise self.failure

    def lost(self) -> None:
        """The client has left (called by the connection)."""
        self.settle("cancelled")
        if self.answer is not None:
            self.answer.abandon("cancelled")

    @property
    def completion_tokens(self) -> int:
        return self.answer.completion_tokens if self.answer is not None else 0

    @property
    def gone(self) -> bool:
        return self.outcome == "cancelled"


class Door:
    """The outermost application. Wraps the framework, so that nothing a request does can keep it from leaving."""

    def __init__(
        self,
        app: ASGIApp,
        config: GatewayConfig,
        access: Access,
        limiter: Limiter,
        bodies: Bodies,
        metrics: Metrics,
    ) -> None:
        self._app = app
        self._access = access
        self._limiter = limiter
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
                visit.status = message["status"]
                headers = [*message["headers"], (b"x-request-id", visit.id)]
                if visit.allowance is not None:
                    headers += visit.allowance.headers(time.monotonic())
                message = {**message, "headers": headers}
            await send(message)

        if scope["method"] == "POST" and scope["path"] in GENERATING and not visit.wire.is_for_metrics:
            await self._generate(visit, scope, receive, stamped)
            return
        try:
            await self._let_in(visit, scope)
        except ApiError as error:
            await self._turn_away(error, scope, receive, stamped)
        else:
            await self._app(scope, receive, stamped)

    async def _let_in(self, visit: Visit, scope: Scope) -> None:
        """Raises ApiError."""
        path = scope["path"]
        if visit.wire.is_for_metrics:
            if path not in PROBES:
                raise ApiError(404, "Only metrics and probes are answered at this port.", code="not_found")
        elif is_guarded(path):
            visit.key = self._access.caller(scope)
            visit.allowance = self._limiter.allowance(visit.key)
            await visit.allowance.look(time.monotonic())
        if self._closing and (path.startswith(API) or path == READY):
            raise shutting_down()

    async def _let_generate(self, visit: Visit, scope: Scope) -> None:
        """Raises ApiError."""
        visit.key = self._access.caller(scope)
        visit.allowance = self._limiter.allowance(visit.key)
        await visit.allowance.enter(time.monotonic())
        if self._closing:
            raise shutting_down()
        if len(self._inside) >= self._max_open_requests:
            raise overloaded(Reason.QUEUE_FULL, 1.0)

    async def _generate(self, visit: Visit, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._let_generate(visit, scope)
        except ApiError as error:
            visit.settle_error(error)
            await self._give_back(visit)
            await self._turn_away(error, scope, receive, send)
            self._count(visit)
            return
        self._inside.add(visit)
        self._metrics.requests_open += 1
        visit.wire.owner = visit
        try:
            await self._app(scope, receive, send)
        finally:
            visit.wire.release(visit)
            self._leave(visit)
            await self._settle(visit)

    def _leave(self, visit: Visit) -> None:
        if visit.answer is not None:
            visit.answer.abandon("error")  # only if the application did not get to its end
        self._bodies.release(visit.body)
        self._inside.discard(visit)
        self._metrics.requests_open -= 1
        visit.settle("error")
        self._count(visit)
        seconds = time.monotonic() - visit.arrived_at
        self._metrics.durations.of(visit.model, visit.tier).observe(seconds)
        if visit.outcome == "cancelled":
            logger.debug("request %s: 499, the client left after %.3f s", visit.id.decode(), seconds)

    def _count(self, visit: Visit) -> None:
        metrics, model, tier, tenant = self._metrics, visit.model, visit.tier, visit.key.tenant
        metrics.requests.add(model, tier, visit.outcome, tenant)
        if visit.status in REFUSALS:
            metrics.refusals.add(model, tier, visit.code, tenant)
        if visit.outcome == "refused" and visit.retry_after_seconds is not None:
            metrics.retry_after.of(model, tier).observe(visit.retry_after_seconds)
        if visit.completion_tokens:
            metrics.completion_tokens.add(model, tier, tenant, amount=visit.completion_tokens)

    async def _settle(self, visit: Visit) -> None:
        """What was reserved becomes what was used."""
        if visit.allowance is None:
            return
        visit.allowance.leave()
        if visit.status in REFUSALS:
            await self._give_back(visit)
        else:
            await visit.allowance.settle(visit.completion_tokens, time.monotonic())

    @staticmethod
    async def _give_back(visit: Visit) -> None:
        """A refused request has used nothing."""
        if visit.allowance is not None:
            await visit.allowance.refund(time.monotonic())

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
            visit.fail(shutting_down())

    def end_who_may_not_stay(self) -> None:
        """Keys have changed: whoever is inside with one that is not good any more gets an error."""
        for visit in tuple(self._inside):
            if not self._access.may_stay(visit.key):
                visit.fail(key_has_ended())


def request_id(scope: Scope) -> bytes:
    """The client's own, if it can be put into a header and a log line; else a fresh one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and SANE_ID.fullmatch(value):
            return bytes(value)
    return b"req_" + secrets.token_hex(12).encode()
