"""A step through the C engine: what `worker.native.decoder.Decoder` does, for packed weights on a CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from worker.native.blocks import BLOCK_TOKENS, PagedCache, blocks_for
from worker.native.config import DecoderConfig
from worker.native.cpu.pack import SLACK_BYTES, Arena, Kernels, anonymous_memory, new_matrix
from worker.native.cpu.program import Buffer, PackedWeights, build_program
from worker.native.decoder import Outcome, context_of
from worker.native.inputs import Span
from worker.native.machine import PROBE_SECONDS, best_seconds

PROBE_SIZE, PROBE_ROWS, PROBE_TIMES = 1024, 128, 4
ROWS_AT_FIRST = 64  # that there are buffers for; more are made when a step brings them


class CBatch(ctypes.Structure):
    _fields_ = [
        ("rows", ctypes.c_int32),
        ("num_spans", ctypes.c_int32),
        ("outputs", ctypes.c_int32),
        ("tokens", ctypes.c_void_p),
        ("spans", ctypes.c_void_p),
        ("blocks", ctypes.c_void_p),
        ("output_rows", ctypes.c_void_p),
        ("x", ctypes.c_void_p),
        ("logits", ctypes.c_void_p),
        ("best", ctypes.c_void_p),
    ]


class CpuCache(PagedCache):
    """As `PagedCache`, in the pages that attention.h describes: per layer [kv_heads, keys and values, blocks]."""

    def __init__(self, config: DecoderConfig, capacity_bytes: int) -> None:
        super().__init__(config, capacity_bytes, torch.device("cpu"), torch.bfloat16)

    def _lay_out(self, config: DecoderConfig, dtype: torch.dtype, device: torch.device) -> None:
        per_layer = self.num_blocks * self.block_bytes // config.layers
        memory = anonymous_memory(config.layers * per_layer + SLACK_BYTES)
        pool = torch.frombuffer(memory, dtype=dtype, count=config.layers * per_layer // dtype.itemsize)
        self.layers = list(pool.view(config.layers, -1).unbind(0))

    def clear_new(self) -> None:
        """Nothing: a page is cleared when its first token is stored."""
        self._new.clear()


class CpuDecoder:
    """A decoder of the Llama kind on packed weights. It owns neither cache nor sequences."""

    device = torch.device("cpu")

    def __init__(self, config: DecoderConfig, weights: PackedWeights, cache: CpuCache, kernels: Kernels) -> None:
        self.config = config
        self.weights = weights
        self.cache = cache
        self.context_tokens = context_of(config, cache)
        self.dtype_name = weights.formats[0]
        self._program = build_program(config, weights, cache.layers, cache.num_blocks)
        self._kernels = kernels
        self._engine = self._new_engine(kernels)
        self._x = self._buffer(Buffer.X, ROWS_AT_FIRST)
        self._logits = self._buffer(Buffer.LOGITS, 1)
        self._inputs: tuple[np.ndarray, ...] = ()  # of the last step, which threads may still look at

    def __del__(self) -> None:
        if getattr(self, "_engine", None):
            self._kernels.library.engine_free(self._engine)

    @property
    def threads(self) -> int:
        return self._kernels.threads

    def set_threads(self, threads: int) -> None:
        """With other threads of its own from now on."""
        if threads != self.threads:
            kernels = Kernels(self._kernels.library, threads)
            engine = self._new_engine(kernels)
            self._kernels.library.engine_free(self._engine)
            self._kernels, self._engine = kernels, engine

    def product_flops(self) -> float:
        """Operations per second of products with many rows, at their best."""
        matrix = new_matrix(Arena(PROBE_SIZE**2 * 2 + 4096), PROBE_SIZE, PROBE_SIZE, self.dtype_name)
        x = torch.ones(PROBE_ROWS, PROBE_SIZE)
        seconds = best_seconds(lambda: self._kernels.multiply(matrix, x, PROBE_TIMES), self.device, PROBE_SECONDS)
        return 2 * PROBE_ROWS * PROBE_SIZE**2 * PROBE_TIMES / seconds

    def run(self, spans: Sequence[Span], needs_logits: bool = True) -> Outcome:
        """Stores keys and values of all tokens. The outcome's tensors are good until the next call."""
        counts = [len(span.tokens) for span in spans]
        stops = np.cumsum(counts, dtype=np.int32)
        rows = int(stops[-1])
        self._x = self._grown(self._x, Buffer.X, rows)
        delivering = tuple(i for i, span in enumerate(spans) if span.delivers)
        output_rows = stops[list(delivering)] - 1
        tokens = np.concatenate([np.asarray(span.tokens, dtype=np.int32) for span in spans])
        logits = best = None
        if needs_logits and delivering:
            self._logits = self._grown(self._logits, Buffer.LOGITS, len(delivering))
            logits = self._logits[: len(delivering)]
        elif delivering:
            best = np.empty(len(delivering), dtype=np.int32)
        self._step(tokens, _table(spans, stops - counts), _blocks(spans), output_rows, self._x, logits, best)
        told = tuple((i, int(stops[i]) - counts[i]) for i, span in enumerate(spans) if span.is_told)
        return Outcome(
            delivering,
            None if logits is None else logits[:, : self.config.vocab],
            None if best is None else best.tolist(),
            self._x[:rows],
            told,
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, vocab] of rows of a step's outcome."""
        none = np.empty(0, dtype=np.int32)
        rows = np.arange(len(hidden), dtype=np.int32)
        logits = self._buffer(Buffer.LOGITS, len(hidden))
        self._step(none, none, none, rows, hidden, logits=logits)
        return logits[:, : self.config.vocab]

    def _step(
        self,
        tokens: np.ndarray,
        table: np.ndarray,
        blocks: np.ndarray,
        output_rows: np.ndarray,
        x: Tensor,
        logits: Tensor | None = None,
        best: np.ndarray | None = None,
    ) -> None:
        batch = CBatch(
            len(tokens),
            len(table),
            len(output_rows),
            tokens.ctypes.data,
            table.ctypes.data,
            blocks.ctypes.data,
            output_rows.ctypes.data,
            x.data_ptr(),
            None if logits is None else logits.data_ptr(),
            None if best is None else best.ctypes.data,
        )
        if not self._kernels.library.engine_step(self._engine, ctypes.byref(batch)):
            raise MemoryError("no memory for a step's activations")
        self._inputs = (tokens, table, blocks, output_rows)

    def _new_engine(self, kernels: Kernels) -> int:
        engine = kernels.library.engine_new(kernels.pool, ctypes.byref(self._program.struct))
        if not engine:
            raise MemoryError("no memory for an engine")
        return int(engine)

    def _grown(self, buffer: Tensor, kind: Buffer, rows: int) -> Tensor:
        return buffer if rows <= len(buffer) else self._buffer(kind, rows)

    def _buffer(self, kind: Buffer, rows: int) -> Tensor:
        return torch.empty(rows, self._program.widths[kind])


def _table(spans: Sequence[Span], first_rows: np.ndarray) -> np.ndarray:
    """Per span: its first row, rows, the first one's position, and where its blocks begin."""
    table = np.empty((len(spans), 4), dtype=np.int32)
    at = 0
    for row, span, first in zip(table, spans, first_rows, strict=True):
        row[:] = first, len(span.tokens), span.position, at
        at += blocks_for(span.context)
    return table


def _blocks(spans: Sequence[Span]) -> np.ndarray:
    blocks = np.concatenate([span.table.array[: blocks_for(span.context)] for span in spans])
    return blocks.astype(np.int32)


assert BLOCK_TOKENS == 16, "a page of attention.h"
