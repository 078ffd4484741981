"""POST /v1/chat/completions."""

from __future__ import annotations

import functools

from starlette.requests import Request
from starlette.responses import Response

from service.chunks import ChatShape
from service.fleet import Model
from service.generate import (
    Generator,
    heading,
    limit_tokens,
    renderings_for,
    requests_for,
    room,
    told_tokens,
    wanted_tokens,
)
from service.schema import ChatRequest, parse_chat
from service.stream import Order
from service.token_log import ChatLog


class Chat:
    def __init__(self, generator: Generator) -> None:
        self._generator = generator

    async def create(self, request: Request) -> Response:
        """Messages in, a message out: in one piece, or as server-sent events."""
        generator = self._generator
        parse = functools.partial(parse_chat, max_choices=generator.config.max_choices)
        visit, body = await generator.read(request, parse)
        model = generator.model(visit, body)
        wanted = wanted_tokens(visit.key, body, told_tokens(body))
        messages = [message.for_template() for message in body.messages]
        prompt = await model.text.chat_prompt(messages, limit_tokens(model.worker, visit.key))
        model.check_text(prompt, "messages")
        max_tokens = room(model.worker, visit.key, len(prompt), wanted, "messages", body.min_tokens)
        requests = requests_for(model, body, visit, [(prompt, max_tokens)])
        told_ids = prompt if body.return_token_ids else None
        order = Order(
            requests=requests,
            renderings=renderings_for(model, body, body.n),
            echoes=[b""] * body.n,
            logs=self._logs(model, body),
            shape=ChatShape(heading("chatcmpl", model, body, requests[0], visit.tier, told_ids)),
            include_usage=body.include_usage,
            prompt_tokens=len(prompt),
        )
        answer = generator.answer(visit, model, order, body.stream)
        return await generator.submit(visit, model, answer, order)

    @staticmethod
    def _logs(model: Model, body: ChatRequest) -> list[ChatLog]:
        if not body.tells_of_tokens:
            return []
        return [ChatLog(model.text.names, body.logprobs, body.return_token_ids) for _ in range(body.n)]
