"""What both generating routes do once a body is parsed: prompts become an order, the order goes to a worker."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request as HttpRequest

from scheduler.messages import Request, Sampling, WorkerInfo
from service.body import Bodies
from service.chunks import Heading
from service.config import GatewayConfig
from service.door import VISIT, Visit
from service.errors import context_length_exceeded
from service.fleet import Fleet, Model
from service.metrics import Metrics
from service.schema import GenerateRequest, Parsed
from service.stream import Answer, CollectedAnswer, Order, StreamedAnswer

SEED_MASK = (1 << 63) - 1
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
        """Raises ApiError when it is not served here. From here on, the request is counted under its model."""
        model = self.fleet.model(body.model)
        visit.model = model.worker.model
        visit.tier = body.service_tier or "default"
        return model

    def answer(self, visit: Visit, model: Model, order: Order, stream: bool) -> Answer:
        kind = StreamedAnswer if stream else CollectedAnswer
        return kind(visit, model.client, order, self.config, self.metrics)

    async def submit(self, visit: Visit, answer: Answer, order: Order) -> Answer:
        """Raises ApiError when the worker refuses."""
        await answer.submit(order.requests)
        self.bodies.release(visit.body)
        return answer


def limit_tokens(worker: WorkerInfo) -> int:
    """How many tokens a prompt and one more may have together."""
    return min(worker.context_tokens, worker.max_prompt_tokens + 1)


def room(worker: WorkerInfo, prompt_tokens: int, wanted_tokens: int | None, param: str) -> int:
    """How many tokens may be generated. Raises ApiError when the prompt leaves room for none."""
    limit = limit_tokens(worker)
    if prompt_tokens + 1 > limit:
        raise context_length_exceeded(prompt_tokens, limit, param)
    left = worker.context_tokens - prompt_tokens
    return left if wanted_tokens is None else min(wanted_tokens, left)


def requests_for(
    model: Model, body: GenerateRequest, tier: str, prompts: Sequence[tuple[Sequence[int], int]]
) -> list[Request]:
    """One per prompt and its max_tokens."""
    seed = random.getrandbits(63) if body.seed is None else body.seed & SEED_MASK
    worker = model.worker
    sampling = Sampling(
        temperature=worker.temperature if body.temperature is None else body.temperature,
        top_p=worker.top_p if body.top_p is None else body.top_p,
        top_k=worker.top_k if body.top_k is None else max(0, body.top_k),
        seed=seed,
    )
    stop_ids = frozenset(() if body.ignore_eos else worker.eos_ids)
    return [
        Request(
            id=model.client.next_id(),
            gateway=model.client.gateway,
            prompt=prompt,
            max_tokens=max_tokens,
            tier=tier,
            sampling=sampling,
            stop_ids=stop_ids,
            ignore_eos=body.ignore_eos,
        )
        for prompt, max_tokens in prompts
    ]


def heading(prefix: str, model: Model, body: GenerateRequest, first: Request, tier: str | None) -> Heading:
    return Heading(
        id=f"{prefix}-{first.gateway:08x}{first.id:08x}",
        created=int(time.time()),
        model=model.worker.model,
        fingerprint=model.worker.fingerprint,
        service_tier=tier,
        include_usage=body.include_usage,
    )
