"""The shape of a model: its bytes and operations."""

from __future__ import annotations

from dataclasses import replace

import pytest

from scheduler.model import SHAPES, LayerGroup


def test_bytes_follow_the_formats_of_weights_and_cache() -> None:
    shape = replace(SHAPES["llama-3.1-8b"], weight_bytes_each=4, kv_bytes_each=1)
    assert shape.weight_bytes(1) == 2 * SHAPES["llama-3.1-8b"].weight_bytes(1)
    assert shape.kv_bytes(10) == SHAPES["llama-3.1-8b"].kv_bytes(10) / 2


def test_a_tied_head_is_kept_once_and_read_every_step() -> None:
    untied = SHAPES["llama-3.1-8b"]
    tied = replace(untied, tied_head=True)
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
