"""The workers behind this gateway: what they serve, how they are, and which of them gets a request."""

from __future__ import annotations

import asyncio
import functools
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
    """A served model and the worker that serves it."""

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
    """One client per worker, each on its own; `_served` holds what every one of them said last."""

    def __init__(self, config: GatewayConfig) -> None:
        workers = tuple(
            dict.fromkeys(config.workers)
        )  # two clients of one worker would take its step stream from each other
        gateway = 1 + secrets.randbelow(0xFFFFFFFE)  # neither 0 nor 0xFFFFFFFF
        self._clients = [
            WorkerClient(
                address,
                gateway,
                functools.partial(self._learn, place),
                connections=config.worker_connections,
                submit_seconds=config.submit_seconds,
                secret=config.secret,
                first_id=place + 1,
                id_step=len(workers),
            )
            for place, address in enumerate(workers)
        ]
        self._served: dict[int, Model] = {}  # by the client's place
        self._building = asyncio.Lock()

    async def run(self) -> None:
        await asyncio.gather(*(client.run() for client in self._clients))

    def close(self) -> None:
        for client in self._clients:
            client.close()

    async def _learn(self, place: int, worker: WorkerInfo) -> None:
        """A worker has told what it serves now."""
        async with self._building:  # workers that start together often have the same tables
            text = self._known_text(worker.variant) or await build_text(worker)
        self._served[place] = Model(worker, text, self._clients[place])
        logger.info("%s serves %s (%s)", self._clients[place].address, worker.model, worker.engine)

    def _known_text(self, variant: str) -> Text | None:
        """The table of a known variant is not built again: 0.6 s for 150,000 tokens."""
        return next((model.text for model in self._served.values() if model.worker.variant == variant), None)

    def models(self) -> list[WorkerInfo]:
        """Each model once, also those whose workers are away."""
        return list({model.worker.model: model.worker for model in self._in_order()}.values())

    def ready_models(self) -> list[str]:
        """Those of which a token can be generated now."""
        models = [(place, model.worker.model) for place, model in sorted(self._served.items())]
        return list(dict.fromkeys(name for place, name in models if self._unready(place) is None))

    def model(self, name: str) -> Model:
        """Of the workers that have it, the one with the fewest open requests.

        Raises ApiError when none has it, or nobody has said yet what is served.
        """
        if not self._served:
            raise unavailable("The model is still being loaded. Please retry.")
        having = [model for model in self._in_order() if model.worker.model == name]
        if not having:
            raise model_not_found(name)
        return min(having, key=lambda model: (not model.client.connected, model.client.open_requests))

    def _in_order(self) -> list[Model]:
        return [model for _, model in sorted(self._served.items())]

    def unready(self) -> str | None:
        """Why no token can be generated now; None when one can."""
        reasons = []
        for place, client in enumerate(self._clients):
            reason = self._unready(place)
            if reason is None:
                return None
            reasons.append(reason if len(self._clients) == 1 else f"{client.address}: {reason}")
        return "; ".join(reasons)

    def _unready(self, place: int) -> str | None:
        """Why this worker can generate nothing now."""
        client = self._clients[place]
        if client.fault:
            return f"the worker cannot be used: {client.fault}"
        if place not in self._served:
            return "the worker has not said yet what it serves" + (f" ({client.absence})" if client.absence else "")
        if not client.connected:
            return "the worker's step stream is not connected"
        snapshot = client.snapshot
        if snapshot is None or time.monotonic() - client.snapshot_at > FRESH_SECONDS:
            return "the worker has not reported for some seconds"
        if snapshot.stalled_seconds > STALL_SECONDS:
            return f"the worker's running step has not ended for {snapshot.stalled_seconds:.0f} s"
        return None


async def build_text(worker: WorkerInfo) -> Text:
    text = await asyncio.to_thread(Text, worker)
    gc.collect()
    gc.freeze()  # the tables never die: keep them out of every later collection
    return text
