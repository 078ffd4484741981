"""Drawing the next tokens, batched and on the device.

A draw depends on the row's logits, its settings, and (seed, position): one uniform number per row comes from a hash of
the two, and the token is where the cumulated distribution passes it. So neither the rest of the batch nor a recomputed
cache changes what a sequence says.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from scheduler.messages import Sampling

WORD = (1 << 64) - 1
CANDIDATES = 128  # enough for most nuclei; sorting a whole vocabulary costs 10 times as much


def sample(logits: Tensor, settings: Sequence[Sampling], positions: Sequence[int]) -> list[int]:
    """One token per row of logits [rows, vocab]; `positions` are those of the tokens drawn.

    NaN counts as impossible; a row in which nothing is possible gives token 0.
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
    return setting.temperature <= 0 or setting.top_k == 1 or setting.top_p <= 0


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
    columns = [(s.temperature, s.top_p, s.top_k or logits.shape[-1], u) for s, u in zip(settings, uniform, strict=True)]
    temperature, top_p, top_k, u = torch.tensor(columns, dtype=torch.float64, device=logits.device).T[:, :, None]
    # The best logit becomes 0 first, so that a tiny temperature cannot overflow. A row of -inf stays one, as NaN.
    scaled = (logits - logits.amax(-1, keepdim=True)) / temperature.float()
    if any(s.top_k or s.top_p < 1 for s in settings):
        scaled = scaled.masked_fill_(scaled < least_kept(scaled, top_k, top_p), -torch.inf)
    cumulated = scaled.softmax(-1).nan_to_num_(0).cumsum(-1, dtype=torch.float64)
    total = cumulated[:, -1:]
    # Below the total, or rounding could end behind the last possible token.
    target = torch.minimum(u * total, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(cumulated, target, right=True).squeeze(-1).clamp_(max=logits.shape[-1] - 1)


def least_kept(scaled: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """The smallest logit that top_k, and top_p of what that leaves, keep per row: [rows, 1].

    What ties with it is kept too: which of equals came first would depend on how they were sorted.
    """
    vocab = scaled.shape[-1]
    for size in (min(CANDIDATES, vocab), vocab):
        best = scaled.topk(size).values  # [rows, size], descending
        kept = best.masked_fill(torch.arange(size, device=best.device) >= top_k, -torch.inf)
        # What top_k leaves lies within the candidates, or the whole row counts.
        whole = torch.where(top_k <= size, kept.logsumexp(-1, keepdim=True), scaled.logsumexp(-1, keepdim=True))
        mass = (kept - whole).exp().cumsum(-1, dtype=torch.float64)
        inside = ((mass < top_p) & (top_p < 1)).sum(-1, keepdim=True)  # places before the one that reaches top_p
        inside = torch.where(top_p < 1, inside, top_k.long() - 1)
        if size == vocab or bool((inside < size).all()):
            break
    return best.gather(-1, inside.clamp(max=size - 1).minimum(top_k.long() - 1))
