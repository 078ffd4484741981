"""The paged KV cache: fixed blocks of tokens, handed out one by one.

Three things are kept apart. A *position* is where a token stands in its sequence; a *slot* is where its keys and values
lie in memory; the *block table* of a sequence leads from one to the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch

from worker.native.config import DecoderConfig

BLOCK_TOKENS = 16
FREE, KEPT, HELD = range(3)  # KEPT: free, but a sequence grows towards it


class BlockAllocator:
    """A fixed number of blocks, and an order of handing them out that keeps a sequence's own in a row.

    A sequence starts where there is room for what it may become. The room is kept from others while they find blocks
    elsewhere; it is nobody's property, so no block is ever lacking because of it.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.free_blocks = num_blocks
        self._more_users: dict[int, int] = {}  # of blocks that have more than one
        self._state = bytearray([FREE]) * num_blocks
        self._states = np.frombuffer(self._state, dtype=np.uint8)  # the same memory

    def find_room(self, count: int, most: int, wish: int = -1) -> range:
        """Free blocks in a row for a sequence that starts with `count` and may come to `most`.

        From `wish` on where `count` are free, else the lowest row that nobody grows towards. Where there is none, the
        upper half of the longest free row: who lies before it keeps the lower one. That may be shorter than `most`, or
        even than `count`.
        """
        assert self.free_blocks, "KV cache is full"
        if wish >= 0 and (behind := self._free_from(wish, most)) >= count:
            return range(wish, wish + behind)
        starts, lengths = runs_of(self._states == FREE)
        fitting = lengths >= most
        if fitting.any():
            start = int(starts[fitting.argmax()])
            return range(start, start + most)
        starts, lengths = runs_of(self._states != HELD)
        longest = int(lengths.argmax())
        start, length = int(starts[longest]), int(lengths[longest])
        left = max(0, length - count) // 2 if start else 0  # nobody lies before the first block
        return range(start + left, start + min(length, left + most))

    def _free_from(self, block: int, most: int) -> int:
        """How many from there on are free, and nobody's room."""
        taken = np.flatnonzero(self._states[block : block + most])
        return int(taken[0]) if len(taken) else len(self._states[block : block + most])

    def keep(self, room: range) -> None:
        """Others may have these only when nothing else is left."""
        states = self._states[room.start : room.stop]
        states[states == FREE] = KEPT

    def allocate(self, count: int, wish: int = -1) -> list[int]:
        """The blocks from `wish` on, and where one of them is not free, others. The caller has made sure of `count`."""
        assert 0 <= count <= self.free_blocks, f"KV cache is full: {count} blocks wanted, {self.free_blocks} free"
        blocks = []
        for _ in range(count):
            if not 0 <= wish < self.num_blocks or self._state[wish] == HELD:
                wish = self._any()
            self._state[wish] = HELD
            blocks.append(wish)
            wish += 1
        self.free_blocks -= count
        return blocks

    def _any(self) -> int:
        """The lowest that nobody grows towards, else the last that somebody would come to."""
        lowest = self._state.find(FREE)
        return lowest if lowest >= 0 else self._state.rfind(KEPT)

    def free(self, blocks: list[int], room: range = range(0)) -> None:
        """One user less of each; without any, it is free. Also gives up a room."""
        for block in blocks:
            assert self._state[block] == HELD, f"block {block} freed twice"
            more = self._more_users.get(block, 0)
            if more > 1:
                self._more_users[block] = more - 1
            elif more:
                del self._more_users[block]
            else:
                self._state[block] = FREE
                self.free_blocks += 1
        states = self._states[room.start : room.stop]
        states[states == KEPT] = FREE

    def share(self, blocks: list[int]) -> None:
        """One user more of each."""
        for block in blocks:
            assert self._state[block] == HELD, f"block {block} is free, and nobody's to share"
            self._more_users[block] = self._more_users.get(block, 0) + 1

    def is_shared(self, block: int) -> bool:
        return block in self._more_users


def runs_of(is_in: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each row of true values starts, and how long it is. It takes 30 µs for 100,000 blocks and 256 rows."""
    edges = np.flatnonzero(np.diff(is_in, prepend=False, append=False))
    return edges[::2], edges[1::2] - edges[::2]


@dataclass(slots=True)
class BlockTable:
    """The blocks of one sequence, in the order of its positions. Changed by `PagedCache` only."""

    blocks: list[int] = field(default_factory=list)
    tokens: int = 0  # positions 0 … tokens − 1 have keys and values
    is_run: bool = True  # each block lies right behind the one before it
    room: range = range(0)  # where it was put, and what is kept for it
    # The blocks again, as the array that steps are built from; longer than `blocks`.
    array: np.ndarray = field(default_factory=lambda: np.zeros(8, dtype=np.int64))


class PagedCache:
    """Keys and values of all layers and sequences, in blocks of `BLOCK_TOKENS` tokens.

    `layers[i]` is [2 * kv_heads, num_blocks, BLOCK_TOKENS, head_dim], the key heads before the value heads, so that a
    step writes and gathers both in one call, and blocks side by side are one long read per head. A block is cleared
    when it gets a new owner: attention multiplies unused slots of a padded table by zero, and zero times NaN is NaN.

    Full blocks may have several users: sequences that begin alike, and the cache itself, which keeps some under a number
    when their sequence ends (`scheduler/prefix.py` decides which). Nobody writes into a full block, so none is ever copied.
    """

    def __init__(self, config: DecoderConfig, capacity_bytes: int, device: torch.device, dtype: torch.dtype) -> None:
        per_token = 2 * config.kv_heads * config.head_dim * dtype.itemsize * config.layers
        self.block_bytes = BLOCK_TOKENS * per_token
        self.num_blocks = capacity_bytes // self.block_bytes
        if self.num_blocks < 1:
            raise ValueError(f"a KV cache of {capacity_bytes} bytes holds no block of {self.block_bytes} bytes")
        self.allocator = BlockAllocator(self.num_blocks)
        self._new: list[int] = []
        self._kept: dict[int, int] = {}  # number -> block
        self._lay_out(config, dtype, device)

    def _lay_out(self, config: DecoderConfig, dtype: torch.dtype, device: torch.device) -> None:
        shape = (config.layers, 2 * config.kv_heads, self.num_blocks, BLOCK_TOKENS, config.head_dim)
        # On a CPU, pages of an empty tensor that no block has touched yet take no memory.
        self._pool = torch.empty(shape, dtype=dtype, device=device)
        self.layers = list(self._pool.unbind(0))
        self.slots = [layer.flatten(1, 2) for layer in self.layers]  # [2 * kv_heads, slots, head_dim], the same memory

    def grow(self, table: BlockTable, tokens: int, expected_tokens: int = 0) -> None:
        """Gives a sequence the blocks for its first `tokens` positions. `clear_new` must follow before they are read.

        `expected_tokens`: what it may come to. It matters when the sequence starts: there is room for so many, if any.
        """
        held, wanted = len(table.blocks), blocks_for(tokens)
        if wanted > held:
            wish = table.blocks[-1] + 1 if held else -1
            if not table.room:
                most = max(wanted, blocks_for(expected_tokens)) - held
                table.room = self.allocator.find_room(wanted - held, most, wish)
                self.allocator.keep(table.room)
                wish = table.room.start
            new = self.allocator.allocate(wanted - held, wish)
            _append(table, new)
            self._new += new
        table.tokens = max(table.tokens, tokens)

    def keep(self, table: BlockTable, place: int, number: int) -> None:
        """A full block of a sequence outlives it."""
        assert number not in self._kept and (place + 1) * BLOCK_TOKENS <= table.tokens
        block = table.blocks[place]
        self.allocator.share([block])
        self._kept[number] = block

    def evict(self, number: int) -> None:
        """What was kept under a number, where it was: a step that failed may have kept less than was planned."""
        if number in self._kept:
            self.allocator.free([self._kept.pop(number)])

    def go_on(self, table: BlockTable, numbers: Sequence[int]) -> None:
        """A sequence whose blocks are full has these behind them, with all their tokens."""
        assert table.tokens == len(table.blocks) * BLOCK_TOKENS
        blocks = [self._kept[number] for number in numbers]
        self.allocator.share(blocks)
        self.allocator.free([], table.room)
        table.room = range(0)  # it goes on behind them, if it can
        _append(table, blocks)
        table.tokens = len(table.blocks) * BLOCK_TOKENS

    def clear_new(self) -> None:
        """Clears the blocks handed out since the last call, all in one operation."""
        if self._new:
            self._pool.index_fill_(2, torch.tensor(self._new, device=self._pool.device), 0)
            self._new.clear()

    def truncate(self, table: BlockTable, tokens: int) -> None:
        """Forgets all positions from `tokens` on, and frees the blocks that hold nothing else."""
        keep = blocks_for(tokens)
        is_cut = tokens % BLOCK_TOKENS and tokens < table.tokens
        assert not (is_cut and self.allocator.is_shared(table.blocks[keep - 1])), (
            "others use what would be written anew"
        )
        self.allocator.free(table.blocks[keep:], range(0) if keep else table.room)
        if not keep:
            table.room = range(0)
        del table.blocks[keep:]
        table.tokens = min(table.tokens, tokens)
        table.is_run = table.is_run or not table.blocks


def _append(table: BlockTable, blocks: list[int]) -> None:
    held, count = len(table.blocks), len(table.blocks) + len(blocks)
    table.is_run = table.is_run and is_run([*table.blocks[-1:], *blocks])
    table.blocks += blocks
    if count > len(table.array):
        table.array = np.resize(table.array, max(count, 2 * len(table.array)))
    table.array[held:count] = blocks


def blocks_for(tokens: int) -> int:
    return -(-tokens // BLOCK_TOKENS)


def is_run(blocks: list[int]) -> bool:
    return all(later == block + 1 for block, later in pairwise(blocks))
