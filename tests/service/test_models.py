"""GET /v1/models, probes."""

from __future__ import annotations


def test_models_are_listed(gateway):
    """48."""
    listed = gateway.http.get("/v1/models").json()
    model = {"id": "acme/tiny-chat", "object": "model", "created": 1700000000, "owned_by": "headgate"}
    assert listed == {"object": "list", "data": [model]}
    assert [model.id for model in gateway.sdk.models.list()] == ["acme/tiny-chat"]


def test_model_with_random_weights_says_so(gateways):
    (model,) = gateways(info={"random_weights": True}).http.get("/v1/models").json()["data"]
    assert model["random_weights"] is True


def test_model_with_a_slash_in_its_id(gateway):
    """48."""
    assert gateway.http.get("/v1/models/acme/tiny-chat").json()["id"] == "acme/tiny-chat"
    assert gateway.sdk.models.retrieve("acme/tiny-chat").id == "acme/tiny-chat"
    assert gateway.http.get("/v1/models/acme/other").json()["error"]["code"] == "model_not_found"


def test_ready_only_when_a_token_can_be_generated(gateways):
    gateway = gateways()
    assert gateway.http.get("/healthz").json() == {"status": "ok"}
    ready = gateway.http.get("/readyz")
    assert (ready.status_code, ready.json()) == (200, {"status": "ready", "models": ["acme/tiny-chat"]})
    gateway.worker.stalled_seconds = 31.0
    gateway.wait_until(lambda: gateway.http.get("/readyz").status_code == 503)
    assert "has not ended for 31 s" in gateway.http.get("/readyz").json()["error"]["message"]
    gateway.worker.stalled_seconds = 0.0
    gateway.wait_until(lambda: gateway.http.get("/readyz").status_code == 200)
