"""The product's own processes, with an instrument attached: `python -m benchmarks.observed worker|gateway LAUNCH`.

A worker's engine process says when the gate takes a request, draws its first token and forgets it (`observed_core`); front
and gateway stay as they are. A gateway looks at its event loop more often and in finer steps than it does by itself.
"""

from __future__ import annotations

import sys

PROBE_SECONDS = 0.005
STALL_SECONDS = tuple(step / 4000 for step in range(1, 201))  # 0.25 ms apart, up to 50 ms


def worker(arguments: list[str]) -> int:
    import headgate.child
    from worker.app import EngineProcess

    EngineProcess.module = "benchmarks.observed_core"
    return headgate.child.main(["worker", *arguments])


def gateway(arguments: list[str]) -> int:
    import headgate.child
    from service import health, metrics

    health.PROBE_SECONDS = PROBE_SECONDS
    metrics.STALL_SECONDS = STALL_SECONDS  # type: ignore[assignment]
    return headgate.child.main(["gateway", *arguments])


if __name__ == "__main__":
    sys.exit({"worker": worker, "gateway": gateway}[sys.argv[1]](sys.argv[2:]))
