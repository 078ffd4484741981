"""How fast the native engine generates, beside what this machine's memory allows and beside other engines.

SmolLM2-135M's geometry with random weights of 16, 8 and 4 bits, two threads, 128 tokens in and 128 out. Headgate is measured
through its own server; llama.cpp through its own, from a wheel, with the same client; transformers in a plain loop. The
engines take turns, round after round, and only one is alive at a time: they would share the memory's bandwidth.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import math
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

from benchmarks.figures import Figure, over_rounds, print_table, save
from benchmarks.gguf import write_random
from benchmarks.load import get
from benchmarks.processes import ROOT, module_output, running
from benchmarks.speeds import (
    ANSWER_TOKENS,
    CONCURRENT,
    LONG_PROMPT_TOKENS,
    LONG_PROMPTS,
    PROMPT_TOKENS,
    Dialect,
    Endpoint,
    alone,
    prefill,
    together,
    warm_up,
)
from scheduler.hardware import Device, MemoryLevel
from scheduler.model import ModelShape
from scheduler.roofline import NO_WORK, StepWork, decode_work, limit_seconds, step_bytes
from worker.native.config import DecoderConfig

ROUNDS = 3
MODEL = "wall"
THREADS = 2
PROBE_DTYPE = "bfloat16"
FORMATS = {"bfloat16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}  # ours -> llama.cpp's
GEOMETRY = ROOT / "worker" / "models" / MODEL

LONG_CONTEXT_TOKENS = 4096
CONTEXT_ANSWER_TOKENS = 64  # of each of the two contexts that are compared

PEER_TARGETS = {  # times llama.cpp's server, by load
    "bfloat16": {"alone": 1.0, "together": 1.8, "prefill": 1.3},
    "int8": {"alone": 1.2, "together": 1.8, "prefill": 1.3},
    "int4": {"alone": 1.2, "together": 1.8, "prefill": 1.3},
}
CONTEXT_TARGET = 1.2  # times what the additional bytes explain

METRICS_SECONDS = 3.0  # until the front has heard of the last step
GREETING = re.compile(r"ready: .* at http://[^ ]+:(\d+)/v1 .*http://[^ ]+:(\d+)/metrics\)")
LLAMACPP_READY = re.compile(r"^built for (.*?)[ |]*\nport (\d+)$", re.MULTILINE)
PEERS = {"llama.cpp": "xllamacpp", "transformers": "transformers"}  # name -> module
SPEEDS = {"alone": "batch 1", "together": f"{CONCURRENT} concurrent", "prefill": f"prefill of {LONG_PROMPT_TOKENS}"}

SHORT, LONG = f"context {PROMPT_TOKENS}", f"context {LONG_CONTEXT_TOKENS}"

Speeds = dict[str, float]  # tokens per second


HEADGATE = Dialect(
    "/v1/completions",
    lambda prompt, tokens: {
        "model": MODEL,
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        "service_tier": "flex",  # no floor, so the gate holds nothing back
    },
    # a token may be a part of a character, which shows no text: then the end tells of it
    lambda event: any(choice["text"] or choice["finish_reason"] for choice in event["choices"]),
    lambda event: (event.get("usage") or {}).get("completion_tokens", 0),
)
LLAMACPP = Dialect(
    "/completion",
    lambda prompt, tokens: {
        "prompt": prompt,
        "n_predict": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "cache_prompt": False,
    },
    lambda event: bool(event["tokens"]),
    lambda event: event["tokens_predicted"],
)


# --- Headgate ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Counters:
    """What the worker counted until now."""

    generated: float
    steps: float
    step_seconds: float
    causes: dict[str, float]

    @classmethod
    def read(cls, text: str) -> Counters:
        def value(name: str) -> float:
            found = re.search(rf"^{name}{{[^}}]*}} (\S+)$", text, re.MULTILINE)
            return float(found[1]) if found else 0.0

        rows = re.findall(r'^headgate_step_seconds_by_cause_total{.*?cause="(\w+)".*?} (\S+)$', text, re.MULTILINE)
        causes = {cause: float(seconds) for cause, seconds in rows if cause != "idle"}
        generated, steps = value("headgate_generation_tokens_total"), value("headgate_step_seconds_count")
        return cls(generated, steps, value("headgate_step_seconds_sum"), causes)

    def since(self, before: Counters) -> dict[str, float]:
        """Milliseconds per step by cause, and in all."""
        steps = self.steps - before.steps
        causes = {name: seconds - before.causes.get(name, 0.0) for name, seconds in self.causes.items()}
        causes["measured"] = self.step_seconds - before.step_seconds
        return {name: 1e3 * seconds / steps for name, seconds in causes.items()} | {"steps": steps}


@dataclass(frozen=True, slots=True)
class Machine:
    """What a probe read per second and multiplied per second, at some moment."""

    bytes_per_second: float
    flops_per_second: float

    def limit_seconds(self, shape: ModelShape, work: StepWork) -> float:
        memory = MemoryLevel("DRAM", math.inf, self.bytes_per_second)
        return limit_seconds(Device("cpu", (memory,), self.flops_per_second), shape, work)


def probe() -> Machine:
    return Machine(**module_output("benchmarks.probe", str(THREADS), PROBE_DTYPE))


@dataclass(frozen=True, slots=True)
class Load:
    """Something that is measured of Headgate: how, and what a step of it carries."""

    name: str
    measure: Callable[[Endpoint], Awaitable[float]]
    work: StepWork
    tokens: int  # that a step brings, or computes of a prompt
    generated: int  # tokens of all answers


@dataclass(frozen=True, slots=True)
class Reading:
    """A load in one round."""

    tokens_per_second: float
    bytes_per_token: float
    limit_share: float
    step_ms: dict[str, float]  # by cause


def loads(shape: ModelShape) -> list[Load]:
    def decode(sequences: int, prompt_tokens: int, answer_tokens: int) -> StepWork:
        return decode_work(shape, sequences, sequences * shape.kv_bytes(prompt_tokens + answer_tokens // 2))

    async def short(endpoint: Endpoint) -> float:
        return await alone(endpoint, PROMPT_TOKENS, CONTEXT_ANSWER_TOKENS)

    async def long(endpoint: Endpoint) -> float:
        return await alone(endpoint, LONG_CONTEXT_TOKENS, CONTEXT_ANSWER_TOKENS)

    few, many = PROMPT_TOKENS, CONTEXT_ANSWER_TOKENS
    prompt = NO_WORK.plus_chunk(shape, 0, LONG_PROMPT_TOKENS, 1)
    return [
        Load("alone", alone, decode(1, few, ANSWER_TOKENS), 1, ANSWER_TOKENS),
        Load("together", together, decode(CONCURRENT, few, ANSWER_TOKENS), CONCURRENT, CONCURRENT * ANSWER_TOKENS),
        Load("prefill", prefill, prompt, LONG_PROMPT_TOKENS, LONG_PROMPTS),
        Load(SHORT, short, decode(1, few, many), 1, many),
        Load(LONG, long, decode(1, LONG_CONTEXT_TOKENS, many), 1, many),
    ]


def measure_headgate(shape: ModelShape, model: str, dtype: str) -> tuple[dict[str, Reading], list[Machine]]:
    """Its server between two probes; the limit is that of the better one."""
    options = ["--model", model, "--served-name", MODEL, "--dtype", dtype, "--threads", str(THREADS)]
    before = probe()
    with running(["-m", "headgate", "serve", "--port", "0", "--metrics-port", "0", *options], GREETING) as match:
        taken = asyncio.run(measure_loads(Endpoint(int(match[1]), HEADGATE), int(match[2]), loads(shape)))
    probes = [before, probe()]
    best = Machine(max(m.bytes_per_second for m in probes), max(m.flops_per_second for m in probes))
    readings = {}
    for load, (speed, step_ms) in zip(loads(shape), taken, strict=True):
        share = best.limit_seconds(shape, load.work) / (load.tokens / speed)
        moved = sum(step_bytes(shape, load.work).values()) / load.tokens
        readings[load.name] = Reading(speed, moved, share, step_ms)
    return readings, probes


async def measure_loads(
    endpoint: Endpoint, metrics_port: int, loads: Sequence[Load]
) -> list[tuple[float, dict[str, float]]]:
    """Tokens per second and milliseconds per step by cause."""
    await warm_up(endpoint)
    await asyncio.sleep(METRICS_SECONDS / 2)
    before, taken = await counters(metrics_port), []
    for load in loads:
        speed = await load.measure(endpoint)
        after = await counters(metrics_port, before.generated + load.generated)
        taken.append((speed, after.since(before)))
        before = after
    return taken


async def counters(port: int, generated: float = 0.0) -> Counters:
    """Once so many tokens are counted: the front hears of steps a few times a second."""
    ends_at = time.monotonic() + METRICS_SECONDS
    while True:
        read = Counters.read((await get(port, "/metrics")).decode())
        if read.generated >= generated or time.monotonic() > ends_at:
            return read
        await asyncio.sleep(0.05)


# --- peers ------------------------------------------------------------------------------------------------------------


def measure_llamacpp(gguf: Path) -> tuple[Speeds, str]:
    """Its speeds, and which instructions the wheel was built for."""
    context = LONG_PROMPT_TOKENS + ANSWER_TOKENS
    arguments = ["-m", "benchmarks.peer_llamacpp", os.fspath(gguf), str(THREADS), str(CONCURRENT), str(context)]
    with running(arguments, LLAMACPP_READY) as match:
        return asyncio.run(speeds_of(Endpoint(int(match[2]), LLAMACPP))), match[1]


async def speeds_of(endpoint: Endpoint) -> Speeds:
    await warm_up(endpoint)
    return {"alone": await alone(endpoint), "together": await together(endpoint), "prefill": await prefill(endpoint)}


def measure_transformers() -> Speeds:
    speeds: Speeds = module_output("benchmarks.peer_transformers", os.fspath(GEOMETRY / "config.json"), str(THREADS))
    return speeds


# --- the run ----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Round:
    """What one round found: by format of the weights, of peers by their name and, where they have several, format."""

    readings: dict[str, dict[str, Reading]] = field(default_factory=dict)
    probes: list[Machine] = field(default_factory=list)
    peers: dict[str, Speeds] = field(default_factory=dict)


@dataclass(slots=True)
class Run:
    """All rounds, and what is known of the engines."""

    shapes: dict[str, ModelShape]  # by format of the weights
    engines: dict[str, str]  # name -> version
    rounds: list[Round] = field(default_factory=list)

    def speeds(self, dtype: str, load: str) -> list[float]:
        return [one.readings[dtype][load].tokens_per_second for one in self.rounds]

    def bytes_per_token(self, dtype: str, load: str) -> list[float]:
        return [one.readings[dtype][load].bytes_per_token for one in self.rounds]

    def peer_speeds(self, peer: str, load: str) -> list[float]:
        return [one.peers[peer][load] for one in self.rounds]

    def play(self, model: str, files: dict[str, Path]) -> None:
        """One more round. `files`: GGUF by format."""
        one = Round()
        for dtype, shape in self.shapes.items():
            one.readings[dtype], probes = measure_headgate(shape, model, dtype)
            one.probes += probes
            if dtype in files:
                one.peers[peer_of(dtype)], built_for = measure_llamacpp(files[dtype])
                self.engines["llama.cpp"] = f"xllamacpp {version('xllamacpp')}, built for {built_for}"
        if "transformers" in self.engines:
            one.peers["transformers bfloat16"] = measure_transformers()
        self.rounds.append(one)


def peer_of(dtype: str) -> str:
    return f"llama.cpp {FORMATS[dtype]}"


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(above, below, strict=True)]


def speed_figures(run: Run) -> list[Figure]:
    figures = []
    for dtype in run.shapes:
        figures += [
            over_rounds(f"{dtype}, {title}", "tok/s", run.speeds(dtype, load)) for load, title in SPEEDS.items()
        ]
        short, long = run.speeds(dtype, SHORT), run.speeds(dtype, LONG)
        explained = ratios(run.bytes_per_token(dtype, LONG), run.bytes_per_token(dtype, SHORT))
        beyond = ratios(ratios(short, long), explained)
        figures.append(over_rounds(f"{dtype}, {LONG}", "tok/s", long))
        name = f"{dtype}, {LONG} / {PROMPT_TOKENS}, time against bytes"
        figures.append(over_rounds(name, "x", beyond, CONTEXT_TARGET))
    return figures


def limit_figures(run: Run) -> list[Figure]:
    bandwidths = [machine.bytes_per_second / 1e9 for one in run.rounds for machine in one.probes]
    flops = [machine.flops_per_second / 1e9 for one in run.rounds for machine in one.probes]
    figures = [over_rounds("read bandwidth", "GB/s", bandwidths), over_rounds("matrix products", "GFLOP/s", flops)]
    for dtype in run.shapes:
        for load, title in (*SPEEDS.items(), (LONG, LONG)):
            shares = [100 * one.readings[dtype][load].limit_share for one in run.rounds]
            moved = [size / 1e6 for size in run.bytes_per_token(dtype, load)]
            figures.append(over_rounds(f"{dtype}, {title}, read", "MB/tok", moved))
            figures.append(over_rounds(f"{dtype}, {title}, share of the limit", "%", shares))
    return figures


def peer_figures(run: Run) -> list[Figure]:
    peers = [(peer, load) for peer in run.rounds[0].peers for load in SPEEDS]
    figures = [over_rounds(f"{peer}, {SPEEDS[load]}", "tok/s", run.peer_speeds(peer, load)) for peer, load in peers]
    for dtype in run.shapes:
        for load in SPEEDS if peer_of(dtype) in run.rounds[0].peers else ():
            quotients = ratios(run.speeds(dtype, load), run.peer_speeds(peer_of(dtype), load))
            name = f"headgate {dtype} / {peer_of(dtype)}, {SPEEDS[load]}"
            figures.append(over_rounds(name, "x", quotients, PEER_TARGETS[dtype][load], at_least=True))
    return figures


def print_causes(run: Run) -> None:
    """Of the last round."""
    print("\nMilliseconds per step by cause, as the worker's /metrics say it, last round")
    for dtype, readings in run.rounds[-1].readings.items():
        for load, reading in readings.items():
            causes = " · ".join(f"{cause} {ms:.2f}" for cause, ms in reading.step_ms.items() if abs(ms) >= 0.005)
            print(f"  {dtype + ', ' + SPEEDS.get(load, load):<26} {causes}")


def print_engines(run: Run) -> None:
    print()
    for name in ("headgate", *PEERS):
        print(f"  {name}: {run.engines.get(name, 'not installed')}")
    print("  vLLM, SGLang: not driven")


def main(rounds: int = ROUNDS, model: str = MODEL) -> list[Figure]:
    config = json.loads((GEOMETRY / "config.json").read_text())
    decoder = DecoderConfig.from_dict(config)
    shapes = {dtype: decoder.model_shape(MODEL, dtype) for dtype in FORMATS}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # servers under test are ended on the way out
    installed = [name for name, module in PEERS.items() if importlib.util.find_spec(module)]
    run = Run(shapes, {"headgate": version("headgate")} | {name: version(PEERS[name]) for name in installed})
    with tempfile.TemporaryDirectory(prefix="headgate-bench-") as folder:
        files = {
            dtype: Path(folder) / f"{format}.gguf" for dtype, format in FORMATS.items() if "llama.cpp" in installed
        }
        for dtype, file in files.items():
            write_random(file, shapes[dtype], config["rope_theta"], config["rms_norm_eps"], FORMATS[dtype])
        for number in range(rounds):
            run.play(model, files)
            print(f"round {number + 1} of {rounds}", flush=True)
    tables = {
        f"Headgate through its server: {THREADS} threads, {PROMPT_TOKENS} in + {ANSWER_TOKENS} out": speed_figures,
        "What memory and cores allow, beside it": limit_figures,
        "Other engines in the same rounds": peer_figures,
    }
    figures = []
    for title, make in tables.items():
        figures += (made := make(run))
        if made:
            print_table(title, made)
    print_causes(run)
    print_engines(run)
    if rounds >= ROUNDS:  # a shorter run is a try
        save("engine", figures, engines=run.engines, rounds=[asdict(one) for one in run.rounds])
    return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--model", default=MODEL, help="another model of this geometry")
    options = parser.parse_args()
    main(options.rounds, options.model)
