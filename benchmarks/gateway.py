"""What lies between the engine process and the client: its CPU per token and per request, its delays.

Everything runs on this machine: a simulated engine whose steps take exactly 5 or 20 ms, the front and the gateway under
test, and a client. Beside ours, in the same rounds and behind the same worker: ours once more with keys and every limit
that there is (`with keys`), the gateway as it is usually written (`usual`), and the floor of any gateway in one event loop, a bare send per token (`bare`).
"""

from __future__ import annotations

import asyncio
import gc
import importlib.util
import itertools
import random
import statistics
from collections.abc import Awaitable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import uvloop
from tokenizers import Tokenizer

from benchmarks.figures import Figure, over_rounds, print_table, save
from benchmarks.load import Connection, Reply, begun, clock, connect_all, ended, get
from benchmarks.serving import Server, Serving, Sightings
from worker.files import DEMO, find_model
from worker.tokenizer import read_tokenizer

ROUNDS = 4
STREAMS = 64
WORDS = (
    "a gate in the canal lets in as much water as it can carry and every boat below it moves at the speed we promised"
)

PROMPT_TOKENS = 100
SETTLE_SECONDS = 0.3

SETUP_REQUESTS = 400
SETUP_PARALLEL = 16
SETUP_PER_SECOND = 100.0
SETUP_SECONDS = 1.5
IDLE_SECONDS = 0.7

ARRIVALS_PER_SECOND = 20.0
ARRIVAL_SECONDS = 5.0
ARRIVAL_TOKENS = 100  # at 20 ms each: about 40 streams at once

STALL_SECONDS = 6.0
LONG_PROMPT_TOKENS = 10_000
LONG_PROMPTS_PER_SECOND = 2.0

BACKGROUND_STREAMS = 48
HANGUPS = 64
HANGUP_SECONDS = 0.03  # apart


@dataclass(frozen=True, slots=True)
class Pace:
    """Streams at one speed. The target is all CPU between engine process and client, µs per token."""

    name: str
    step_seconds: float
    tokens: int  # of each answer: about three seconds
    target: float


PACES = (Pace("64 x 200/s", 0.005, 600, 16.0), Pace("64 x 50/s", 0.020, 157, 24.0))


@dataclass(slots=True)
class Rig:
    """The servers that are compared, behind a worker of one pace."""

    pace: Pace
    sightings: Sightings
    servers: dict[str, Server]
    probed: Server  # ours once more, with a fine probe in its event loop


@dataclass(slots=True)
class Samples:
    """Values per quantity, and of each a list per round."""

    rounds: dict[str, list[list[float]]] = field(default_factory=dict)

    def add(self, name: str, values: Sequence[float]) -> None:
        self.rounds.setdefault(name, []).append(list(values))

    def median(self, name: str, unit: str, target: float | None = None) -> Figure:
        return over_rounds(name, unit, [statistics.median(values) for values in self.rounds[name]], target)

    def ratio(self, name: str, above: str, below: str) -> Figure:
        """Of two servers in the same round: what a busy machine does to both cancels out."""
        pairs = zip(self.rounds[above], self.rounds[below], strict=True)
        return over_rounds(name, "x", [a[0] / b[0] for a, b in pairs])

    def difference(self, name: str, unit: str, of: str, less: str, target: float) -> Figure:
        """Of two servers in the same round."""
        pairs = zip(self.rounds[of], self.rounds[less], strict=True)
        return over_rounds(name, unit, [a[0] - b[0] for a, b in pairs], target)

    def percentile(self, name: str, of: str, q: float, unit: str, target: float | None = None) -> Figure:
        """Over all rounds together; the spread is that of the rounds."""
        rounds = [float(np.percentile(values, q)) for values in self.rounds[of]]
        value = float(np.percentile(list(itertools.chain(*self.rounds[of])), q))
        return Figure(name, unit, value, min(rounds), max(rounds), target)


def prompt_of(tokens: int) -> str:
    """A text of about so many tokens, no two of which are alike at their beginning."""
    tokenizer = Tokenizer.from_str(read_tokenizer(find_model(DEMO)).tokenizer_json)
    words = random.Random(tokens).choices(WORDS.split(), k=2 * tokens)
    encoding = tokenizer.encode(" ".join(words))
    return " ".join(words)[: encoding.offsets[tokens][1]]


# --- CPU --------------------------------------------------------------------------------------------------------------


async def stream_cost(server: Server, pace: Pace, prompt: str) -> tuple[float, float]:
    """µs of CPU per token: in the steady state, and with the set-up of the streams."""
    request = server.request(prompt, pace.tokens)
    start = server.cpu_seconds()
    connections = await connect_all(server.port, STREAMS)
    replies = [connection.ask(request) for connection in connections]
    await begun(replies)
    await asyncio.sleep(SETTLE_SECONDS)
    from_cpu, from_chunks = server.cpu_seconds(), count(replies)
    while max(reply.chunks for reply in replies) < 0.9 * pace.tokens:  # noqa: ASYNC110 (an event per chunk would cost)
        await asyncio.sleep(0.02)
    to_cpu, to_chunks = server.cpu_seconds(), count(replies)
    await ended(replies, 30.0)
    whole = server.cpu_seconds() - start
    tokens = STREAMS * pace.tokens
    per_chunk = tokens / count(replies)  # a server that lags puts several tokens into a chunk
    for connection in connections:
        connection.close()
    return (to_cpu - from_cpu) / ((to_chunks - from_chunks) * per_chunk) * 1e6, whole / tokens * 1e6


def count(replies: Sequence[Reply]) -> int:
    return sum(reply.chunks for reply in replies)


async def setup_cost(server: Server, prompt: str) -> tuple[float, float]:
    """ms of CPU per request that brings one token, on kept connections: several at all times, and some at a steady rate.

    The second is larger, for there everything has gone to sleep, and out of the caches, before the next request comes.
    """
    request = server.request(prompt, 1)
    connections = await connect_all(server.port, SETUP_PARALLEL)
    idle_cpu = server.cpu_seconds()
    await asyncio.sleep(IDLE_SECONDS)
    idle_share = (server.cpu_seconds() - idle_cpu) / IDLE_SECONDS

    async def cost(work: Awaitable[int]) -> float:
        began, from_cpu = clock(), server.cpu_seconds()
        count = await work
        return 1e3 * (server.cpu_seconds() - from_cpu - idle_share * (clock() - began)) / count

    parallel = await cost(ask_in_turn(connections, request, SETUP_REQUESTS))
    offsets = [i / SETUP_PER_SECOND for i in range(int(SETUP_SECONDS * SETUP_PER_SECOND))]
    spaced = await cost(ask_all_at(connections, request, offsets))
    for connection in connections:
        connection.close()
    return parallel, spaced


async def ask_in_turn(connections: Sequence[Connection], request: bytes, count: int) -> int:
    """On each connection one request after the other."""
    left = iter(range(count))

    async def one_after_the_other(connection: Connection) -> None:
        for _ in left:
            await connection.ask(request).ended

    await asyncio.gather(*map(one_after_the_other, connections))
    return count


async def ask_all_at(connections: Sequence[Connection], request: bytes, offsets: Sequence[float]) -> int:
    replies = await ask_at(list(connections), request, offsets)
    await ended(replies, 30.0)
    return len(replies)


async def ask_at(idle: list[Connection], request: bytes, offsets: Sequence[float]) -> list[Reply]:
    """Sends a request at each of the times from now, on whichever connection is free."""
    began, replies = clock(), []
    for offset in offsets:
        await asyncio.sleep(max(0.0, began + offset - clock()))
        if not idle:
            raise RuntimeError("all connections are busy: the server does not keep up")
        connection = idle.pop(0)
        reply = connection.ask(request)
        reply.ended.add_done_callback(partial(give_back, idle, connection))
        replies.append(reply)
    return replies


def give_back(idle: list[Connection], connection: Connection, _: object) -> None:
    idle.append(connection)


# --- delays -----------------------------------------------------------------------------------------------------------


async def added_ttft(rig: Rig, server: Server, prompt: str, seed: int) -> list[float]:
    """ms per request: the client's time to first token less the engine's own for the same request."""
    rng = random.Random(seed)
    gaps = (rng.expovariate(ARRIVALS_PER_SECOND) for _ in itertools.count())
    offsets = list(itertools.takewhile(lambda offset: offset < ARRIVAL_SECONDS, itertools.accumulate(gaps)))
    connections = await connect_all(server.port, 4 * STREAMS)
    request = server.request(prompt, ARRIVAL_TOKENS)
    replies = await ask_at(list(connections), request, offsets)
    await ended(replies, 30.0)
    await asyncio.sleep(SETTLE_SECONDS)
    for connection in connections:
        connection.close()
    seen = rig.sightings.at
    return [
        1e3 * (reply.first_at - reply.sent_at - (seen["first", reply.key] - seen["arrived", reply.key]))
        for reply in replies
    ]


async def hangup_delays(rig: Rig, server: Server, prompt: str) -> list[float]:
    """ms from the client's closing its socket to the gate's having forgotten the request."""
    request = server.request(prompt, 10_000)
    connections = await connect_all(server.port, BACKGROUND_STREAMS + HANGUPS)
    replies = [connection.ask(request) for connection in connections]
    await begun(replies)
    await asyncio.sleep(SETTLE_SECONDS)
    rng, closed = random.Random(0), {}
    for connection, reply in zip(connections[:HANGUPS], replies, strict=False):
        await asyncio.sleep(HANGUP_SECONDS * rng.uniform(0.5, 1.5))
        closed[reply.key] = clock()
        connection.close()
    for connection in connections[HANGUPS:]:
        connection.close()
    await asyncio.sleep(2 * SETTLE_SECONDS)
    return [1e3 * (rig.sightings.at["cancelled", key] - at) for key, at in closed.items()]


async def stalls(busy: Server, idle: Server, prompt: str, long_prompt: str) -> tuple[list[float], list[float]]:
    """ms that timers in the event loop were late: of the loaded gateway, and of an idle one on the same machine."""
    streams = await connect_all(busy.port, STREAMS)
    replies = [stream.ask(busy.request(prompt, 10_000)) for stream in streams]
    await begun(replies)
    others = await connect_all(busy.port, 8)
    offsets = [i / LONG_PROMPTS_PER_SECOND for i in range(int(STALL_SECONDS * LONG_PROMPTS_PER_SECOND))]
    before = [await probe(server) for server in (busy, idle)]
    scraping = asyncio.create_task(scrape(busy))
    await ended(await ask_at(others, busy.request(long_prompt, 1), offsets), 30.0)
    scraping.cancel()
    after = [await probe(server) for server in (busy, idle)]
    for connection in streams + others:
        connection.close()
    busy_ms, idle_ms = (since(old, new) for old, new in zip(before, after, strict=True))
    return busy_ms, idle_ms


async def scrape(server: Server) -> None:
    while True:
        await get(server.port, "/metrics")
        await asyncio.sleep(1.0)


async def probe(server: Server) -> list[tuple[float, float]]:
    """(upper bound in seconds, how many up to it) of the gateway's own histogram of stalls."""
    rows = []
    for line in (await get(server.port, "/metrics")).decode().splitlines():
        if line.startswith("headgate_event_loop_stall_seconds_bucket"):
            bound = line.partition('le="')[2].partition('"')[0]
            rows.append((float(bound), float(line.rsplit(" ", 1)[1])))
    return rows


def since(before: Sequence[tuple[float, float]], after: Sequence[tuple[float, float]]) -> list[float]:
    """The stalls between two looks at the histogram, each as the upper bound of its bucket, in ms."""
    values: list[float] = []
    earlier = 0.0
    for (bound, old), (_, new) in zip(before, after, strict=True):
        highest = min(bound, 2 * after[-2][0])  # what is beyond the last bound counts as twice as much
        values += [1e3 * highest] * round(new - old - earlier)
        earlier = new - old
    return values


# --- the whole --------------------------------------------------------------------------------------------------------


def start_rigs(stack: ExitStack) -> list[Rig]:
    rigs = []
    for pace in PACES:
        serving = stack.enter_context(Serving(pace.step_seconds))
        servers = {
            "headgate": serving.start_gateway(),
            "with keys": serving.start_gateway_with_keys(),
            "usual": serving.start_gateway("benchmarks.usual"),
            "bare": serving.start_bare(pace.step_seconds),
        }
        rigs.append(Rig(pace, serving.sightings, servers, serving.start_gateway("benchmarks.observed")))
    for rig in rigs:
        for server in (*rig.servers.values(), rig.probed):
            server.wait_until_ready()
    return rigs


async def measure(rigs: Sequence[Rig], rounds: int) -> Samples:
    samples = Samples()
    prompt, long_prompt = prompt_of(PROMPT_TOKENS), prompt_of(LONG_PROMPT_TOKENS)
    fast, slow = rigs
    for number in range(rounds):
        for rig in rigs:
            for name, server in rig.servers.items():
                steady, whole = await stream_cost(server, rig.pace, prompt)
                samples.add(f"{name}, {rig.pace.name}, steady", [steady])
                samples.add(f"{name}, {rig.pace.name}, with set-up", [whole])
        for name in ("headgate", "with keys", "usual"):
            parallel, spaced = await setup_cost(fast.servers[name], prompt)
            samples.add(f"{name}, set-up, {SETUP_PARALLEL} at once", [parallel])
            samples.add(f"{name}, set-up, {SETUP_PER_SECOND:g}/s", [spaced])
            if name != "with keys":
                samples.add(f"{name}, added ttft", await added_ttft(slow, slow.servers[name], prompt, number))
        samples.add("headgate, hang-up", await hangup_delays(slow, slow.servers["headgate"], prompt))
        busy, idle = await stalls(slow.probed, fast.probed, prompt, long_prompt)
        samples.add("headgate, stall", busy)
        samples.add("idle process, stall", idle)
        print(f"round {number + 1} of {rounds}", flush=True)
    return samples


def figures_of(samples: Samples) -> list[Figure]:
    figures = []
    for pace in PACES:
        for state in ("steady", "with set-up"):
            names = [f"{server}, {pace.name}, {state}" for server in ("headgate", "usual", "bare")]
            figures.append(samples.median(names[0], "µs/token", pace.target if state == "steady" else None))
            figures += [samples.median(name, "µs/token") for name in names[1:]]
            figures.append(samples.ratio(f"usual / headgate, {pace.name}, {state}", names[1], names[0]))
        with_keys = f"with keys, {pace.name}, steady"
        what = f"keys and limits add, {pace.name}"
        figures.append(samples.difference(what, "µs/token", with_keys, f"headgate, {pace.name}, steady", 3.0))
    for load, setup_target in ((f"{SETUP_PARALLEL} at once", 0.6), (f"{SETUP_PER_SECOND:g}/s", None)):
        names = [f"{server}, set-up, {load}" for server in ("headgate", "usual")]
        figures.append(samples.median(names[0], "ms/req", setup_target))
        figures.append(samples.median(names[1], "ms/req"))
        figures.append(samples.ratio(f"usual / headgate, set-up, {load}", names[1], names[0]))
        what = f"keys and limits add, set-up, {load}"
        figures.append(samples.difference(what, "ms/req", f"with keys, set-up, {load}", names[0], 0.3))
    figures.append(samples.percentile("headgate, event loop stall p99", "headgate, stall", 99, "ms", 5.0))
    figures.append(samples.percentile("idle process, event loop stall p99", "idle process, stall", 99, "ms"))
    for name, targets in (("headgate", (3.0, 8.0)), ("usual", (None, None))):
        for q, target in zip((50, 99), targets, strict=True):
            figures.append(samples.percentile(f"{name}, added ttft p{q}", f"{name}, added ttft", q, "ms", target))
    for q, target in ((50, None), (99, 5.0)):
        figures.append(samples.percentile(f"headgate, hang-up to cancel p{q}", "headgate, hang-up", q, "ms", target))
    return figures


def main(rounds: int = ROUNDS) -> list[Figure]:
    with ExitStack() as stack:
        rigs = start_rigs(stack)
        gc.disable()  # the client's own pauses are nobody's delay
        samples = uvloop.run(measure(rigs, rounds))
        gc.enable()
    figures = figures_of(samples)
    print_table("Between engine process and client", figures)
    if importlib.util.find_spec("sglang_router") is None:
        print("  SGLang's router: not installed")
    medians = {name: [statistics.median(values) for values in rounds] for name, rounds in samples.rounds.items()}
    save("gateway", figures, rounds=medians)
    return figures


if __name__ == "__main__":
    main()
