"""Errors as OpenAI clients expect them. Each is a value that can become a response or, after the first byte, an event."""

from __future__ import annotations

import math
from collections.abc import Sequence

import orjson
from starlette.responses import Response

from scheduler.messages import REASONS, Finish, Reason, Refuse

DONE = b"data: [DONE]\n\n"

Headers = tuple[tuple[str, str], ...]


class ApiError(Exception):
    """Ends a request with an OpenAI-shaped error."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Headers = (),
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type
        self.param = param
        self.code = code
        self.headers = headers if retry_after_seconds is None else headers + retry_headers(retry_after_seconds)
        self.retry_after_seconds = retry_after_seconds
        self.outcome = "error" if status >= 500 else "refused" if status == 429 else "invalid"

    def body(self) -> bytes:
        return orjson.dumps(
            {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}
        )

    def response(self) -> Response:
        return Response(self.body(), self.status, dict(self.headers), "application/json")

    def events(self) -> bytes:
        """The error after the first byte: an event, then the end of the stream."""
        return b"data: " + self.body() + b"\n\n" + DONE


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def not_allowed(message: str, code: str, param: str | None = None) -> ApiError:
    """A known caller asks for what is not for them."""
    return ApiError(403, message, param=param, code=code)


def key_has_ended() -> ApiError:
    """Of a key that was good when the request came in."""
    return ApiError(401, "This API key has been revoked or has expired.", code="invalid_api_key")


def model_not_found(model: str) -> ApiError:
    return ApiError(
        404,
        f"The model '{model}' does not exist here. GET /v1/models lists what is served.",
        param="model",
        code="model_not_found",
    )


def context_length_exceeded(prompt_tokens: int, limit_tokens: int, param: str, exactly: bool = True) -> ApiError:
    """Not `exactly`: it has at least so many tokens, and nobody counted further."""
    came_to = "came to" if exactly else "came to at least"
    return invalid(
        f"A request may have at most {limit_tokens} tokens here, and at least one of them must be generated. "
        f"Your {param} {came_to} {prompt_tokens} tokens. Please shorten the {param}.",
        param,
        "context_length_exceeded",
    )


def retry_headers(seconds: float) -> Headers:
    """Retry-After knows whole seconds only, so it is rounded up; retry-after-ms is exact."""
    milliseconds = max(0, math.ceil(seconds * 1000))
    return (("retry-after", str(max(1, math.ceil(milliseconds / 1000)))), ("retry-after-ms", str(milliseconds)))


def unavailable(message: str, retry_after_seconds: float = 1.0, code: str = "service_unavailable") -> ApiError:
    return ApiError(503, message, type="service_unavailable", code=code, retry_after_seconds=retry_after_seconds)


def shutting_down() -> ApiError:
    error = unavailable("This server is shutting down. Please retry.", code=Reason.SHUTTING_DOWN)
    error.outcome = "refused"
    return error


def overloaded(reason: Reason, retry_after_seconds: float) -> ApiError:
    sentence = {
        Reason.TIME_BUDGET: "one more request would slow others below the speed they were promised",
        Reason.KV_FOOTPRINT: "the memory that this request is expected to need is not free",
        Reason.TTFT_UNREACHABLE: "the first token would come later than the service tier allows",
        Reason.QUEUE_FULL: "too many requests are waiting already",
    }.get(reason, "the server cannot take this request now")
    return ApiError(
        429,
        f"Not admitted: {sentence} ({reason}). Please retry after {retry_after_seconds:.3g} s.",
        type="rate_limit_exceeded",
        code=reason,
        retry_after_seconds=retry_after_seconds,
    )


def rate_limited(
    family: str, owner: str, per_minute: int, used: float, requested: int, retry_after_seconds: float
) -> ApiError:
    """`family`: "requests" or "tokens"; `owner`: whose limit it is."""
    return ApiError(
        429,
        f"Rate limit reached for {owner} on {family} per minute: limit {per_minute}, used {math.ceil(used)}, "
        f"requested {requested}. Please retry after {retry_after_seconds:.3g} s.",
        type=family,
        code="rate_limit_exceeded",
        retry_after_seconds=retry_after_seconds,
    )


def never_within_rate(owner: str, per_minute: int, requested: int) -> ApiError:
    """Waiting would not help, and clients that retry by themselves are told so."""
    return ApiError(
        429,
        f"Request too large for {owner} on tokens per minute: limit {per_minute}, requested {requested} in the prompt alone. "
        "It would never fit, however long you wait. Please shorten the prompt or ask for a higher limit.",
        type="tokens",
        code="rate_limit_exceeded",
        headers=(("x-should-retry", "false"),),
    )


def too_many_at_once(owner: str, limit: int, num_waiting: int, retry_after_seconds: float) -> ApiError:
    waiting = f", and {num_waiting} waiting" if num_waiting else ""
    return ApiError(
        429,
        f"Too many concurrent requests for {owner}: limit {limit}, all in use{waiting}. "
        f"Please retry after {retry_after_seconds:.3g} s.",
        type="requests",
        code="concurrency_limit",
        retry_after_seconds=retry_after_seconds,
    )


def refused(reason: Reason, retry_after_seconds: float) -> ApiError:
    """A worker's refusal, early or late, in OpenAI's words."""
    match reason:
        case Reason.TOO_LARGE:
            return invalid(
                "The request needs more context or memory than this model's worker has. "
                "Please shorten the prompt or lower max_tokens.",
                code="context_length_exceeded",
            )
        case Reason.UNKNOWN_TIER:
            return invalid("This service tier is not offered here.", "service_tier", reason)
        case Reason.SHUTTING_DOWN:
            return shutting_down()
        case Reason.BAD_REQUEST | Reason.WORKER_FAILED:
            return unavailable("The worker failed while it had this request. Please retry.", code=reason)
        case _:
            return overloaded(reason, retry_after_seconds)


def refused_by(decision: Refuse) -> ApiError:
    return refused(decision.reason, decision.retry_after_seconds)


def failed(finish: int, column: Sequence[int]) -> ApiError:
    """The error that a failing event of the step stream carries; its token column is [reason, retry-after in ms]."""
    known = bool(column) and column[0] < len(REASONS)
    reason = REASONS[column[0]] if known else Reason.WORKER_FAILED
    if finish == Finish.REFUSED:
        return refused(reason, column[1] / 1000 if len(column) > 1 else 1.0)
    if reason is Reason.SHUTTING_DOWN:
        return shutting_down()
    return unavailable("The worker failed while it had this request. Please retry.", code=reason)
