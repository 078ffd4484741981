"""The engine as the loop sees it: starting, stopping, recomputing, and plans that make no sense."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from scheduler.batch import Entry, Kind, StepPlan
from scheduler.messages import Request, Sampling
from worker.engine import Engine
from worker.native.config import DecoderConfig
from worker.native.loader import tensor_shapes
from worker.native.runner import NativeEngine

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 120,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "max_position_embeddings": 200,
    "tie_word_embeddings": True,
}
BLOCK_BYTES = 2 * 16 * 2 * 2 * 8 * 4  # layers, tokens, keys and values, heads, head_dim, float32


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    generator = torch.Generator().manual_seed(0)
    shapes = tensor_shapes(DecoderConfig.from_dict(CONFIG))
    tensors = {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path


@pytest.fixture
def engine(checkpoint: Path) -> NativeEngine:
    return NativeEngine.load(checkpoint, "cpu", kv_cache_bytes=30 * BLOCK_BYTES + 5, threads=1)


def request(key: int, prompt: list[int], seed: int = 0, temperature: float = 1.0) -> Request:
    return Request(key, 0, prompt, 64, sampling=Sampling(temperature, top_p=0.95, seed=seed))


def prefill(*requests: Request) -> StepPlan:
    return StepPlan(tuple(Entry(r.key, Kind.PREFILL, 0, len(r.prompt), True) for r in requests), requests)


def decode(engine: Engine, lengths: dict[int, int], steps: int) -> dict[int, list[int]]:
    """Generates from sequences that have drawn their first token; `lengths` are what their caches hold."""
    tokens: dict[int, list[int]] = {key: [] for key in lengths}
    for step in range(steps):
        plan = StepPlan(tuple(Entry(key, Kind.DECODE, length + step, 1, True) for key, length in lengths.items()))
        for key, new in engine.run(plan).tokens.items():
            tokens[key] += new
    return tokens


def test_attributes_describe_what_was_loaded(engine: NativeEngine) -> None:
    parameters = sum(torch.Size(shape).numel() for shape in tensor_shapes(DecoderConfig.from_dict(CONFIG)).values())
    assert engine.config == CONFIG
    assert (engine.block_tokens, engine.block_bytes, engine.num_blocks) == (16, BLOCK_BYTES, 30)
    assert engine.kv_cache_bytes == 30 * BLOCK_BYTES
    assert (engine.device, engine.dtype, engine.context_tokens) == ("cpu", "float32", 200)
    extra = 2 * 8 * (4 + 2 - 2)  # q's and k's norms are kept once per head
    assert (engine.parameters, engine.weight_bytes) == (parameters, 4 * (parameters + extra))


def test_context_is_no_longer_than_the_cache(checkpoint: Path) -> None:
    assert NativeEngine.load(checkpoint, "cpu", kv_cache_bytes=3 * BLOCK_BYTES, threads=1).context_tokens == 48


def test_every_block_is_free_after_all_stopped(engine: NativeEngine) -> None:
    requests = [request(key, [1] * length) for key, length in enumerate((1, 15, 16, 17, 60))]
    engine.run(prefill(*requests))
    decode(engine, {r.key: len(r.prompt) for r in requests}, 5)
    assert engine.free_blocks == 30 - (1 + 2 + 2 + 2 + 5)
    assert engine.run(StepPlan(stop=tuple(range(5)))).tokens == {}
    assert engine.free_blocks == 30


def test_stopping_an_unknown_sequence_is_ignored(engine: NativeEngine) -> None:
    engine.run(StepPlan(stop=(12345,)))
    engine.run(prefill(request(1, [3])))
    engine.run(StepPlan(stop=(1,)))
    engine.run(StepPlan(stop=(1,)))
    assert engine.free_blocks == 30


def test_draws_do_not_depend_on_the_batch(engine: NativeEngine) -> None:
    requests = [request(key, list(range(5 + 9 * key)), seed=key) for key in range(5)]
    first = engine.run(prefill(*requests)).tokens
    together = decode(engine, {r.key: len(r.prompt) for r in requests}, 20)
    engine.run(StepPlan(stop=tuple(range(5))))
    for r in requests:
        assert engine.run(prefill(r)).tokens[r.key] == first[r.key]
        assert decode(engine, {r.key: len(r.prompt)}, 20)[r.key] == together[r.key]
        engine.run(StepPlan(stop=(r.key,)))
    assert len({tuple(tokens) for tokens in together.values()}) == 5


def test_a_sequence_recomputed_after_eviction_continues_identically(engine: NativeEngine) -> None:
    prompt = [5, 6, 7] * 9
    expected = engine.run(prefill(request(1, prompt, seed=9))).tokens[1] + decode(engine, {1: 27}, 30)[1]
    engine.run(StepPlan(stop=(1,)))
    tokens = engine.run(prefill(request(1, prompt, seed=9))).tokens[1] + decode(engine, {1: 27}, 10)[1]
    again = request(1, prompt + tokens, seed=9)
    chunk = StepPlan((Entry(1, Kind.PREFILL, 0, 20, False),), start=(again,), stop=(1,))
    assert engine.run(chunk).tokens == {}
    tokens += engine.run(StepPlan((Entry(1, Kind.PREFILL, 20, 18, True),))).tokens[1]
    tokens += decode(engine, {1: 38}, 19)[1]
    assert tokens == expected


def test_a_plan_may_go_back_to_an_earlier_position(engine: NativeEngine) -> None:
    r = request(1, list(range(40)), temperature=0.0)
    first = engine.run(prefill(r)).tokens[1]
    engine.run(StepPlan(stop=(1,), start=(r,), entries=(Entry(1, Kind.PREFILL, 0, 39, False),)))
    assert engine.run(StepPlan((Entry(1, Kind.PREFILL, 10, 30, True),))).tokens[1] == first
    assert engine.free_blocks == 30 - 3


def test_thread_choice_leaves_no_trace(checkpoint: Path) -> None:
    engine = NativeEngine.load(checkpoint, "cpu", kv_cache_bytes=8 * BLOCK_BYTES)
    assert engine.free_blocks == 8
    assert torch.get_num_threads() >= 1
    torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (Entry(9, Kind.DECODE, 0, 1, True), "not started"),
        (Entry(1, Kind.VERIFY, 20, 1, True), "kind is none of decode, prefill"),
        (Entry(1, Kind.PREFILL, 21, 1, False), "20 of 21 known tokens"),
        (Entry(1, Kind.PREFILL, 20, 2, False), "20 of 21 known tokens"),
        (Entry(1, Kind.PREFILL, 20, 0, False), "20 of 21 known tokens"),
        (Entry(1, Kind.PREFILL, 3, 5, True), "21 tokens are known already"),
    ],
)
def test_entries_that_contradict_the_sequence_are_refused(engine: NativeEngine, entry: Entry, message: str) -> None:
    engine.run(prefill(request(1, [2] * 20)))
    with pytest.raises(ValueError, match=message):
        engine.run(StepPlan((entry,)))
    engine.run(StepPlan(stop=(1,)))
    assert engine.free_blocks == 30


def test_requests_that_cannot_run_are_refused(engine: NativeEngine) -> None:
    for prompt in ([], [120], [-1]):
        with pytest.raises(ValueError, match="each below 120"):
            engine.run(StepPlan(start=(request(1, prompt),)))
    engine.run(StepPlan(start=(request(1, [1] * 201),)))
    with pytest.raises(ValueError, match="started twice"):
        engine.run(StepPlan(start=(request(1, [1]),)))
    with pytest.raises(ValueError, match="the context is 200 tokens"):
        engine.run(StepPlan((Entry(1, Kind.PREFILL, 0, 201, True),)))


def test_what_cannot_be_loaded_is_explained(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no config\.json"):
        NativeEngine.load(tmp_path)
    with pytest.raises(ValueError, match="device 'tpu'"):
        NativeEngine.load(checkpoint, device="tpu")
    with pytest.raises(ValueError, match="dtype 'int3'"):
        NativeEngine.load(checkpoint, "cpu", dtype="int3")
    with pytest.raises(ValueError, match="holds no block"):
        NativeEngine.load(checkpoint, "cpu", kv_cache_bytes=10)
