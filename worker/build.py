"""Builds what the engine process runs: engine, cost model, tiers, gate, and what the worker says of itself."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from scheduler.admission import Load, room
from scheduler.calibration import CostModel, fit_device
from scheduler.gate import Gate, Limits
from scheduler.hardware import Device
from scheduler.messages import Sampling, WorkerInfo
from scheduler.model import ModelShape
from scheduler.prefix import Sharing
from scheduler.roofline import decode_work
from scheduler.tiers import Tier, default_tiers
from worker.amounts import in_bytes, in_millions
from worker.calibrate import sweep
from worker.config import WorkerConfig
from worker.engine import Engine
from worker.files import DEMO, ModelNotFound, find_config, find_model
from worker.native.topology import wait_passively
from worker.simulated import SENTENCE, SimulatedEngine, find_device, find_shape
from worker.tokenizer import TokenizerFiles, read_tokenizer

SOLO_CONTEXT = 256  # tokens of context at which UTPS is stated
COALESCE_SECONDS = 0.005
SHORT_NAMES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16", "int8": "i8", "int4": "i4"}


class StartFailed(Exception):
    """The worker cannot start as it is configured; the text is a sentence for the user."""


@dataclass(frozen=True, slots=True)
class Built:
    engine: Engine
    gate: Gate
    info: WorkerInfo


def build(config: WorkerConfig) -> Built:
    """Loads, measures and fits; prints a line per stage. Raises StartFailed with a sentence."""
    try:
        if config.engine == "simulated":
            return _build_simulated(config)
        return _build_native(config)
    except (ModelNotFound, ValueError, OSError) as error:
        raise StartFailed(" ".join(str(error).split())) from error  # in one line


def stage(line: str) -> None:
    print(f"headgate: {line}", flush=True)


def _build_simulated(config: WorkerConfig) -> Built:
    device, shape = find_device(config.hardware), find_shape(config.model)
    files = read_tokenizer(find_model(DEMO))
    sentence = Tokenizer.from_str(files.tokenizer_json).encode(SENTENCE, add_special_tokens=False).ids
    engine = SimulatedEngine(device, shape, sentence, files.eos_ids[0], config.seed)
    capacity = config.kv_cache_bytes or engine.kv_cache_bytes
    if capacity < shape.kv_bytes(1024):
        raise ValueError(
            f"{shape.name} needs {in_bytes(shape.resident_bytes)} for its weights and does not fit {device.name} "
            f"({in_bytes(device.memory.capacity_bytes)})"
        )
    stage(f"simulating {shape.name} ({in_millions(shape.parameters)} parameters, bf16) on {device.name}")
    cost = CostModel(device, shape)
    return _assemble(config, engine, cost, capacity, files, config.served_name or f"simulated-{device.name}")


def _build_native(config: WorkerConfig) -> Built:
    model = find_config(config.random_weights) if config.random_weights else find_model(config.model, stage)
    name = config.served_name or own_name(config, model)
    files = read_tokenizer(model)
    stage(
        f"making up random weights for {name}; its text will be random, too" if files.is_random else f"loading {name}"
    )
    wait_passively(os.environ)
    from worker.native.build import load  # torch takes more than a second to import
    from worker.native.memory import enough_memory

    began = time.monotonic()
    with enough_memory(name):
        native = load(model, name, config, stage)
    engine = native.engine
    copies = f" x {native.copies}" if native.copies > 1 else ""
    stage(
        f"loaded in {time.monotonic() - began:.1f} s: {in_millions(engine.parameters)} parameters, "
        f"{in_bytes(engine.weight_bytes)}{copies} in {engine.held_form} on {engine.device}{native.threads_note}"
    )
    if native.stored_form:
        stage(f"read from {native.stored_form}; held in {engine.held_form}, {in_bytes(engine.weight_bytes)}{copies}")
    shape = native.shape
    limits = _limits(config, shape)
    usual = Sampling(
        files.temperature, files.top_p, files.top_k, min_p=files.min_p, repetition_penalty=files.repetition_penalty
    )
    began = time.monotonic()
    with enough_memory(name):
        timings = sweep(engine, shape, limits, int(engine.kv_cache_bytes / shape.kv_bytes(1)), usual)
    cost = CostModel(fit_device(native.device, shape, timings), shape)
    cost.prime(timings)
    stage(f"measured in {native.measured_seconds + time.monotonic() - began:.1f} s: {len(timings)} kinds of steps")
    return _assemble(config, engine, cost, engine.kv_cache_bytes, files, name)


def own_name(config: WorkerConfig, model: Path) -> str:
    """Of the folder or the config, where that is how the model was named; else the name itself."""
    if config.random_weights:
        path = Path(os.path.abspath(model))  # a name for `.`, and no link is followed
        return path.parent.name if path.name == "config.json" else path.stem
    named = Path(config.model).expanduser()
    if model != named:
        return config.model
    return model.stem if model.is_file() else os.path.basename(os.path.abspath(named))


def _assemble(
    config: WorkerConfig, engine: Engine, cost: CostModel, capacity: float, files: TokenizerFiles, name: str
) -> Built:
    shape = cost.shape
    if config.context_tokens > shape.context_tokens:
        stage(f"--context {config.context_tokens:,} is more than the model takes: {shape.context_tokens:,} tokens")
    limits = _limits(config, shape)
    solo = 1 / cost.seconds(decode_work(shape, 1, shape.kv_bytes(SOLO_CONTEXT)))
    tiers = default_tiers(solo)
    sharing = Sharing.EVERYBODY if config.shared_prefix else Sharing.TENANT
    gate = Gate(cost, capacity, tiers, limits, sharing)
    _describe(cost, capacity, tiers, solo, limits)
    strictest = min(tier.gap_seconds for tier in tiers)
    info = WorkerInfo(
        model=name,
        variant=files.digest,
        created=int(time.time()),
        context_tokens=gate.most_tokens,
        max_prompt_tokens=gate.most_tokens - 1,
        eos_ids=files.eos_ids,
        tokenizer_json=files.tokenizer_json,
        chat_template=files.chat_template,
        special_tokens=files.special_tokens,
        tier_wait_seconds={tier.name: tier.max_wait_seconds for tier in tiers},
        engine=config.engine,
        fingerprint=f"hg-{config.engine}-{files.digest[:8]}" + ("-random-weights" if files.is_random else ""),
        coalesce_seconds=min(COALESCE_SECONDS, strictest / 2),
        temperature=files.temperature,
        top_p=files.top_p,
        top_k=files.top_k,
        min_p=files.min_p,
        repetition_penalty=files.repetition_penalty,
        random_weights=files.is_random,
        block_tokens=limits.block_tokens,
        shared_prefix=config.shared_prefix,
        vocabulary=shape.vocabulary,
    )
    return Built(engine, gate, info)


def _limits(config: WorkerConfig, shape: ModelShape) -> Limits:
    context = min(shape.context_tokens, config.context_tokens or shape.context_tokens)
    return Limits(context, sequences=config.max_sequences, waiting=config.max_waiting)


def _describe(cost: CostModel, capacity: float, tiers: tuple[Tier, ...], solo: float, limits: Limits) -> None:
    """What was measured of the machine and what it means for users, as lines."""
    device, shape = cost.device, cost.shape
    stage(f"machine: {_machine(device)}; ridge {cost.ridge} tokens per step")
    stage(f"KV cache: {int(capacity / shape.kv_bytes(1)):,} tokens in {in_bytes(capacity)}")
    floor = next(tier for tier in tiers if tier.name == "default")
    each = shape.kv_bytes(SOLO_CONTEXT)
    users = max(1, min(room(cost, Load(0, 0.0, floor.gap_seconds), each), limits.sequences, int(capacity / each)))
    full = 1 / cost.seconds(decode_work(shape, users, users * each))
    stage(
        f"predicted: {solo:,.0f} tokens/s for a single user; {full:,.0f} each for {users} at once "
        f"({users * full:,.0f} in all), with {SOLO_CONTEXT} tokens of context"
    )
    stage("tiers: " + " · ".join(_tier(tier) for tier in tiers))


def _machine(device: Device) -> str:
    parts = [f"{level.name} {level.bytes_per_second / 1e9:.0f} GB/s" for level in device.levels]
    if device.weights_bytes_per_second:
        parts[-1] += f" (weights: {device.weights_bytes_per_second / 1e9:.0f} GB/s)"
    rates = [f"{rate / 1e9:,.0f} {SHORT_NAMES.get(name, name)}" for name, rate in device.flops_per_dtype]
    parts.append(f"{', '.join(rates) or f'{device.flops_per_second / 1e9:,.0f}'} GFLOP/s")
    if device.call_seconds:
        parts.append(f"{device.call_seconds * 1e6:.1f} µs a call")
    return " · ".join(parts)


def _tier(tier: Tier) -> str:
    if not tier.floor_utps:
        return f"{tier.name} no floor, waits as long as it takes"
    return f"{tier.name} >= {tier.floor_utps:,.0f} tokens/s, waits up to {tier.max_wait_seconds:.0f} s"
