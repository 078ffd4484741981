"""POST /v1/completions: prompts as text or token ids, several in one call, each continued `n` times."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from scheduler.messages import Finish
from service.chunks import CompletionShape
from service.detokenize import escape
from service.errors import invalid
from service.fleet import Model
from service.generate import Generator, heading, limit_tokens, renderings_for, requests_for, room, wanted_tokens
from service.keys import Key
from service.schema import DEFAULT_COMPLETION_TOKENS, CompletionRequest, check_prompt_ids, parse_completion
from service.stream import Order
from service.token_log import CompletionLog, Echoed

MAX_PROMPT_LOGPROBS = 65536  # 0.6 MB on the step stream, which all requests share

Value = TypeVar("Value")


class Completions:
    def __init__(self, generator: Generator) -> None:
        self._generator = generator

    async def create(self, request: Request) -> Response:
        """`n` choices per prompt; one usage and one end for all of them."""
        generator = self._generator
        parse = functools.partial(parse_completion, max_choices=generator.config.max_choices)
        visit, body = await generator.read(request, parse)
        model = generator.model(visit, body)
        key, wanted = visit.key, wanted_tokens(visit.key, body, DEFAULT_COMPLETION_TOKENS)
        prompts = [await self._ids(model, key, prompt) for prompt in body.prompt]
        check_scores(sum(map(len, prompts)), body)
        limits = [room(model.worker, key, len(ids), wanted, "prompt", body.min_tokens) for ids in prompts]
        if body.only_scores:
            limits = [1] * len(limits)  # a step computes them, and draws a token whether it is wanted or not
        requests = requests_for(model, body, visit, list(zip(prompts, limits, strict=True)))
        echoes = await self._echoes(model, body)
        order = Order(
            requests=requests,
            renderings=renderings_for(model, body, len(requests)),
            echoes=repeated([escape(echo) for echo in echoes], body.n),
            logs=await self._logs(model, body, prompts, echoes),
            shape=CompletionShape(heading("cmpl", model, body, requests[0], visit.tier if body.service_tier else None)),
            include_usage=body.include_usage,
            prompt_tokens=sum(map(len, prompts)),
        )
        answer = generator.answer(visit, model, order, body.stream)
        if body.max_tokens == 0 and not body.only_scores:  # nothing to compute, so nothing for a worker to do
            for choice in answer.choices:
                choice.take((), Finish.LENGTH, time.monotonic())
            return answer
        return await generator.submit(visit, model, answer, order)

    @staticmethod
    async def _ids(model: Model, key: Key, prompt: str | list[Any]) -> list[int]:
        if isinstance(prompt, str):
            ids = await model.text.prompt(prompt, limit_tokens(model.worker, key))
            if not ids:
                raise invalid("'prompt' must hold at least one token.", "prompt")
            model.check_text(ids, "prompt")
            return ids
        room(
            model.worker, key, len(prompt), None, "prompt"
        )  # before the ids are looked at: that takes time for millions
        check_prompt_ids(prompt, model.vocabulary)
        return prompt

    @staticmethod
    async def _echoes(model: Model, body: CompletionRequest) -> list[str]:
        """Per prompt the text that stands in front of what is generated."""
        if not body.echo:
            return [""] * len(body.prompt)
        if isinstance(body.prompt[0], str):
            return body.prompt
        return await model.text.decode(body.prompt)

    @staticmethod
    async def _logs(
        model: Model, body: CompletionRequest, prompts: Sequence[Sequence[int]], echoes: Sequence[str]
    ) -> list[CompletionLog]:
        """Per choice; none where nobody wants to know of single tokens."""
        if not body.tells_of_tokens:
            return []
        wants_logprobs = body.logprobs is not None
        echoed: list[Echoed | None] = [None] * len(prompts)
        if body.echo and wants_logprobs:
            echoed = [await model.text.echoed(ids, echo) for ids, echo in zip(prompts, echoes, strict=True)]
        return [
            CompletionLog(model.text.names, wants_logprobs, body.return_token_ids, ids, one, body.only_scores)
            for ids, one in zip(repeated(prompts, body.n), repeated(echoed, body.n), strict=True)
        ]


def repeated(values: Sequence[Value], times: int) -> list[Value]:
    """Each of them so many times, one after the other."""
    return [value for value in values for _ in range(times)]


def check_scores(prompt_tokens: int, body: CompletionRequest) -> None:
    """They come in one piece each. Raises ApiError when these are too many."""
    scores = prompt_tokens * body.n * (1 + (body.logprobs or 0))
    if body.echo and body.logprobs is not None and scores > MAX_PROMPT_LOGPROBS:
        raise invalid(
            f"'logprobs' with 'echo' asks for {scores} log probabilities of prompts (tokens x n x (1 + logprobs)); "
            f"one request gets at most {MAX_PROMPT_LOGPROBS}.",
            "logprobs",
        )
