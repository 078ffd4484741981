"""Requests of every tier to both models, for as long as a dashboard is looked at."""

from __future__ import annotations

import threading
from types import TracebackType

from openai import APIError, OpenAI

MODELS = ("headgate-demo", "simulated-h100")
TIERS = ("priority", "default", "flex")
TOKENS = 600  # of an answer: some seconds, for what panels tell of requests that have run for a second


def client(port: int, key: str = "none") -> OpenAI:
    return OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=key, max_retries=0, timeout=60)


def stream_text(api: OpenAI, model: str, tokens: int, tier: str = "default") -> str:
    """A whole answer of exactly `tokens` tokens, streamed."""
    stream = api.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Document `textwrap.dedent`"}],
        max_completion_tokens=tokens,
        service_tier=tier,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    return "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)


class Load:
    """One stream at a time per model and tier, while the block runs."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(m, t)) for m in MODELS for t in TIERS]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, model: str, tier: str) -> None:
        with client(self._port) as api:
            while not self._over.is_set():
                try:
                    stream_text(api, model, TOKENS, tier)
                except APIError:  # a refusal is a thing to be seen, too
                    self._over.wait(0.2)
