"""The engine as the loop sees it: starting, stopping, recomputing, and plans that make no sense."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from scheduler.batch import Entry, Kind, StepPlan
from scheduler.messages import Logprobs, Request, Sampling
from worker.engine import Engine
from worker.native.config import DecoderConfig
from worker.native.cpu.build import NoLibrary, load_library
from worker.native.decoder import Outcome
from worker.native.inputs import Span
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


@pytest.fixture(params=["torch", "the C step"])
def engine(checkpoint: Path, request: pytest.FixtureRequest) -> NativeEngine:
    if request.param == "torch":
        return NativeEngine.load(checkpoint, "cpu", kv_cache_bytes=30 * BLOCK_BYTES + 5, threads=1)
    try:
        library = load_library()
    except NoLibrary as error:
        pytest.skip(str(error))
    kv_cache_bytes = 30 * BLOCK_BYTES // 2 + 5
    return NativeEngine.load(checkpoint, "cpu", "bfloat16", kv_cache_bytes, threads=2, library=library)


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


@pytest.mark.parametrize("engine", ["torch"], indirect=True)
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
    threads = torch.get_num_threads()
    try:
        engine = NativeEngine.load(checkpoint, "cpu", kv_cache_bytes=8 * BLOCK_BYTES)
    finally:
        torch.set_num_threads(threads)
    assert engine.free_blocks == 8
    assert engine._sequences == {}


# --- penalties, and what the model thought


SHAPING = Sampling(
    1.0, 0.95, seed=4, repetition_penalty=1.4, presence_penalty=0.5, frequency_penalty=0.8, min_p=0.01, min_tokens=25
)


def generate(engine: NativeEngine, asked: Request, steps: int, chunk: int = 1000) -> tuple[list[int], list[Logprobs]]:
    """The tokens of a prefill in chunks and of decode steps, and what was told of them."""
    prompt, tokens, told = len(asked.prompt), [], []
    for position in range(0, prompt, chunk):
        count = min(chunk, prompt - position)
        entry = Entry(asked.key, Kind.PREFILL, position, count, position + count == prompt)
        result = engine.run(StepPlan((entry,), start=() if position else (asked,)))
        told += result.logprobs.get(asked.key, [])
        tokens += result.tokens.get(asked.key, [])
    for step in range(steps - 1):
        result = engine.run(StepPlan((Entry(asked.key, Kind.DECODE, prompt + step, 1, True),)))
        told += result.logprobs.get(asked.key, [])
        tokens += result.tokens[asked.key]
    engine.run(StepPlan(stop=(asked.key,)))
    return tokens, told


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_resumed_sequence_continues_exactly_as_an_uninterrupted_one(engine: NativeEngine, temperature: float) -> None:
    asked = request(1, [5, 6, 7] * 9)
    stop_ids = frozenset(range(30, 60))  # much of what there is, so that the ban matters
    asked = replace(asked, sampling=replace(SHAPING, temperature=temperature), stop_ids=stop_ids)
    expected, _ = generate(engine, asked, 60)
    assert stop_ids.isdisjoint(expected[:25]) and not stop_ids.isdisjoint(expected[25:])
    for cut in (1, 10, 24, 25, 40):
        again = replace(asked, prompt=[*asked.prompt, *expected[:cut]], resumed_tokens=cut)
        assert expected[:cut] + generate(engine, again, 60 - cut, chunk=13)[0] == expected


def test_penalties_change_what_is_said_of_who_asks_alone(engine: NativeEngine) -> None:
    plain = request(1, [9] * 30, temperature=0.0)
    shaping = replace(plain, id=2, sampling=replace(SHAPING, temperature=0.0, logit_bias=((9, -100.0),)))
    alone = [generate(engine, r, 40)[0] for r in (plain, shaping)]
    first = engine.run(prefill(plain, shaping)).tokens
    rest = decode(engine, {1: 30, 2: 30}, 39)
    assert [first[key] + rest[key] for key in (1, 2)] == alone
    assert len(set(alone[1])) > 2 * len(set(alone[0])) and 9 not in alone[1]


def whole_forward(engine: NativeEngine, tokens: list[int]) -> torch.Tensor:
    """Log probabilities after each token, from one pass over all of them."""
    seen = {}
    run = engine._decoder.run

    def recording(spans: Sequence[Span], needs_logits: bool) -> Outcome:
        outcome = run(spans, needs_logits)
        seen["hidden"] = outcome.hidden
        return outcome

    engine._decoder.run = recording  # type: ignore[method-assign]
    engine.run(prefill(request(77, tokens)))
    engine.run(StepPlan(stop=(77,)))
    engine._decoder.run = run  # type: ignore[method-assign]
    return engine._decoder.logits(seen["hidden"]).log_softmax(-1)


def check_told(told: list[Logprobs], tokens: list[int], reference: torch.Tensor, count: int) -> None:
    """`told` is of all tokens but the first."""
    assert len(told) == len(tokens) - 1
    for at, (row, token) in enumerate(zip(told, tokens[1:], strict=True)):
        assert row[0] == (token, pytest.approx(float(reference[at, token]), abs=1e-4))
        values, best = reference[at].topk(count)
        assert [other for other, _ in row[1:]] == best.tolist()
        assert [value for _, value in row[1:]] == pytest.approx(values.tolist(), abs=1e-4)


@pytest.mark.parametrize("count", [0, 3])
def test_logprobs_of_prompt_and_output_are_those_of_a_whole_forward_however_it_is_cut(
    engine: NativeEngine, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.native.runner.TOLD_AT_ONCE", 16)
    prompt = [(i * i) % 120 for i in range(50)]
    asked = replace(request(1, prompt), logprobs=count, prompt_logprobs=True)
    for chunk in (1, 7, 16, 49, 50):
        tokens, told = generate(engine, asked, 12, chunk)
        assert tokens == generate(engine, replace(asked, logprobs=None), 12)[0], "asking changes nothing"
        check_told(told, [*prompt, *tokens], whole_forward(engine, [*prompt, *tokens]), count)


def test_logprobs_of_the_prompt_come_with_the_first_token_and_only_then(engine: NativeEngine) -> None:
    told, silent, short = request(1, [3] * 20), request(2, [4] * 20), request(3, [5])
    told = replace(told, logprobs=1, prompt_logprobs=True)
    short = replace(short, logprobs=0, prompt_logprobs=True)
    result = engine.run(StepPlan((Entry(1, Kind.PREFILL, 0, 15, False),), start=(told,)))
    assert result.logprobs == {}
    rest = Entry(1, Kind.PREFILL, 15, 5, True)
    result = engine.run(StepPlan((rest, *prefill(silent, short).entries), start=(silent, short)))
    assert {key: len(rows) for key, rows in result.logprobs.items()} == {1: 20, 3: 1}
    result = engine.run(StepPlan((Entry(1, Kind.DECODE, 20, 1, True), Entry(3, Kind.DECODE, 1, 1, True))))
    assert {key: len(rows) for key, rows in result.logprobs.items()} == {1: 1, 3: 1}


def test_positions_computed_anew_are_told_once(engine: NativeEngine) -> None:
    asked = replace(request(1, list(range(40))), logprobs=2, prompt_logprobs=True)
    expected = generate(engine, asked, 1)[1]
    engine.run(StepPlan((Entry(1, Kind.PREFILL, 0, 30, False),), start=(asked,)))
    engine.run(StepPlan((Entry(1, Kind.PREFILL, 10, 10, False),)))
    assert engine.run(StepPlan((Entry(1, Kind.PREFILL, 20, 20, True),))).logprobs[1] == approximately(expected)
    engine.run(StepPlan((Entry(1, Kind.PREFILL, 5, 35, False),)))
    assert len(engine.run(StepPlan((Entry(1, Kind.DECODE, 40, 1, True),))).logprobs[1]) == 1


def approximately(rows: list[Logprobs]) -> list[list[tuple[int, float]]]:
    return [[(token, pytest.approx(value, abs=1e-4)) for token, value in row] for row in rows]


def test_a_resumed_request_tells_nothing_of_its_prompt(engine: NativeEngine) -> None:
    asked = replace(request(1, list(range(40))), logprobs=2, prompt_logprobs=True, resumed_tokens=5)
    assert len(generate(engine, asked, 3)[1]) == 3


def test_cancelling_within_a_prompt_that_is_told_frees_all_and_tells_nothing(engine: NativeEngine) -> None:
    asked = replace(request(1, list(range(60))), logprobs=2, prompt_logprobs=True)
    expected = generate(engine, asked, 1)[1]
    engine.run(StepPlan((Entry(1, Kind.PREFILL, 0, 20, False),), start=(asked,)))
    engine.run(StepPlan((Entry(1, Kind.PREFILL, 20, 20, False),)))
    result = engine.run(StepPlan(stop=(1,)))
    assert (result.tokens, result.logprobs) == ({}, {})
    assert engine.free_blocks == 30 and engine._sequences == {}
    assert len(expected) == 60
    again = generate(engine, asked, 1)[1]  # under the same key: nothing is left of what was told
    assert again == approximately(expected)


def test_sequences_that_decode_side_by_side_are_each_read_where_they_lie(engine: NativeEngine) -> None:
    requests = [replace(request(key, [1] * 30), max_tokens=80) for key in range(4)]
    engine.run(prefill(*requests))
    decode(engine, {r.key: 30 for r in requests}, 60)
    assert all(sequence.table.is_run for sequence in engine._sequences.values())


# --- what makes no sense


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


def test_what_a_plan_frees_is_freed_even_where_the_rest_of_it_fails(engine: NativeEngine) -> None:
    engine.run(prefill(request(1, [1] * 40), request(2, [2] * 40)))
    engine.run(StepPlan(kept=((1, 0, 7),)))
    with pytest.raises(KeyError):
        engine.run(StepPlan(kept=((3, 0, 8),), stop=(1, 2), evicted=(7, 8)))
    assert engine.free_blocks == 30


def test_what_cannot_be_loaded_is_explained(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no config\.json"):
        NativeEngine.load(tmp_path)
    with pytest.raises(ValueError, match="holds no block"):
        NativeEngine.load(checkpoint, "cpu", kv_cache_bytes=10)
