"""Drawing the next tokens, batched and on the device.

A draw depends on the row's logits, its settings, and (seed, position): one uniform number per row comes from a hash of
the two, and the token is where the cumulated distribution passes it. So neither the rest of the batch nor a recomputed
cache changes what a sequence says.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from scheduler.messages import Sampling

WORD = (1 << 64) - 1
LEAST_TEMPERATURE = 1e-5
CANDIDATES = 128  # the best logits, enough for most nuclei; only other rows are sorted whole


def sample(logits: Tensor, settings: Sequence[Sampling], positions: Sequence[int]) -> list[int]:
    """One token per row of logits [rows, vocab]; `positions` are those of the tokens drawn.

    NaN counts as impossible; a row in which nothing is possible gives some token.
    """
    logits = torch.nan_to_num(logits.float(), nan=-torch.inf, neginf=-torch.inf)
    tokens = logits.argmax(-1)
    drawn = [i for i, setting in enumerate(settings) if not is_greedy(setting)]
    if drawn:
        rows = torch.tensor(drawn, device=logits.device)
        chosen = [settings[i] for i in drawn]
        uniform = [uniform_at(settings[i].seed, positions[i]) for i in drawn]
        tokens[rows] = draw(logits[rows], chosen, uniform)
    result: list[int] = tokens.tolist()
    return result


def is_greedy(setting: Sampling) -> bool:
    """Settings that leave one token; below the least temperature the second best logit has no chance in float32."""
    return setting.temperature < LEAST_TEMPERATURE or setting.top_k == 1 or setting.top_p <= 0


def uniform_at(seed: int, position: int) -> float:
    """A number in [0, 1): two rounds of SplitMix64 (Steele, Lea, Flood 2014), over the seed, then the position."""
    return (_mix(_mix(seed & WORD) + position & WORD) >> 11) * 2.0**-53


def _mix(word: int) -> int:
    word = word + 0x9E3779B97F4A7C15 & WORD
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & WORD
    word = (word ^ word >> 27) * 0x94D049BB133111EB & WORD
    return word ^ word >> 31


def draw(logits: Tensor, settings: Sequence[Sampling], uniform: Sequence[float]) -> Tensor:
    """Tokens [rows] from logits [rows, vocab] in float32 without NaN, by inverting the cumulated distribution."""
    device, vocab = logits.device, logits.shape[-1]
    temperature = torch.tensor([[s.temperature] for s in settings], device=device)
    # The best logit becomes 0 first, so that a small temperature cannot overflow.
    scaled = (logits - logits.amax(-1, keepdim=True)) / temperature
    filtered = [i for i, s in enumerate(settings) if s.top_k or s.top_p < 1]
    if filtered:
        rows = torch.tensor(filtered, device=device)
        scaled[rows] = keep_likely(scaled[rows], [settings[i] for i in filtered])
    cumulated = scaled.softmax(-1).nan_to_num_(0).cumsum(-1, dtype=torch.float64)
    total = cumulated[:, -1:]
    target = torch.tensor(uniform, dtype=torch.float64, device=device)[:, None] * total
    # Below the total, or rounding could end behind the last possible token.
    target = target.minimum(total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(cumulated, target, right=True).squeeze(-1).clamp_(max=vocab - 1)


def keep_likely(scaled: Tensor, settings: Sequence[Sampling]) -> Tensor:
    """The same logits [rows, vocab], with -inf for what top_k, or top_p of the tokens that top_k leaves, rules out.

    What ties with the least likely token kept is kept too: which of equals comes first would depend on how they are sorted.
    """
    vocab = scaled.shape[-1]
    top_k = torch.tensor([[min(s.top_k or vocab, vocab)] for s in settings], device=scaled.device)
    # A sum of probabilities may reach 1 too early: off is infinity.
    columns = [[s.top_p if s.top_p < 1 else math.inf] for s in settings]
    top_p = torch.tensor(columns, dtype=torch.float64, device=scaled.device)
    least, is_certain = least_kept(scaled.topk(min(CANDIDATES, vocab)).values, scaled, top_k, top_p)
    if not bool(is_certain.all()):
        rest = ~is_certain.squeeze(-1)
        least[rest], _ = least_kept(descending(scaled[rest]), scaled[rest], top_k[rest], top_p[rest])
    return torch.where(scaled < least, -torch.inf, scaled)


def least_kept(best: Tensor, scaled: Tensor, top_k: Tensor, top_p: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest logit to keep per row, and whether the best logits [rows, size] were enough to know: both [rows, 1]."""
    size, vocab = best.shape[-1], scaled.shape[-1]
    beyond = torch.arange(size, device=best.device) >= top_k
    left = best.masked_fill(beyond, -torch.inf)
    whole = torch.where(top_k <= size, left.logsumexp(-1, keepdim=True), scaled.logsumexp(-1, keepdim=True))
    mass = (left - whole).double().exp_().cumsum(-1)
    last = (mass < top_p).sum(-1, keepdim=True).minimum(top_k - 1)  # the place that reaches top_p, or ends top_k
    knows_whole = (top_k <= size) | (top_k == vocab)  # of what top_k leaves
    is_certain = knows_whole & (last < size)
    return best.gather(-1, last.clamp(max=size - 1)), is_certain


def descending(logits: Tensor) -> Tensor:
    """Every row sorted. On a CPU by numpy, whose sort uses vector instructions: 4,096 logits in 0.07 ms instead of 0.45."""
    if logits.device.type != "cpu":
        return logits.sort(-1, descending=True).values
    return torch.from_numpy(np.sort(logits.numpy())).flip(-1)
