"""What the running sequences mean for those who come: when memory and seconds come free."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property

from scheduler import admission
from scheduler.admission import MIN_CHUNK, Drain, Load
from scheduler.calibration import CostModel
from scheduler.fill import RIDGE_SHARE, add_decodes
from scheduler.footprint import LengthHistory
from scheduler.ledger import Ledger
from scheduler.prefix import pinned_bytes
from scheduler.roofline import NO_WORK, StepWork
from scheduler.sequence import Sequence
from scheduler.waiting import Queued, Waiting


class Outlook:
    """Valid until the running sequences change. Each part is computed when first asked for: a burst of arrivals asks once."""

    def __init__(
        self, running: Mapping[int, Sequence], ledger: Ledger, cost: CostModel, history: LengthHistory, places: int
    ) -> None:
        self._running = running
        self._ledger = ledger
        self._cost = cost
        self._history = history
        self._places = places - len(running)
        self._room: dict[tuple[str, float], int] = {}  # (tier, footprint) -> places that the floors leave

    def wait_seconds(self, candidate: Waiting, ahead: Queued) -> float:
        """Seconds until a request that came now would start: its place in the line, memory and seconds that come free.

        Its own prompt is left out: counting it would refuse the long ones.
        """
        missing_bytes = ahead.kv_bytes + candidate.needed_bytes - self._ledger.free_bytes
        missing_places = ahead.count + 1 - self._free_places(candidate)
        drain = self._drain.wait_seconds(missing_bytes, missing_places)
        return drain + self.prefill_seconds(candidate.tier.rank, ahead)

    def prefill_seconds(self, rank: int, ahead: Queued) -> float:
        """Time to compute the prompts that are before a request of this rank."""
        tokens = ahead.uncached_tokens + sum(count for other, count in self._prefill_tokens.items() if other <= rank)
        if not tokens:
            return 0.0
        chunk = max(MIN_CHUNK, math.ceil(RIDGE_SHARE * self._cost.ridge))
        step = self._cost.seconds(self._decode_work.plus_chunk(self._cost.shape, 0, chunk, outputs=0))
        return tokens / chunk * step

    @property
    def utps(self) -> float:
        """What each of the running sequences gets, if no prompt is computed."""
        return 1 / self._cost.seconds(self._decode_work)

    @cached_property
    def load(self) -> Load:
        promised = [s for s in self._running.values() if s.tier.floor_utps]
        read = sum(s.footprint_bytes for s in promised)
        return Load(len(promised), read, min((s.tier.gap_seconds for s in promised), default=math.inf))

    def _free_places(self, candidate: Waiting) -> int:
        if not candidate.tier.floor_utps:
            return self._places
        kind = candidate.tier.name, candidate.footprint_bytes
        free = self._room.get(kind)
        if free is None:
            load = replace(self.load, gap_seconds=min(self.load.gap_seconds, candidate.tier.gap_seconds))
            free = self._room[kind] = admission.room(self._cost, load, candidate.footprint_bytes)
        return min(self._places, free if self.load.sequences else max(1, free))

    @cached_property
    def _decode_work(self) -> StepWork:
        """Of a step with everybody who decodes now; of one short sequence where nobody does."""
        decoding = [s for s in self._running.values() if s.is_decoding]
        return add_decodes(self._cost.shape, NO_WORK, decoding) if decoding else StepWork(1, 1, 0.0, 0.0, 0.0)

    @cached_property
    def _drain(self) -> Drain:
        """A pinned block comes free with the last of its users."""
        step = self._cost.seconds(self._decode_work)
        left = {s.key: max(1, self._expected_output(s) - len(s.generated)) for s in self._running.values()}
        held = {key: self._ledger.held_bytes(key) for key in left}
        if self._ledger.pinned_bytes:
            last_first = sorted(left, key=left.__getitem__, reverse=True)
            shares = pinned_bytes(self._running[key].prefix for key in last_first)
            for key, share in zip(last_first, shares, strict=True):
                held[key] += share
        return Drain((step * left[key], held[key]) for key in left)

    @cached_property
    def _prefill_tokens(self) -> dict[int, int]:
        """By rank: prompt tokens that running sequences still have to compute."""
        tokens: dict[int, int] = {}
        for sequence in self._running.values():
            rank = sequence.tier.rank
            tokens[rank] = tokens.get(rank, 0) + sequence.uncached_prefill
        return tokens

    def _expected_output(self, sequence: Sequence) -> int:
        """Output tokens at its end: the mean of the history, and for those who outlived it half as much again."""
        expected = self._history.expected_tokens(sequence.request)
        return min(sequence.request.max_tokens, max(expected, len(sequence.generated) * 3 // 2))
