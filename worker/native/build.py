"""Loads the torch engine for a worker: how much KV cache it gets, and what was measured of the machine."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from scheduler.hardware import Device
from scheduler.model import ModelShape
from worker.config import WorkerConfig
from worker.files import has_random_weights, read_config
from worker.native.config import DecoderConfig
from worker.native.loader import DTYPES
from worker.native.machine import measure_machine
from worker.native.memory import plan_memory
from worker.native.runner import NativeEngine
from worker.native.topology import available_cpus, bind_to_node


@dataclass(frozen=True, slots=True)
class Native:
    engine: NativeEngine
    shape: ModelShape
    device: Device  # as measured, with every share at 1
    measured_seconds: float  # that took
    threads_note: str


def load(model: Path, name: str, config: WorkerConfig) -> Native:
    """Raises ValueError with a sentence when the checkpoint or the device cannot be used."""
    values = read_config(model)
    decoder = _decoder(model, values)
    plan = plan_memory(values, decoder, _stored_dtype(model, values), name, config)
    place = _settle(decoder, config)
    engine = NativeEngine.load(
        model, config.device, config.dtype, plan.kv_cache_bytes, config.threads or None, plan.packs
    )
    shape = decoder.model_shape(name, engine.dtype)
    began = time.monotonic()
    device = measure_machine(engine.device, engine.dtype, engine.weights)
    measured_seconds = time.monotonic() - began
    threads = torch.get_num_threads()
    note = f", {threads} thread{'s' if threads > 1 else ''}{place}" if engine.device == "cpu" else ""
    return Native(engine, shape, device, measured_seconds, note)


def _decoder(model: Path, values: dict[str, Any]) -> DecoderConfig:
    try:
        return DecoderConfig.from_dict(values)
    except ValueError as error:  # says config.json, but not whose
        path = model if has_random_weights(model) else model / "config.json"
        sentence = str(error)
        separator = "" if sentence.startswith("config.json") else ": "
        raise ValueError(f"{path}{separator}{sentence.removeprefix('config.json')}") from error


def _settle(decoder: DecoderConfig, config: WorkerConfig) -> str:
    """Before anything is allocated: binds this process to a memory node where there are several, and says so."""
    if config.device not in ("cpu", "auto") or (config.device == "auto" and torch.cuda.is_available()):
        return ""
    needed = decoder.model_shape(config.model, "float32").resident_bytes  # or 16 bits and a second copy
    place = bind_to_node(needed, config.threads)
    torch.set_num_threads(config.threads or available_cpus())
    return f" {place}" if place else ""


def _stored_dtype(model: Path, values: dict[str, Any]) -> str:
    """As the config says it: no weights are looked at before it is known that they fit."""
    stored = values.get("dtype") or values.get("torch_dtype")
    return stored if stored in DTYPES and not has_random_weights(model) else "bfloat16"
