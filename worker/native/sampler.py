"""Drawing the next tokens, batched and on the device.

A row's logits are shaped in the order that vLLM documents: bans and biases, then penalties (`penalties.py`; greedy rows
too), then temperature, min_p, top_k, and top_p of what these leave. What ties with the least likely token kept is kept
too: which of equals comes first would depend on how they are sorted.

A draw depends on the row's logits, its settings, and (seed, position): the uniform numbers of a row come from a hash of
the two. So neither the rest of the batch nor a recomputed cache changes what a sequence says.

Nothing is sorted whole. The best of every block of logits is known from one quick pass: it finds the best token, and the
few dozen best that mostly hold all that top_k, min_p and top_p keep. Where they do not, tokens are drawn from the whole
distribution until one is among those kept (`draw_far`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from scheduler.messages import Sampling
from worker.native.penalties import Past, shaped

WORD = (1 << 64) - 1
LEAST_TEMPERATURE = 1e-5
BLOCK = 64  # logits whose best is kept beside them
NEAR = 64  # the best logits of a row, enough for most nuclei; torch finds as many of NEAR * BLOCK in 8 µs
UNKNOWN = -1
DRAWN_AT_ONCE = {"cpu": 1 << 20, "cuda": 1 << 28}  # logits: on a CPU what stays in its caches from pass to pass


def sample(
    logits: Tensor, settings: Sequence[Sampling], positions: Sequence[int], pasts: Sequence[Past | None] = ()
) -> list[int]:
    """One token per row of logits [rows, vocab]; `positions` are those of the tokens drawn.

    NaN counts as impossible; a row in which nothing is possible gives some token. `pasts`: see `penalties.py`.
    """
    logits = logits.float()
    if any(pasts):
        logits = shaped(logits, pasts)
    blocks, peaks = in_blocks(logits)
    drawn = [i for i, setting in enumerate(settings) if not is_greedy(setting)]
    needs_best = len(drawn) < len(settings)
    tokens = best_tokens(blocks, peaks).cpu().numpy() if needs_best else np.empty(len(settings), dtype=np.int64)
    at_once = DRAWN_AT_ONCE[logits.device.type] // logits.shape[-1] + 1
    for start in range(0, len(drawn), at_once):
        group = drawn[start : start + at_once]
        rows = rows_at(group, logits)
        tokens[group] = draw(blocks[rows], peaks[rows], [settings[i] for i in group], [positions[i] for i in group])
    result: list[int] = tokens.clip(max=logits.shape[-1] - 1).tolist()
    return result


def is_greedy(setting: Sampling) -> bool:
    """Settings that leave one token; below the least temperature the second best logit has no chance in float32."""
    return setting.temperature < LEAST_TEMPERATURE or setting.top_k == 1 or setting.top_p <= 0


def is_filtered(setting: Sampling) -> bool:
    return setting.top_k > 0 or setting.top_p < 1 or setting.min_p > 0


def uniform_at(seed: int, position: int, attempt: int = 0) -> float:
    """A number in [0, 1): rounds of SplitMix64 (Steele, Lea, Flood 2014), over the seed, the position, each attempt."""
    word = _mix(_mix(seed & WORD) + position & WORD)
    for _ in range(attempt):
        word = _mix(word)
    return (word >> 12) * 2.0**-52  # one bit less than a float holds: its product with a total is less than the total


def _mix(word: int) -> int:
    word = word + 0x9E3779B97F4A7C15 & WORD
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & WORD
    word = (word ^ word >> 27) * 0x94D049BB133111EB & WORD
    return word ^ word >> 31


# --- blocks -----------------------------------------------------------------------------------------------------------


def in_blocks(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The same logits [rows, blocks, BLOCK], padded, with something possible and nothing infinite; the best of each."""
    short = -logits.shape[-1] % BLOCK
    padded = F.pad(logits, (0, short), value=-torch.inf) if short else logits
    blocks = padded.view(len(logits), -1, BLOCK)
    peaks = blocks.amax(-1)
    if math.isfinite(peaks.amax(-1).sum().item()):  # anything that is not would have come through
        return blocks, peaks
    blocks = blocks.nan_to_num(nan=-torch.inf, neginf=-torch.inf)
    blocks[blocks.isneginf().flatten(1).all(-1)] = 0.0
    return blocks, blocks.amax(-1)


def best_tokens(blocks: Tensor, peaks: Tensor) -> Tensor:
    """The first of the best, per row."""
    block = peaks.argmax(-1)
    return block * BLOCK + block_of(blocks, block).argmax(-1)


def block_of(blocks: Tensor, index: Tensor) -> Tensor:
    """One block per row: [rows, BLOCK]. Or several, where index is [rows, count]: [rows, count, BLOCK]."""
    rows = torch.arange(len(blocks), device=blocks.device)
    return blocks[rows.view(-1, *[1] * (index.dim() - 1)), index]


# --- drawing ----------------------------------------------------------------------------------------------------------


def draw(blocks: Tensor, peaks: Tensor, settings: Sequence[Sampling], positions: Sequence[int]) -> np.ndarray:
    """Tokens [rows] from logits [rows, blocks, BLOCK] and the best of each block."""
    temperature = column([s.temperature for s in settings], blocks)
    # The best logit becomes 0 first, so that a small temperature cannot overflow.
    best = peaks.amax(-1, keepdim=True)
    scaled = (blocks - best[..., None]).div_(temperature[..., None])
    p = scaled.flatten(1).softmax(-1).view_as(scaled)
    tokens = np.full(len(settings), UNKNOWN)
    filtered = [i for i, setting in enumerate(settings) if is_filtered(setting)]
    if filtered:
        rows, near = rows_at(filtered, p), [settings[i] for i in filtered]
        tokens[filtered] = draw_near(scaled[rows], p[rows], peaks[rows], near, [positions[i] for i in filtered])
    rest = np.flatnonzero(tokens == UNKNOWN).tolist()
    if rest:
        rows, far = rows_at(rest, p), [settings[i] for i in rest]
        tokens[rest] = draw_far(scaled[rows], p[rows], far, [positions[i] for i in rest])
    return tokens


def draw_near(
    scaled: Tensor, p: Tensor, peaks: Tensor, settings: Sequence[Sampling], positions: Sequence[int]
) -> np.ndarray:
    """Tokens [rows] drawn among the best of each row; UNKNOWN where these do not hold all that the settings keep."""
    best, ids = nearest(scaled, peaks)
    mass = p.flatten(1).gather(-1, ids)
    total = p.sum(-1).sum(-1, keepdim=True, dtype=torch.float64)
    uniform = np.array([[uniform_at(s.seed, position)] for s, position in zip(settings, positions, strict=True)])
    near = Near(best.cpu().numpy(), ids.cpu().numpy(), mass.cpu().numpy().astype(np.float64), total.cpu().numpy())
    return near.draw(settings, uniform, is_all=best.shape[-1] == p[0].numel())


def nearest(scaled: Tensor, peaks: Tensor) -> tuple[Tensor, Tensor]:
    """The best of each row and their token ids, descending: [rows, near]. They lie in the blocks with the best peaks."""
    block = peaks.topk(min(NEAR, peaks.shape[-1])).indices  # [rows, near blocks]
    inside = block_of(scaled, block).flatten(1)
    best, at = inside.topk(min(NEAR, inside.shape[-1]))
    return best, block.gather(-1, at // BLOCK) * BLOCK + at % BLOCK


@dataclass(frozen=True, slots=True)
class Near:
    """The best of each row, descending, in numpy: a dozen operations on so little cost a third of what they do in torch."""

    best: np.ndarray  # logits [rows, near], the first is 0
    ids: np.ndarray
    mass: np.ndarray  # their probabilities
    total: np.ndarray  # those of all tokens [rows, 1]

    def draw(self, settings: Sequence[Sampling], uniform: np.ndarray, is_all: bool) -> np.ndarray:
        """`is_all`: nothing but these is there."""
        ends = -np.inf if is_all else self.best[:, -1:]  # equals may be missing from here on
        floor = self.floor(settings)
        has_none = floor == -np.inf
        left = np.where(self.best >= floor, self.mass, 0.0)
        whole = np.where(has_none, self.total, left.sum(-1, keepdims=True))
        least = np.maximum(floor, self.least_of_top_p(settings, left, whole))
        is_known = (has_none | (floor > ends)) & (least > ends) | is_all
        order = self.ids.argsort(-1)  # equals come in no order of their own
        kept = np.take_along_axis(np.where(self.best >= least, self.mass, 0.0), order, -1).cumsum(-1)
        place = (kept <= uniform * kept[:, -1:]).sum(-1, keepdims=True)
        token = np.take_along_axis(self.ids, np.take_along_axis(order, place, -1), -1)
        return np.where(is_known, token, UNKNOWN)[:, 0]

    def floor(self, settings: Sequence[Sampling]) -> np.ndarray:
        """The smallest logit that top_k and min_p keep; minus infinity where both are off."""
        near = self.best.shape[-1]
        top_k = np.array([[min(max(s.top_k, 0), near + 1)] for s in settings])
        kth = np.take_along_axis(self.best, top_k.clip(1, near) - 1, -1)
        return np.where(top_k > 0, kth, -np.inf).clip(np.array(min_p_floors(settings))[:, None])

    def least_of_top_p(self, settings: Sequence[Sampling], left: np.ndarray, whole: np.ndarray) -> np.ndarray:
        """The logit with which the likeliest reach top_p of the whole; minus infinity where these do not."""
        before = (left.cumsum(-1) < np.array(top_p_shares(settings))[:, None] * whole).sum(-1, keepdims=True)
        near = self.best.shape[-1]
        return np.where(before < near, np.take_along_axis(self.best, before.clip(max=near - 1), -1), -np.inf)


def draw_far(scaled: Tensor, p: Tensor, settings: Sequence[Sampling], positions: Sequence[int]) -> np.ndarray:
    """Tokens [rows] by rejection: who draws a token that top_p does not keep draws again, among those more likely.

    A token is kept when those more likely are together less than top_p, which takes a pass but no sorting. All that top_p
    keeps is more likely than a token it does not keep, so narrowing to these leaves the distribution as it was.
    """
    if any(s.top_k > 0 or s.min_p > 0 for s in settings):
        p = p * (scaled >= floor_of(scaled, settings)[..., None])
    share = column(top_p_shares(settings), p, torch.float64) * p.sum(-1).sum(-1, keepdim=True, dtype=torch.float64)
    tokens = np.empty(len(settings), dtype=np.int64)
    left = list(range(len(settings)))
    for attempt in itertools.count():
        uniform = [uniform_at(settings[i].seed, positions[i], attempt) for i in left]
        drawn = pick(p, column(uniform, p, torch.float64))
        tokens[left] = drawn.cpu().numpy()
        if all(settings[i].top_p >= 1 for i in left):
            break
        likelier = p * (scaled > scaled.flatten(1).gather(-1, drawn[:, None])[..., None])
        out = (likelier.sum(-1).sum(-1, keepdim=True, dtype=torch.float64) >= share).nonzero()[:, 0].tolist()
        if not out:
            break
        left, rows = [left[i] for i in out], rows_at(out, p)
        p, scaled, share = likelier[rows], scaled[rows], share[rows]
    return tokens


def pick(p: Tensor, uniform: Tensor) -> Tensor:
    """Inverts the cumulated distribution, first over the blocks, then within one. p need not sum to 1.

    Where it is NaN, as a temperature may make it, some token comes out.
    """
    mass = p.sum(-1).cumsum(-1, dtype=torch.float64)  # [rows, blocks]
    target = uniform * mass[:, -1:]
    block = torch.searchsorted(mass, target, right=True).clamp_(max=mass.shape[-1] - 1)  # [rows, 1]
    before = F.pad(mass, (1, 0)).gather(-1, block)
    within = block_of(p, block.squeeze(-1)).cumsum(-1, dtype=torch.float64)  # [rows, BLOCK]
    # Sums in another order: without the bound, rounding could end behind the last possible token of the block.
    rest = (target - before).minimum(within[:, -1:].nextafter(torch.zeros_like(target)))
    place = torch.searchsorted(within, rest, right=True).clamp_(max=BLOCK - 1)
    return (block * BLOCK + place).squeeze(-1)


def floor_of(scaled: Tensor, settings: Sequence[Sampling]) -> Tensor:
    """The smallest logit that top_k and min_p keep [rows, 1], of whole rows; minus infinity where both are off."""
    floor = column(min_p_floors(settings), scaled)
    top_k = column([min(max(s.top_k, 0), scaled[0].numel()) for s in settings], scaled, torch.int64)
    most = int(top_k.max())
    if not most:
        return floor
    kth = scaled.flatten(1).topk(most).values.gather(-1, top_k.clamp(min=1) - 1)
    return floor.maximum(kth.masked_fill(top_k == 0, -torch.inf))


# --- settings as columns ----------------------------------------------------------------------------------------------


def column(values: Sequence[float], like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=like.device)[:, None]  # [rows, 1]


def min_p_floors(settings: Sequence[Sampling]) -> list[float]:
    """The smallest logit that min_p keeps, where the best is 0; minus infinity where it is off."""
    return [math.log(min(s.min_p, 1.0)) if s.min_p > 0 else -math.inf for s in settings]


def top_p_shares(settings: Sequence[Sampling]) -> list[float]:
    """top_p; infinity where it is off, as a sum of probabilities may reach 1 too early."""
    return [s.top_p if s.top_p < 1 else math.inf for s in settings]


def rows_at(indices: list[int], like: Tensor) -> Tensor | slice:
    """An index for ascending rows; all of them need no copy."""
    return slice(None) if len(indices) == len(like) else torch.tensor(indices, device=like.device)
