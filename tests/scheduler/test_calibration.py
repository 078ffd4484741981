"""The cost model learns the machine, and knows how well."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.calibration import FLOPS_SHARES, MOST_OF_MEMORY, CostModel, Timing, _nonnegative_fit, fit_device
from scheduler.hardware import CATALOGUE, Device
from scheduler.model import SHAPES
from scheduler.roofline import StepWork, decode_work, step_cost

SHAPE = SHAPES["smollm2-135m"]
LAPTOP = CATALOGUE["laptop-cpu"]


def steps(seed: int = 0) -> list[StepWork]:
    """A sweep of decodes, prefills and mixtures."""
    kv = SHAPE.kv_bytes(1)
    works = [decode_work(SHAPE, n, n * context * kv) for n in (1, 2, 4, 8, 16, 32, 64) for context in (32, 640)]
    empty = StepWork(0, 0, 0.0, 0.0, 0.0)
    works += [empty.plus_chunk(SHAPE, at, c, True) for c in (8, 16, 32, 64, 128, 256, 512) for at in (0, 640)]
    works += [decode_work(SHAPE, n, n * 300 * kv).plus_chunk(SHAPE, 0, 4 * n, True) for n in (4, 8, 16, 32)]
    return works


def timings(device: Device, noise: Callable[[], float] = lambda: 1.0) -> list[Timing]:
    return [Timing(work, step_cost(device, SHAPE, work).seconds * noise()) for work in steps()]


def changing_load(rng: random.Random) -> StepWork:
    work = decode_work(SHAPE, count := rng.randint(1, 60), count * rng.randint(20, 900) * SHAPE.kv_bytes(1))
    return work.plus_chunk(SHAPE, rng.randint(0, 500), rng.choice((0, 0, 16, 64, 200)), True)


def planted(**shares: float) -> Device:
    return replace(LAPTOP, phase_seconds=0.0, **shares)


@pytest.mark.parametrize("noise", [0.0, 0.02])
@pytest.mark.parametrize(
    "truth",
    [
        planted(host_seconds=2e-4, sequence_seconds=3e-5, kv_share=0.5, flops_share=0.4, attention_share=0.2),
        planted(host_seconds=0.0, sequence_seconds=0.0, kv_share=0.8, flops_share=0.1, attention_share=0.5),
        planted(host_seconds=3e-3, sequence_seconds=1e-4, kv_share=0.3, flops_share=0.9, attention_share=0.1),
        planted(host_seconds=1e-3, weight_share=0.5, kv_share=0.4, flops_share=0.3, attention_share=0.3),
    ],
    ids=["usual", "no-host-time", "slow-host", "slow-weights"],
)
def test_the_fit_predicts_the_machine_whose_figures_were_planted(truth: Device, noise: float) -> None:
    rng = random.Random(1)
    fitted = fit_device(LAPTOP, SHAPE, timings(truth, lambda: 1 + noise * rng.uniform(-1, 1)))
    errors = []
    for _ in range(200):
        work = changing_load(rng)
        errors.append(step_cost(fitted, SHAPE, work).seconds / step_cost(truth, SHAPE, work).seconds - 1)
    assert np.mean(np.abs(errors)) <= 0.03 + noise
    assert np.max(np.abs(errors)) <= 0.15


def test_the_fit_recovers_the_planted_figures() -> None:
    """The corner is looked for on a grid: planted on a point of it, everything else comes out too."""
    flops_share = float(FLOPS_SHARES[36])
    truth = planted(
        host_seconds=1e-3, sequence_seconds=5e-5, kv_share=0.5, flops_share=flops_share, attention_share=0.2
    )
    fitted = fit_device(LAPTOP, SHAPE, timings(truth))
    assert fitted.host_seconds == pytest.approx(truth.host_seconds, rel=0.1)
    assert fitted.sequence_seconds == pytest.approx(truth.sequence_seconds, rel=0.1)
    assert fitted.flops_share == pytest.approx(truth.flops_share, rel=0.1)
    assert fitted.kv_share == pytest.approx(truth.kv_share, rel=0.1)
    assert fitted.weight_share == 1.0


@settings(max_examples=60)
@given(st.integers(0, 10_000))
def test_the_nonnegative_fit_is_the_best_there_is(seed: int) -> None:
    """No step along any coordinate and no coarse grid point is better, and none is negative."""
    rng = np.random.default_rng(seed)
    features, target = rng.normal(size=(12, 4)), rng.normal(size=12)
    errors, found = _nonnegative_fit(features, np.stack((target, -target)))
    error, values = errors[0], found[0]
    assert (values >= 0).all()

    def loss(x: np.ndarray) -> float:
        return float(((target - features @ x) ** 2).sum())

    assert error == pytest.approx(loss(values))
    gradient = -2 * features.T @ (target - features @ values)
    assert (gradient >= -1e-6).all()  # going up anywhere does not help
    assert np.abs(gradient[values > 0]).max(initial=0) < 1e-6  # nor does going down where there is room
    assert all(loss(np.abs(rng.normal(size=4))) >= error for _ in range(20))


def serve(model: CostModel, count: int, slowness: float, rng: random.Random, noise: float = 0.0) -> list[float]:
    errors = []
    for _ in range(count):
        work = changing_load(rng)
        seconds = step_cost(model.device, SHAPE, work).seconds * slowness * math.exp(rng.gauss(0, noise))
        errors.append(model.observe(work, seconds))
    return [abs(error) for error in errors]


@pytest.mark.parametrize("slowness", [1.12, 1 / 1.12])
def test_a_shift_of_an_eighth_is_followed_within_sixty_steps(slowness: float) -> None:
    rng = random.Random(2)
    model = CostModel(LAPTOP, SHAPE)
    serve(model, 300, 1.0, rng, noise=0.01)
    errors = serve(model, 200, slowness, rng, noise=0.01)
    assert np.mean(errors[:5]) > 0.08
    assert np.mean(errors[60:]) < 0.03


@pytest.mark.parametrize("slowness", [2.0, 6.0])
def test_a_machine_that_stays_much_slower_is_followed_within_sixty_steps(slowness: float) -> None:
    rng = random.Random(3)
    model = CostModel(LAPTOP, SHAPE)
    serve(model, 300, 1.0, rng, noise=0.01)
    errors = serve(model, 200, slowness, rng, noise=0.01)
    assert np.mean(errors[60:]) < 0.05
    assert np.mean(serve(model, 200, 1.0, rng, noise=0.01)[60:]) < 0.05


def test_a_step_that_was_interrupted_changes_no_prediction() -> None:
    model = CostModel(LAPTOP, SHAPE)
    serve(model, 100, 1.0, random.Random(4))
    work = decode_work(SHAPE, 8, 1e8)
    before = model.seconds(work)
    error = model.observe(work, before * 50)
    assert error == pytest.approx(math.log(50))
    assert model.seconds(work) == before


@pytest.mark.parametrize("noise", [0.03, 0.1])
def test_the_margin_covers_nineteen_steps_of_twenty(noise: float) -> None:
    rng = random.Random(5)
    model = CostModel(LAPTOP, SHAPE, margin=0.5)
    serve(model, 600, 1.0, rng, noise)
    over = 0
    for _ in range(1000):
        work = changing_load(rng)
        seconds = step_cost(LAPTOP, SHAPE, work).seconds * math.exp(rng.gauss(0, noise))
        over += seconds > model.safe_seconds(work)
        model.observe(work, seconds)
    assert over <= 70
    assert 0.02 <= model.margin <= 4 * noise


def test_the_margin_stays_within_bounds_whatever_happens() -> None:
    model = CostModel(LAPTOP, SHAPE)
    serve(model, 64, 1.0, random.Random(6))
    assert model.margin == 0.02
    serve(model, 512, 1.0, random.Random(7), noise=3.0)
    assert model.margin == 1.0


def test_the_sweep_gives_the_first_corrections_and_the_first_margin() -> None:
    model = CostModel(LAPTOP, SHAPE)
    works = steps()
    model.prime([Timing(work, model.cost(work).seconds * 1.2, spread=0.01) for work in works])
    assert all(model.seconds(work) == pytest.approx(1.2 * model.cost(work).seconds) for work in works)
    assert model.margin == pytest.approx(math.expm1(math.log(1.2) + 0.01))


def test_main_memory_is_not_said_to_be_faster_than_it_was_seen() -> None:
    """Steps that take the same for a row as for eight say nothing of how much of it was reading."""
    flat = [Timing(work, 0.016 if work.query_tokens < 12 else 0.016 + 3e-4 * work.query_tokens) for work in steps()]
    in_memory, in_cache = (fit_device(device, SHAPE, flat) for device in (LAPTOP, with_cache(LAPTOP)))
    assert in_memory.weight_share <= MOST_OF_MEMORY < in_cache.weight_share
    work = steps()[0]
    read = SHAPE.weight_bytes(1) / LAPTOP.memory.bytes_per_second
    assert step_cost(in_memory, SHAPE, work).weights > read / (MOST_OF_MEMORY + 0.01)


def with_cache(device: Device) -> Device:
    """The same rate, but of a cache that holds everything: its probe may have been far too low."""
    return replace(device, levels=(replace(device.memory, name="L3"), device.memory))


def test_what_no_timing_tells_is_taken_from_experience_not_for_free() -> None:
    """A large model leaves no time for long contexts: KV and attention then cost what they cost elsewhere."""
    truth = planted(host_seconds=1e-3, kv_share=0.8, flops_share=0.5, attention_share=0.5)
    works = [decode_work(SHAPE, n, n * SHAPE.kv_bytes(2)) for n in (1, 8, 32)]
    works += [StepWork(0, 0, 0.0, 0.0, 0.0).plus_chunk(SHAPE, 0, c, True) for c in (8, 32)]
    fitted = fit_device(LAPTOP, SHAPE, [Timing(work, step_cost(truth, SHAPE, work).seconds) for work in works])
    far = decode_work(SHAPE, 8, 8 * SHAPE.kv_bytes(4096))
    assert step_cost(fitted, SHAPE, far).seconds == pytest.approx(step_cost(truth, SHAPE, far).seconds, rel=0.2)


# --- the limit --------------------------------------------------------------------------------------------------------


@given(st.integers(0, 10_000))
def test_no_step_is_ever_faster_than_the_limit_that_it_is_held_against(seed: int) -> None:
    rng = random.Random(seed)
    model = CostModel(LAPTOP, SHAPE)
    for _ in range(20):
        work = changing_load(rng)
        seconds = model.limit.seconds(work) * rng.choice((0.3, 0.9, 1.5, 4.0))
        model.observe(work, seconds)
        assert model.limit.seconds(work) <= seconds * (1 + 1e-9)


def test_a_fast_step_raises_the_rates_of_its_own_memory_level_and_no_other() -> None:
    model = CostModel(LAPTOP, SHAPE)
    work = decode_work(SHAPE, 1, 0.0)
    predicted = model.cost(work)
    model.limit.observe(work, model.limit.seconds(work) / 2)
    cache, memory = model.limit.device.levels
    assert memory.bytes_per_second == pytest.approx(2 * LAPTOP.memory.bytes_per_second)
    assert model.limit.bytes_per_second == memory.bytes_per_second
    assert cache == LAPTOP.levels[0]
    assert model.limit.device.flops_per_second == LAPTOP.flops_per_second
    assert model.cost(work) == predicted, "what is promised rests on the fit, not on the limit"


def test_the_steps_of_the_sweep_raise_the_limit() -> None:
    model = CostModel(LAPTOP, SHAPE)
    work = decode_work(SHAPE, 1, 0.0)
    seconds = model.limit.seconds(work) / 3
    model.prime([Timing(work, seconds)])
    assert model.limit.seconds(work) == pytest.approx(seconds)


def test_a_chunk_that_draws_no_token_is_not_said_to_have_read_the_head() -> None:
    model = CostModel(LAPTOP, SHAPE)
    empty = StepWork(0, 0, 0.0, 0.0, 0.0)
    drawing, silent = (empty.plus_chunk(SHAPE, 0, 1, delivers) for delivers in (True, False))
    head = SHAPE.head_parameters * SHAPE.weight_bytes_each / LAPTOP.memory.bytes_per_second
    assert model.limit.seconds(drawing) - model.limit.seconds(silent) == pytest.approx(head)
