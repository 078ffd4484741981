"""Loads the torch engine for a worker: how much KV cache it gets, and what was measured of the machine."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from scheduler.hardware import Device
from scheduler.model import ModelShape
from worker import gguf
from worker.config import WorkerConfig
from worker.files import read_config
from worker.native.config import DecoderConfig
from worker.native.forms import open_checkpoint
from worker.native.machine import measure_machine
from worker.native.memory import MemoryPlan, plan_memory
from worker.native.runner import NativeEngine
from worker.native.topology import available_cpus, bind_to

EMBEDDING = "model.embed_tokens.weight"  # whose format is the checkpoint's


@dataclass(frozen=True, slots=True)
class Native:
    engine: NativeEngine
    shape: ModelShape
    device: Device  # as measured, with every share at 1
    measured_seconds: float  # that took
    copies: int  # of the weights in memory
    threads_note: str
    stored_form: str  # of few bits, what the file holds; else nothing


def load(model: Path, name: str, config: WorkerConfig) -> Native:
    """Raises ValueError with a sentence when the checkpoint or the device cannot be used."""
    decoder = _decoder(model, read_config(model))
    with open_checkpoint(model, decoder) as checkpoint:
        stored_form = checkpoint.describe()
        stored_dtype = checkpoint.dtype(EMBEDDING)  # of the header: no tensor is read before it is known that all fit
    plan = plan_memory(decoder, stored_dtype, name, config)
    _settle(plan, config.threads)
    engine = NativeEngine.load(model, plan.device, plan.dtype, plan.kv_cache_bytes, config.threads or None, plan.packs)
    gguf.forget()
    shape = decoder.model_shape(name, engine.dtype)
    began = time.monotonic()
    device = measure_machine(engine.device, engine.dtype, engine.weights)
    measured_seconds = time.monotonic() - began
    threads = torch.get_num_threads()
    place = f" {plan.place}" if plan.place else ""
    note = f", {threads} thread{'s' if threads > 1 else ''}{place}" if engine.device == "cpu" else ""
    return Native(engine, shape, device, measured_seconds, 2 if plan.packs else 1, note, stored_form)


def _decoder(model: Path, values: dict[str, Any]) -> DecoderConfig:
    try:
        return DecoderConfig.from_dict(values)
    except ValueError as error:  # says config.json, but not whose
        path = model if model.is_file() else model / "config.json"
        sentence = str(error)
        separator = "" if sentence.startswith("config.json") else ": "
        raise ValueError(f"{path}{separator}{sentence.removeprefix('config.json')}") from error


def _settle(plan: MemoryPlan, threads: int) -> None:
    """Before anything is allocated: binds this process to a memory node where there are several."""
    if plan.device != "cpu":
        return
    if plan.node:
        bind_to(plan.node)
    torch.set_num_threads(threads or available_cpus())
