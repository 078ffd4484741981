"""The sampler: distributions against numpy, and draws that depend on seed and position alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from scheduler.messages import Sampling
from worker.native.sampler import CANDIDATES, keep_likely, sample, uniform_at


def random_logits(rows: int, vocab: int, seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def reference_distribution(logits: np.ndarray, setting: Sampling) -> np.ndarray:
    """Temperature, then top_k, then the smallest set of what is left whose mass reaches top_p."""
    scaled = logits.astype(np.float64) / setting.temperature
    order = np.argsort(-scaled)
    order = order[: setting.top_k or len(order)]
    p = np.exp(scaled[order] - scaled.max())
    p /= p.sum()
    kept = order[: int(np.searchsorted(np.cumsum(p), setting.top_p)) + 1] if setting.top_p < 1 else order
    result = np.zeros(len(logits))
    result[kept] = np.exp(scaled[kept] - scaled.max())
    return result / result.sum()


SETTINGS = [
    Sampling(temperature=1.0),
    Sampling(temperature=0.6),
    Sampling(temperature=1.3, top_k=5),
    Sampling(temperature=1.0, top_p=0.7),
    Sampling(temperature=0.8, top_k=7, top_p=0.9),
    Sampling(temperature=1.0, top_p=1e-9),
    Sampling(temperature=1.0, top_k=1000),
]


@pytest.mark.parametrize("setting", SETTINGS)
def test_draws_follow_the_distribution(setting: Sampling) -> None:
    logits, draws = random_logits(1, 24), 20_000
    settings = [Sampling(setting.temperature, setting.top_p, setting.top_k, seed) for seed in range(draws)]
    tokens = sample(logits.expand(draws, -1), settings, [17] * draws)
    expected = reference_distribution(logits[0].numpy(), setting)
    seen = np.bincount(tokens, minlength=24) / draws
    assert not seen[expected == 0].any()
    assert np.abs(seen - expected).max() < 5 * np.sqrt(0.25 / draws)


@pytest.mark.parametrize("vocab", [50, CANDIDATES, 1000])
@pytest.mark.parametrize("scale", [0.01, 1.0, 6.0])
def test_what_top_k_and_top_p_keep(vocab: int, scale: float) -> None:
    settings = [Sampling(1.0, p, k) for p in (0.05, 0.5, 0.9, 0.999, 1.0) for k in (0, 2, 40, CANDIDATES + 72, 5000)]
    logits = random_logits(len(settings), vocab, seed=vocab, scale=scale)
    kept = keep_likely(logits, settings).isfinite().numpy()
    for row, setting in enumerate(settings):
        expected = reference_distribution(logits[row].numpy(), setting) > 0
        assert abs(int(kept[row].sum()) - int(expected.sum())) <= 1, setting  # float32 may stand on either side of p
        assert (kept[row] != expected).sum() <= 1, setting


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    for top_p, count in ((0.01, 1), (0.45, 1), (0.55, 2), (0.79, 2), (0.81, 3), (0.96, 4)):
        assert int(keep_likely(logits, [Sampling(top_p=top_p)]).isfinite().sum()) == count


def test_a_draw_does_not_depend_on_the_rest_of_the_batch() -> None:
    logits = random_logits(40, 500, scale=3.0)
    settings = [SETTINGS[i % len(SETTINGS)] for i in range(40)]
    settings = [Sampling(s.temperature * (i % 5 > 0), s.top_p, s.top_k, seed=i) for i, s in enumerate(settings)]
    positions = [7 * i for i in range(40)]
    together = sample(logits, settings, positions)
    alone = [sample(logits[i : i + 1], settings[i : i + 1], positions[i : i + 1])[0] for i in range(40)]
    backwards = sample(logits.flip(0), settings[::-1], positions[::-1])[::-1]
    assert together == alone == backwards


@pytest.mark.parametrize(
    "setting", [Sampling(0.0, seed=3), Sampling(1e-30, seed=3), Sampling(5.0, top_k=1), Sampling(5.0, top_p=0.0)]
)
def test_settings_that_leave_one_token_take_the_best(setting: Sampling) -> None:
    logits = random_logits(30, 100)
    assert sample(logits, [setting] * 30, range(30)) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("setting", [*SETTINGS, Sampling(0.0)])
def test_nan_and_minus_infinity_are_never_drawn(setting: Sampling) -> None:
    logits = random_logits(200, 60)
    logits[:, ::2] = -torch.inf
    logits[:, 1::4] = torch.nan
    tokens = sample(
        logits, [Sampling(setting.temperature, setting.top_p, setting.top_k, i) for i in range(200)], range(200)
    )
    assert all(token % 4 == 3 for token in tokens)


@pytest.mark.parametrize("value", [torch.nan, -torch.inf, torch.inf])
def test_a_row_without_a_likely_token_still_gives_one(value: float) -> None:
    logits = torch.full((2, 10), value)
    for setting in (Sampling(0.0), Sampling(1.0), Sampling(1.0, top_p=0.5), Sampling(1.0, top_k=3)):
        assert all(0 <= token < 10 for token in sample(logits, [setting] * 2, [0, 1]))


def test_half_precision_logits_are_drawn_from() -> None:
    logits = random_logits(4, 50).bfloat16()
    assert sample(logits, [Sampling(0.0)] * 4, range(4)) == logits.float().argmax(-1).tolist()


def test_uniform_numbers_are_uniform_over_seeds_and_over_positions() -> None:
    for numbers in ([uniform_at(s, 5) for s in range(4000)], [uniform_at(5, p) for p in range(4000)]):
        counts = np.histogram(numbers, bins=10, range=(0, 1))[0]
        assert min(numbers) >= 0 and max(numbers) < 1
        assert np.abs(counts - 400).max() < 100
    assert uniform_at(-1, 0) == uniform_at((1 << 64) - 1, 0)  # any Python int is a seed
    assert uniform_at(1, 2) != uniform_at(2, 1)
