"""Filling a step: all decodes with a floor, those without as far as time allows, and a piece of prefill.

How many prompt tokens a step carries decides goodput more than any memory policy does: too few waste the weight read, too
many break floors. About the ridge is right while memory binds; more, when the line's TTFT targets need it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from collections.abc import Sequence as ListOf
from dataclasses import dataclass

from scheduler.admission import FLOOR_SHARE, MIN_CHUNK
from scheduler.batch import Entry, Kind
from scheduler.calibration import CostModel
from scheduler.model import ModelShape
from scheduler.roofline import NO_WORK, StepWork, decode_work
from scheduler.sequence import Sequence

RIDGE_SHARE = 1.3  # tokens per step, as a multiple of the ridge, that prefill fills a step up to
TTFT_SHARE = 0.5  # of the TTFT target that the line's prefill may take before chunks grow
LEAST_TTFT_SECONDS = 0.2
MOST_CHUNK = 8192
LONELY_STEP_SECONDS = 0.1  # a step that carries no decode may take this long: who arrives meanwhile waits for its end


@dataclass(frozen=True, slots=True)
class Filled:
    """Entries and whose they are, side by side."""

    entries: tuple[Entry, ...]
    sequences: tuple[Sequence, ...]
    work: StepWork
    budget_seconds: float  # what the strictest floor allows; infinite without one
    best_effort: int  # decodes without a floor


def fill_step(
    cost: CostModel,
    promised: list[Sequence],
    best_effort: list[Sequence],
    prefilling: list[Sequence],
    turn: int,
    may_grow: bool,
    now: float,
) -> Filled:
    """What the next step carries. Best-effort decodes go round from `turn`; `may_grow`: chunks may, memory is not tight."""
    shape = cost.shape
    budget = FLOOR_SHARE * min((s.tier.gap_seconds for s in promised), default=math.inf)
    work = add_decodes(shape, NO_WORK, promised)
    taken = _take_turns(cost, best_effort, turn, work, budget, MIN_CHUNK if prefilling else 0)
    work = add_decodes(shape, work, taken)
    sequences = promised + taken
    entries = [Entry(s.key, Kind.DECODE, s.computed, 1, True) for s in sequences]
    if prefilling:
        chunks = deal(prefilling, _chunk_tokens(cost, prefilling, work, budget, may_grow, now))
        entries += chunks
        sequences += prefilling[: len(chunks)]
        work = _add_chunks(shape, work, chunks)
    return Filled(tuple(entries), tuple(sequences), work, budget, len(taken))


def sort_out(running: Iterable[Sequence]) -> tuple[list[Sequence], list[Sequence], list[Sequence]]:
    """Those who decode with a floor, those who decode without one, and those who prefill, first come first."""
    promised: list[Sequence] = []
    best_effort: list[Sequence] = []
    prefilling: list[Sequence] = []
    for sequence in running:
        if not sequence.is_decoding:
            prefilling.append(sequence)
        elif sequence.tier.floor_utps:
            promised.append(sequence)
        else:
            best_effort.append(sequence)
    return promised, best_effort, sorted(prefilling, key=lambda s: (s.tier.rank, s.order))


def _take_turns(
    cost: CostModel, sequences: list[Sequence], turn: int, work: StepWork, budget: float, chunk: int
) -> list[Sequence]:
    """As many sequences without a floor as the budget leaves room for, and for `chunk` prompt tokens."""
    if not sequences or budget == math.inf:
        return sequences
    turn %= len(sequences)
    ordered = sequences[turn:] + sequences[:turn]

    def fits(count: int) -> bool:
        more = add_decodes(cost.shape, work, ordered[:count])
        return cost.safe_seconds(more.plus_chunk(cost.shape, 0, chunk, outputs=0)) <= budget

    return ordered[: largest(fits, 0, len(ordered))]


def _chunk_tokens(
    cost: CostModel, prefilling: list[Sequence], work: StepWork, budget: float, may_grow: bool, now: float
) -> int:
    """Prompt tokens for this step: about the ridge, more by need, never beyond the strictest floor."""
    most = min(sum(s.uncached_prefill for s in prefilling), MOST_CHUNK)

    def seconds(tokens: int) -> float:
        return cost.safe_seconds(_add_chunks(cost.shape, work, deal(prefilling, tokens)))

    if not work.outputs:
        return max(MIN_CHUNK, largest(lambda tokens: seconds(tokens) <= LONELY_STEP_SECONDS, MIN_CHUNK, most))
    chunk = max(math.ceil(RIDGE_SHARE * cost.ridge) - work.outputs, cost.ridge, MIN_CHUNK)
    if chunk < most and may_grow:
        rate = _needed_rate(prefilling, now)
        chunk = most - largest(lambda less: (most - less) / seconds(most - less) >= rate, 0, most - chunk)
    return max(MIN_CHUNK, largest(lambda tokens: seconds(tokens) <= budget, MIN_CHUNK, min(chunk, most)))


def _needed_rate(prefilling: list[Sequence], now: float) -> float:
    """Prompt tokens per second at which everybody in the line gets a first token within a share of the TTFT target."""
    rate, queued = 0.0, 0
    for sequence in prefilling:
        queued += sequence.uncached_prefill
        left = TTFT_SHARE * sequence.tier.ttft_target_seconds - (now - sequence.arrived_at)
        rate = max(rate, queued / max(left, LEAST_TTFT_SECONDS))
    return rate


def deal(prefilling: ListOf[Sequence], tokens: int) -> list[Entry]:
    """`tokens` prompt tokens dealt to the sequences in their order, each as much as it still needs."""
    entries = []
    for sequence in prefilling:
        if tokens <= 0:
            break
        piece = min(tokens, sequence.uncached_prefill)
        delivers = piece == sequence.uncached_prefill
        entries.append(Entry(sequence.key, Kind.PREFILL, sequence.computed, piece, delivers, sequence.is_told))
        tokens -= piece
    return entries


def add_decodes(shape: ModelShape, work: StepWork, sequences: ListOf[Sequence]) -> StepWork:
    """This work and one decoded token for each of the sequences."""
    more = decode_work(shape, len(sequences), shape.kv_bytes_of_all([s.computed + 1 for s in sequences]))
    return StepWork(
        work.outputs + more.outputs,
        work.query_tokens + more.query_tokens,
        work.kv_read_bytes + more.kv_read_bytes,
        work.kv_write_bytes + more.kv_write_bytes,
        work.attention_flops + more.attention_flops,
    )


def _add_chunks(shape: ModelShape, work: StepWork, chunks: Iterable[Entry]) -> StepWork:
    for chunk in chunks:
        work = work.plus_chunk(shape, chunk.position, chunk.query_tokens, chunk.outputs)
    return work


def largest(fits: Callable[[int], bool], low: int, high: int) -> int:
    """The largest number in low..high that fits, given that smaller ones fit too; `low` where none does."""
    if high <= low or fits(high):
        return max(low, high)
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low
