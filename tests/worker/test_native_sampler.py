"""The sampler: shaped logits and draws against numpy in float64, and draws that depend on seed and position alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from scheduler.messages import Request, Sampling
from worker.native.logprobs import LEAST, likeliest, logprobs_of
from worker.native.penalties import Past, past_of, shaped
from worker.native.sampler import BLOCK, NEAR, pick, sample, uniform_at


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def random_logits(rows: int, vocab: int, seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def reference_distribution(logits: np.ndarray, setting: Sampling, slack: float = 0.0) -> np.ndarray:
    """Temperature, then min_p, then top_k, then the smallest set of what is left whose mass reaches top_p.

    With slack, what only rounding keeps out is in.
    """
    scaled = (logits.astype(np.float64) - logits.max()) / setting.temperature
    p = np.exp(scaled)
    p[p < setting.min_p * (1 - slack)] = 0
    if 0 < setting.top_k < len(p):
        p[p < np.sort(p)[-setting.top_k]] = 0
    if setting.top_p < 1:
        order = np.argsort(-p, kind="stable")
        before = np.cumsum(p[order]) - p[order]
        last = order[before < (setting.top_p + slack) * p.sum()][-1]
        p[p < p[last]] = 0
    return p / p.sum()


def reference_draw(p: np.ndarray, uniform: float) -> int:
    return int(np.searchsorted(np.cumsum(p), uniform, side="right").clip(max=len(p) - 1))


SETTINGS = [
    Sampling(temperature=1.0),
    Sampling(temperature=0.6),
    Sampling(temperature=1.3, top_k=5),
    Sampling(temperature=1.0, top_p=0.7),
    Sampling(temperature=0.8, top_k=7, top_p=0.9),
    Sampling(temperature=1.0, top_p=1e-9),
    Sampling(temperature=1.0, top_k=1000),
    Sampling(temperature=1.2, min_p=0.1),
    Sampling(temperature=1.0, min_p=0.02, top_p=0.8),
    Sampling(temperature=1.0, min_p=0.3, top_p=0.95, top_k=4),
]
FLAT = [  # more is kept than the nearest hold
    Sampling(temperature=3.0, top_p=0.9),
    Sampling(temperature=3.0, top_p=0.3),
    Sampling(temperature=3.0, top_k=NEAR + 20),
    Sampling(temperature=3.0, top_k=NEAR + 20, top_p=0.8),
    Sampling(temperature=3.0, min_p=0.05),
    Sampling(temperature=3.0, min_p=0.05, top_p=0.9),
]


@pytest.mark.parametrize(("setting", "vocab"), [*((s, 24) for s in SETTINGS), *((s, 300) for s in FLAT)])
def test_draws_follow_the_distribution(setting: Sampling, vocab: int) -> None:
    logits, draws = random_logits(1, vocab, seed=1), 20_000 if vocab == 24 else 5_000
    settings = [replace(setting, seed=seed) for seed in range(draws)]
    tokens = sample(logits.expand(draws, -1), settings, [17] * draws)
    expected = reference_distribution(logits[0].numpy(), setting)
    seen = np.bincount(tokens, minlength=vocab) / draws
    assert not seen[expected == 0].any()
    assert (np.abs(seen - expected) < 5 * np.sqrt(expected / draws) + 1e-9).all()
    assert ((seen > 0) | (expected < 20 / draws)).all(), "what is likely enough has come"


samplings = st.builds(
    Sampling,
    temperature=st.floats(0.05, 5.0),
    top_p=st.sampled_from([1.0, 1.0, 0.999, 0.95, 0.7, 0.2, 0.01]),
    top_k=st.sampled_from([0, 0, 2, 20, NEAR - 1, NEAR, NEAR + 1, 200, 5000]),
    min_p=st.sampled_from([0.0, 0.0, 0.001, 0.05, 0.5, 1.0]),
    seed=st.integers(0, 2**64 - 1),
)


@hypothesis_settings(deadline=None, max_examples=100)
@given(
    settings=st.lists(samplings, min_size=1, max_size=8),
    vocab=st.sampled_from([2, BLOCK - 1, BLOCK, BLOCK + 1, 128, 300, 2000]),
    scale=st.sampled_from([0.0, 0.01, 1.0, 6.0]),
    seed=st.integers(0, 1000),
    levels=st.sampled_from([0, 0, 4]),
)
def test_any_combination_draws_what_a_plain_reference_draws(
    settings: list[Sampling], vocab: int, scale: float, seed: int, levels: int
) -> None:
    logits = random_logits(len(settings), vocab, seed, scale)
    if levels:
        logits = (logits * levels).round() / levels  # many equals
    tokens = sample(logits, settings, range(len(settings)))
    for row, (token, setting) in enumerate(zip(tokens, settings, strict=True)):
        p = reference_distribution(logits[row].numpy(), setting)
        assert reference_distribution(logits[row].numpy(), setting, slack=1e-5)[token] > 0, setting
        if setting.top_p >= 1 or (p > 0).sum() == 1:  # otherwise it may have been drawn by rejection
            uniform = uniform_at(setting.seed, row)
            near = {reference_draw(p, uniform + step) for step in (-1e-5, 0.0, 1e-5)}
            assert min(near) <= token <= max(near), setting


@pytest.mark.parametrize("vocab", [4, 30, 200])
def test_top_p_keeps_the_smallest_set_that_reaches_it(vocab: int) -> None:
    rest = -100.0 * torch.arange(1, vocab - 3)
    logits = torch.cat((torch.tensor([0.5, 0.3, 0.15, 0.05]).log(), rest)).expand(2000, -1)
    for top_p, count in ((0.01, 1), (0.45, 1), (0.55, 2), (0.79, 2), (0.81, 3), (0.96, 4)):
        settings = [Sampling(top_p=top_p, seed=seed) for seed in range(2000)]
        assert set(sample(logits, settings, [0] * 2000)) == set(range(count))


def test_what_ties_with_the_last_token_kept_is_kept_too() -> None:
    for vocab in (20, 200):
        logits = torch.zeros(1, vocab).expand(800, -1)
        for setting in (Sampling(top_k=2), Sampling(top_p=0.1), Sampling(min_p=1.0)):
            settings = [replace(setting, seed=seed) for seed in range(800)]
            assert len(set(sample(logits, settings, [0] * 800))) > 0.9 * vocab


def as_past(setting: Sampling, row: int) -> Past | None:
    request = Request(1, 0, [row, 2, 2, 200 + row], 9, sampling=setting, stop_ids=frozenset({5, 900}), resumed_tokens=2)
    return past_of(request, vocab=300)


def test_a_draw_does_not_depend_on_the_rest_of_the_batch() -> None:
    rows = 60
    logits = random_logits(rows, 500, scale=3.0)
    chosen = [*SETTINGS, *FLAT]
    extra = [
        {},
        {"repetition_penalty": 1.3},
        {"presence_penalty": 1.0, "frequency_penalty": 0.5},
        {"logit_bias": ((3, 5.0), (7, -100.0))},
        {"min_tokens": 4},
    ]
    settings = [replace(chosen[i % len(chosen)], **extra[i % 5 if i % 2 else 0], seed=i) for i in range(rows)]
    settings = [replace(s, temperature=s.temperature * (i % 7 > 0)) for i, s in enumerate(settings)]
    positions = [7 * i for i in range(rows)]
    pasts = [as_past(setting, row) for row, setting in enumerate(settings)]
    assert 0 < pasts.count(None) < rows
    together = sample(logits, settings, positions, pasts)
    alone = [
        sample(logits[i : i + 1], settings[i : i + 1], positions[i : i + 1], pasts[i : i + 1])[0] for i in range(rows)
    ]
    backwards = sample(logits.flip(0), settings[::-1], positions[::-1], pasts[::-1])[::-1]
    assert together == alone == backwards


@pytest.mark.parametrize(
    "setting", [Sampling(0.0, seed=3), Sampling(1e-30, seed=3), Sampling(5.0, top_k=1), Sampling(5.0, top_p=0.0)]
)
def test_settings_that_leave_one_token_take_the_best(setting: Sampling) -> None:
    logits = random_logits(30, 100)
    assert sample(logits, [setting] * 30, range(30)) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("setting", [*SETTINGS, *FLAT, Sampling(0.0)])
def test_nan_and_minus_infinity_are_never_drawn(setting: Sampling) -> None:
    logits = random_logits(200, 60)
    logits[:, ::2] = -torch.inf
    logits[:, 1::4] = torch.nan
    tokens = sample(logits, [replace(setting, seed=i) for i in range(200)], range(200))
    assert all(token % 4 == 3 for token in tokens)


@pytest.mark.parametrize("value", [torch.nan, -torch.inf, torch.inf])
def test_a_row_without_a_likely_token_still_gives_one(value: float) -> None:
    for vocab in (10, 200):
        logits = torch.full((2, vocab), value)
        for setting in (Sampling(0.0), Sampling(1.0), Sampling(1.0, top_p=0.5), Sampling(1.0, top_k=3)):
            assert all(0 <= token < vocab for token in sample(logits, [setting] * 2, [0, 1]))


@pytest.mark.parametrize(
    "odd",
    [
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_p": float("nan")},
        {"min_p": 7.0},
        {"min_p": float("nan")},
        {"top_k": -1},
        {"top_k": 10**30, "top_p": 0.5},
        {"repetition_penalty": 0.0},
        {"logit_bias": ((3, float("nan")), (4, float("inf")))},
    ],
)
def test_settings_that_make_no_sense_harm_nobody_else(odd: dict[str, Any]) -> None:
    logits = random_logits(3, 300)
    settings = [Sampling(seed=1, top_p=0.9), Sampling(seed=2, **odd), Sampling(seed=3)]
    pasts = [as_past(setting, row) for row, setting in enumerate(settings)]
    tokens = sample(logits, settings, [0] * 3, pasts)
    assert tokens[0::2] == sample(logits[0::2], settings[0::2], [0] * 2) and 0 <= tokens[1] < 300


def test_the_highest_uniform_number_ends_at_the_last_possible_token() -> None:
    p = random_logits(500, 5 * BLOCK).softmax(-1)
    last = torch.randint(1, p.shape[-1], (500, 1), generator=torch.Generator().manual_seed(2))
    p[torch.arange(p.shape[-1]) > last] = 0.0
    p[:, :-1:2] = 0.0
    highest = torch.full((500, 1), 1 - 2.0**-52, dtype=torch.float64)
    tokens = pick(p.view(500, 5, BLOCK), highest)
    assert (p.gather(-1, tokens[:, None]) > 0).all()


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


# --- penalties, biases, bans


def past(prompt: list[int], resumed: int = 0, stop_ids: tuple[int, ...] = (), **settings: object) -> Past | None:
    sampling = Sampling(**settings)  # type: ignore[arg-type]
    request = Request(1, 0, prompt, 9, sampling=sampling, stop_ids=frozenset(stop_ids), resumed_tokens=resumed)
    return past_of(request, vocab=8)


def shape_one(logits: list[float], one: Past | None) -> list[float]:
    result: list[float] = shaped(torch.tensor([logits]), [one])[0].tolist()
    return result


LOGITS = [1.0, -1.0, 2.0, 0.0, 4.0, -4.0, 0.5, 3.0]


def test_repetition_penalty_divides_what_is_likely_and_multiplies_what_is_not() -> None:
    one = past([0, 1, 1, 3], repetition_penalty=2.0)
    assert one is not None
    one.add([4, 5, 4])
    assert shape_one(LOGITS, one) == [0.5, -2.0, 2.0, 0.0, 2.0, -8.0, 0.5, 3.0]


def test_presence_and_frequency_count_the_output_alone() -> None:
    one = past([0, 0, 7], presence_penalty=0.5, frequency_penalty=0.25)
    assert one is not None
    assert shape_one(LOGITS, one) == LOGITS
    one.add([2, 2, 0])
    assert shape_one(LOGITS, one) == [1.0 - 0.75, -1.0, 2.0 - 1.0, 0.0, 4.0, -4.0, 0.5, 3.0]


def test_biases_come_before_the_repetition_penalty_and_this_before_the_others() -> None:
    one = past([2], 1, repetition_penalty=2.0, presence_penalty=1.0, logit_bias=((2, 4.0), (3, -1.0)))
    assert shape_one(LOGITS, one) == [1.0, -1.0, (2.0 + 4.0) / 2 - 1.0, -1.0, 4.0, -4.0, 0.5, 3.0]


def test_stop_ids_cannot_be_drawn_before_min_tokens_were() -> None:
    one = past([1, 1], 1, (4, 7, 99), min_tokens=3)  # one of the three is there already; 99 is no token
    assert one is not None
    for _ in range(2):
        assert sample(torch.tensor([LOGITS]), [Sampling(0.0)], [0], [one]) == [2]
        one.add([2])
    assert sample(torch.tensor([LOGITS]), [Sampling(0.0)], [0], [one]) == [4]
    assert shape_one(LOGITS, one) == LOGITS


def test_a_bias_of_a_hundred_forces_and_of_minus_a_hundred_bans() -> None:
    logits = random_logits(200, 500, scale=5.0)
    for setting in (Sampling(0.0), Sampling(1.5), Sampling(1.0, top_p=0.9)):
        settings = [replace(setting, seed=seed) for seed in range(200)]
        forced = past([1], logit_bias=((6, 100.0),))
        assert set(sample(logits, settings, range(200), [forced] * 200)) == {6}
        best = logits.argmax(-1).tolist()
        banned = [past([1], logit_bias=((token, -100.0),)) for token in best]
        assert not any(a == b for a, b in zip(sample(logits, settings, range(200), banned), best, strict=True))


def test_requests_without_such_settings_have_no_past() -> None:
    assert past([1, 2], stop_ids=(4,), top_p=0.3, min_p=0.1, top_k=3) is None
    assert past([1, 2], min_tokens=3) is None, "there is nothing to ban"


@hypothesis_settings(deadline=None, max_examples=100)
@given(
    prompt=st.lists(st.integers(0, 299), min_size=1, max_size=40),
    drawn=st.lists(st.integers(0, 299), max_size=300),
    resumed=st.integers(0, 300),
    repetition=st.sampled_from([1.0, 0.7, 1.3]),
    presence=st.sampled_from([0.0, -1.0, 0.6]),
    frequency=st.sampled_from([0.0, -0.2, 0.3]),
    bias=st.dictionaries(st.integers(0, 299), st.floats(-100, 100), max_size=5),
    min_tokens=st.integers(0, 200),
)
def test_shaped_logits_are_those_of_a_plain_reference_and_of_a_resumed_run(
    prompt: list[int],
    drawn: list[int],
    resumed: int,
    repetition: float,
    presence: float,
    frequency: float,
    bias: dict[int, float],
    min_tokens: int,
) -> None:
    sampling = Sampling(1.0, 1.0, 0, 0, 0.0, repetition, presence, frequency, tuple(bias.items()), min_tokens)
    request = Request(1, 0, prompt, 900, sampling=sampling, stop_ids=frozenset({3, 5}))
    one = Past(request, 300)
    one.add(drawn)
    resumed = min(resumed, len(drawn))
    again = Past(replace(request, prompt=[*prompt, *drawn[:resumed]], resumed_tokens=resumed), 300)
    again.add(drawn[resumed:])

    logits = random_logits(2, 300)
    expected = logits.double().numpy()
    for token, value in bias.items():
        expected[:, token] += value
    if len(drawn) < min_tokens:
        expected[:, [3, 5]] = -np.inf
    for token in {*prompt, *drawn}:
        column = expected[:, token]
        expected[:, token] = np.where(column > 0, column / repetition, column * repetition)
    for token in drawn:
        expected[:, token] -= frequency
    for token in set(drawn):
        expected[:, token] -= presence
    got = shaped(logits, [one, again])
    np.testing.assert_allclose(got.numpy(), expected, atol=2e-4)
    assert torch.equal(shaped(logits, [one, one]), shaped(logits, [again, again]))


# --- log probabilities


@pytest.mark.parametrize("vocab", [5, 64, 300, 5000])
@pytest.mark.parametrize("scale", [0.0, 2.0])
def test_logprobs_are_those_of_log_softmax(vocab: int, scale: float) -> None:
    logits = random_logits(9, vocab, scale=scale)
    counts = [0, 1, 2, 4, 5, 20, 63, 64, 100]
    tokens = [row % vocab for row in range(9)]
    reference = logits.double().log_softmax(-1).numpy()
    for row, told in enumerate(logprobs_of(logits, tokens, counts)):
        assert len(told) == 1 + min(counts[row], vocab)
        assert told[0][0] == tokens[row]
        np.testing.assert_allclose([value for _, value in told], [reference[row, t] for t, _ in told], atol=1e-5)
        best = np.lexsort((np.arange(vocab), -logits[row].numpy()))
        assert [token for token, _ in told[1:]] == best[: counts[row]].tolist()


def test_logprobs_are_told_of_the_logits_as_they_came() -> None:
    logits, setting = random_logits(1, 300), Sampling(0.01, top_k=2, logit_bias=((7, 100.0),))
    token = sample(logits, [setting], [0], [past([1], logit_bias=((7, 100.0),))])[0]
    ((chosen, *_),) = logprobs_of(logits, [token], [1])
    assert chosen == (7, pytest.approx(float(logits.log_softmax(-1)[0, 7]), abs=1e-5))


def test_of_equals_the_lower_id_is_told_first() -> None:
    logits = torch.zeros(1, 300)
    logits[0, [250, 20, 130]] = 1.0
    ((_, *told),) = logprobs_of(logits, [0], [5])
    assert [token for token, _ in told] == [20, 130, 250, 0, 1]


@pytest.mark.parametrize("value", [torch.nan, -torch.inf, torch.inf, 3e38, -3e38])
def test_no_logprob_is_infinite_or_missing(value: float) -> None:
    for logits in (torch.full((2, 70), value), random_logits(2, 70)):
        logits[0, :60] = value
        for (token, _), *told in logprobs_of(logits, [3, 4], [20, 70]):
            assert token in (3, 4) and len(told) in (20, 70)
            assert all(LEAST <= logprob <= 0 and 0 <= other < 70 for other, logprob in told)
            assert len({other for other, _ in told}) == len(told)


def test_a_row_that_wants_no_alternatives_is_not_sorted_for_those_that_do(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at = []

    def watching(values: np.ndarray, ids: np.ndarray, count: int) -> list[tuple[int, float]]:
        looked_at.append(len(values))
        return likeliest(values, ids, count)

    monkeypatch.setattr("worker.native.logprobs.likeliest", watching)
    logits, counts = random_logits(4, 20_000), [0, 5, 0, 20]
    told = logprobs_of(logits, range(4), counts)
    assert [len(row) - 1 for row in told] == counts
    assert len(looked_at) == 2 and max(looked_at) <= NEAR
    assert told == [logprobs_of(logits[i : i + 1], [i], [count])[0] for i, count in enumerate(counts)]


def test_logprobs_do_not_depend_on_the_rest_of_the_batch() -> None:
    logits = random_logits(20, 5000)
    together = logprobs_of(logits, range(20), [5] * 20)
    assert together == [logprobs_of(logits[i : i + 1], [i], [5])[0] for i in range(20)]
