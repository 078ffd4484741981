"""Weights in groups: what they stand for, and how near they come to what was quantized."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from worker.native.groups import GROUP, Groups, for_kernel, groups_of, half


def weights(rows: int = 6, columns: int = 96, scale: float = 0.05) -> Tensor:
    """With a few numbers far from the others, as trained matrices have them."""
    chance = torch.Generator().manual_seed(0)
    found = torch.randn(rows, columns, generator=chance) * scale
    found[::2, ::29] *= 6
    return found


def min_max(weight: Tensor) -> Tensor:
    """The plain way: 16 even steps from the least to the largest of a group."""
    grouped = weight.unflatten(1, (-1, GROUP))
    low, step = grouped.amin(-1, keepdim=True), (grouped.amax(-1, keepdim=True) - grouped.amin(-1, keepdim=True)) / 15
    return ((grouped - low) / step).round().mul(step).add(low).flatten(1)


def error(found: Tensor, right: Tensor, importance: Tensor | float = 1.0) -> float:
    return float(((found - right).square() * importance).sum())


def test_a_weight_is_scale_times_value_plus_offset() -> None:
    values = torch.arange(64, dtype=torch.uint8).view(1, 64) % 16
    groups = Groups(4, values, torch.tensor([[2.0, 0.5]]), torch.tensor([[-1.0, 3.0]]))
    assert groups.shape == (1, 64) and not groups.is_centred
    assert groups.floats()[0, [0, 1, 31, 32, 33]].tolist() == [-1.0, 1.0, 29.0, 3.0, 3.5]
    assert torch.equal(groups[0:1].floats(), groups.floats())


def test_eight_bits_are_signed_and_off_by_half_a_step_at_most() -> None:
    weight = weights()
    groups = groups_of(weight, 8)
    assert groups.is_centred and groups.values.dtype == torch.uint8
    step = groups.scale.repeat_interleave(GROUP, 1)
    assert bool(((groups.floats() - weight).abs() <= 0.51 * step).all())


def test_four_bits_come_nearer_than_even_steps_from_least_to_largest() -> None:
    weight = weights(64, 512)
    groups = groups_of(weight, 4)
    assert int(groups.values.max()) <= 15
    assert error(groups.floats(), weight) < 0.9 * error(min_max(weight), weight)


def test_columns_that_matter_come_nearer_than_without_being_told() -> None:
    weight, importance = weights(64, 512), torch.ones(512)
    importance[::8] = 100.0
    told, plain = groups_of(weight, 4, importance).floats(), groups_of(weight, 4).floats()
    assert error(told, weight, importance) < 0.8 * error(plain, weight, importance)


@pytest.mark.parametrize("bits", [8, 4])
def test_scales_and_offsets_are_numbers_of_float16(bits: int) -> None:
    groups = groups_of(weights(), bits)
    assert torch.equal(half(groups.scale), groups.scale) and torch.equal(half(groups.offset), groups.offset)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("value", [0.0, 1.0, -0.3, 1e-9, 3000.0])
def test_a_group_of_equal_numbers_stays_what_it_is(bits: int, value: float) -> None:
    found = groups_of(torch.full((2, 32), value), bits).floats()
    assert (
        bool(found.isfinite().all()) and error(found, torch.full((2, 32), value)) <= 64 * (value * 2**-7) ** 2 + 1e-12
    )


def test_rows_that_are_not_made_of_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="rows of 40 numbers are not made of groups of 32"):
        groups_of(torch.zeros(2, 40), 8)


def test_a_kernel_gets_what_it_has_and_the_next_best_else() -> None:
    eight, four = groups_of(weights(), 8), groups_of(weights(), 4)
    assert for_kernel(eight, 8) is eight and for_kernel(four, 4) is four
    signed = Groups(4, four.values, four.scale, -8 * four.scale)
    assert torch.equal(for_kernel(signed, 8).floats(), signed.floats())
    lopsided = Groups(8, eight.values, eight.scale, eight.offset + half(torch.tensor(0.03)))
    near = for_kernel(lopsided, 8)
    assert near.is_centred and error(near.floats(), lopsided.floats()) < 1e-4 * float(lopsided.floats().square().sum())
    assert for_kernel(weights(), 4).bits == 4
