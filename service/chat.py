"""POST /v1/chat/completions."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from service.chunks import ChatShape
from service.generate import Generator, heading, limit_tokens, requests_for, room
from service.schema import parse_chat
from service.stream import Order


class Chat:
    def __init__(self, generator: Generator) -> None:
        self._generator = generator

    async def create(self, request: Request) -> Response:
        """Messages in, a message out: in one piece, or as server-sent events."""
        generator = self._generator
        visit, body = await generator.read(request, parse_chat)
        model = generator.model(visit, body)
        messages = [message.for_template() for message in body.messages]
        prompt = await model.text.chat_prompt(messages, limit_tokens(model.worker))
        max_tokens = room(model.worker, len(prompt), body.limit_tokens, "messages")
        requests = requests_for(model, body, visit.tier, [(prompt, max_tokens)])
        shape = ChatShape(heading("chatcmpl", model, body, requests[0], visit.tier))
        order = Order(requests, [model.text.rendering(body.stop)], [b""], shape, body.include_usage)
        answer = generator.answer(visit, model, order, body.stream)
        return await generator.submit(visit, answer, order)
