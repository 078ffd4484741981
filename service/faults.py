"""Exceptions that leave a route, turned into answers at exactly one place."""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from service.door import VISIT, Visit
from service.errors import ApiError

CLIENT_CLOSED_REQUEST = 499


async def api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    visit: Visit = request.scope[VISIT]
    visit.settle_error(error)
    return error.response()


async def http_error(request: Request, error: Exception) -> Response:
    """No such path, or not with this method."""
    assert isinstance(error, HTTPException)
    path = request.url.path
    if error.status_code == 404:
        message, code = f"There is no {path} here. The API is below /v1.", "not_found"
    elif error.status_code == 405:
        message, code = f"{path} does not take {request.method}.", "method_not_allowed"
    else:
        message, code = str(error.detail), None
    return ApiError(error.status_code, message, code=code, headers=tuple((error.headers or {}).items())).response()


async def client_left(request: Request, error: Exception) -> Response:
    """Nobody will read it."""
    visit: Visit = request.scope[VISIT]
    visit.settle("cancelled")
    return Response(status_code=CLIENT_CLOSED_REQUEST)


async def our_fault(request: Request, error: Exception) -> Response:
    """A bug. The server logs the traceback; the client learns nothing but that it was not its fault."""
    visit: Visit = request.scope[VISIT]
    visit.settle("error")
    message = f"The server made a mistake. Please report the request id {visit.id.decode()}."
    return ApiError(500, message, type="server_error", code="internal_error").response()
