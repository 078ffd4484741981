"""The tensors of one step, built once and used by every layer.

Rows are query tokens. Sequences with a single one come first, ordered by length; chunks of several follow.

A layer with a window reads less: the blocks from the first one on that a sequence's tokens still see. The blocks before
it stay where they are, because other layers may need them, and because all layers share one block table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from worker.native.blocks import BLOCK_TOKENS, BlockTable

TILED_ROWS = 64  # of a chunk, from where on its attention pays in tiles: see `decoder.attend_tiled`
ALONE_TOKENS = 512  # from here on a copy of a sequence's keys and values costs more than a call (2 threads of an EPYC)


@dataclass(frozen=True, slots=True)
class Span:
    """One sequence's part of a step: its tokens from `position` on, whose slots the block table already holds."""

    table: BlockTable
    position: int
    tokens: Sequence[int]
    delivers: bool
    is_told: bool = False  # what the model thinks of all of its tokens is wanted

    @property
    def context(self) -> int:
        return self.position + len(self.tokens)


@dataclass(frozen=True, slots=True)
class Read:
    """One call of attention: the rows it computes, and where their keys and values lie.

    Either `sequences` rows of one token each, padded to the longest, or one sequence with a chunk of rows. A column is a
    token in these blocks; with a window, the first of a sequence's is not its position 0. A single sequence whose blocks
    lie in a row is read where it is; others are gathered.
    """

    start: int  # rows start … stop − 1
    stop: int
    sequences: int
    blocks: Tensor  # [sequences * blocks of the longest]
    run: tuple[int, int] | None  # the first of the blocks in a row, and the one behind their last
    context: int  # columns of the longest
    mask: Tensor | None  # added to the scores: [sequences, 1, 1, context] or [rows, context]; None: nothing is masked …
    causal: bool  # … or a plain triangle: a chunk from position 0 on, no longer than the window
    tiled: bool = False  # a chunk whose scores are computed by hand, all of them masked


@dataclass(frozen=True, slots=True)
class StepInputs:
    """What the decoder needs to know of a step."""

    tokens: Tensor  # [rows]
    positions: Tensor  # [rows]
    slots: Tensor  # [rows]
    reads: dict[int, tuple[Read, ...]]  # by the layers' window; 0: they see everything
    outputs: Tensor | None  # rows whose logits are wanted; None: all of them
    delivering: tuple[int, ...]  # to which span, as given, each of these rows belongs
    told: tuple[tuple[int, int], ...]  # spans, as given, with `is_told`, and the row where each begins


def build_inputs(
    spans: Sequence[Span],
    device: torch.device,
    dtype: torch.dtype,
    group_tokens: int,
    windows: Sequence[int] = (0,),
) -> StepInputs:
    """`group_tokens` bounds the tokens that one call of attention gathers, padding included (one sequence always fits).

    `windows`: of the model's layers, each once.
    """
    singles = sorted((i for i, s in enumerate(spans) if len(s.tokens) == 1), key=lambda i: -spans[i].position)
    order = singles + [i for i, s in enumerate(spans) if len(s.tokens) > 1]
    ordered = [spans[i] for i in order]
    longest = max(span.context for span in spans)
    reach = {window: window if window < longest else 0 for window in windows}  # nobody has outgrown the others
    groups = [g for window in set(reach.values()) for g in _groups(ordered, len(singles), window, group_tokens)]
    rows = sum(len(span.tokens) for span in ordered)
    outputs = _output_rows(ordered)
    delivering = tuple(i for i in order if spans[i].delivers)

    fixed = [*_row_columns(ordered, len(singles)), np.array(outputs, dtype=np.int64)]
    tokens, positions, slots, output_rows, *tables = _to_device([*fixed, *(g.table() for g in groups)], device)
    reads = [(group.window, group.read(blocks, dtype)) for group, blocks in zip(groups, tables, strict=True)]
    return StepInputs(
        tokens=tokens,
        positions=positions,
        slots=slots,
        reads={window: tuple(read for seen, read in reads if seen == reach[window]) for window in windows},
        outputs=None if len(outputs) == rows else output_rows,
        delivering=delivering,
        told=tuple((i, row) for i, row in zip(order, _first_rows(ordered), strict=True) if spans[i].is_told),
    )


@dataclass(frozen=True, slots=True)
class _Group:
    """Spans that one call of attention reads through a window, and the step's row where the first of them begins."""

    spans: Sequence[Span]
    row: int
    window: int

    @property
    def rows(self) -> int:
        return sum(len(span.tokens) for span in self.spans)

    @property
    def first_blocks(self) -> list[int]:
        """Per span the first block with a token that it sees."""
        if not self.window:
            return [0] * len(self.spans)
        return [max(0, span.position + 1 - self.window) // BLOCK_TOKENS for span in self.spans]

    def table(self) -> np.ndarray:
        """The blocks of its spans from there on, padded with each one's own first block."""
        firsts = self.first_blocks
        counts = [-(-span.context // BLOCK_TOKENS) - first for span, first in zip(self.spans, firsts, strict=True)]
        table = np.empty((len(self.spans), max(counts)), dtype=np.int64)
        for row, span, first, count in zip(table, self.spans, firsts, counts, strict=True):
            row[:count] = span.table.array[first : first + count]
            row[count:] = span.table.array[first]
        return table.ravel()

    def read(self, blocks: Tensor, dtype: torch.dtype) -> Read:
        pairs = zip(self.spans, self.first_blocks, strict=True)
        stops = [span.context - first * BLOCK_TOKENS for span, first in pairs]  # one column after a span's last token
        rows, columns, singles = self.rows, max(stops), self.rows == len(self.spans)
        tiled = not singles and is_tiled(rows, blocks.device, dtype)
        causal = not singles and not tiled and rows == self.spans[0].context <= (self.window or rows)
        mask = None
        if singles:
            mask = _mask_of_singles(stops, self.window, blocks.device, dtype)
        elif not causal:
            mask = _mask_of_chunk(rows, columns, self.window, blocks.device, dtype)
        return Read(self.row, self.row + rows, len(self.spans), blocks, self.run(), columns, mask, causal, tiled)

    def run(self) -> tuple[int, int] | None:
        span, first = self.spans[0], self.first_blocks[0]
        if len(self.spans) > 1 or not span.table.is_run:
            return None
        start = span.table.blocks[0]
        return start + first, start - (-span.context // BLOCK_TOKENS)


def _groups(ordered: Sequence[Span], singles: int, window: int, group_tokens: int) -> list[_Group]:
    # A window begins anywhere in its first block, so up to a block less one token more than it is gathered.
    most = window + BLOCK_TOKENS - 1 if window else ordered[0].context
    lengths = [(min(span.context, most), is_read_alone(span, most)) for span in ordered[:singles]]
    sizes = group_by_length(lengths, group_tokens)
    groups, at, row = [], 0, 0
    for size in (*sizes, *[1] * (len(ordered) - singles)):
        groups.append(_Group(ordered[at : at + size], row, window))
        at += size
        row += groups[-1].rows
    return groups


def is_read_alone(span: Span, most: int) -> bool:
    """Where a copy, of `most` tokens at the most, costs more than a call of attention for the sequence alone."""
    return span.table.is_run and min(span.context, most) >= ALONE_TOKENS


def is_tiled(rows: int, device: torch.device, dtype: torch.dtype) -> bool:
    return rows >= TILED_ROWS and device.type == "cpu" and dtype == torch.bfloat16


def group_by_length(lengths: Sequence[tuple[int, bool]], group_tokens: int) -> list[int]:
    """Sizes of the groups that descending lengths are cut into, each padded to its longest: less than half is padding.

    A length that is marked is a group of its own.
    """
    groups: list[int] = []
    at = 0
    while at < len(lengths):
        (longest, alone), count = lengths[at], 1
        used = longest
        for length, is_alone in lengths[at + 1 :]:
            padded = (count + 1) * longest
            if alone or is_alone or padded >= 2 * (used + length) or padded > group_tokens:
                break
            count, used = count + 1, used + length
        groups.append(count)
        at += count
    return groups


def _row_columns(ordered: Sequence[Span], singles: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Token, position and slot of every row."""
    tokens = [span.tokens[0] for span in ordered[:singles]]
    positions = [np.array([span.position for span in ordered[:singles]], dtype=np.int64)]
    last_blocks = [span.table.blocks[span.position // BLOCK_TOKENS] for span in ordered[:singles]]
    slots = [np.array(last_blocks, dtype=np.int64) * BLOCK_TOKENS + positions[0] % BLOCK_TOKENS]
    for span in ordered[singles:]:
        tokens += span.tokens
        at = np.arange(span.position, span.context)
        positions.append(at)
        slots.append(span.table.array[at // BLOCK_TOKENS] * BLOCK_TOKENS + at % BLOCK_TOKENS)
    return np.array(tokens, dtype=np.int64), np.concatenate(positions), np.concatenate(slots)


def _first_rows(ordered: Sequence[Span]) -> list[int]:
    return list(accumulate((len(span.tokens) for span in ordered[:-1]), initial=0))


def _output_rows(ordered: Sequence[Span]) -> list[int]:
    """The last row of every span that delivers."""
    rows, stop = [], 0
    for span in ordered:
        stop += len(span.tokens)
        if span.delivers:
            rows.append(stop - 1)
    return rows


def _to_device(columns: Sequence[np.ndarray], device: torch.device) -> tuple[Tensor, ...]:
    """All columns in one transfer."""
    packed = torch.from_numpy(np.concatenate(columns)).to(device)
    return packed.split([len(column) for column in columns])


def _mask_of_singles(stops: Sequence[int], window: int, device: torch.device, dtype: torch.dtype) -> Tensor | None:
    """Minus infinity where a row must not look: from its stop on, and further back than its window."""
    columns, begins = max(stops), [max(0, stop - window) if window else 0 for stop in stops]
    if min(stops) == columns and not any(begins):
        return None
    stop, begin = torch.tensor([stops, begins], device=device)[:, :, None].unbind(0)
    column = torch.arange(columns, device=device)
    hidden = (column >= stop) | (column < begin)
    return torch.zeros(hidden.shape, device=device, dtype=dtype).masked_fill_(hidden, -torch.inf)[:, None, None]


def _mask_of_chunk(rows: int, columns: int, window: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The last row stands at the last column; each sees up to itself, no further back than its window: [rows, columns]."""
    hidden = torch.full((rows, columns), -torch.inf, device=device, dtype=dtype)
    mask = hidden.triu(columns - rows + 1)
    return mask.add_(hidden.tril_(columns - rows - window)) if window else mask
