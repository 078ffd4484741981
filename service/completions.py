"""POST /v1/completions: prompts as text or token ids, several in one call, each continued once."""

from __future__ import annotations

import time
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from scheduler.messages import Finish
from service.chunks import CompletionShape
from service.detokenize import escape
from service.errors import invalid
from service.fleet import Model
from service.generate import Generator, heading, requests_for, room
from service.schema import CompletionRequest, parse_completion
from service.stream import Order
from service.text import Text


class Completions:
    def __init__(self, generator: Generator) -> None:
        self._generator = generator

    async def create(self, request: Request) -> Response:
        """A choice per prompt; one usage and one end for all of them."""
        generator = self._generator
        visit, fields = await generator.read(request)
        body = parse_completion(fields)
        model = generator.model(visit, body)
        self._check_number(body)
        prompts = [await self._ids(model.text, prompt) for prompt in body.prompt]
        limits = [room(model.worker, len(ids), body.max_tokens, "prompt") for ids in prompts]
        requests = requests_for(model, body, visit.tier, list(zip(prompts, limits, strict=True)))
        shape = CompletionShape(heading("cmpl", model, body, requests[0], body.service_tier))
        renderings = [model.text.rendering(body.stop) for _ in prompts]
        order = Order(requests, renderings, self._echoes(model, body), shape, body.include_usage)
        answer = generator.answer(visit, model, order, body.stream)
        if body.max_tokens == 0:  # nothing to generate, so nothing for a worker to do
            for choice in answer.choices:
                choice.take((), Finish.LENGTH, time.monotonic())
            return answer
        return await generator.submit(visit, answer, order)

    def _check_number(self, body: CompletionRequest) -> None:
        most = self._generator.config.max_prompts
        if len(body.prompt) > most:
            raise invalid(f"'prompt' takes at most {most} prompts in one request, not {len(body.prompt)}.", "prompt")

    async def _ids(self, text: Text, prompt: Any) -> list[int]:
        if isinstance(prompt, str):
            ids = await text.prompt(prompt)
            if not ids:
                raise invalid("'prompt' must hold at least one token.", "prompt")
            return ids
        wrong = next((id for id in prompt if not 0 <= id < text.vocabulary), None)
        if wrong is not None:
            raise invalid(
                f"'prompt' holds {wrong}, which is no token id: they are 0 to {text.vocabulary - 1}.", "prompt"
            )
        return list(prompt)

    @staticmethod
    def _echoes(model: Model, body: CompletionRequest) -> list[bytes]:
        if not body.echo:
            return [b""] * len(body.prompt)
        return [escape(prompt if isinstance(prompt, str) else model.text.decode(prompt)) for prompt in body.prompt]
