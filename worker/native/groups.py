"""Weights in groups of 32 numbers of a row that share a scale and an offset: what the packed kernels compute with."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

GROUP = 32  # numbers
SEARCH_STEPS = 3  # ranges that are tried for a group of 4 bits …
SHRINK = 0.05  # … each by so much narrower at both ends
LEAST = 1e-30  # instead of a division by zero
SLAB_NUMBERS = 1 << 18  # that are searched through at a time: what a cache holds


@dataclass(frozen=True, slots=True)
class Groups:
    """A matrix [rows, cols] whose weights are scale * value + offset.

    `is_centred` says that every offset is that of a signed number, -2^(bits-1) * scale: the only 8 bits that the kernel has.
    """

    bits: int  # 8 or 4
    values: Tensor  # uint8 [rows, cols], one number per byte
    scale: Tensor  # float32 [rows, cols / 32]
    offset: Tensor  # float32 [rows, cols / 32]

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def is_centred(self) -> bool:
        return bool(torch.equal(self.offset, -self._centre * self.scale))

    @property
    def _centre(self) -> int:
        return 1 << (self.bits - 1)

    def floats(self) -> Tensor:
        """The weights in float32; of signed numbers exactly the product of number and scale."""
        numbers = self.values.unflatten(1, (-1, GROUP)).float()  # [rows, groups, 32]
        if self.is_centred:
            return ((numbers - self._centre) * self.scale[..., None]).flatten(1)
        return numbers.mul_(self.scale[..., None]).add_(self.offset[..., None]).flatten(1)

    def __getitem__(self, rows: slice | Tensor) -> Groups:
        return replace(self, values=self.values[rows], scale=self.scale[rows], offset=self.offset[rows])


def for_kernel(weight: Tensor | Groups, bits: int) -> Groups:
    """The same matrix in the groups that the kernel of so many bits has: as it is where that is what it has."""
    if isinstance(weight, Groups):
        if weight.bits == bits and (bits == 4 or weight.is_centred):
            return weight
        if weight.bits < bits and weight.is_centred:  # the same signed numbers, further from their bound
            return _centred(bits, weight.values.int() - (1 << (weight.bits - 1)), weight.scale)
        weight = weight.floats()
    return groups_of(weight, bits)


def groups_of(weight: Tensor, bits: int, importance: Tensor | None = None) -> Groups:
    """Quantizes [rows, cols]. Scales and offsets are numbers that float16 holds, so packing loses nothing more.

    `importance` [cols] weighs the squared error of each column: the mean square of what it is multiplied with.
    """
    if weight.shape[1] % GROUP:
        raise ValueError(f"rows of {weight.shape[1]} numbers are not made of groups of {GROUP}")
    if bits == 8:
        return _eight(weight)
    rows = max(1, SLAB_NUMBERS // weight.shape[1])
    parts = [_four(slab, importance) for slab in weight.split(rows)]
    values, scale, offset = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return Groups(4, values, scale, offset)


def _eight(weight: Tensor) -> Groups:
    grouped = weight.unflatten(1, (-1, GROUP)).float()
    scale = half(grouped.abs().amax(-1) / 127)
    numbers = (grouped / nonzero(scale)[..., None]).round_().clamp_(-127, 127)
    return _centred(8, numbers.flatten(1), scale)


def _centred(bits: int, numbers: Tensor, scale: Tensor) -> Groups:
    centre = 1 << (bits - 1)
    return Groups(bits, (numbers + centre).to(torch.uint8), scale, -centre * scale)


def _four(weight: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Values, scales and offsets of the least squared error among some ranges, each refined by a regression."""
    w = weight.unflatten(1, (-1, GROUP)).float()  # [rows, groups, 32]
    search = Search(w, importance)
    low, high = w.amin(-1), w.amax(-1)
    for step in range(SEARCH_STEPS):
        shrink = SHRINK * step * (high - low)
        scale, offset = _regression(search, (high - low - 2 * shrink) / 15, low + shrink)
        search.offer(half(scale), half(offset))
    return search.values.flatten(1).to(torch.uint8), search.scale, search.offset


class Search:
    """For each group of 4 bits of w [rows, groups, n], the scale and offset of the least squared error so far."""

    def __init__(self, w: Tensor, importance: Tensor | None) -> None:
        self.w = w
        # [1, groups, n], or one for all
        self.weights = torch.ones(()) if importance is None else importance.float().view(1, *w.shape[1:])
        self.values = torch.zeros_like(w)
        self.scale, self.offset = torch.zeros(w.shape[:2]), torch.zeros(w.shape[:2])
        self._error = torch.full(w.shape[:2], torch.inf)

    def nearest(self, scale: Tensor, offset: Tensor) -> Tensor:
        return ((self.w - offset[..., None]) / nonzero(scale)[..., None]).round_().clamp_(0, 15)

    def sum(self, numbers: Tensor) -> Tensor:
        """Over each group, weighed."""
        return (numbers * self.weights).sum(-1)

    def offer(self, scale: Tensor, offset: Tensor) -> None:
        values = self.nearest(scale, offset)
        error = self.sum((values * scale[..., None] + offset[..., None]).sub_(self.w).square_())
        is_better = error < self._error
        self.values = torch.where(is_better[..., None], values, self.values)
        self.scale = torch.where(is_better, scale, self.scale)
        self.offset = torch.where(is_better, offset, self.offset)
        self._error = torch.minimum(error, self._error)


def _regression(search: Search, scale: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """The scale and offset that fit these ones' values best; the same ones where all values of a group are."""
    values, w = search.nearest(scale, offset), search.w
    total = search.sum(torch.ones_like(w)).clamp_min(LEAST)
    mean_value, mean_w = search.sum(values) / total, search.sum(w) / total
    centred = values - mean_value[..., None]
    spread = search.sum(centred.square())
    slope = search.sum(centred * (w - mean_w[..., None])) / spread.clamp_min(LEAST)
    fits = spread > 1e-6 * total
    return torch.where(fits, slope, scale), torch.where(fits, mean_w - slope * mean_value, offset)


def half(numbers: Tensor) -> Tensor:
    """Rounded to what float16 holds, still in float32."""
    return numbers.clamp(-65504.0, 65504.0).half().float()


def nonzero(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, torch.ones((), dtype=scale.dtype), scale)
