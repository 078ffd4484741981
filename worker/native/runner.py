"""The torch engine: sequences, their cache, and one forward pass per plan."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from scheduler.batch import Entry, Kind, StepPlan
from scheduler.messages import Request, Sampling
from worker.engine import StepResult
from worker.native.blocks import BLOCK_TOKENS, BlockTable, PagedCache
from worker.native.config import DecoderConfig
from worker.native.decoder import Decoder
from worker.native.inputs import Span, StepInputs, build_inputs
from worker.native.loader import DTYPES, Checkpoint, Weights, load_weights, tensor_shapes
from worker.native.machine import available_cpus, choose_threads
from worker.native.sampler import sample

KINDS = (Kind.DECODE, Kind.PREFILL)
# What one call of attention gathers: on a CPU about what a second-level cache holds, so that it is read from there.
GATHER_BYTES = {"cpu": 1 << 20, "cuda": 256 << 20}


@dataclass(slots=True)
class Sequence:
    """One running request: every token known so far, prompt first, and where its keys and values lie."""

    tokens: list[int]
    sampling: Sampling
    table: BlockTable = field(default_factory=BlockTable)


class NativeEngine:
    """A stepwise engine (see `worker/engine.py`) for the checkpoints of `config.FAMILIES`.

    `config` is the raw config.json, `block_bytes` the KV cache of one block over all layers, `kv_cache_bytes` that of
    all blocks, `weight_bytes` and `parameters` count a tied head once, `context_tokens` is the longest a sequence can get,
    `device` and `dtype` are the names that `load` would take.
    """

    block_tokens = BLOCK_TOKENS

    def __init__(
        self, config: dict[str, Any], shape: DecoderConfig, weights: Weights, cache: PagedCache, context_tokens: int
    ) -> None:
        self.config = config
        self.context_tokens = context_tokens
        self.num_blocks = cache.num_blocks
        self.block_bytes = cache.block_bytes
        self.kv_cache_bytes = cache.num_blocks * cache.block_bytes
        self.weight_bytes = sum(tensor.nbytes for tensor in weights.tensors())
        self.parameters = sum(math.prod(size) for size in tensor_shapes(shape).values())
        self.device = str(weights.norm.device)
        self.dtype = str(weights.norm.dtype).removeprefix("torch.")
        self._cache = cache
        self._decoder = Decoder(shape, weights, cache, context_tokens)
        self._group_tokens = GATHER_BYTES[weights.norm.device.type] * BLOCK_TOKENS * shape.layers // cache.block_bytes
        self._sequences: dict[int, Sequence] = {}

    @classmethod
    @torch.inference_mode()
    def load(
        cls,
        path: str | Path,
        device: str = "auto",
        dtype: str = "auto",
        kv_cache_bytes: int = 1 << 30,
        threads: int | None = None,
    ) -> NativeEngine:
        """Reads a checkpoint directory. ValueError with a sentence that helps for all that cannot work.

        `device`: auto, cpu, cuda or cuda:n. `dtype`: auto (float32 on a CPU, else the checkpoint's), float32, bfloat16,
        float16. `threads`: of torch, on a CPU; None measures whether more than one pays.
        """
        path = Path(path)
        config = _read_config(path)
        shape = DecoderConfig.from_dict(config)
        where = _device(device)
        if threads and where.type == "cpu":
            torch.set_num_threads(threads)
        with Checkpoint(path) as checkpoint:
            weights = load_weights(checkpoint, shape, where, _dtype(dtype, where, checkpoint))
        cache = PagedCache(shape, kv_cache_bytes, where, weights.norm.dtype)
        engine = cls(config, shape, weights, cache, min(shape.max_positions, cache.num_blocks * BLOCK_TOKENS))
        if threads is None and where.type == "cpu":
            engine._choose_threads()
        return engine

    @property
    def free_blocks(self) -> int:
        return self._cache.allocator.free_blocks

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> StepResult:
        """See `worker.engine.Engine`. ValueError for a plan that contradicts what the engine knows of its sequences."""
        for key in plan.stop:
            self._stop(key)
        for request in plan.start:
            self._start(request)
        if not plan.entries:
            return StepResult()
        spans = [self._span(entry) for entry in plan.entries]
        self._cache.clear_new()
        inputs = build_inputs(spans, self._decoder.device, self._decoder.dtype, self._group_tokens)
        return self._deliver(plan, inputs, self._decoder.forward(inputs))

    def _stop(self, key: int) -> None:
        sequence = self._sequences.pop(key, None)
        if sequence is not None:  # a request may be cancelled before it ever started
            self._cache.truncate(sequence.table, 0)

    def _start(self, request: Request) -> None:
        if request.key in self._sequences:
            raise ValueError(f"sequence {request.key} is started twice")
        vocab = self._decoder.config.vocab
        if not len(request.prompt) or not 0 <= min(request.prompt) <= max(request.prompt) < vocab:
            raise ValueError(f"sequence {request.key}: a prompt is one token or more, each below {vocab}")
        self._sequences[request.key] = Sequence(list(request.prompt), request.sampling)

    def _span(self, entry: Entry) -> Span:
        """Checks an entry against its sequence and gives it blocks. Positions already computed are computed anew."""
        if entry.kind not in KINDS:
            raise ValueError(f"{entry}: kind is none of {', '.join(KINDS)}")
        sequence = self._sequences.get(entry.key)
        if sequence is None:
            raise ValueError(f"{entry}: not started")
        table, stop = sequence.table, entry.position + entry.query_tokens
        if not 0 <= entry.position <= table.tokens or not entry.position < stop <= len(sequence.tokens):
            raise ValueError(f"{entry}: {table.tokens} of {len(sequence.tokens)} known tokens are in the cache")
        if stop > self.context_tokens:
            raise ValueError(f"{entry}: the context is {self.context_tokens} tokens")
        if entry.delivers and stop != len(sequence.tokens):
            raise ValueError(f"{entry}: delivers, but {len(sequence.tokens)} tokens are known already")
        if entry.position < table.tokens:
            self._cache.truncate(table, entry.position)
        self._cache.grow(table, stop)
        return Span(table, entry.position, sequence.tokens[entry.position : stop], entry.delivers)

    def _deliver(self, plan: StepPlan, inputs: StepInputs, logits: torch.Tensor | None) -> StepResult:
        """Draws a token for every row of logits, and makes it the next known token of its sequence."""
        if logits is None:
            return StepResult()
        keys = [plan.entries[i].key for i in inputs.delivering]
        sequences = [self._sequences[key] for key in keys]
        drawn = sample(logits, [s.sampling for s in sequences], [len(s.tokens) for s in sequences])
        for sequence, token in zip(sequences, drawn, strict=True):
            sequence.tokens.append(token)
        return StepResult({key: [token] for key, token in zip(keys, drawn, strict=True)})

    def _choose_threads(self) -> None:
        """Times a decode step of a few short sequences, with one thread and with all."""
        tokens = min(65, self.context_tokens)
        count = max(1, min(8, self.num_blocks * BLOCK_TOKENS // (tokens + BLOCK_TOKENS)))
        requests = [Request(id=i, gateway=-1, prompt=[0] * tokens, max_tokens=1) for i in range(count)]
        keys = tuple(request.key for request in requests)  # negative: no real request has such a key
        prefill = tuple(Entry(key, Kind.PREFILL, 0, tokens - 1, False) for key in keys) if tokens > 1 else ()
        decode = StepPlan(tuple(Entry(key, Kind.DECODE, tokens - 1, 1, True) for key in keys))

        def step() -> None:
            self.run(decode)
            for key in keys:
                self._sequences[key].tokens.pop()  # so that the next step is the same one

        self.run(StepPlan(prefill, start=tuple(requests)))
        choose_threads(step, available_cpus())
        self.run(StepPlan(stop=keys))


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads((path / "config.json").read_text())
    except FileNotFoundError as error:
        raise ValueError(f"{path} holds no config.json: not a checkpoint directory") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path / 'config.json'} is not an object")
    return config


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ValueError(f"device {name!r}: known are auto, cpu, cuda and cuda:n")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name!r}: torch sees {torch.cuda.device_count()} CUDA devices")
    return device


def _dtype(name: str, device: torch.device, checkpoint: Checkpoint) -> torch.dtype:
    if name == "auto":
        name = "float32" if device.type == "cpu" else checkpoint.dtype("model.embed_tokens.weight")
    if name not in DTYPES:
        raise ValueError(f"dtype {name!r}: known are auto, {', '.join(DTYPES)}")
    return DTYPES[name]
