"""The decoder against transformers: same logits and greedy tokens, however steps are cut and mixed."""

from __future__ import annotations

import ctypes
import json
import math
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from scheduler.batch import Entry, Kind, StepPlan
from scheduler.messages import Request, Sampling
from worker.native.blocks import BlockTable
from worker.native.config import DecoderConfig, Rope
from worker.native.cpu.build import NoLibrary, load_library
from worker.native.cpu.decoder import CpuDecoder
from worker.native.cpu.pack import Arena, Kernels, new_matrix
from worker.native.decoder import Outcome, rope_frequencies, rope_table
from worker.native.inputs import Span, group_by_length
from worker.native.runner import NativeEngine

GREEDY = Sampling(temperature=0.0)
NEW_TOKENS = 64
SMALL: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,  # so that two best logits are seldom close
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 64}
NO_SPECIAL = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}  # of a vocabulary larger than this one
SLIDING, FULL = "sliding_attention", "full_attention"
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SMALL),
    "llama-tied": lambda: LlamaConfig(**SMALL, tie_word_embeddings=True),
    "llama-llama3-rope": lambda: LlamaConfig(**SMALL, rope_parameters=LLAMA3),
    "llama-wide-heads-and-biases": lambda: LlamaConfig(**SMALL, head_dim=24, attention_bias=True, mlp_bias=True),
    "llama-one-kv-head": lambda: LlamaConfig(**{**SMALL, "num_key_value_heads": 1}),
    "llama-no-sharing": lambda: LlamaConfig(**{**SMALL, "num_key_value_heads": 4}),
    "llama-linear-rope": lambda: LlamaConfig(
        **SMALL, rope_parameters={"rope_type": "linear", "rope_theta": 5000.0, "factor": 3.0}
    ),
    "mistral": lambda: MistralConfig(**SMALL, head_dim=24, sliding_window=None),
    "mistral-window": lambda: MistralConfig(**SMALL, sliding_window=21),
    "mistral-window-of-one-block-tied": lambda: MistralConfig(**SMALL, sliding_window=16, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**SMALL),
    "qwen2-late-windows-tied": lambda: Qwen2Config(
        **SMALL, use_sliding_window=True, sliding_window=37, max_window_layers=1, tie_word_embeddings=True
    ),
    "qwen2-yarn": lambda: Qwen2Config(**SMALL, rope_parameters=YARN),
    "qwen3": lambda: Qwen3Config(**SMALL, head_dim=32, tie_word_embeddings=True),
    "qwen3-untied": lambda: Qwen3Config(**SMALL, head_dim=16, attention_bias=True),
    "qwen3-listed-windows": lambda: Qwen3Config(
        **SMALL, head_dim=32, use_sliding_window=True, sliding_window=9, layer_types=[FULL, SLIDING, FULL]
    ),
    "smollm3": lambda: SmolLM3Config(**{**SMALL, "num_hidden_layers": 4}, **NO_SPECIAL),
    "smollm3-listed-untied-biases": lambda: SmolLM3Config(
        **SMALL,
        **NO_SPECIAL,
        no_rope_layers=[0, 1, 0],
        tie_word_embeddings=False,
        attention_bias=True,
        mlp_bias=True,
    ),
    "smollm3-windows": lambda: SmolLM3Config(
        **SMALL, **NO_SPECIAL, no_rope_layer_interval=2, use_sliding_window=True, sliding_window=24
    ),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def save_model(name: str, path: Path) -> torch.nn.Module:
    """A random model; norms and biases are random too, as they start as ones and zeros."""
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(path)
    return model


@dataclass
class Running:
    tokens: list[int]
    prompt_tokens: int
    computed: int = 0  # 0: not started

    @property
    def is_done(self) -> bool:
        return len(self.tokens) >= self.prompt_tokens + NEW_TOKENS


class RandomScheduler:
    """Mixes decodes and chunks of random sizes; now and then drops a sequence's cache, to be recomputed later."""

    def __init__(self, engine: NativeEngine, seed: int, prompts: list[list[int]]) -> None:
        self.engine = engine
        self.random = random.Random(seed)
        self.sequences = {key: Running(list(prompt), len(prompt)) for key, prompt in enumerate(prompts)}
        self.evictions = 0

    def run(self) -> None:
        while any(not running.is_done for running in self.sequences.values()):
            self.step()
        self.engine.run(StepPlan(stop=tuple(self.sequences)))

    def step(self) -> None:
        stop = self._stop_some()
        free = self.engine.num_blocks - sum(blocks(running.computed) for running in self.sequences.values())
        entries, start = [], []
        for key in self.random.sample(sorted(self.sequences), len(self.sequences)):
            running = self.sequences[key]
            left = len(running.tokens) - running.computed
            count = min(left, self.random.randint(1, 40))
            needed = blocks(running.computed + count) - blocks(running.computed)
            if running.is_done or needed > free or self.random.random() < 0.2:
                continue
            if running.computed == 0:
                start.append(Request(key, 0, list(running.tokens), NEW_TOKENS, sampling=GREEDY))
            kind = Kind.DECODE if left == 1 else Kind.PREFILL
            entries.append(Entry(key, kind, running.computed, count, count == left))
            running.computed += count
            free -= needed
        result = self.engine.run(StepPlan(tuple(entries), tuple(start), stop))
        assert set(result.tokens) == {entry.key for entry in entries if entry.delivers}
        for key, tokens in result.tokens.items():
            self.sequences[key].tokens += tokens

    def _stop_some(self) -> tuple[int, ...]:
        """Who is done leaves; any other loses its blocks in one of 50 steps, so that nobody waits for them for good."""
        stop = []
        for key, running in self.sequences.items():
            if running.computed and (running.is_done or self.random.random() < 0.02):
                running.computed = 0
                stop.append(key)
                self.evictions += not running.is_done
        return tuple(stop)


def blocks(tokens: int) -> int:
    return -(-tokens // 16)


def record_logits(engine: NativeEngine) -> dict[tuple[int, ...], torch.Tensor]:
    """Logits by the tokens they follow."""
    seen: dict[tuple[int, ...], torch.Tensor] = {}
    deliver = engine._deliver

    def recording(plan: StepPlan, outcome: Outcome) -> Any:
        for row, span in enumerate(outcome.delivering):
            assert outcome.logits is not None
            seen[tuple(engine._sequences[plan.entries[span].key].tokens)] = outcome.logits[row].clone()
        return deliver(plan, outcome)

    engine._deliver = recording  # type: ignore[method-assign]
    return seen


@pytest.mark.parametrize("name", CONFIGS)
def test_agrees_with_transformers_in_any_mix_of_batch_chunk_and_block(name: str, tmp_path: Path) -> None:
    model = save_model(name, tmp_path)
    block_bytes = engine_block_bytes(tmp_path)
    engine = NativeEngine.load(tmp_path, "cpu", "float32", kv_cache_bytes=26 * block_bytes, threads=1)
    seen = record_logits(engine)
    rng = random.Random(1)
    prompts = [[rng.randrange(300) for _ in range(length)] for length in (1, 5, 16, 17, 40, 77)]
    scheduler = RandomScheduler(engine, seed=len(name), prompts=prompts)
    scheduler.run()
    assert scheduler.evictions > 0
    assert engine.free_blocks == engine.num_blocks == 26
    for running in scheduler.sequences.values():
        check_against(model, running.tokens, running.prompt_tokens, seen)


def engine_block_bytes(path: Path) -> int:
    shape = DecoderConfig.from_dict(json.loads((path / "config.json").read_text()))
    return shape.layers * 16 * 2 * 4 * shape.kv_heads * shape.head_dim


@torch.no_grad()
def check_against(model: Any, tokens: list[int], prompt_tokens: int, seen: dict[tuple[int, ...], torch.Tensor]) -> None:
    """Teacher-forced: the reference sees our tokens, and must find each of them best, or one of two very close ones."""
    reference = model(torch.tensor([tokens])).logits[0]
    for position in range(prompt_tokens, len(tokens)):
        expected = reference[position - 1]
        torch.testing.assert_close(seen[tuple(tokens[:position])], expected, rtol=0, atol=1e-4)
        assert expected[tokens[position]] > expected.max() - 1e-3


def test_a_flat_batch_of_many_lengths_gives_each_sequence_its_own_logits(tmp_path: Path) -> None:
    model = save_model("llama", tmp_path)
    engine = NativeEngine.load(tmp_path, "cpu", "float32", kv_cache_bytes=8 << 20, threads=1)
    seen = record_logits(engine)
    rng = random.Random(2)
    prompts = [[rng.randrange(300) for _ in range(rng.choice((1, 3, 15, 16, 30, 33, 100, 180)))] for _ in range(24)]
    start = tuple(Request(key, 0, prompt, 9, sampling=GREEDY) for key, prompt in enumerate(prompts))
    first = engine.run(StepPlan(tuple(Entry(r.key, Kind.PREFILL, 0, len(r.prompt), True) for r in start), start))
    second = engine.run(StepPlan(tuple(Entry(r.key, Kind.DECODE, len(r.prompt), 1, True) for r in start)))
    for key, prompt in enumerate(prompts):
        check_against(model, prompt + first.tokens[key] + second.tokens[key], len(prompt), seen)


@pytest.mark.parametrize("lengths", [[1], [512, 16, 16, 16], [500, 400, 300, 200, 100, 50, 25, 12, 6, 3], [64] * 9])
def test_less_than_half_of_a_group_is_padding(lengths: list[int]) -> None:
    groups = group_by_length([(length, False) for length in lengths], group_tokens=10_000)
    at = 0
    for count in groups:
        assert count * lengths[at] < 2 * sum(lengths[at : at + count])
        at += count
    assert at == len(lengths)


def test_a_group_gathers_no_more_than_its_bound() -> None:
    assert group_by_length([(64, False)] * 9, group_tokens=256) == [4, 4, 1]
    assert group_by_length([(1000, False)] * 2, group_tokens=256) == [1, 1]


def test_bfloat16_stays_close_to_float32(tmp_path: Path) -> None:
    save_model("qwen3", tmp_path)
    prompt = [random.Random(3).randrange(300) for _ in range(50)]
    logits = []
    for dtype in ("float32", "bfloat16"):
        engine = NativeEngine.load(tmp_path, "cpu", dtype, kv_cache_bytes=1 << 20, threads=1)
        seen = record_logits(engine)
        start = (Request(0, 0, prompt, 1, sampling=GREEDY),)
        engine.run(StepPlan((Entry(0, Kind.PREFILL, 0, 30, False),), start))
        engine.run(StepPlan((Entry(0, Kind.PREFILL, 30, 20, True),)))
        logits.append(seen[tuple(prompt)].float())
    assert (logits[0] - logits[1]).norm() < 0.05 * logits[0].norm()


def test_rope_table_has_unit_length_and_starts_unrotated() -> None:
    cos, sin = rope_table(Rope(theta=10000.0), head_dim=8, positions=5)
    torch.testing.assert_close(cos**2 + sin**2, torch.ones_like(cos))
    assert cos[0].eq(1).all() and sin[0].eq(0).all()


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"original_max_position_embeddings": None},
        {"factor": 40.0, "beta_fast": 20, "beta_slow": 2},
        {"truncate": False},
        {"attention_factor": 1.5},
        {"mscale": 1.0, "mscale_all_dim": 0.7},
        {"mscale": 1.0},
        {"beta_fast": 1, "beta_slow": 1, "truncate": False},
    ],
)
def test_yarn_is_that_of_transformers(change: dict[str, Any]) -> None:
    scaling = {name: value for name, value in {**YARN, **change}.items() if value is not None}
    reference = Qwen2Config(**SMALL, rope_parameters=dict(scaling))
    frequencies, length = ROPE_INIT_FUNCTIONS["yarn"](reference)
    own = DecoderConfig.from_dict({**SMALL, "architectures": ["Qwen2ForCausalLM"], "rope_parameters": scaling})
    assert own.rope.length == pytest.approx(length)
    torch.testing.assert_close(rope_frequencies(own.rope, own.head_dim), frequencies)


# --- the C step -------------------------------------------------------------------------------------------------------

# Relative root mean squares of logits, and how far the token that was drawn may lie below the best. Activations are
# rounded to the format of the weights before each product.
TOLERANCES = {"bfloat16": (0.02, 0.15), "int8": (0.05, 0.4), "int4": (0.05, 0.4)}


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    try:
        return load_library()
    except NoLibrary as error:
        pytest.skip(str(error))


@torch.no_grad()
def round_weights(model: torch.nn.Module, kernels: Kernels, format: str) -> None:
    """To what the packed format holds."""
    for parameter in model.parameters():
        if parameter.dim() == 2:
            matrix = new_matrix(Arena(1 << 20), *parameter.shape, format)
            kernels.pack(matrix, parameter.data)
            parameter.copy_(kernels.unpack(matrix))


@pytest.mark.parametrize(
    ("name", "format"),
    [(name, format) for name in CONFIGS for format in ("bfloat16", "int8")] + [("llama", "int4"), ("qwen3", "int4")],
)
def test_the_c_step_agrees_with_transformers_in_any_mix(
    name: str, format: str, tmp_path: Path, library: ctypes.CDLL
) -> None:
    model: Any = save_model(name, tmp_path)
    round_weights(model, Kernels(library, 1), format)
    blocks_bytes = 26 * engine_block_bytes(tmp_path) // 2
    engine = NativeEngine.load(tmp_path, "cpu", format, kv_cache_bytes=blocks_bytes, threads=2, library=library)
    engine._needs_logits = lambda plan: True  # type: ignore[method-assign]
    seen = record_logits(engine)
    rng = random.Random(1)
    prompts = [[rng.randrange(300) for _ in range(length)] for length in (1, 5, 16, 17, 40, 77)]
    scheduler = RandomScheduler(engine, seed=len(name), prompts=prompts)
    scheduler.run()
    assert scheduler.evictions > 0
    assert engine.free_blocks == engine.num_blocks == 26
    tolerance, gap = TOLERANCES[format]
    for running in scheduler.sequences.values():
        with torch.no_grad():
            reference = model(torch.tensor([running.tokens])).logits[0, running.prompt_tokens - 1 : -1]
        tokens = [tuple(running.tokens[:stop]) for stop in range(running.prompt_tokens, len(running.tokens))]
        logits = torch.stack([seen[known] for known in tokens])
        assert (logits - reference).norm() < tolerance * reference.norm()
        drawn = torch.tensor(running.tokens[running.prompt_tokens :])
        below = reference.amax(-1) - reference.gather(1, drawn[:, None])[:, 0]
        assert below.max() < gap * reference.std()


@pytest.mark.parametrize(
    ("name", "format"),
    [("llama", "bfloat16"), ("mistral-window", "int8"), ("qwen3", "int4"), ("smollm3-listed-untied-biases", "int8")],
)
def test_the_c_step_draws_the_same_tokens_however_steps_are_cut(
    name: str, format: str, tmp_path: Path, library: ctypes.CDLL
) -> None:
    save_model(name, tmp_path)
    rng = random.Random(1)
    prompts = [[rng.randrange(300) for _ in range(length)] for length in (1, 5, 16, 17, 40, 77)]
    told = []
    for seed, threads in ((1, 1), (2, 3), (3, 4)):
        engine = NativeEngine.load(tmp_path, "cpu", format, kv_cache_bytes=1 << 20, threads=threads, library=library)
        scheduler = RandomScheduler(engine, seed=seed, prompts=prompts)
        scheduler.run()
        told.append([running.tokens for running in scheduler.sequences.values()])
    assert told[0] == told[1] == told[2]


@pytest.mark.parametrize(("format", "tolerance"), [("bfloat16", 0.01), ("int8", 0.025)])
def test_with_weights_of_the_usual_size_the_c_step_loses_little(
    format: str, tolerance: float, tmp_path: Path, library: ctypes.CDLL
) -> None:
    """Against the checkpoint's own weights in float32: what rounding them costs is in it."""
    torch.manual_seed(3)
    sizes = {"hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 6, "initializer_range": 0.05}
    model: Any = AutoModelForCausalLM.from_config(LlamaConfig(**{**SMALL, **sizes})).eval()
    model.save_pretrained(tmp_path)
    tokens = [random.Random(4).randrange(300) for _ in range(100)]
    engine = NativeEngine.load(tmp_path, "cpu", format, kv_cache_bytes=1 << 22, threads=2, library=library)
    table = BlockTable()
    engine._cache.grow(table, 100)
    hidden = engine._decoder.run([Span(table, 0, tokens, True)]).hidden
    with torch.no_grad():
        reference = model(torch.tensor([tokens])).logits[0]
    assert (engine._decoder.logits(hidden) - reference).norm() < tolerance * reference.norm()


def test_a_long_context_that_several_threads_share_is_read_whole(tmp_path: Path, library: ctypes.CDLL) -> None:
    """Alone, a sequence's last token is cut into parts; in a chunk it is not."""
    torch.manual_seed(3)
    config = LlamaConfig(**{**SMALL, "num_key_value_heads": 1, "max_position_embeddings": 8192})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokens = [random.Random(5).randrange(300) for _ in range(5000)]
    engine = NativeEngine.load(tmp_path, "cpu", "bfloat16", kv_cache_bytes=1 << 23, threads=3, library=library)
    table = BlockTable()
    engine._cache.grow(table, 5000)
    whole = engine._decoder.run([Span(table, 0, tokens, True)]).hidden[-1].clone()
    alone = engine._decoder.run([Span(table, 4999, tokens[-1:], True)]).hidden[-1]
    torch.testing.assert_close(alone, whole, rtol=0, atol=2e-2 * float(whole.abs().max()))


def test_the_best_token_is_that_of_the_logits(tmp_path: Path, library: ctypes.CDLL) -> None:
    save_model("llama", tmp_path)
    engine = NativeEngine.load(tmp_path, "cpu", "bfloat16", kv_cache_bytes=1 << 20, threads=2, library=library)
    spans = []
    for length in (3, 20, 1, 40):
        table = BlockTable()
        engine._cache.grow(table, length)
        spans.append(Span(table, 0, [random.Random(length).randrange(300) for _ in range(length)], length != 20))
    whole, best = (engine._decoder.run(spans, needs_logits) for needs_logits in (True, False))
    assert whole.delivering == best.delivering == (0, 2, 3)
    assert whole.logits is not None and best.logits is None
    assert best.best == whole.logits.argmax(-1).tolist()


def test_a_step_of_nothing_is_done_at_once(tmp_path: Path, library: ctypes.CDLL) -> None:
    save_model("llama", tmp_path)
    engine = NativeEngine.load(tmp_path, "cpu", "bfloat16", kv_cache_bytes=1 << 20, threads=2, library=library)
    assert len(engine._decoder.logits(engine._decoder._x[:0])) == 0


def test_threads_outlive_what_made_them_until_the_last_engine_is_gone(tmp_path: Path, library: ctypes.CDLL) -> None:
    """In a cycle that is collected as a whole, either may be told first."""
    save_model("llama", tmp_path)
    engine = NativeEngine.load(tmp_path, "cpu", "int8", kv_cache_bytes=1 << 20, threads=4, library=library)
    decoder, before = engine._decoder, len(os.listdir("/proc/self/task"))
    assert isinstance(decoder, CpuDecoder)
    decoder._kernels.__del__()
    decoder._kernels.pool = 0
    table = BlockTable()
    engine._cache.grow(table, 20)
    assert decoder.run([Span(table, 0, list(range(20)), True)]).hidden.isfinite().all()
    decoder.__del__()
    decoder._engine = 0
    assert len(os.listdir("/proc/self/task")) == before - 3


def test_a_page_that_held_something_that_is_no_number_is_clean_for_its_next_owner(
    tmp_path: Path, library: ctypes.CDLL
) -> None:
    save_model("llama", tmp_path)
    engine = NativeEngine.load(tmp_path, "cpu", "bfloat16", kv_cache_bytes=1 << 20, threads=2, library=library)
    with torch.inference_mode():
        for layer in engine._cache.layers:
            layer.fill_(torch.nan)
    for length, key in ((5, 1), (33, 2), (16, 3)):
        start = (Request(key, 0, list(range(length)), 9, sampling=GREEDY, logprobs=0),)
        result = engine.run(StepPlan((Entry(key, Kind.PREFILL, 0, length, True),), start))
        again = engine.run(StepPlan((Entry(key, Kind.DECODE, length, 1, True),)))
        told = [result.logprobs[key][0], again.logprobs[key][0]]
        assert all(math.isfinite(row[0][1]) for row in told)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_agrees_with_transformers(tmp_path: Path) -> None:
    model = save_model("qwen3", tmp_path)
    engine = NativeEngine.load(tmp_path, "cuda", "float32", kv_cache_bytes=1 << 20)
    seen = record_logits(engine)
    scheduler = RandomScheduler(engine, seed=5, prompts=[[1, 2, 3], [4] * 40])
    scheduler.run()
    cpu = {tokens: logits.cpu() for tokens, logits in seen.items()}
    for running in scheduler.sequences.values():
        check_against(model, running.tokens, running.prompt_tokens, cpu)
