"""What a step carries: which sequence computes how many tokens, and why."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from scheduler.messages import Request, TokenEvent


class Kind(StrEnum):
    """What an entry's tokens are for. The engine may treat all alike; the cost model and the metrics do not."""

    DECODE = "decode"
    PREFILL = "prefill"
    VERIFY = "verify"  # drafted tokens of a speculation
    DENOISE = "denoise"  # a masked block of a diffusion model
    COMMIT = "commit"  # the pass that stores a finished block


class Entry(NamedTuple):
    """One sequence's part of a step: compute `query_tokens` tokens from `position` on.

    `delivers`: the last of them is the sequence's last known token, so the step draws what comes next. `is_told`: the
    request wants to know how likely the model held these prompt tokens.
    """

    key: int
    kind: Kind
    position: int
    query_tokens: int
    delivers: bool
    is_told: bool = False

    @property
    def outputs(self) -> int:
        """Rows whose logits are wanted."""
        return self.query_tokens if self.is_told else int(self.delivers)


class Kept(NamedTuple):
    """A full block that outlives its sequence: the one at this place of `key`'s, kept under a number."""

    key: int
    place: int
    number: int


class Shared(NamedTuple):
    """`key` goes on with blocks that were kept: the tokens in them are computed."""

    key: int
    numbers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One forward pass, and what changes hands before it, in the order `kept`, `stop`, `evicted`, `start`, `shared`.

    `kept`, `evicted`, `shared`: what the prefix cache (`scheduler/prefix.py`) makes of full blocks. `stop`: sequences whose KV cache is free from now on. `start`: sequences that appear in an entry for the first time;
    stop comes before start, and a key may be in both. `refused`: requests that waited in vain. `predicted_seconds`: how
    long the step will take.
    """

    entries: tuple[Entry, ...] = ()
    start: tuple[Request, ...] = ()
    stop: tuple[int, ...] = ()
    refused: tuple[TokenEvent, ...] = ()
    predicted_seconds: float = 0.0
    kept: tuple[Kept, ...] = ()
    evicted: tuple[int, ...] = ()
    shared: tuple[Shared, ...] = ()
