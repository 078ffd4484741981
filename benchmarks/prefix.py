"""What the prefix cache saves: requests that begin alike, one after another, through our server.

SmolLM2-135M's geometry with random weights. 32 prompts share their first 2,000 tokens and have 100 of their own; then a
prompt of another tenant begins the same way. Hits are counted in whole blocks, as the answers' usage tells them.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.engine import DTYPE, GREETING, HEADGATE, MODEL, THREADS
from benchmarks.figures import Figure, over_rounds, print_table, save
from benchmarks.processes import running
from benchmarks.speeds import Endpoint, Stream, prompt_of, warm_up
from headgate.key_book import KeyBook
from service.keys import NO_DIGEST, Key, mint

ROUNDS = 3
SHARED_TOKENS = 2000
OWN_TOKENS = 100
REQUESTS = 32
BLOCK_TOKENS = 16
SHARE_TARGET = 12.0  # percent of the first's time to first token


@dataclass(frozen=True, slots=True)
class Round:
    """Seconds to the first token, and cached tokens as told, of all requests in their order; the stranger's last."""

    seconds: list[float]
    cached_tokens: list[int]


def play(model: str) -> Round:
    with tempfile.TemporaryDirectory(prefix="headgate-bench-") as folder:
        keys = [make_key(Path(folder), tenant) for tenant in ("one", "other")]
        options = ["--model", model, "--served-name", MODEL, "--dtype", DTYPE, "--threads", str(THREADS)]
        options += ["--data", folder]
        with running(["-m", "headgate", "serve", "--port", "0", "--metrics-port", "0", *options], GREETING) as match:
            one, other = (Endpoint(int(match[1]), HEADGATE, key) for key in keys)
            return asyncio.run(measure(one, other))


def make_key(folder: Path, tenant: str) -> str:
    book = KeyBook(folder, time.time())
    id, whole = mint()
    book.create(Key(id, tenant, NO_DIGEST, book.now), whole)
    return whole


async def measure(one: Endpoint, other: Endpoint) -> Round:
    await warm_up(one)
    shared = prompt_of(SHARED_TOKENS)
    askers = [*[one] * REQUESTS, other]
    streams = [await asker.ask(shared + prompt_of(OWN_TOKENS), 2) for asker in askers]
    return Round([stream.first_seconds for stream in streams], [cached_tokens(stream) for stream in streams])


def cached_tokens(stream: Stream) -> int:
    tokens: int = stream.end["usage"]["prompt_tokens_details"]["cached_tokens"]
    return tokens


def figures_of(rounds: list[Round]) -> list[Figure]:
    whole = SHARED_TOKENS // BLOCK_TOKENS * BLOCK_TOKENS
    expected = [0, *[whole] * (REQUESTS - 1), 0]
    wrong = [sum(a != b for a, b in zip(one.cached_tokens, expected, strict=True)) for one in rounds]
    later = [one.seconds[1:REQUESTS] for one in rounds]

    def shares(seconds: list[float]) -> list[float]:
        return [100 * value / one.seconds[0] for value, one in zip(seconds, rounds, strict=True)]

    return [
        over_rounds("first", "ms", [1e3 * one.seconds[0] for one in rounds]),
        over_rounds(f"2nd to {REQUESTS}nd, median", "ms", [1e3 * statistics.median(s) for s in later]),
        over_rounds(f"2nd to {REQUESTS}nd, median", "%", shares([statistics.median(s) for s in later]), SHARE_TARGET),
        over_rounds(f"2nd to {REQUESTS}nd, slowest", "%", shares([max(s) for s in later])),
        over_rounds("another tenant", "%", shares([one.seconds[-1] for one in rounds])),
        over_rounds("answers that tell other hits", "", wrong, 0.0),
    ]


def main(rounds: int = ROUNDS, model: str = MODEL) -> list[Figure]:
    played = []
    for number in range(rounds):
        played.append(play(model))
        print(f"round {number + 1} of {rounds}", flush=True)
    figures = figures_of(played)
    print_table(
        f"Time to first token: {SHARED_TOKENS} tokens shared, {OWN_TOKENS} own; {THREADS} threads, {DTYPE}", figures
    )
    if rounds >= ROUNDS:  # a shorter run is a try
        save("prefix", figures, rounds=[asdict(one) for one in played])
    return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prefix")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--model", default=MODEL, help="another model")
    options = parser.parse_args()
    main(options.rounds, options.model)
