"""The prefix cache from one end to the other: what an answer's usage tells of it, and who hits whose blocks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from headgate.key_book import KeyBook
from service.keys import NO_DIGEST, Key, mint

START = list(range(1000, 1200))  # twelve blocks and a half
MODELS = {
    "native": [],
    "simulated": ["--engine", "simulated", "--hardware", "h100"],
}


def cached_tokens(server: Any, prompt: list[int], key: str = "none", stream: bool = False) -> int:
    fields = {"prompt": prompt, "stream": stream, "stream_options": {"include_usage": True} if stream else None}
    answer = httpx.post(
        f"{server.url}/v1/completions",
        json=server.body(3, **fields),
        headers={"authorization": f"Bearer {key}"},
        timeout=30,
    )
    assert answer.status_code == 200, answer.text
    whole = json.loads(answer.text.split("data: ")[-2]) if stream else answer.json()
    tokens: int = whole["usage"]["prompt_tokens_details"]["cached_tokens"]
    return tokens


@pytest.mark.parametrize("engine", MODELS)
def test_usage_tells_what_was_cached(serve: Callable[..., Any], until: Callable[..., Any], engine: str) -> None:
    server = serve(*MODELS[engine])
    assert cached_tokens(server, [*START, 7]) == 0
    assert cached_tokens(server, [*START, 8, 9]) == 192
    assert cached_tokens(server, [*START, 10], stream=True) == 192
    assert cached_tokens(server, START[:97]) == 96
    assert cached_tokens(server, START[1:]) == 0
    counts = {"hit_tokens": 192 + 192 + 96, "query_tokens": 201 + 202 + 201 + 97 + 199}
    until(lambda: all(server.worker(f"headgate_prefix_cache_{name}_total") == count for name, count in counts.items()))


@pytest.mark.parametrize("shared", [False, True])
def test_a_tenant_hits_its_own_blocks_unless_told_otherwise(
    serve: Callable[..., Any], until: Callable[..., Any], tmp_path: Path, shared: bool
) -> None:
    data = tmp_path / "data"
    keys = [make_key(data, tenant) for tenant in ("one", "other")]
    server = serve(*MODELS["simulated"], "--data", str(data), *(["--shared-prefix"] if shared else []))
    one, other = keys
    assert cached_tokens(server, START, one) == 0
    assert cached_tokens(server, START, one) == 192
    assert cached_tokens(server, START, other) == (192 if shared else 0)
    assert cached_tokens(server, START, other) == 192


def make_key(data: Path, tenant: str) -> str:
    book = KeyBook(data, 0.0)
    id, whole = mint()
    book.create(Key(id, tenant, NO_DIGEST, book.now), whole)
    return whole
