"""What operators and probes ask: does the process live, can it generate, what has it counted."""

from __future__ import annotations

import asyncio
import time

from starlette.responses import JSONResponse, Response

from service.errors import unavailable
from service.fleet import Fleet
from service.metrics import CONTENT_TYPE, Metrics

PROBE_SECONDS = 0.05


class Health:
    def __init__(self, fleet: Fleet, metrics: Metrics) -> None:
        self._fleet = fleet
        self._metrics = metrics

    async def healthz(self) -> Response:
        """The process lives."""
        return JSONResponse({"status": "ok"})

    async def readyz(self) -> Response:
        """A token can be generated."""
        reason = self._fleet.unready()
        if reason is not None:
            return unavailable(f"Not ready: {reason}.", code="not_ready").response()
        return JSONResponse({"status": "ready", "models": self._fleet.ready_models()})

    async def metrics(self) -> Response:
        """Prometheus text."""
        return Response(self._metrics.render(), media_type=CONTENT_TYPE)

    async def watch_the_loop(self) -> None:
        """Measures how late the event loop runs a timer, for ever."""
        while True:
            asked_at = time.monotonic()
            await asyncio.sleep(PROBE_SECONDS)
            self._metrics.stalls.observe(max(0.0, time.monotonic() - asked_at - PROBE_SECONDS))
