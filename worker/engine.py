"""The protocol between the engine process's loop and an engine.

An engine is stepwise: it is told what one forward pass carries and returns what that pass delivered. It never decides
what runs, and never measures its own time: the loop does both (`worker/core.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from scheduler.batch import StepPlan
from scheduler.messages import Logprobs


@dataclass(frozen=True, slots=True)
class StepResult:
    """Tokens by sequence key, for every entry of the plan with `delivers`. Normally one each.

    `logprobs`: by key, one per token, for requests that ask for them; where a request wants its prompt's, they come in
    front of those of its first token.
    """

    tokens: dict[int, list[int]] = field(default_factory=dict)
    logprobs: dict[int, list[Logprobs]] = field(default_factory=dict)


class Engine(Protocol):
    """Called from one thread only. An exception out of `run` ends every running request with an error."""

    def run(self, plan: StepPlan) -> StepResult:
        """Frees `plan.stop`, takes in `plan.start` (and what else changes hands, see there), computes `plan.entries` and waits for the result.

        The caller guarantees that the KV cache of all entries fits: it holds the ledger.
        """
        ...
