"""What the model itself thought of tokens: their log probabilities, before anything shapes the draw."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from scheduler.messages import Logprobs
from worker.native.sampler import in_blocks, nearest

LEAST = -9999.0  # instead of minus infinity, which JSON does not have


def logprobs_of(logits: Tensor, tokens: Sequence[int], counts: Sequence[int]) -> list[Logprobs]:
    """Per row of logits [rows, vocab]: its token, then as many of the likeliest as asked for, descending.

    Of equals the lower id comes first. NaN counts as impossible.
    """
    vocab = logits.shape[-1]
    blocks, peaks = in_blocks(logits.float())
    told = blocks.flatten(1).log_softmax(-1)  # [rows, vocab, and some padding]
    own = told.gather(-1, torch.tensor(tokens, device=told.device)[:, None])[:, 0].tolist()
    rows: list[list[tuple[int, float]]] = [[(token, value)] for token, value in zip(tokens, own, strict=True)]
    if any(counts):
        best, ids = (near.cpu().numpy() for near in nearest(told.view_as(blocks), peaks))
        for i, count in enumerate(counts):
            place = min(count, vocab)
            if not place:
                continue
            if place < best.shape[-1] and best[i, place - 1] > best[i, -1]:  # no equal of these is missing
                rows[i] += likeliest(best[i], ids[i], place)
            else:
                rows[i] += likeliest(told[i, :vocab].cpu().numpy(), np.arange(vocab), place)
    return [[(token, max(value, LEAST)) for token, value in row] for row in rows]


def likeliest(values: np.ndarray, ids: np.ndarray, count: int) -> list[tuple[int, float]]:
    order = np.lexsort((ids, -values))[:count]
    return list(zip(ids[order].tolist(), values[order].tolist(), strict=True))
