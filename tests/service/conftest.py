"""Fixtures: a tokenizer, a worker's word about itself, and gateways."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from scheduler.messages import WorkerInfo

# there is no package below tests/, so helpers that stand beside the tests are imported by path
for _name in ("scripted_worker", "gateway_under_test"):
    _spec = importlib.util.spec_from_file_location(_name, Path(__file__).with_name(f"{_name}.py"))
    assert _spec is not None and _spec.loader is not None
    sys.modules[_name] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules[_name])

from gateway_under_test import MODEL, TEMPLATE, Cabinet, Gateway, Ids, build_tokenizer  # noqa: E402


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return build_tokenizer()


@pytest.fixture(scope="session")
def ids(tokenizer: Tokenizer) -> Ids:
    return Ids(tokenizer)


@pytest.fixture(scope="session")
def worker_info(tokenizer: Tokenizer) -> WorkerInfo:
    return WorkerInfo(
        model=MODEL,
        variant="v1",
        created=1700000000,
        context_tokens=4096,
        max_prompt_tokens=4096,
        eos_ids=(tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|eot|>")),
        tokenizer_json=tokenizer.to_str(),
        chat_template=TEMPLATE,
        special_tokens={"eos_token": "<|im_end|>"},
        tier_wait_seconds={"default": 60.0, "flex": math.inf, "priority": 2.0},
        engine="scripted",
        fingerprint="fp_scripted",
    )


@pytest.fixture(scope="session")
def shared_gateway(tmp_path_factory: pytest.TempPathFactory, worker_info: WorkerInfo) -> Iterator[Gateway]:
    gateway = Gateway(tmp_path_factory.mktemp("gateway"), worker_info, ping_seconds=0.4)
    yield gateway
    gateway.close()


@pytest.fixture
def gateway(shared_gateway: Gateway) -> Iterator[Gateway]:
    """The shared one, with a worker that has forgotten the last test."""
    shared_gateway.worker.reset()
    yield shared_gateway
    shared_gateway.wait_until(lambda: shared_gateway.metric("headgate_requests_open") == 0)


@pytest.fixture
def cabinet(tmp_path: Path) -> Iterator[Cabinet]:
    cabinet = Cabinet(tmp_path / "data")
    yield cabinet
    cabinet.close()


@pytest.fixture
def gateways(tmp_path: Path, worker_info: WorkerInfo) -> Iterator[Callable[..., Gateway]]:
    """Makes gateways with settings of their own; fields of the worker's info go in as `info`."""
    made: list[Gateway] = []

    def make(info: dict[str, Any] | None = None, **settings: Any) -> Gateway:
        directory = tmp_path / str(len(made))
        directory.mkdir()
        made.append(Gateway(directory, replace(worker_info, **(info or {})), **settings))
        return made[-1]

    yield make
    for gateway in made:
        gateway.close()
