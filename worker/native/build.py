"""Loads the torch engine for a worker: how much KV cache it gets, and what was measured of the machine."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from scheduler.hardware import Device
from scheduler.model import ModelShape
from worker import gguf
from worker.config import WorkerConfig
from worker.files import read_config
from worker.native.config import DecoderConfig
from worker.native.cpu.build import NoLibrary, load_library
from worker.native.cpu.pack import BITS
from worker.native.cpu.program import AS_STORED, bytes_as_stored
from worker.native.forms import open_checkpoint
from worker.native.loader import DTYPES
from worker.native.machine import measure_machine
from worker.native.memory import MemoryPlan, find_device, plan_memory
from worker.native.runner import NativeEngine
from worker.native.topology import available_cpus, bind_to

Say = Callable[[str], None]

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


def load(model: Path, name: str, config: WorkerConfig, say: Say = lambda line: None) -> Native:
    """Raises ValueError with a sentence when the checkpoint or the device cannot be used."""
    decoder = _decoder(model, read_config(model))
    with open_checkpoint(model, decoder) as checkpoint:
        stored_form = checkpoint.describe()
        stored_dtype = checkpoint.dtype(EMBEDDING)  # of the header: no tensor is read before it is known that all fit
        packed_bytes = bytes_as_stored(checkpoint, decoder)
    library = _find_library(config, "bfloat16" if packed_bytes else stored_dtype, say)
    plan = plan_memory(decoder, stored_dtype, name, config, library is not None, packed_bytes)
    _settle(plan, config.threads)
    engine = NativeEngine.load(
        model, plan.device, plan.dtype, plan.kv_cache_bytes, config.threads or None, plan.packs, library
    )
    gguf.forget()
    shape = decoder.model_shape(name, engine.dtype)
    if plan.dtype == AS_STORED:
        parameters_read = shape.weight_bytes(1) / shape.weight_bytes_each
        shape = replace(shape, weight_bytes_each=engine.read_bytes / parameters_read)
    began = time.monotonic()
    device = measure_machine(engine.device, engine.dtype, engine.weights, engine.own_flops())
    measured_seconds = time.monotonic() - began
    threads = engine.threads
    place = f" {plan.place}" if plan.place else ""
    note = f", {threads} thread{'s' if threads > 1 else ''}{place}" if engine.device == "cpu" else ""
    return Native(engine, shape, device, measured_seconds, 2 if plan.packs else 1, note, stored_form)


def _find_library(config: WorkerConfig, stored_dtype: str, say: Say) -> ctypes.CDLL | None:
    """The C step's, where it would be of use on a CPU; says why it is not to be had."""
    wanted = config.dtype if config.dtype != "auto" else stored_dtype
    if find_device(config.device).type != "cpu" or wanted == "float32":
        return None
    try:
        return load_library(say=say)
    except NoLibrary as error:
        if config.dtype in BITS and config.dtype not in DTYPES:
            raise ValueError(f"--dtype {config.dtype} needs C code compiled at start: {error}") from error
        say(f"computing with torch, which is several times slower than the C step: {error}")
        return None


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
