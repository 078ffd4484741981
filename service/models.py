"""GET /v1/models and /v1/models/{id}."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from starlette.requests import Request

from scheduler.messages import WorkerInfo
from service.door import VISIT, Visit
from service.errors import model_not_found
from service.fleet import Fleet


class Models:
    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    async def list(self, request: Request) -> dict[str, Any]:
        """What is served here, and this caller may use."""
        return {"object": "list", "data": [described(worker) for worker in self._allowed(request)]}

    def _allowed(self, request: Request) -> Iterator[WorkerInfo]:
        visit: Visit = request.scope[VISIT]
        return (worker for worker in self._fleet.models() if visit.key.may_use_model(worker.model))

    async def get(self, id: str, request: Request) -> dict[str, Any]:
        """One model; its id may contain slashes."""
        for worker in self._allowed(request):
            if worker.model == id:
                return described(worker)
        raise model_not_found(id)


def described(worker: WorkerInfo) -> dict[str, Any]:
    model = {"id": worker.model, "object": "model", "created": worker.created, "owned_by": "headgate"}
    return model | ({"random_weights": True} if worker.random_weights else {})
