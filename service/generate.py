"""What both generating routes do once a body is parsed: prompts become an order, the order goes to a worker."""

from __future__ import annotations

import asyncio
import itertools
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from starlette.requests import Request as HttpRequest

from scheduler.messages import Request, Sampling, WorkerInfo
from service.body import Bodies
from service.chunks import Heading
from service.config import GatewayConfig
from service.detokenize import Rendering
from service.door import VISIT, Visit
from service.errors import ApiError, context_length_exceeded, invalid, not_allowed
from service.fleet import Fleet, Model
from service.keys import Key
from service.limits import Allowance
from service.metrics import Metrics
from service.schema import AUTO, GenerateRequest, Parsed, check_ids
from service.stream import Answer, CollectedAnswer, LoggedCollection, LoggedStream, Order, StreamedAnswer

SEED_MASK = (1 << 63) - 1
MAX_REPEATED_TOKENS = 1 << 20  # of prompts, times n: so many are copied, and may come back with every answer
MAX_LOGPROBS = 1 << 18  # of what one request generates: 18 MB of JSON in a chat
SEED_STEP = 0x9E3779B97F4A7C15  # between the seeds of a prompt's answers: far apart, whatever the first one is
PARSE_INLINE_BYTES = 256 << 10  # many parts or messages, checked one by one in Python: a thread lets others run between


@dataclass(frozen=True, slots=True)
class Generator:
    """The parts of the gateway that a generating route uses."""

    config: GatewayConfig
    bodies: Bodies
    fleet: Fleet
    metrics: Metrics

    async def read(self, request: HttpRequest, parse: Callable[[dict[str, Any]], Parsed]) -> tuple[Visit, Parsed]:
        """The body, checked. Raises ApiError."""
        visit: Visit = request.scope[VISIT]
        fields = await self.bodies.read_json(request, visit.body)
        if visit.body.bytes > PARSE_INLINE_BYTES:
            return visit, await asyncio.to_thread(parse, fields)
        return visit, parse(fields)

    def model(self, visit: Visit, body: GenerateRequest) -> Model:
        """Raises ApiError when it is not served here, or not to this caller. From here on, the request has model and tier."""
        key = visit.key
        if not key.may_use_model(body.model):
            raise model_not_allowed(body.model, key.models)
        model = self.fleet.model(body.model)
        visit.model = model.worker.model
        visit.tier = tier_for(key, body.service_tier)
        check_against(model, body)
        return model

    def answer(self, visit: Visit, model: Model, order: Order, stream: bool) -> Answer:
        if stream:
            kind: type[Answer] = LoggedStream if order.logs else StreamedAnswer
        else:
            kind = LoggedCollection if order.logs else CollectedAnswer
        return kind(visit, model.client, order, self.config, self.metrics)

    async def submit(self, visit: Visit, model: Model, answer: Answer, order: Order) -> Answer:
        """Raises ApiError when the caller's limits or the worker refuse."""
        if visit.allowance is not None:
            # not before the prompt is known to be good: nobody waits in line only to hear that it is too long
            await Turn(visit, visit.allowance).come(model.worker.tier_wait_seconds.get(visit.tier, math.inf))
            longest = max(request.max_tokens for request in order.requests)
            await visit.allowance.reserve(order.prompt_tokens, longest, len(order.requests), time.monotonic())
            visit.answer = answer
        await answer.submit(order.requests)
        self.bodies.release(visit.body)
        return answer


class Turn:
    """A place in the caller's own line. While a visit has it, it is what the door ends."""

    completion_tokens = 0

    def __init__(self, visit: Visit, allowance: Allowance) -> None:
        self._visit = visit
        self._allowance = allowance
        visit.answer = self

    async def come(self, wait_seconds: float) -> None:
        """Raises ApiError when it takes longer, or what has ended the visit meanwhile."""
        try:
            await self._allowance.slot(wait_seconds)
        except ApiError:
            self._visit.check()
            raise
        self._visit.check()

    def abandon(self, outcome: str) -> None:
        self._allowance.leave()  # which wakes who waits

    def fail(self, error: ApiError) -> None:
        self._allowance.leave()


def model_not_allowed(model: str, allowed: Sequence[str]) -> ApiError:
    names = ", ".join(allowed)
    return not_allowed(
        f"This API key may not use the model '{model}'. It may use: {names}.", "model_not_allowed", "model"
    )


def tier_for(key: Key, asked: str | None) -> str:
    """The service tier that a request gets. Raises ApiError when its key has no right to it."""
    if asked in (None, AUTO):
        return key.default_tier if key.may_use_tier(key.default_tier) else key.tiers[0]
    if not key.may_use_tier(asked):
        names = ", ".join(key.tiers)
        message = f"This API key may not use the service tier '{asked}'. It may use: {names}."
        raise not_allowed(message, "tier_not_allowed", "service_tier")
    return asked


def check_against(model: Model, body: GenerateRequest) -> None:
    """What only the model can tell of a body. Raises ApiError."""
    check_ids(body.stop_token_ids, model.vocabulary, "stop_token_ids")
    check_ids([id for id, _ in body.logit_bias], model.vocabulary, "logit_bias")
    if body.alternatives is not None and model.worker.engine == "simulated":
        raise invalid("'logprobs' needs a model: the simulated engine draws no tokens, it has no weights.", "logprobs")


def context_tokens(worker: WorkerInfo, key: Key) -> int:
    """How many tokens a prompt and its answer may have together."""
    return min(worker.context_tokens, key.max_context_tokens or worker.context_tokens)


def limit_tokens(worker: WorkerInfo, key: Key) -> int:
    """How many tokens a prompt and one more may have together."""
    return min(context_tokens(worker, key), worker.max_prompt_tokens + 1)


def wanted_tokens(key: Key, body: GenerateRequest, unsaid_tokens: int | None) -> int | None:
    """How many tokens an answer may have; `unsaid_tokens` where the client does not say. Raises ApiError."""
    most = key.max_output_tokens
    if body.limit_tokens is None:
        return min((tokens for tokens in (unsaid_tokens, most) if tokens is not None), default=None)
    if most is not None and body.limit_tokens > most:
        message = (
            f"'{body.limit_param}' is {body.limit_tokens}, but answers to this API key have at most {most} tokens."
        )
        raise invalid(message, body.limit_param)
    return body.limit_tokens


def room(
    worker: WorkerInfo, key: Key, prompt_tokens: int, wanted_tokens: int | None, param: str, min_tokens: int = 0
) -> int:
    """How many tokens may be generated. Raises ApiError when the prompt leaves room for none, or for too few."""
    limit = limit_tokens(worker, key)
    if prompt_tokens + 1 > limit:
        raise context_length_exceeded(prompt_tokens, limit, param)
    left = context_tokens(worker, key) - prompt_tokens
    most = left if wanted_tokens is None else min(wanted_tokens, left)
    if min_tokens > most:
        raise invalid(f"'min_tokens' is {min_tokens}, but no more than {most} tokens may be generated.", "min_tokens")
    return most


def requests_for(
    model: Model, body: GenerateRequest, visit: Visit, prompts: Sequence[tuple[Sequence[int], int]]
) -> list[Request]:
    """`n` for each prompt and its max_tokens, one after the other. Raises ApiError when that is too much."""
    repeated_tokens = body.n * sum(len(prompt) for prompt, _ in prompts)
    if body.n > 1 and repeated_tokens > MAX_REPEATED_TOKENS:
        raise invalid(
            f"'n' asks for prompts of {repeated_tokens} tokens in all; together they may have {MAX_REPEATED_TOKENS}.",
            "n",
        )
    check_logprobs(body, sum(max_tokens for _, max_tokens in prompts))
    sampling = sampling_for(model.worker, body)
    samplings = [sampling, *(replace(sampling, seed=seed_of(sampling.seed, number)) for number in range(1, body.n))]
    stop_ids = frozenset((*body.stop_token_ids, *(() if body.ignore_eos else model.worker.eos_ids)))
    return [
        Request(
            id=model.client.next_id(),
            gateway=model.client.gateway,
            prompt=prompt,
            max_tokens=max_tokens,
            tier=visit.tier,
            tenant=visit.key.tenant,
            sampling=sampling,
            stop_ids=stop_ids,
            ignore_eos=body.ignore_eos,
            logprobs=body.alternatives,
            prompt_logprobs=body.alternatives is not None and body.begins_with_prompt,
        )
        for (prompt, max_tokens), sampling in itertools.product(prompts, samplings)
    ]


def told_tokens(body: GenerateRequest) -> int | None:
    """Where the client says no limit, an answer with log probabilities ends where they do. None: nothing is told."""
    return None if body.alternatives is None else MAX_LOGPROBS // (body.n * (1 + body.alternatives))


def check_logprobs(body: GenerateRequest, max_tokens: int) -> None:
    """`max_tokens`: of all prompts. Raises ApiError when an answer might tell too much: it is held until it is whole."""
    if body.alternatives is None:
        return
    asked = body.n * max_tokens * (1 + body.alternatives)
    if asked > MAX_LOGPROBS:
        raise invalid(
            f"'logprobs' asks for up to {asked} log probabilities (tokens that may be generated x n x (1 + likeliest ones)); "
            f"one request gets at most {MAX_LOGPROBS}. Please lower max_tokens.",
            "logprobs",
        )


def sampling_for(worker: WorkerInfo, body: GenerateRequest) -> Sampling:
    """Where the client says nothing, the model's own way holds."""
    return Sampling(
        temperature=worker.temperature if body.temperature is None else body.temperature,
        top_p=worker.top_p if body.top_p is None else body.top_p,
        top_k=worker.top_k if body.top_k is None else max(0, body.top_k),
        seed=random.getrandbits(63) if body.seed is None else body.seed & SEED_MASK,
        min_p=worker.min_p if body.min_p is None else body.min_p,
        repetition_penalty=worker.repetition_penalty if body.repetition_penalty is None else body.repetition_penalty,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        logit_bias=body.logit_bias,
        min_tokens=body.min_tokens,
    )


def seed_of(seed: int, number: int) -> int:
    """Of a prompt's answer: the first one has the seed itself, as if it were the only one."""
    return (seed + number * SEED_STEP) & SEED_MASK


def renderings_for(model: Model, body: GenerateRequest, count: int) -> list[Rendering]:
    make = model.text.traced_rendering if body.tells_of_tokens else model.text.rendering
    return [make(body.stop, body.min_tokens) for _ in range(count)]


def heading(
    prefix: str,
    model: Model,
    body: GenerateRequest,
    first: Request,
    tier: str | None,
    prompt_ids: Sequence[int] | None = None,
) -> Heading:
    return Heading(
        id=f"{prefix}-{first.gateway:08x}{first.id:08x}",
        created=int(time.time()),
        model=model.worker.model,
        fingerprint=model.worker.fingerprint,
        service_tier=tier,
        include_usage=body.include_usage,
        prompt_ids=prompt_ids,
    )
