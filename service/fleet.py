"""The workers behind this gateway: what they serve, how they are, and which of them gets a request. One worker so far."""

from __future__ import annotations

import asyncio
import gc
import logging
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass

from scheduler.messages import WorkerInfo
from service.client import WorkerClient
from service.config import GatewayConfig
from service.errors import invalid, model_not_found, unavailable
from service.text import Text

logger = logging.getLogger(__name__)

FRESH_SECONDS = 5.0  # a snapshot comes every second
STALL_SECONDS = 30.0  # no step runs for so long


@dataclass(frozen=True, slots=True)
class Model:
    """A served model and who serves it."""

    worker: WorkerInfo
    text: Text
    client: WorkerClient

    @property
    def vocabulary(self) -> int:
        """Ids below it are known to model and tokenizer."""
        return min(self.worker.vocabulary or self.text.vocabulary, self.text.vocabulary)

    def check_text(self, ids: Sequence[int], param: str) -> None:
        """A tokenizer may have tokens that its model was never given. Raises ApiError when a text has one of these."""
        if self.vocabulary < self.text.vocabulary and max(ids, default=0) >= self.vocabulary:
            raise invalid(f"'{param}' has the token {max(ids)}, which this model does not know.", param)


class Fleet:
    def __init__(self, config: GatewayConfig) -> None:
        gateway = 1 + secrets.randbelow(0xFFFFFFFE)  # neither 0 nor 0xFFFFFFFF
        self._client = WorkerClient(
            config.workers[0],
            gateway,
            self._learn,
            connections=config.worker_connections,
            submit_seconds=config.submit_seconds,
        )
        self._model: Model | None = None

    async def run(self) -> None:
        await self._client.run()

    def close(self) -> None:
        self._client.close()

    async def _learn(self, worker: WorkerInfo) -> None:
        """A worker has told what it serves. The table of a known variant is not built again: 0.6 s for 150,000 tokens."""
        known = self._model
        if known is not None and known.worker.variant == worker.variant:
            text = known.text
        else:
            text = await asyncio.to_thread(Text, worker)
            gc.collect()
            gc.freeze()  # the tables never die: keep them out of every later collection
        self._model = Model(worker, text, self._client)
        logger.info("serving %s (%s)", worker.model, worker.engine)

    def models(self) -> list[WorkerInfo]:
        return [self._model.worker] if self._model is not None else []

    def model(self, name: str) -> Model:
        """Raises ApiError when nobody serves it, or nobody has said yet what is served."""
        if self._model is None:
            raise unavailable("The model is still being loaded. Please retry.")
        if name != self._model.worker.model:
            raise model_not_found(name)
        return self._model

    def unready(self) -> str | None:
        """Why no token can be generated now; None when one can."""
        if self._client.fault:
            return f"the worker cannot be used: {self._client.fault}"
        if self._model is None:
            return "no worker has said yet what it serves"
        if not self._client.connected:
            return "the worker's step stream is not connected"
        snapshot = self._client.snapshot
        if snapshot is None or time.monotonic() - self._client.snapshot_at > FRESH_SECONDS:
            return "the worker has not reported for some seconds"
        if snapshot.stalled_seconds > STALL_SECONDS:
            return f"the worker's running step has not ended for {snapshot.stalled_seconds:.0f} s"
        return None
