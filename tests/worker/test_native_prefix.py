"""A gate with a prefix cache over the torch engine: the same tokens as without one, and no block lost."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from scheduler.batch import Entry, Kept, Kind, Shared, StepPlan
from scheduler.calibration import CostModel
from scheduler.gate import Gate, Limits
from scheduler.hardware import CATALOGUE
from scheduler.messages import Request, Sampling
from scheduler.prefix import Sharing
from scheduler.tiers import default_tiers
from worker.native.config import FAMILIES, DecoderConfig, Windows
from worker.native.runner import NativeEngine

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 112,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
}
WINDOWS = {"use_sliding_window": True, "sliding_window": 21, "max_window_layers": 1}
BLOCK_BYTES = 2 * 16 * 2 * 2 * 16 * 4  # layers, tokens, keys and values, heads, head_dim, float32
BLOCKS = 40


def load(folder: Path, **changes: Any) -> NativeEngine:
    path = folder / "config.json"
    path.write_text(json.dumps(SIZES | changes))
    return NativeEngine.load(path, "cpu", "float32", kv_cache_bytes=BLOCKS * BLOCK_BYTES, threads=1)


@pytest.fixture
def engine(tmp_path: Path) -> NativeEngine:
    return load(tmp_path, architectures=["Qwen3ForCausalLM"])


class Service:
    """Gate and engine, step by step."""

    def __init__(self, engine: NativeEngine, sharing: Sharing) -> None:
        shape = DecoderConfig.from_dict(engine.config).model_shape("tiny", "float32")
        cost = CostModel(CATALOGUE["laptop-cpu"], shape)
        self.gate = Gate(cost, engine.kv_cache_bytes, default_tiers(10.0), Limits(512), sharing)
        self.engine = engine
        self.cached: dict[int, int] = {}
        self._ids = 0

    def answers(self, prompts: Iterable[list[int]], max_tokens: int = 24) -> list[list[int]]:
        """To prompts that come at once."""
        requests = []
        for prompt in prompts:
            self._ids += 1
            requests.append(Request(self._ids, 1, prompt, max_tokens, "flex", sampling=Sampling(temperature=0.0)))
            self.gate.arrive(requests[-1], 0.0)
        told: dict[int, list[int]] = {request.key: [] for request in requests}
        while self.gate.has_work:
            plan = self.gate.plan(0.0)
            result = self.engine.run(plan)
            for event in self.gate.observe(result.tokens, 0.01, 0.0, 0.0).events if plan.entries else ():
                told[event.key] += event.tokens
                self.cached[event.key & 0xFFFF] = self.cached.get(event.key & 0xFFFF, 0) + event.cached_tokens
        return list(told.values())

    def close(self) -> None:
        """All that is cached can be had back."""
        while self.gate._evict():
            pass
        self.engine.run(StepPlan(evicted=tuple(self.gate._evicted)))
        self.gate._evicted.clear()
        assert self.engine.free_blocks == BLOCKS


def words(seed: int, count: int) -> list[int]:
    return [(seed * 7919 + place * place * 31 + place) % 300 for place in range(count)]


def families() -> Iterator[Any]:
    for name, family in FAMILIES.items():
        yield pytest.param(name, {}, id=name)
        if family.windows is not Windows.NONE:
            yield pytest.param(name, WINDOWS, id=f"{name}-windows")


@pytest.mark.parametrize(("architecture", "windows"), list(families()))
def test_tokens_are_the_same_with_and_without_the_cache(
    architecture: str, windows: dict[str, Any], tmp_path: Path
) -> None:
    engine = load(tmp_path, architectures=[architecture], **windows)
    told = []
    for sharing in (Sharing.NOBODY, Sharing.TENANT):
        service, start = Service(engine, sharing), words(1, 100)
        first = service.answers([start + words(2, 7)])
        together = service.answers([start + words(seed, 20) for seed in (3, 4)] + [start])
        turn = start + words(2, 7) + first[0] + words(5, 30)
        told.append([*first, *together, *service.answers([turn])])
        service.close()
    assert told[0] == told[1]
    assert len(set(map(tuple, told[0]))) > 2, "answers that would be the same to any prompt prove nothing"
    assert service.cached == {1: 0, 2: 96, 3: 96, 4: 96, 5: 128}


def test_the_cache_may_be_full_and_more_than_full(engine: NativeEngine) -> None:
    plain, cached = Service(engine, Sharing.NOBODY), Service(engine, Sharing.TENANT)
    scripts = [[words(n % 3, 90) + words(n + k, 25) for k in range(4)] for n in range(6)]
    expected = [plain.answers(prompts, 40) for prompts in scripts]
    assert [cached.answers(prompts, 40) for prompts in scripts] == expected
    assert cached.gate.prefixes.evicted_blocks > 0 and cached.gate.prefixes.hit_tokens > 1000
    cached.close()


def test_a_sequence_with_shared_blocks_is_stopped_and_computed_anew(engine: NativeEngine) -> None:
    first, second = (Request(key, 0, words(1, 50), 9, sampling=Sampling(0.0)) for key in (1, 2))
    drawn = engine.run(StepPlan((Entry(1, Kind.PREFILL, 0, 50, True),), (first,))).tokens[1]
    kept = tuple(Kept(1, place, 10 + place) for place in range(3))
    shared = (Shared(2, (10, 11, 12)),)
    plan = StepPlan((Entry(2, Kind.PREFILL, 48, 2, True),), (second,), (1,), kept=kept, shared=shared)
    assert engine.run(plan).tokens[2] == drawn
    assert engine.free_blocks == BLOCKS - 4
    with pytest.raises(AssertionError, match="others use"):
        engine.run(StepPlan((Entry(2, Kind.PREFILL, 40, 10, False),)))
    engine.run(StepPlan((Entry(2, Kind.PREFILL, 32, 18, False),)))
    assert engine.free_blocks == BLOCKS - 5, "its own third block, beside the one that is kept"
    third = Request(3, 0, words(1, 50), 9, sampling=Sampling(0.0))
    again = engine.run(
        StepPlan((Entry(3, Kind.PREFILL, 48, 2, True),), (third,), (2,), shared=(Shared(3, (10, 11, 12)),))
    )
    assert again.tokens[3] == drawn, "what is kept is as it was"
    engine.run(StepPlan(stop=(3,), evicted=(10, 11, 12)))
    assert engine.free_blocks == BLOCKS


def test_blocks_are_evicted_while_others_use_them_without_harm(engine: NativeEngine) -> None:
    first, second = (Request(key, 0, words(1, 40), 9, sampling=Sampling(0.0)) for key in (1, 2))
    drawn = engine.run(StepPlan((Entry(1, Kind.PREFILL, 0, 40, True),), (first,))).tokens[1]
    kept = (Kept(1, 0, 1), Kept(1, 1, 2))
    engine.run(StepPlan((), (second,), (1,), kept=kept, shared=(Shared(2, (1, 2)),)))
    engine.run(StepPlan(evicted=(1, 2, 77)))
    assert engine.free_blocks == BLOCKS - 2
    assert engine.run(StepPlan((Entry(2, Kind.PREFILL, 32, 8, True),))).tokens[2] == drawn
    engine.run(StepPlan(stop=(2,)))
    assert engine.free_blocks == BLOCKS


def test_a_turn_that_follows_lies_behind_the_one_before(engine: NativeEngine) -> None:
    service = Service(engine, Sharing.TENANT)
    (answer,) = service.answers([words(1, 60)])
    turn = Request(9, 0, words(1, 60) + answer + words(2, 40), 4, sampling=Sampling(0.0))
    service.gate.arrive(turn, 0.0)
    engine.run(service.gate.plan(0.0))
    assert engine._sequences[turn.key].table.is_run
