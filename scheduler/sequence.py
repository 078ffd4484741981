"""A running request as the gate keeps it, and what becomes of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from scheduler.messages import Finish, Request
from scheduler.prefix import Prefix
from scheduler.tiers import Tier


@dataclass(slots=True)
class Sequence:
    """`computed` tokens of it are in the KV cache, `cached_tokens` of them since before it began; `generated` are known.

    `footprint_bytes`: of all its blocks, those included that others pay for, once it has become what is reserved for.
    `held_tokens`: so many fit into the blocks that it has.
    """

    key: int
    request: Request
    tier: Tier
    order: int
    arrived_at: float
    started_at: float
    reserved_output: int
    prompt_tokens: int
    footprint_bytes: float
    prefix: Prefix
    generated: list[int] = field(default_factory=list)
    computed: int = 0
    held_tokens: int = 0
    cached_tokens: int = 0
    first_at: float = 0.0
    last_at: float = 0.0
    restarts: int = 0

    @property
    def known(self) -> int:
        return self.prompt_tokens + len(self.generated)

    @property
    def is_decoding(self) -> bool:
        generated = len(self.generated)
        return generated > 0 and self.computed == self.prompt_tokens + generated - 1

    @property
    def uncached_prefill(self) -> int:
        """Tokens to compute before the next one can be drawn; 0 while it decodes."""
        return 0 if self.is_decoding else self.known - self.computed

    @property
    def is_told(self) -> bool:
        """It has no token yet, and wants to know how likely the model held those of its prompt."""
        return self.request.prompt_logprobs and self.request.logprobs is not None and not self.generated


@dataclass(frozen=True, slots=True)
class Ended:
    """The outcome of one request, for the metrics."""

    tier: str
    finish: Finish
    prompt_tokens: int
    output_tokens: int
    queue_seconds: float
    ttft_seconds: float | None
    utps: float | None
    floor_utps: float
    violation: str | None = None  # the cause, where the floor was not kept over the request's life


def outcome(sequence: Sequence, finish: Finish, was_slow: bool) -> Ended:
    """`was_slow`: its last step took longer than predicted, margin included."""
    output, first, last = len(sequence.generated), sequence.first_at, sequence.last_at
    utps = (output - 1) / (last - first) if output > 1 and last > first else None
    floor = sequence.tier.floor_utps
    violation = None
    if utps is not None and utps < floor:
        violation = "footprint" if sequence.restarts else "machine" if was_slow else "schedule"
    return Ended(
        tier=sequence.tier.name,
        finish=finish,
        prompt_tokens=sequence.prompt_tokens,
        output_tokens=output,
        queue_seconds=sequence.started_at - sequence.arrived_at,
        ttft_seconds=first - sequence.arrived_at if output else None,
        utps=utps,
        floor_utps=floor,
        violation=violation,
    )
