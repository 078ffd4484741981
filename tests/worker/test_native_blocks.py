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


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 7), st.integers(-1, 20), st.integers(1, 30)), max_size=60))
def test_blocks_have_one_owner_and_none_is_lost(moves: list[tuple[bool, int, int, int]]) -> None:
    allocator, owned = BlockAllocator(20), []
    for takes, count, wish, most in moves:
        if takes and count <= allocator.free_blocks:
            room = range(0)
            if allocator.free_blocks and wish < 0:
                room = allocator.find_room(count, most)
                allocator.keep(room)
            owned.append((allocator.allocate(count, room.start if room else wish), room))
            assert not 0 < count <= len(room) or owned[-1][0] == list(room[:count])
        elif not takes and owned:
            allocator.free(*owned.pop(count % len(owned)))
        held = [block for blocks, _ in owned for block in blocks]
        assert len(held) == len(set(held)) == 20 - allocator.free_blocks
        assert set(held) <= set(range(20))
    for blocks, room in owned:
        allocator.free(blocks, room)
    assert allocator.find_room(1, 20) == range(20), "nothing is kept for anybody any more"


@given(st.lists(st.tuples(st.sampled_from(["grow", "keep", "go on", "stop", "evict"]), st.integers(0, 9)), max_size=80))
def test_shared_blocks_live_as_long_as_anybody_uses_them(moves: list[tuple[str, int]]) -> None:
    cache, tables, kept = make_cache(20), [BlockTable() for _ in range(4)], dict[int, list[int]]()
    for number, (move, choice) in enumerate(moves):
        table, full = tables[choice % 4], tables[choice % 4].tokens // BLOCK_TOKENS
        if move == "grow" and cache.allocator.free_blocks >= 2:
            cache.grow(table, table.tokens + 1 + 3 * choice, 64)
        elif move == "keep" and full:
            cache.keep(table, choice % full, number)
            kept[number] = [table.blocks[choice % full]]
        elif move == "go on" and kept and table.tokens % BLOCK_TOKENS == 0:
            name = list(kept)[choice % len(kept)]
            cache.go_on(table, [name])
            assert table.blocks[-1:] == kept[name]
        elif move == "stop":
            cache.truncate(table, 0)
        elif move == "evict" and kept:
            cache.evict(kept_name := list(kept)[choice % len(kept)])
            del kept[kept_name]
        used = {block for table in tables for block in table.blocks}.union(*kept.values())
        assert len(used) == 20 - cache.allocator.free_blocks
        assert all(list(table.array[: len(table.blocks)]) == table.blocks for table in tables)
    for table in tables:
        cache.truncate(table, 0)
    for name in kept:
        cache.evict(name)
    assert cache.allocator.free_blocks == 20 and not cache.allocator.is_shared(0)
    assert cache.allocator.find_room(1, 20) == range(20), "nothing is kept for anybody any more"


def grow_in_turns(cache: PagedCache, count: int, most: int, expected: int, start: int = 17) -> list[BlockTable]:
    tables = [BlockTable() for _ in range(count)]
    for tokens in range(start, most + 1):
        for table in tables:
            cache.grow(table, tokens, expected)
    return tables


@pytest.mark.parametrize("count", [2, 8])
def test_sequences_that_grow_side_by_side_stay_in_a_row_where_there_is_room(count: int) -> None:
    cache = make_cache(count * 20)
    tables = grow_in_turns(cache, count, most=320, expected=320)
    assert [table.blocks for table in tables] == [list(range(20 * i, 20 * i + 20)) for i in range(count)]
    assert all(table.is_run for table in tables)


def test_a_sequence_starts_at_the_lowest_place_with_room_for_it() -> None:
    cache = make_cache(100)
    tables = grow_in_turns(cache, 3, most=20, expected=320)
    assert [table.blocks[0] for table in tables] == [0, 20, 40]
    cache.truncate(tables[0], 0)
    long, short = BlockTable(), BlockTable()
    cache.grow(long, 1, 330)
    cache.grow(short, 1, 160)
    assert (long.blocks, short.blocks) == ([60], [0])


@pytest.mark.parametrize("count", [2, 8])
def test_where_there_is_no_room_for_all_they_share_what_there_is(count: int) -> None:
    cache = make_cache(count * 20)
    tables = grow_in_turns(cache, count, most=160, expected=320 * count)
    assert all(table.is_run for table in tables), "each has half of a row, and no less than the tenth it came to"
    for tokens in range(161, 321):
        for table in tables:
            cache.grow(table, tokens, 320 * count)
    assert cache.allocator.free_blocks == 0
    assert sorted(block for table in tables for block in table.blocks) == list(range(count * 20))
    for table in tables:
        cache.truncate(table, 0)
    assert cache.allocator.find_room(1, count * 20) == range(count * 20)


def test_a_sequence_that_outgrows_its_room_leaves_that_of_others_alone() -> None:
    cache = make_cache(60)
    quiet, loud = BlockTable(), BlockTable()
    cache.grow(loud, 16, 160)
    cache.grow(quiet, 16, 480)
    cache.grow(loud, 16 * 30)
    assert quiet.blocks == [10] and loud.blocks == [*range(10), *range(40, 60)] and not loud.is_run
    cache.grow(loud, 16 * 35)
    assert loud.blocks[30:] == [39, 38, 37, 36, 35], "only then what is kept, from its end"
    cache.grow(quiet, 16 * 25)
    assert quiet.is_run


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
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 400), st.integers(0, 2000)), max_size=40))
def test_a_table_holds_just_the_blocks_of_its_tokens(moves: list[tuple[int, int, int]]) -> None:
    cache, tables = make_cache(90), [BlockTable() for _ in range(3)]
    for which, tokens, expected in moves:
        table = tables[which]
        kept = table.blocks[: -(-tokens // BLOCK_TOKENS)]
        if tokens > table.tokens:
            cache.grow(table, tokens, expected)
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
    assert cache.allocator.find_room(1, 90) == range(90)


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
