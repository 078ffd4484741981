"""The paged KV cache: fixed blocks of tokens, handed out one by one.

Three things are kept apart. A *position* is where a token stands in its sequence; a *slot* is where its keys and values
lie in memory; the *block table* of a sequence leads from one to the other.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import pairwise

import numpy as np
import torch

from worker.native.config import DecoderConfig

BLOCK_TOKENS = 16


class BlockAllocator:
    """A fixed number of blocks. The lowest free one is handed out first, or the one that continues a run."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.free_blocks = num_blocks
        self._heap = list(range(num_blocks))  # every free block once, and some that were handed out as part of a run
        self._is_free = bytearray(b"\x01") * num_blocks
        self._is_listed = bytearray(b"\x01") * num_blocks  # in the heap

    def allocate(self, count: int, after: int = -1) -> list[int]:
        """The caller has made sure that `count` blocks are free. Those next to block `after` come first."""
        assert 0 <= count <= self.free_blocks, f"KV cache is full: {count} blocks wanted, {self.free_blocks} free"
        blocks = []
        for _ in range(count):
            follows = 0 <= after < self.num_blocks - 1 and self._is_free[after + 1]
            after = after + 1 if follows else self._lowest()
            self._is_free[after] = 0
            blocks.append(after)
        self.free_blocks -= count
        return blocks

    def _lowest(self) -> int:
        while True:
            block = heappop(self._heap)
            self._is_listed[block] = 0
            if self._is_free[block]:
                return block

    def free(self, blocks: list[int]) -> None:
        for block in blocks:
            assert not self._is_free[block], f"block {block} freed twice"
            self._is_free[block] = 1
            if not self._is_listed[block]:
                self._is_listed[block] = 1
                heappush(self._heap, block)
        self.free_blocks += len(blocks)


@dataclass(slots=True)
class BlockTable:
    """The blocks of one sequence, in the order of its positions. Changed by `PagedCache` only."""

    blocks: list[int] = field(default_factory=list)
    tokens: int = 0  # positions 0 … tokens − 1 have keys and values
    is_run: bool = True  # each block lies right behind the one before it
    # The blocks again, as the array that steps are built from; longer than `blocks`.
    array: np.ndarray = field(default_factory=lambda: np.zeros(8, dtype=np.int64))


class PagedCache:
    """Keys and values of all layers and sequences, in blocks of `BLOCK_TOKENS` tokens.

    `layers[i]` is [2 * kv_heads, num_blocks, BLOCK_TOKENS, head_dim], the key heads before the value heads, so that a
    step writes and gathers both in one call, and blocks side by side are one long read per head. A block is cleared when it gets a new owner: attention multiplies the
    unused slots of a padded table by zero, and zero times NaN is NaN.
    """

    def __init__(self, config: DecoderConfig, capacity_bytes: int, device: torch.device, dtype: torch.dtype) -> None:
        per_token = 2 * config.kv_heads * config.head_dim * dtype.itemsize * config.layers
        self.block_bytes = BLOCK_TOKENS * per_token
        self.num_blocks = capacity_bytes // self.block_bytes
        if self.num_blocks < 1:
            raise ValueError(f"a KV cache of {capacity_bytes} bytes holds no block of {self.block_bytes} bytes")
        self.allocator = BlockAllocator(self.num_blocks)
        shape = (config.layers, 2 * config.kv_heads, self.num_blocks, BLOCK_TOKENS, config.head_dim)
        # On a CPU, pages of an empty tensor that no block has touched yet take no memory.
        self._pool = torch.empty(shape, dtype=dtype, device=device)
        self.layers = list(self._pool.unbind(0))
        self.slots = [layer.flatten(1, 2) for layer in self.layers]  # [2 * kv_heads, slots, head_dim], the same memory
        self._new: list[int] = []

    def grow(self, table: BlockTable, tokens: int) -> None:
        """Gives a sequence the blocks for its first `tokens` positions. `clear_new` must follow before they are read."""
        held = len(table.blocks)
        wanted = -(-tokens // BLOCK_TOKENS)
        if wanted > held:
            last = table.blocks[-1] if held else -1
            new = self.allocator.allocate(wanted - held, after=last)
            table.is_run = table.is_run and is_run([last, *new] if held else new)
            table.blocks += new
            self._new += new
            if wanted > len(table.array):
                table.array = np.resize(table.array, max(wanted, 2 * len(table.array)))
            table.array[held:wanted] = new
        table.tokens = max(table.tokens, tokens)

    def clear_new(self) -> None:
        """Clears the blocks handed out since the last call, all in one operation."""
        if self._new:
            self._pool.index_fill_(2, torch.tensor(self._new, device=self._pool.device), 0)
            self._new.clear()

    def truncate(self, table: BlockTable, tokens: int) -> None:
        """Forgets all positions from `tokens` on, and frees the blocks that hold nothing else."""
        keep = -(-tokens // BLOCK_TOKENS)
        self.allocator.free(table.blocks[keep:])
        del table.blocks[keep:]
        table.tokens = min(table.tokens, tokens)
        table.is_run = table.is_run or not table.blocks


def is_run(blocks: list[int]) -> bool:
    return all(later == block + 1 for block, later in pairwise(blocks))
