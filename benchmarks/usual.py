"""The same gateway as it is usually written, for comparison: `python -m benchmarks.usual gateway LAUNCH`.

FastAPI and a StreamingResponse, httpx to the worker, a queue per request, the tokenizer's own incremental decoder, a dict
and json per chunk, prometheus_client per token. Same worker, same step stream; only what a measurement needs works.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import jinja2
import uvicorn
from fastapi import FastAPI
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from prometheus_client import Histogram, generate_latest
from pydantic import BaseModel
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from headgate.lifeline import watch
from headgate.supervisor import Launch
from scheduler.messages import FrameReader, Request, StepFrame, WorkerInfo

GATEWAY = 4711
GAPS = Histogram("usual_inter_token_latency_seconds", "Time between two tokens")


class Message(BaseModel):
    role: str
    content: str


class ChatRequest(BaseModel):
    model: str
    messages: list[Message]
    max_tokens: int
    stream: bool = True
    ignore_eos: bool = False


def create_app(worker_socket: str) -> FastAPI:
    queues: dict[int, asyncio.Queue[tuple[list[int], int]]] = {}
    state: dict[str, Any] = {"ids": 0, "ready": False}
    client = httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(uds=worker_socket), base_url="http://worker")

    async def read_steps() -> None:
        while (answer := await client.get("/model")).status_code != 200:  # noqa: ASYNC110 (the worker starts)
            await asyncio.sleep(0.1)
        info = state["info"] = WorkerInfo.decode(answer.content)
        state["tokenizer"] = Tokenizer.from_str(info.tokenizer_json)
        state["template"] = jinja2.Environment().from_string(info.chat_template or "")
        reader = FrameReader()
        async with client.stream("GET", f"/steps?gateway={GATEWAY}", timeout=None) as steps:
            state["ready"] = True
            async for piece in steps.aiter_raw():
                for frame in reader.feed(piece):
                    if isinstance(frame, StepFrame):
                        deal(frame)

    def deal(frame: StepFrame) -> None:
        at = 0
        for id, word in zip(frame.ids, frame.info, strict=True):
            count = word & 0xFFFF
            if id in queues:
                queues[id].put_nowait((frame.tokens[at : at + count], word >> 16))
            at += count

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(read_steps())
        yield
        task.cancel()

    app = FastAPI(lifespan=life)

    @app.get("/readyz")
    async def readyz() -> JSONResponse:
        return JSONResponse({"models": [state["info"].model]} if state["ready"] else {}, 200 if state["ready"] else 503)

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(generate_latest().decode())

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest) -> StreamingResponse:
        text = state["template"].render(messages=[m.model_dump() for m in body.messages], add_generation_prompt=True)
        prompt = state["tokenizer"].encode(text, add_special_tokens=False).ids
        state["ids"] += 1
        request = Request(state["ids"], GATEWAY, prompt, body.max_tokens, ignore_eos=body.ignore_eos)
        queues[request.id] = asyncio.Queue()
        answer = await client.post(f"/requests?gateway={GATEWAY}", content=request.encode())
        assert answer.json()["decision"] == "accept", answer.text
        return StreamingResponse(chunks(request.id, body.model), media_type="text/event-stream")

    async def chunks(id: int, model: str) -> AsyncIterator[str]:
        decoder, queue, finish, last_at = DecodeStream(), queues[id], 0, time.monotonic()
        while not finish:
            ids, finish = await queue.get()
            for token in ids:
                now = time.monotonic()
                GAPS.observe(now - last_at)
                last_at = now
                yield chunk(id, model, {"content": decoder.step(state["tokenizer"], token) or ""}, None)
        del queues[id]
        yield chunk(id, model, {}, "length")
        yield "data: [DONE]\n\n"

    def chunk(id: int, model: str, delta: dict[str, str], finish_reason: str | None) -> str:
        fields = {
            "id": f"chatcmpl-{GATEWAY:08x}{id:08x}",
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": state["info"].fingerprint,
            "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}],
        }
        return f"data: {json.dumps(fields, separators=(',', ':'))}\n\n"

    return app


def main(arguments: list[str]) -> None:
    launch = Launch(**json.loads(arguments[0]))
    watch(launch.lifeline_fd, launch.folder)
    app = create_app(json.loads(launch.config)["workers"][0])
    server = uvicorn.Server(uvicorn.Config(app, access_log=False, log_level="warning"))
    server.run(sockets=[socket.socket(fileno=launch.socket_fds[0])])


if __name__ == "__main__":
    main(sys.argv[2:])
