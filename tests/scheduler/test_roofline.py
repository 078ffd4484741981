"""Bytes, operations and seconds of a step, checked against numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.batch import Entry, Kind
from scheduler.hardware import CATALOGUE, Device, MemoryLevel
from scheduler.model import SHAPES, LayerGroup, ModelShape
from scheduler.roofline import (
    StepWork,
    decode_work,
    limit_seconds,
    mix,
    ridge_tokens,
    step_bytes,
    step_cost,
    step_flops,
    step_work,
)

LLAMA = SHAPES["llama-3.1-8b"]
MOE = SHAPES["qwen3-30b-a3b"]
PERFECT_H100 = Device("h100", (MemoryLevel("memory", 80 * 2**30, 3.35e12),), 989e12, host_seconds=0.0)
works = st.builds(
    StepWork, st.integers(0, 300), st.integers(1, 8192), st.floats(0, 1e11), st.floats(0, 1e9), st.floats(0, 1e14)
)
positive = st.floats(1e-9, 1e3)


def test_llama_8b_reads_fifteen_gigabytes_a_step_and_keeps_128_kib_a_token() -> None:
    """8.03e9 parameters, less the input embedding of 128,256 x 4,096, in bf16."""
    assert LLAMA.parameters == pytest.approx(8.03e9, rel=1e-3)
    assert LLAMA.weight_bytes(1) == LLAMA.weight_bytes(512) == pytest.approx(15.0e9, rel=2e-3)
    assert LLAMA.weight_bytes(1) == LLAMA.resident_bytes - 2 * 128256 * 4096
    assert LLAMA.kv_bytes(1) == 131072  # 2 (k and v) x 32 layers x 8 heads x 128 x 2 bytes


def test_llama_8b_on_an_h100_decodes_at_223_and_prefills_at_62_thousand_tokens_a_second() -> None:
    """3.35e12 / 15.0e9 bytes; 989e12 / (16.06e9 operations a token, of which 1.05e9 are the head's)."""
    solo = step_cost(PERFECT_H100, LLAMA, StepWork(1, 1, 0.0, 0.0, 0.0)).seconds
    assert 1 / solo == pytest.approx(223, rel=0.01)
    assert LLAMA.matmul_flops(1, 1) == pytest.approx(15.0e9, rel=2e-3)
    assert LLAMA.matmul_flops(1, 0) == pytest.approx(14.0e9, rel=5e-3)
    prompt = StepWork(8192, 8192, 0.0, 0.0, 0.0)
    assert 8192 / step_cost(PERFECT_H100, LLAMA, prompt).seconds == pytest.approx(989e12 / 15.0e9, rel=0.02)


def test_llama_8b_on_an_h100_turns_compute_bound_near_three_hundred_tokens() -> None:
    """989e12 / 3.35e12 operations a byte x 2 bytes / 2 operations = 295, and a little more: the head is read but not used."""
    assert ridge_tokens(PERFECT_H100, LLAMA) == pytest.approx(295 * 15.0 / 13.96, rel=0.01)


def test_reading_the_context_costs_its_bytes() -> None:
    """64 sequences of 2,000 tokens: 16.8 GB of KV, 5.0 ms at 3.35 TB/s, on top of 4.5 ms for the weights."""
    work = decode_work(LLAMA, 64, 64 * 2000 * 131072)
    cost = step_cost(PERFECT_H100, LLAMA, work)
    assert cost.kv == pytest.approx(5.01e-3, rel=0.01)
    assert cost.weights == pytest.approx(4.48e-3, rel=0.01)


def test_a_mixture_of_experts_reads_the_experts_its_tokens_choose() -> None:
    """U = 128·(1 − (1 − 8/128)^T): 8 experts for one token, 51.6 for eight, all for many."""
    expert_bytes = MOE.layers * MOE.mlp_parameters * MOE.weight_bytes_each
    rest = MOE.weight_bytes(1) - 8 * expert_bytes
    assert rest > 0
    assert (MOE.weight_bytes(8) - rest) / expert_bytes == pytest.approx(128 * (1 - (15 / 16) ** 8))
    assert (MOE.weight_bytes(10_000) - rest) / expert_bytes == pytest.approx(128)
    assert MOE.parameters == pytest.approx(30.5e9, rel=0.01)
    assert MOE.matmul_flops(1, 1) == pytest.approx(2 * 3.0e9, rel=0.05)
    assert ridge_tokens(PERFECT_H100, MOE) > 5 * ridge_tokens(PERFECT_H100, LLAMA)


@given(positive, positive)
def test_mix_lies_between_the_larger_cost_and_a_fifth_more(a: float, b: float) -> None:
    assert mix(a, b) == mix(b, a)
    assert max(a, b) <= mix(a, b) <= max(a, b) * 2**0.25 * (1 + 1e-12)
    assert mix(a, b) == pytest.approx((a**4 + b**4) ** 0.25)


def test_mix_of_nothing_is_nothing() -> None:
    assert mix(0.0, 0.0) == 0.0 and mix(3.0, 0.0) == 3.0


@given(st.sampled_from(sorted(CATALOGUE)), st.sampled_from(sorted(SHAPES)), works)
def test_causes_sum_to_the_step_and_none_is_negative(device: str, shape: str, work: StepWork) -> None:
    cost = step_cost(CATALOGUE[device], SHAPES[shape], work)
    parts = [cost.weights, cost.compute, cost.kv, cost.phases, cost.host]
    assert min(parts) >= 0
    assert cost.seconds == pytest.approx(sum(parts))


@given(st.sampled_from(sorted(CATALOGUE)), st.sampled_from(sorted(SHAPES)), works)
def test_no_step_is_predicted_faster_than_its_limit(device: str, shape: str, work: StepWork) -> None:
    shares = CATALOGUE[device]
    assert max(shares.weight_share, shares.kv_share, shares.flops_share, shares.attention_share) <= 1
    assert limit_seconds(shares, SHAPES[shape], work) <= step_cost(shares, SHAPES[shape], work).seconds * (1 + 1e-9)


@given(works, st.integers(1, 500), st.integers(0, 4000))
def test_a_chunk_never_makes_a_step_cheaper(work: StepWork, tokens: int, position: int) -> None:
    more = work.plus_chunk(LLAMA, position, tokens, outputs=1)
    device = CATALOGUE["h100"]
    assert step_cost(device, LLAMA, more).seconds > step_cost(device, LLAMA, work).seconds
    assert work.plus_chunk(LLAMA, position, 0, outputs=0) == work


def test_the_work_of_entries_is_the_sum_of_its_chunks() -> None:
    entries = [Entry(1, Kind.DECODE, 99, 1, True), Entry(2, Kind.PREFILL, 64, 32, False)]
    work = StepWork(0, 0, 0.0, 0.0, 0.0).plus_chunk(LLAMA, 99, 1, True).plus_chunk(LLAMA, 64, 32, False)
    assert step_work(LLAMA, entries) == work
    assert work.kv_read_bytes == 131072 * (100 + 96) and work.kv_write_bytes == 131072 * 33
    assert step_bytes(LLAMA, work)["kv_read"] == work.kv_read_bytes
    assert step_flops(LLAMA, work) == LLAMA.matmul_flops(33, 1) + work.attention_flops


def test_every_row_of_a_prompt_that_is_told_goes_through_the_head() -> None:
    plain, told = (Entry(2, Kind.PREFILL, 64, 32, False, is_told) for is_told in (False, True))
    last = Entry(2, Kind.PREFILL, 96, 8, True, is_told=True)
    assert [entry.outputs for entry in (plain, told, last, last._replace(is_told=False))] == [0, 32, 8, 1]
    works = [step_work(LLAMA, [entry]) for entry in (plain, told)]
    head_flops = 2 * 4096 * 128256
    assert step_flops(LLAMA, works[1]) - step_flops(LLAMA, works[0]) == 32 * head_flops
    device = CATALOGUE["laptop-cpu"]
    costs = [step_cost(device, LLAMA, work).seconds for work in works]
    limits = [limit_seconds(device, LLAMA, work) for work in works]
    assert costs[1] > costs[0] and limits[1] > limits[0]


def test_attention_operations_of_a_prompt_do_not_depend_on_how_it_is_cut() -> None:
    for shape in (LLAMA, replace(LLAMA, groups=(LayerGroup(20, window=100), LayerGroup(12)))):
        whole = shape.attention_flops(600, 0)
        assert whole == pytest.approx(sum(shape.attention_flops(50, at) for at in range(0, 600, 50)))
        assert whole == pytest.approx(sum(shape.attention_flops(1, at) for at in range(600)))


def test_layers_with_a_window_look_at_no_more_than_it() -> None:
    windowed = replace(LLAMA, groups=(LayerGroup(32, window=100),))
    assert windowed.attention_flops(1, 5000) == pytest.approx(windowed.attention_flops(1, 100), rel=0.01)
    read = windowed.kv_bytes(5000)
    assert windowed.decode_attention_flops(read) == pytest.approx(windowed.attention_flops(1, 5000))
    assert LLAMA.decode_attention_flops(LLAMA.kv_bytes(5000)) == pytest.approx(LLAMA.attention_flops(1, 5000), rel=1e-3)


def test_a_model_that_fits_a_cache_is_read_at_the_speed_of_the_cache() -> None:
    tiny = ModelShape("tiny", 2, 64, 2, 2, 32, 128, 1000, 512, weight_bytes_each=4.0)
    device = CATALOGUE["laptop-cpu"]
    assert step_cost(device, tiny, StepWork(1, 1, 0.0, 0.0, 0.0)).weights == tiny.weight_bytes(1) / 200e9
    assert step_cost(device, tiny, StepWork(1, 1, 1e9, 0.0, 0.0)).weights == tiny.weight_bytes(1) / 60e9
