"""The gateway, wired on one screen."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Security
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from service import faults
from service.access import Access, is_guarded
from service.admin import Admin, read_tenants_of
from service.auth import Keyring
from service.body import Bodies
from service.chat import Chat
from service.completions import Completions
from service.config import GatewayConfig
from service.counters import MemoryCounters
from service.door import Door
from service.errors import ApiError
from service.fleet import Fleet
from service.generate import Generator
from service.health import Health
from service.limits import Limiter
from service.metrics import Metrics
from service.models import Models
from service.schema import ChatRequest, CompletionRequest, documented


class BareRoute(APIRoute):
    """A documented route whose endpoint reads the request itself. Solving no dependencies saves 12 µs."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        return self.endpoint


def create_app(config: GatewayConfig) -> Door:
    """The ASGI application. It writes to connections past ASGI, so `service.server` has to serve it."""
    keyring = Keyring.open(config.data)
    limiter = Limiter(MemoryCounters(), read_tenants_of(config.config_file))
    metrics = Metrics(config.version, limiter.tenants)
    bodies = Bodies(config)
    fleet = Fleet(config)
    generator = Generator(config, bodies, fleet, metrics)
    chat, completions, models = Chat(generator), Completions(generator), Models(fleet)
    health = Health(fleet, metrics)
    admin = Admin(config.config_file, keyring, limiter, lambda: door.end_who_may_not_stay())

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        lives = (fleet.run(), health.watch_the_loop(), keyring.watch(door.end_who_may_not_stay), admin.listen())
        tasks = [asyncio.create_task(life) for life in lives]
        yield
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        fleet.close()

    # only said in the API's description: the door has let nobody in without one
    key = [Security(HTTPBearer(auto_error=False, scheme_name="key", description="An API key, where there are any."))]
    app = FastAPI(
        title="Headgate",
        version=config.version,
        lifespan=life,
        redirect_slashes=False,
        redoc_url=None,
        swagger_ui_oauth2_redirect_url=None,
    )
    bare = functools.partial(
        app.router.add_api_route, methods=["POST"], dependencies=key, route_class_override=BareRoute
    )
    bare("/v1/chat/completions", chat.create, openapi_extra=documented(ChatRequest))
    bare("/v1/completions", completions.create, openapi_extra=documented(CompletionRequest))
    app.add_api_route("/v1/headgate/reload", admin.reload, methods=["POST"], dependencies=key)
    for path, endpoint in (
        ("/v1/models", models.list),
        ("/v1/models/{id:path}", models.get),
        ("/healthz", health.healthz),
        ("/readyz", health.readyz),
        ("/metrics", health.metrics),
    ):
        app.add_api_route(path, endpoint, methods=["GET"], dependencies=key if is_guarded(path) else None)
        app.add_api_route(path, endpoint, methods=["HEAD"], include_in_schema=False)  # the server leaves the body out

    app.add_exception_handler(ApiError, faults.api_error)
    app.add_exception_handler(HTTPException, faults.http_error)
    app.add_exception_handler(ClientDisconnect, faults.client_left)
    app.add_exception_handler(Exception, faults.our_fault)
    door = Door(app, config, Access(config, keyring), limiter, bodies, metrics)
    return door
