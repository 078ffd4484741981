"""Blocks have one owner, and what a sequence gives back is whole and clean."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.native.blocks import BLOCK_TOKENS, BlockAllocator, BlockTable, PagedCache
from worker.native.config import DecoderConfig

CONFIG = DecoderConfig.from_dict(
    {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 10,
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 8,
    }
)
BLOCK_BYTES = 2 * 16 * 2 * 2 * 4 * 4  # layers, tokens, keys and values, heads, head_dim, float32


def make_cache(num_blocks: int) -> PagedCache:
    return PagedCache(CONFIG, num_blocks * BLOCK_BYTES, torch.device("cpu"), torch.float32)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 7), st.integers(-1, 19)), max_size=60))
def test_blocks_have_one_owner_and_none_is_lost(moves: list[tuple[bool, int, int]]) -> None:
    allocator, owned = BlockAllocator(20), []
    for takes, count, after in moves:
        if takes and count <= allocator.free_blocks:
            owned.append(allocator.allocate(count, after))
        elif not takes and owned:
            allocator.free(owned.pop(count % len(owned)))
        held = [block for blocks in owned for block in blocks]
        assert len(held) == len(set(held)) == 20 - allocator.free_blocks
        assert set(held) <= set(range(20))


def test_a_lone_sequence_gets_blocks_in_a_row_whatever_was_there_before() -> None:
    cache, tables = make_cache(20), [BlockTable() for _ in range(3)]
    for tokens in range(16, 97, 16):  # three that grow in turns, one through the other
        for table in tables:
            cache.grow(table, tokens)
    assert not any(table.is_run for table in tables)
    for table in (tables[1], tables[0], tables[2]):
        cache.truncate(table, 0)
        assert table.is_run
    cache.grow(tables[0], 20)
    for tokens in range(21, 320):
        cache.grow(tables[0], tokens)
    assert tables[0].is_run and tables[0].blocks == list(range(20))


def test_allocator_asserts_on_its_own_state() -> None:
    allocator = BlockAllocator(2)
    blocks = allocator.allocate(2)
    with pytest.raises(AssertionError, match="full"):
        allocator.allocate(1)
    allocator.free(blocks)
    with pytest.raises(AssertionError, match="twice"):
        allocator.free(blocks[:1])


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 400)), max_size=40))
def test_a_table_holds_just_the_blocks_of_its_tokens(moves: list[tuple[int, int]]) -> None:
    cache, tables = make_cache(90), [BlockTable() for _ in range(3)]
    for which, tokens in moves:
        table = tables[which]
        kept = table.blocks[: -(-tokens // BLOCK_TOKENS)]
        if tokens > table.tokens:
            cache.grow(table, tokens)
        else:
            cache.truncate(table, tokens)
        assert table.tokens == tokens
        assert len(table.blocks) == -(-tokens // BLOCK_TOKENS)
        assert table.blocks[: len(kept)] == kept == table.array[: len(kept)].tolist()
        assert table.array[: len(table.blocks)].tolist() == table.blocks
        in_a_row = list(range(table.blocks[0], table.blocks[0] + len(table.blocks))) if table.blocks else []
        assert not table.is_run or table.blocks == in_a_row
    for table in tables:
        cache.truncate(table, 0)
    assert cache.allocator.free_blocks == 90


def test_a_block_is_clean_when_it_changes_owner() -> None:
    cache, first, second = make_cache(3), BlockTable(), BlockTable()
    cache.grow(first, 48)
    cache.clear_new()
    for layer in cache.layers:
        layer.fill_(torch.nan)
    cache.truncate(first, 20)
    cache.grow(second, 3)
    cache.clear_new()
    for layer in cache.layers:
        assert layer[:, second.blocks].eq(0).all()
        assert layer[:, first.blocks].isnan().all()  # nobody else's is touched


def test_cache_uses_what_it_is_given_in_whole_blocks() -> None:
    cache = PagedCache(CONFIG, 5 * BLOCK_BYTES + 100, torch.device("cpu"), torch.float32)
    assert (cache.block_bytes, cache.num_blocks) == (BLOCK_BYTES, 5)
    assert sum(layer.nbytes for layer in cache.layers) == 5 * BLOCK_BYTES
    with pytest.raises(ValueError, match="holds no block"):
        PagedCache(CONFIG, BLOCK_BYTES - 1, torch.device("cpu"), torch.float32)
