"""The tensors of one step, built once and used by every layer.

Rows are query tokens. Sequences with a single one come first, ordered by length; chunks of several follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from worker.native.blocks import BLOCK_TOKENS, BlockTable


@dataclass(frozen=True, slots=True)
class Span:
    """One sequence's part of a step: its tokens from `position` on, whose slots the block table already holds."""

    table: BlockTable
    position: int
    tokens: Sequence[int]
    delivers: bool

    @property
    def context(self) -> int:
        return self.position + len(self.tokens)


@dataclass(frozen=True, slots=True)
class Read:
    """One call of attention: the rows it computes, and where their keys and values lie.

    Either `sequences` rows of one token each, padded to the longest, or one sequence with a chunk of rows.
    """

    start: int  # rows start … stop − 1
    stop: int
    sequences: int
    blocks: Tensor  # [sequences * blocks of the longest]
    context: int  # tokens of the longest
    mask: Tensor | None  # added to the scores: [sequences, 1, 1, context] or [rows, context]; None: nothing is masked …
    causal: bool  # … or a plain triangle: a chunk from position 0 on


@dataclass(frozen=True, slots=True)
class StepInputs:
    """What the decoder needs to know of a step."""

    tokens: Tensor  # [rows]
    positions: Tensor  # [rows]
    slots: Tensor  # [rows]
    reads: tuple[Read, ...]
    outputs: Tensor | None  # rows whose logits are wanted; None: all of them
    delivering: tuple[int, ...]  # to which span, as given, each of these rows belongs


def build_inputs(spans: Sequence[Span], device: torch.device, dtype: torch.dtype, group_tokens: int) -> StepInputs:
    """`group_tokens` bounds the tokens that one call of attention gathers, padding included (one sequence always fits)."""
    singles = sorted((i for i, s in enumerate(spans) if len(s.tokens) == 1), key=lambda i: -spans[i].position)
    order = singles + [i for i, s in enumerate(spans) if len(s.tokens) > 1]
    ordered = [spans[i] for i in order]
    groups = group_by_length([span.context for span in ordered[: len(singles)]], group_tokens)
    groups += [1] * (len(order) - len(singles))
    rows = sum(len(span.tokens) for span in ordered)
    outputs = _output_rows(ordered)
    delivering = tuple(i for i in order if spans[i].delivers)

    columns = [*_row_columns(ordered, len(singles)), np.array(outputs, dtype=np.int64), *_tables(ordered, groups)]
    tokens, positions, slots, output_rows, *tables = _to_device(columns, device)
    return StepInputs(
        tokens=tokens,
        positions=positions,
        slots=slots,
        reads=tuple(_reads(ordered, groups, tables, dtype)),
        outputs=None if len(outputs) == rows else output_rows,
        delivering=delivering,
    )


def group_by_length(lengths: Sequence[int], group_tokens: int) -> list[int]:
    """Sizes of the groups that descending lengths are cut into, each padded to its longest: less than half is padding."""
    groups: list[int] = []
    at = 0
    while at < len(lengths):
        longest, count, used = lengths[at], 1, lengths[at]
        for length in lengths[at + 1 :]:
            padded = (count + 1) * longest
            if padded >= 2 * (used + length) or padded > group_tokens:
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


def _output_rows(ordered: Sequence[Span]) -> list[int]:
    """The last row of every span that delivers."""
    rows, stop = [], 0
    for span in ordered:
        stop += len(span.tokens)
        if span.delivers:
            rows.append(stop - 1)
    return rows


def _tables(ordered: Sequence[Span], groups: Sequence[int]) -> list[np.ndarray]:
    """Per group the block tables of its sequences, padded with each one's own first block."""
    tables, at = [], 0
    for count in groups:
        blocks = -(-ordered[at].context // BLOCK_TOKENS)
        table = np.empty((count, blocks), dtype=np.int64)
        for row, span in zip(table, ordered[at : at + count], strict=True):
            own = min(blocks, len(span.table.blocks))
            row[:own] = span.table.array[:own]
            row[own:] = span.table.array[0]
        tables.append(table.ravel())
        at += count
    return tables


def _to_device(columns: Sequence[np.ndarray], device: torch.device) -> tuple[Tensor, ...]:
    """All columns in one transfer."""
    packed = torch.from_numpy(np.concatenate(columns)).to(device)
    return packed.split([len(column) for column in columns])


def _reads(ordered: Sequence[Span], groups: Sequence[int], tables: Sequence[Tensor], dtype: torch.dtype) -> list[Read]:
    reads, span_at, row_at = [], 0, 0
    for count, blocks in zip(groups, tables, strict=True):
        group = ordered[span_at : span_at + count]
        rows = count if count > 1 else len(group[0].tokens)
        causal = rows > 1 and count == 1 and group[0].position == 0
        mask = None if causal or rows == 1 else _mask(group, blocks.device, dtype)
        reads.append(Read(row_at, row_at + rows, count, blocks, group[0].context, mask, causal))
        span_at += count
        row_at += rows
    return reads


def _mask(group: Sequence[Span], device: torch.device, dtype: torch.dtype) -> Tensor | None:
    """Minus infinity where a row must not look."""
    longest = group[0].context
    if len(group) == 1:  # a chunk that continues: every row sees what was there, and the chunk up to itself
        mask = torch.full((len(group[0].tokens), longest), -torch.inf, device=device, dtype=dtype)
        return mask.triu_(group[0].position + 1)  # [rows, context]
    contexts = [span.context for span in group]
    if contexts[-1] == longest:
        return None
    beyond = torch.arange(longest, device=device) >= torch.tensor(contexts, device=device)[:, None]
    return torch.zeros(beyond.shape, device=device, dtype=dtype).masked_fill_(beyond, -torch.inf)[:, None, None]
