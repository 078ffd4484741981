"""POST /v1/completions: prompts as text or token ids, several in one call, each continued once."""

from __future__ import annotations

import functools
import time
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from scheduler.messages import Finish
from service.chunks import CompletionShape
from service.detokenize import escape
from service.errors import invalid
from service.fleet import Model
from service.generate import Generator, heading, limit_tokens, requests_for, room
from service.schema import CompletionRequest, check_ids, parse_completion
from service.stream import Order


class Completions:
    def __init__(self, generator: Generator) -> None:
        self._generator = generator

    async def create(self, request: Request) -> Response:
        """A choice per prompt; one usage and one end for all of them."""
        generator = self._generator
        parse = functools.partial(parse_completion, max_prompts=generator.config.max_prompts)
        visit, body = await generator.read(request, parse)
        model = generator.model(visit, body)
        prompts = [await self._ids(model, prompt) for prompt in body.prompt]
        limits = [room(model.worker, len(ids), body.max_tokens, "prompt") for ids in prompts]
        requests = requests_for(model, body, visit.tier, list(zip(prompts, limits, strict=True)))
        shape = CompletionShape(heading("cmpl", model, body, requests[0], body.service_tier))
        renderings = [model.text.rendering(body.stop) for _ in prompts]
        order = Order(requests, renderings, await self._echoes(model, body), shape, body.include_usage)
        answer = generator.answer(visit, model, order, body.stream)
        if body.max_tokens == 0:  # nothing to generate, so nothing for a worker to do
            for choice in answer.choices:
                choice.take((), Finish.LENGTH, time.monotonic())
            return answer
        return await generator.submit(visit, answer, order)

    @staticmethod
    async def _ids(model: Model, prompt: str | list[Any]) -> list[int]:
        if isinstance(prompt, str):
            ids = await model.text.prompt(prompt, limit_tokens(model.worker))
            if not ids:
                raise invalid("'prompt' must hold at least one token.", "prompt")
            return ids
        room(model.worker, len(prompt), None, "prompt")  # before the ids are looked at: that takes time for millions
        check_ids(prompt, model.text.vocabulary)
        return prompt

    @staticmethod
    async def _echoes(model: Model, body: CompletionRequest) -> list[bytes]:
        if not body.echo:
            return [b""] * len(body.prompt)
        if isinstance(body.prompt[0], str):
            return [escape(prompt) for prompt in body.prompt]
        return [escape(text) for text in await model.text.decode(body.prompt)]
