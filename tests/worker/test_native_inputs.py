"""What attention reads: each row just the tokens that it may see, and no block that none of a read's rows sees."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.native.blocks import BLOCK_TOKENS, BlockTable
from worker.native.inputs import Read, Span, StepInputs, build_inputs

CPU = torch.device("cpu")
Place = tuple[int, int]  # position of the first token, tokens


def make_spans(places: list[Place]) -> list[Span]:
    """Block b of sequence s has the number 1000 s + b."""
    spans = []
    for sequence, (position, count) in enumerate(places):
        blocks = [1000 * sequence + i for i in range(-(-(position + count) // BLOCK_TOKENS))]
        table = BlockTable(blocks, position + count, array=torch.tensor([*blocks, 0, 0]).numpy())
        spans.append(Span(table, position, list(range(count)), True))
    return spans


def seen_by_rows(inputs: StepInputs, window: int) -> dict[int, set[int]]:
    """Per row the slots that it sees."""
    seen: dict[int, set[int]] = {}
    for read in inputs.reads[window]:
        rows = range(read.start, read.stop)
        mask = full_mask(read)
        if read.run:
            assert list(range(*read.run)) == read.blocks.tolist()
        slots = read.blocks.view(read.sequences, -1, 1) * BLOCK_TOKENS + torch.arange(BLOCK_TOKENS)
        slots = slots.flatten(1)[:, : read.context]
        for i, row in enumerate(rows):
            columns = mask[i] == 0
            assert row not in seen
            seen[row] = set(slots[i if read.sequences > 1 else 0][columns].tolist())
            assert len(seen[row]) == columns.sum()
    return seen


def full_mask(read: Read) -> torch.Tensor:
    rows = read.stop - read.start
    if read.causal:
        assert rows == read.context and read.mask is None
        return torch.full((rows, rows), -torch.inf).triu_(1)
    mask = torch.zeros(()) if read.mask is None else read.mask
    return mask.reshape(-1, read.context).expand(rows, -1) if mask.dim() else torch.zeros(rows, read.context)


@settings(max_examples=60, deadline=None)
@given(
    places=st.lists(st.tuples(st.integers(0, 120), st.one_of(st.just(1), st.integers(1, 40))), min_size=1, max_size=7),
    window=st.integers(1, 200),
    group_tokens=st.integers(1, 600),
)
def test_a_row_sees_the_tokens_of_its_window_and_no_others(places: list[Place], window: int, group_tokens: int) -> None:
    inputs = build_inputs(make_spans(places), CPU, torch.float32, group_tokens, (0, window))
    for seen_window in (0, window):
        seen = seen_by_rows(inputs, seen_window)
        assert sorted(seen) == list(range(len(inputs.tokens)))
        for row, slots in seen.items():
            position, own = int(inputs.positions[row]), int(inputs.slots[row])
            first = max(0, position + 1 - seen_window) if seen_window else 0
            start = own - position  # blocks are numbered on, so slots are, too
            assert slots == {start + i for i in range(first, position + 1)}


def test_a_decode_beyond_the_window_reads_the_blocks_of_the_window_only() -> None:
    (span,) = make_spans([(1000, 1)])
    inputs = build_inputs([span], CPU, torch.float32, 1 << 20, (0, 40))
    (everything,), (windowed,) = inputs.reads[0], inputs.reads[40]
    assert everything.blocks.tolist() == span.table.blocks
    assert windowed.blocks.tolist() == [60, 61, 62]  # positions 961 … 1000 of 960 … 1007


def test_windows_that_nobody_has_outgrown_are_read_like_none() -> None:
    inputs = build_inputs(make_spans([(39, 1), (20, 1)]), CPU, torch.float32, 1 << 20, (0, 40))
    assert inputs.reads[40] == inputs.reads[0]


def test_long_sequences_with_a_window_are_read_together() -> None:
    inputs = build_inputs(make_spans([(900, 1), (500, 1), (100, 1)]), CPU, torch.float32, 1 << 20, (32,))
    (read,) = inputs.reads[32]
    assert read.sequences == 3
    assert read.context <= 32 + BLOCK_TOKENS - 1
