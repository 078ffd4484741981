"""How fast a server generates, measured through HTTP: streamed completions of random token ids, one client for all servers."""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

PROMPT_TOKENS = ANSWER_TOKENS = 128
CONCURRENT = 8
LONG_PROMPT_TOKENS = 512
LONG_PROMPTS = 3
IDS = range(300, 4000)  # that any tokenizer here knows
TIMEOUT_SECONDS = 120.0

clock = time.monotonic


@dataclass(frozen=True, slots=True)
class Dialect:
    """What a server wants to be sent, and what it says."""

    path: str
    body: Callable[[list[int], int], dict[str, Any]]  # of prompt and max_tokens
    has_text: Callable[[dict[str, Any]], bool]  # whether an event brings a token
    count: Callable[[dict[str, Any]], int]  # tokens of the answer, as an event says at the end; else 0


@dataclass(frozen=True, slots=True)
class Stream:
    """One streamed answer: when each event that brought text came."""

    sent_at: float
    times: list[float]
    tokens: int
    end: dict[str, Any]  # its last event

    @property
    def first_seconds(self) -> float:
        return self.times[0] - self.sent_at

    @property
    def per_second(self) -> float:
        """From the first to the last token."""
        return (self.tokens - 1) / (self.times[-1] - self.times[0])

    def tokens_between(self, start: float, end: float) -> float:
        """After `start`, up to `end`; an event may bring several."""
        return sum(start < at <= end for at in self.times) * self.tokens / len(self.times)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A server that can be asked."""

    port: int
    dialect: Dialect
    key: str = ""

    async def ask(self, prompt: list[int], max_tokens: int) -> Stream:
        """RuntimeError when the answer has not as many tokens."""
        async with asyncio.timeout(TIMEOUT_SECONDS):
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            sent_at = clock()
            writer.write(http_post(self.dialect.path, self.dialect.body(prompt, max_tokens), self.key))
            try:
                lines = [(clock(), line) async for line in reader]
            finally:
                writer.close()
        events = [(at, json.loads(line[6:])) for at, line in lines if line.startswith(b"data: {")]
        times = [at for at, event in events if self.dialect.has_text(event)]
        tokens = max((self.dialect.count(event) for _, event in events), default=0)
        if tokens != max_tokens or not times:
            raise RuntimeError(f"{tokens} tokens came instead of {max_tokens}: {lines[:1]} … {lines[-3:]}")
        return Stream(sent_at, times, tokens, events[-1][1])

    async def ask_all(self, prompts: Sequence[list[int]], max_tokens: int) -> list[Stream]:
        return await asyncio.gather(*(self.ask(prompt, max_tokens) for prompt in prompts))


def http_post(path: str, body: dict[str, Any], key: str = "") -> bytes:
    content = json.dumps(body).encode()
    bearer = f"authorization: Bearer {key}\r\n" if key else ""
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\nconnection: close\r\n"
    return f"{head}{bearer}content-length: {len(content)}\r\n\r\n".encode() + content


def prompt_of(tokens: int) -> list[int]:
    """No two are alike, so that no cache has it."""
    return random.choices(IDS, k=tokens)


async def warm_up(endpoint: Endpoint) -> None:
    await endpoint.ask_all([prompt_of(PROMPT_TOKENS) for _ in range(CONCURRENT)], 8)


async def alone(endpoint: Endpoint, prompt_tokens: int = PROMPT_TOKENS, tokens: int = ANSWER_TOKENS) -> float:
    """Tokens per second of one request, after its first."""
    return (await endpoint.ask(prompt_of(prompt_tokens), tokens)).per_second


async def together(endpoint: Endpoint) -> float:
    """Tokens per second of all requests, from when the last of them has begun to when the first of them ends."""
    streams = await endpoint.ask_all([prompt_of(PROMPT_TOKENS) for _ in range(CONCURRENT)], ANSWER_TOKENS)
    start, end = max(s.times[0] for s in streams), min(s.times[-1] for s in streams)
    if start >= end:
        raise RuntimeError(f"the {CONCURRENT} requests did not run at the same time")
    return sum(s.tokens_between(start, end) for s in streams) / (end - start)


async def prefill(endpoint: Endpoint) -> float:
    """Prompt tokens per second until the first token, one prompt after the other; the median."""
    streams = [await endpoint.ask(prompt_of(LONG_PROMPT_TOKENS), 1) for _ in range(LONG_PROMPTS)]
    return LONG_PROMPT_TOKENS / statistics.median(s.first_seconds for s in streams)
