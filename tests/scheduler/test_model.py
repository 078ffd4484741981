"""The shape of a model, from its config."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from scheduler.model import SHAPES, LayerGroup, ModelShape

LLAMA_CONFIG: dict[str, Any] = {
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}


def from_config(config: dict[str, Any]) -> ModelShape:
    return ModelShape.from_config(config, "llama-3.1-8b", "bfloat16", "bfloat16")


def test_a_config_gives_the_shape() -> None:
    assert from_config(LLAMA_CONFIG) == SHAPES["llama-3.1-8b"]


def test_what_a_config_may_leave_out_has_the_usual_values() -> None:
    config = {name: value for name, value in LLAMA_CONFIG.items() if name != "num_key_value_heads"}
    assert from_config(config).kv_heads == 32
    assert from_config({**LLAMA_CONFIG, "head_dim": None}).head_dim == 128
    assert from_config({**LLAMA_CONFIG, "head_dim": 64}).head_dim == 64


@pytest.mark.parametrize(
    "field", ["num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size"]
)
def test_a_missing_field_is_named(field: str) -> None:
    config = {name: value for name, value in LLAMA_CONFIG.items() if name != field}
    with pytest.raises(ValueError, match=field):
        from_config(config)


def test_a_mixture_of_experts_is_told_by_its_config() -> None:
    config = {**LLAMA_CONFIG, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8}
    shape = from_config(config)
    assert (shape.intermediate, shape.experts, shape.experts_per_token) == (768, 128, 8)


def test_bytes_follow_the_formats_of_weights_and_cache() -> None:
    shape = ModelShape.from_config(LLAMA_CONFIG, "m", "float32", "int8")
    assert shape.weight_bytes(1) == 2 * SHAPES["llama-3.1-8b"].weight_bytes(1)
    assert shape.kv_bytes(10) == SHAPES["llama-3.1-8b"].kv_bytes(10) / 2


def test_a_tied_head_is_kept_once_and_read_every_step() -> None:
    tied = from_config({**LLAMA_CONFIG, "tie_word_embeddings": True})
    untied = from_config(LLAMA_CONFIG)
    assert untied.resident_bytes - tied.resident_bytes == 2 * 128256 * 4096
    assert untied.weight_bytes(1) == tied.weight_bytes(1) == tied.resident_bytes


@pytest.mark.parametrize(
    ("name", "billions"),
    [("smollm2-135m", 0.1345), ("qwen3-0.6b", 0.596), ("llama-3.2-1b", 1.236), ("llama-3.1-70b", 70.55)],
)
def test_known_models_have_the_parameters_they_are_named_for(name: str, billions: float) -> None:
    assert SHAPES[name].parameters == pytest.approx(billions * 1e9, rel=0.005)


def test_windowed_layers_keep_no_more_than_their_window() -> None:
    full = SHAPES["llama-3.1-8b"]
    windowed = replace(full, groups=(LayerGroup(24, window=512), LayerGroup(8)))
    assert windowed.kv_bytes(512) == full.kv_bytes(512)
    assert windowed.kv_bytes(4096) == full.kv_bytes(4096) * (24 * 512 + 8 * 4096) / (32 * 4096)


def test_the_kv_of_all_is_the_sum_over_each() -> None:
    contexts = [1, 500, 3000]
    for shape in (SHAPES["qwen3-8b"], replace(SHAPES["qwen3-8b"], groups=(LayerGroup(30, 128), LayerGroup(6)))):
        assert shape.kv_bytes_of_all(contexts) == pytest.approx(sum(shape.kv_bytes(tokens) for tokens in contexts))
        assert shape.kv_bytes_of_all([]) == shape.kv_bytes(0) == 0
