"""GET /v1/models and /v1/models/{id}."""

from __future__ import annotations

from typing import Any

from scheduler.messages import WorkerInfo
from service.errors import model_not_found
from service.fleet import Fleet


class Models:
    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    async def list(self) -> dict[str, Any]:
        """What is served here."""
        return {"object": "list", "data": [described(worker) for worker in self._fleet.models()]}

    async def get(self, id: str) -> dict[str, Any]:
        """One model; its id may contain slashes."""
        for worker in self._fleet.models():
            if worker.model == id:
                return described(worker)
        raise model_not_found(id)


def described(worker: WorkerInfo) -> dict[str, Any]:
    model = {"id": worker.model, "object": "model", "created": worker.created, "owned_by": "headgate"}
    return model | ({"random_weights": True} if worker.random_weights else {})
