"""Who may begin with blocks of the KV cache that are already computed: an index of full blocks by what leads up to them.

A block is known by a digest over its tokens and the digest of the block before it, so equal digests mean equal prefixes.
The first one stands on the tenant's name: nobody hits another tenant's blocks, nor can time them. 128 bits of a
cryptographic hash need no second look at the tokens; a block of 16 takes about 1 µs.

The gate owns the index and decides; an engine is told in its plans which block of which sequence is kept under which
number, who begins with it, and what is evicted. Thus a simulator hits as the real thing does, and a run can be replayed.

Every block that anybody uses is charged once. Who computed it goes on paying for it, as part of what was reserved for it;
who hits it reserves less. When the one who paid has ended and others still use it, it is `pinned` instead. A block that
nobody uses is idle: free in the ledger's eyes, and evicted when a step needs the memory.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from hashlib import blake2b

from scheduler.ledger import Ledger
from scheduler.messages import Request

DIGEST_BYTES = 16
TOKEN_BYTES = 4
HASHED_AT_ONCE = 16  # blocks: most of the time goes into taking tokens up; a prompt that hits nothing hashes no more
MARKED_BLOCKS = (1, 4, 16, 64, 256)  # long: prefixes that others are told of
MOST_MARKS = 64  # the last used; 0.7 KB of a snapshot


class Sharing(StrEnum):
    """Who may hit whose blocks."""

    NOBODY = "nobody"
    TENANT = "tenant"  # each its own
    EVERYBODY = "everybody"


@dataclass(slots=True, eq=False)
class Node:
    """A computed block. `number` is its name between gate and engine, and is not used again."""

    digest: bytes
    number: int
    held_bytes: float
    payer: Prefix | None  # whose reservation it is part of
    users: int = 1


@dataclass(slots=True, eq=False)
class Prefix:
    """What one request begins with: its tokens block by block, and those blocks of it that are in the index."""

    request: Request
    block_tokens: int
    digests: list[bytes]  # in front the one that all others stand on
    is_alone: bool  # its further blocks are not shared, in either direction
    generated: list[int] = field(default_factory=list)  # grows while it runs
    nodes: list[Node] = field(default_factory=list)

    @property
    def known(self) -> int:
        return len(self.request.prompt) + len(self.generated)

    @property
    def most_hits(self) -> int:
        """Blocks that it could take over: the last known token is always computed, since the next is drawn from it."""
        request = self.request
        is_told = request.prompt_logprobs and request.logprobs is not None and not self.generated
        return 0 if is_told else (self.known - 1) // self.block_tokens

    def digest(self, block: int) -> bytes:
        """Of a block whose tokens are all known."""
        while len(self.digests) <= block + 1:
            self._hash_on()
        return self.digests[block + 1]

    def _hash_on(self) -> None:
        first, size = len(self.digests) - 1, TOKEN_BYTES * self.block_tokens
        stop = min(first + HASHED_AT_ONCE, self.known // self.block_tokens)
        assert first < stop, "its tokens are not all known"
        tokens, digest = array("I", self._tokens(first, stop)).tobytes(), self.digests[-1]
        for at in range(0, len(tokens), size):
            digest = blake2b(digest + tokens[at : at + size], digest_size=DIGEST_BYTES).digest()
            self.digests.append(digest)

    def _tokens(self, first_block: int, stop_block: int) -> Sequence[int]:
        prompt = self.request.prompt
        start, stop, length = first_block * self.block_tokens, stop_block * self.block_tokens, len(prompt)
        if stop <= length:
            return prompt[start:stop]
        return [*prompt[start:], *self.generated[max(0, start - length) : stop - length]]

    def may_go_on(self, computed: int) -> bool:
        """It stands where another block could be taken over."""
        return (
            not self.is_alone and computed == len(self.nodes) * self.block_tokens < self.most_hits * self.block_tokens
        )

    def coming(self, computed: int) -> bytes | None:
        """The block that it computes next, where that will be shared."""
        block = len(self.nodes)
        if self.is_alone or computed // self.block_tokens != block or self.known < (block + 1) * self.block_tokens:
            return None
        return self.digest(block)


def prefix_of(request: Request, block_tokens: int, sharing: Sharing) -> Prefix:
    """Of a request that has arrived."""
    whose = request.tenant if sharing is Sharing.TENANT else ""
    root = blake2b(whose.encode(), digest_size=DIGEST_BYTES).digest()
    return Prefix(request, block_tokens, [root], sharing is Sharing.NOBODY)


def mark_of(digest: bytes) -> int:
    """What of a digest is enough to guess who has a block."""
    return int.from_bytes(digest[:4], "little")


def known_blocks(prefix: Prefix, marks: Collection[int]) -> int:
    """How long a part of a prompt somebody who tells these marks has, as far as they tell."""
    known = 0
    for blocks in MARKED_BLOCKS:
        if blocks > prefix.most_hits or mark_of(prefix.digest(blocks - 1)) not in marks:
            break
        known = blocks
    return known


class PrefixIndex:
    """All blocks that can be hit. `block_bytes` tells what the n-th block of a sequence holds."""

    def __init__(
        self, sharing: Sharing, block_tokens: int, block_bytes: Callable[[int], float], ledger: Ledger
    ) -> None:
        self.sharing = sharing
        self.hit_tokens = 0
        self.query_tokens = 0  # of prompts that were looked up
        self.evicted_blocks = 0
        self.idle_bytes = 0.0
        self._block_tokens = block_tokens
        self._block_bytes = block_bytes
        self._ledger = ledger
        self._nodes: dict[bytes, Node] = {}
        self._idle: OrderedDict[bytes, Node] = OrderedDict()  # least recently used first, and a block before its parent
        self._numbers = 0
        self._marks: OrderedDict[int, None] = OrderedDict()  # least recently used first

    def __len__(self) -> int:
        return len(self._nodes)

    def prefix(self, request: Request) -> Prefix:
        return prefix_of(request, self._block_tokens, self.sharing)

    @property
    def marks(self) -> tuple[int, ...]:
        """Of the prefixes that were used last."""
        return tuple(self._marks)

    def hits(self, prefix: Prefix) -> list[Node]:
        """The blocks with which it could go on from where its own end."""
        found: list[Node] = []
        if not prefix.is_alone:
            for block in range(len(prefix.nodes), prefix.most_hits):
                node = self._nodes.get(prefix.digest(block))
                if node is None:
                    break
                found.append(node)
        return found

    def hold(self, prefix: Prefix, nodes: Sequence[Node]) -> None:
        """It goes on with these from now on, whoever else leaves."""
        for node in nodes:
            if not node.users:
                del self._idle[node.digest]
                self.idle_bytes -= node.held_bytes
                self._ledger.pin(node.held_bytes)
            node.users += 1
            prefix.nodes.append(node)
            self._mark(prefix)
        self.hit_tokens += len(nodes) * self._block_tokens

    def publish(self, prefix: Prefix, computed: int) -> list[tuple[int, int]]:
        """Its first `computed` tokens are in the KV cache: (place, number) of the blocks that others may hit now.

        Who has computed what another had published keeps that to itself, and all that follows.
        """
        kept: list[tuple[int, int]] = []
        while not prefix.is_alone and len(prefix.nodes) < computed // self._block_tokens:
            block = len(prefix.nodes)
            digest = prefix.digest(block)
            if digest in self._nodes:
                prefix.is_alone = True
            else:
                self._numbers += 1
                node = Node(digest, self._numbers, self._block_bytes(block), payer=prefix)
                self._nodes[digest] = node
                prefix.nodes.append(node)
                self._mark(prefix)
                kept.append((block, node.number))
        return kept

    def release(self, prefix: Prefix) -> None:
        """It uses its blocks no longer, and pays for none."""
        for node in reversed(prefix.nodes):  # so that a block becomes idle before its parent, and is evicted before it
            node.users -= 1
            if node.payer is prefix:
                node.payer = None
                if node.users:
                    self._ledger.pin(node.held_bytes)
            elif node.payer is None and not node.users:
                self._ledger.unpin(node.held_bytes)
            if not node.users:
                self._idle[node.digest] = node
                self.idle_bytes += node.held_bytes
        prefix.nodes.clear()
        prefix.is_alone = self.sharing is Sharing.NOBODY

    def evict(self) -> Node | None:
        """The idle block that has been so for longest."""
        if not self._idle:
            return None
        digest, node = self._idle.popitem(last=False)
        del self._nodes[digest]
        self.idle_bytes -= node.held_bytes
        self.evicted_blocks += 1
        self._marks.pop(mark_of(digest), None)
        return node

    def _mark(self, prefix: Prefix) -> None:
        """Its last block was just used."""
        if len(prefix.nodes) in MARKED_BLOCKS:
            mark = mark_of(prefix.nodes[-1].digest)
            self._marks[mark] = None
            self._marks.move_to_end(mark)
            if len(self._marks) > MOST_MARKS:
                self._marks.popitem(last=False)


def held_bytes(nodes: Sequence[Node]) -> float:
    return sum(node.held_bytes for node in nodes)


def charged_bytes(nodes: Sequence[Node]) -> float:
    """Of those that somebody pays for, or that are pinned."""
    return sum(node.held_bytes for node in nodes if node.users)


def pinned_bytes(prefixes: Iterable[Prefix]) -> list[float]:
    """What is pinned, told to the first in this order that uses it.

    Looks at every block once: who uses a block uses all before it, so those were told already.
    """
    told: set[int] = set()
    shares = []
    for prefix in prefixes:
        share = 0.0
        for node in reversed(prefix.nodes):
            if node.number in told:
                break
            told.add(node.number)
            share += node.held_bytes if node.payer is None else 0.0
        shares.append(share)
    return shares
