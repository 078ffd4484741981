"""More at once than can be served: everybody gets exactly one clean answer."""

from __future__ import annotations

import asyncio
import json
import resource
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from worker.simulated import SENTENCE

CLIENTS = 2000
TOKENS = 5


@pytest.fixture(autouse=True)
def many_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = CLIENTS + 500
    if soft < wanted:
        if hard != resource.RLIM_INFINITY and hard < wanted:
            pytest.skip(f"only {hard} open files are allowed here, {wanted} are needed")
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes


async def ask(port: int, body: dict[str, Any]) -> Answer:
    """One request on a connection of its own, read to the end of the connection."""
    content = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\nconnection: close\r\n"
    writer.write(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)
    whole = await reader.read()
    writer.close()
    await writer.wait_closed()
    head_lines, _, rest = whole.partition(b"\r\n\r\n")
    first, *lines = head_lines.decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    if headers.get("transfer-encoding") == "chunked":
        rest = unchunked(rest)
    else:
        assert len(rest) == int(headers["content-length"])
    return Answer(int(first.split(" ")[1]), headers, rest)


def unchunked(body: bytes) -> bytes:
    pieces = []
    while True:
        size, _, body = body.partition(b"\r\n")
        length = int(size, 16)
        if not length:
            assert body == b"\r\n", "something came after the end"
            return b"".join(pieces)
        pieces.append(body[:length])
        assert body[length : length + 2] == b"\r\n"
        body = body[length + 2 :]


def text_of(answer: Answer, streamed: bool) -> tuple[str, int]:
    """(text, tokens counted) of a good answer; every framing rule is checked on the way."""
    if not streamed:
        whole = json.loads(answer.body)
        return whole["choices"][0]["text"], whole["usage"]["completion_tokens"]
    *events, done, end = answer.body.decode().split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    assert [len(chunk["choices"]) for chunk in chunks[-2:]] == [1, 0]
    text = "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])
    return text, chunks[-1]["usage"]["completion_tokens"]


def check(answer: Answer, streamed: bool, expected: str) -> str:
    """What kind of clean answer it is."""
    if answer.status == 200:
        assert text_of(answer, streamed) == (expected, TOKENS)
        return "served"
    assert answer.status == 429, answer
    error = json.loads(answer.body)["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "rate_limit_exceeded"
    assert int(answer.headers["retry-after"]) >= 1
    assert float(answer.headers["retry-after-ms"]) <= 1000 * int(answer.headers["retry-after"])
    return str(error["code"])


def test_two_thousand_at_once_each_get_one_clean_answer(serve: Callable[..., Any], until: Callable[..., Any]) -> None:
    server = serve("--max-sequences", "16", "--max-waiting", "64")
    expected = server.post(TOKENS).json()["choices"][0]["text"]
    assert SENTENCE.startswith(expected)
    port = int(server.url.rsplit(":", 1)[1])

    async def rush() -> list[Answer]:
        options: list[dict[str, Any]] = [{}, {"stream": True, "stream_options": {"include_usage": True}}]
        return await asyncio.gather(*(ask(port, server.body(TOKENS, **options[n % 2])) for n in range(CLIENTS)))

    answers = asyncio.run(rush())
    kinds = Counter(check(answer, n % 2 == 1, expected) for n, answer in enumerate(answers))
    assert sum(kinds.values()) == CLIENTS
    assert kinds["served"] >= 16 and kinds["queue_full"] > 0, kinds

    server.wait_until_idle()
    assert server.is_ready() and server.post(TOKENS).json()["choices"][0]["text"] == expected
    until(lambda: server.worker("headgate_requests_ended_total", finish="length") == kinds["served"] + 2)
    gateway, worker = server.gateway_metrics(), server.worker_metrics()
    assert gateway.value("headgate_requests_total", outcome="ok") == kinds["served"] + 2
    assert gateway.value("headgate_requests_total", outcome="refused") == CLIENTS - kinds["served"]
    assert worker.value("headgate_admissions_total", reason="queue_full") == kinds["queue_full"]
    assert "Traceback" not in server.said
