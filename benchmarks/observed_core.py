"""The engine process with a gate that tells what happens to every request, a line each: `@ EVENT KEY SECONDS`.

The seconds are `time.monotonic`, which all processes of a machine share.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from scheduler.gate import Gate, StepOutcome
from scheduler.messages import Decision, Request
from worker import build, core
from worker.config import WorkerConfig


class ObservedGate(Gate):
    """Decides like any gate."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._fresh: set[int] = set()  # keys without a first token

    def arrive(self, request: Request, now: float) -> Decision:
        decision = super().arrive(request, now)
        self._fresh.add(request.key)
        say("arrived", request.key, now)
        return decision

    def observe(self, tokens: dict[int, list[int]], seconds: float, host_seconds: float, now: float) -> StepOutcome:
        outcome = super().observe(tokens, seconds, host_seconds, now)
        for event in outcome.events:
            if event.key in self._fresh:
                self._fresh.discard(event.key)
                say("first", event.key, now)
        return outcome

    def cancel(self, key: int, now: float) -> bool:
        known = super().cancel(key, now)
        if known:
            self._fresh.discard(key)
            say("cancelled", key, now)
        return known


def say(event: str, key: int, now: float) -> None:
    os.write(1, f"@ {event} {key} {now:.7f}\n".encode())


if __name__ == "__main__":
    build.Gate = ObservedGate  # type: ignore[assignment,misc]
    core.main(int(sys.argv[1]), WorkerConfig.decode(sys.argv[2]))
