"""One read of keys and values: gathered or where they lie, fused or by hand, it is the same attention."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from worker.native.blocks import BLOCK_TOKENS, BlockTable
from worker.native.decoder import BY_HAND_TOKENS, TILE_ROWS, attend, attend_tiled
from worker.native.inputs import TILED_ROWS, Read, Span, build_inputs

KV_HEADS, SHARED, HEAD_DIM, BLOCKS = 2, 3, 16, 100


def pages_of(dtype: torch.dtype) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(2 * KV_HEADS, BLOCKS, BLOCK_TOKENS, HEAD_DIM).to(dtype)


def read_of(blocks: list[int], rows: int, context: int, run: bool) -> Read:
    mask = None if rows == 1 else torch.zeros(rows, context).fill_(-torch.inf).triu_(context - rows + 1)
    place = (blocks[0], blocks[-1] + 1) if run else None
    return Read(0, rows, 1, torch.tensor(blocks), place, context, mask, False)


def exact(q: Tensor, pages: Tensor, blocks: list[int], context: int) -> Tensor:
    """In float64, with every key and value repeated for the query heads that share it."""
    kv = pages[:, blocks].flatten(1, 2)[:, :context].double().repeat_interleave(SHARED, 0)
    k, v = kv.chunk(2)
    scores = q.double().transpose(0, 1) @ k.transpose(1, 2) / HEAD_DIM**0.5  # [heads, rows, context]
    rows = len(q)
    hidden = torch.ones(rows, context, dtype=torch.bool).triu_(context - rows + 1)
    attended: Tensor = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v
    return attended.transpose(0, 1).flatten(1)


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("context", [1, 16, 17, 640, BY_HAND_TOKENS + 5])
def test_blocks_in_a_row_are_read_where_they_lie_as_if_they_were_gathered(rows: int, context: int) -> None:
    context = max(rows, context)
    pages, blocks = pages_of(torch.float32), list(range(7, 7 + -(-context // BLOCK_TOKENS)))
    q = torch.randn(rows, KV_HEADS * SHARED, HEAD_DIM)
    lying, gathered = (attend(q, pages, read_of(blocks, rows, context, run)) for run in (True, False))
    wanted = exact(q, pages, blocks, context)
    assert (lying - wanted).abs().max() < 1e-5 and (gathered - wanted).abs().max() < 1e-5


@pytest.mark.parametrize("run", [False, True])
@pytest.mark.parametrize("context", [BY_HAND_TOKENS - 3, BY_HAND_TOKENS + 1, BY_HAND_TOKENS + 16, 1500])
def test_a_long_context_in_bfloat16_is_as_exact_by_hand_as_fused(context: int, run: bool) -> None:
    pages, blocks = pages_of(torch.bfloat16), list(range(3, 3 + -(-context // BLOCK_TOKENS)))
    pages[:, blocks[-1], context % BLOCK_TOKENS or BLOCK_TOKENS :] = 100  # what lies behind the context does not count
    q = torch.randn(1, KV_HEADS * SHARED, HEAD_DIM).bfloat16()
    wanted = exact(q, pages, blocks, context)
    k, v = (part[None, :, :context] for part in pages[:, blocks].flatten(1, 2).chunk(2))
    fused = F.scaled_dot_product_attention(q.view(1, KV_HEADS, SHARED, -1), k, v).reshape(1, -1)
    error = (attend(q, pages, read_of(blocks, 1, context, run)) - wanted).abs().max()
    assert error < 2 * (fused - wanted).abs().max() + 2**-9


@pytest.mark.parametrize("rows", [TILED_ROWS, TILE_ROWS, 2 * TILE_ROWS + 5])
@pytest.mark.parametrize("before", [0, 7, 600])
@pytest.mark.parametrize("scores", [16 << 20, 20 * SHARED * KV_HEADS * 900])
def test_a_chunk_in_bfloat16_is_as_exact_in_tiles_as_the_sum_of_its_roundings(
    rows: int, before: int, scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.native.decoder.TILE_SCORES", scores)
    context = before + rows
    pages, blocks = pages_of(torch.bfloat16), list(range(3, 3 + -(-context // BLOCK_TOKENS)))
    q = torch.randn(rows, KV_HEADS * SHARED, HEAD_DIM).bfloat16()
    table = BlockTable(blocks, context, array=torch.tensor(blocks).numpy())
    inputs = build_inputs([Span(table, before, [0] * rows, True)], q.device, q.dtype, 1 << 20)
    ((read,),) = inputs.reads.values()
    assert read.tiled and not read.causal
    wanted = exact(q, pages, blocks, context)
    error = attend(q, pages, read) - wanted
    assert error.norm() < 0.008 * wanted.norm() and error.abs().max() < 0.04
    k, v = (part[:, :context].float() for part in pages[:, blocks].flatten(1, 2).chunk(2))
    assert read.mask is not None
    tiled = attend_tiled(q.float().view(rows, KV_HEADS, SHARED, -1), k, v, read.mask.float())
    assert (tiled - wanted).abs().max() < 1e-5


def test_a_window_masks_tiles_too() -> None:
    rows, window, blocks = 200, 40, list(range(20))
    pages = pages_of(torch.bfloat16)
    q = torch.randn(rows, KV_HEADS * SHARED, HEAD_DIM).bfloat16()
    table = BlockTable(blocks, rows, array=torch.tensor(blocks).numpy())
    inputs = build_inputs([Span(table, 0, [0] * rows, True)], q.device, q.dtype, 1 << 20, (window,))
    (read,) = inputs.reads[window]
    tiled = attend(q, pages, read)
    fused = attend(q, pages, replace(read, tiled=False))
    assert read.tiled and (tiled - fused).abs().max() < 0.04
    pages[:, : (rows - window) // BLOCK_TOKENS] = 100
    assert torch.equal(attend(q, pages, read)[-1], tiled[-1])
