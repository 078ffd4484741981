"""What a sequence's own past does to its next logits: biases, bans and penalties, in this order.

Only rows that ask for them pay, and only for the tokens concerned: the tokens of a sequence are counted once, as they come.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from scheduler.messages import Request

Placed = list[tuple[int, "Past"]]  # where a row begins in the flat logits, and whose it is


class Past:
    """The tokens of a sequence as penalties count them, its biases, and the stop ids that it may not draw yet.

    Its prompt is there for the repetition penalty alone, but for what an earlier run drew (`Request.resumed_tokens`).
    """

    def __init__(self, request: Request, vocab: int) -> None:
        sampling = request.sampling
        biases = dict(sampling.logit_bias)
        self.biased = np.array(list(biases), dtype=np.int64)
        self.biases = np.array(list(biases.values()), dtype=np.float32)
        self._stop_ids = np.array([token for token in request.stop_ids if token < vocab], dtype=np.int64)
        self._tokens_before_stop = sampling.min_tokens  # still to be drawn
        self.repetition = sampling.repetition_penalty
        self._frequency, self._presence = sampling.frequency_penalty, sampling.presence_penalty
        self._places: dict[int, int] = {}  # token -> where the next two have it
        self._tokens = np.empty(0, dtype=np.int64)
        self._counts = np.empty(0, dtype=np.float32)
        drawn_from = len(request.prompt) - request.resumed_tokens
        if self.repetition != 1.0:
            self._know(request.prompt[:drawn_from])
        self.add(request.prompt[drawn_from:])

    def _know(self, prompt: Sequence[int]) -> None:
        self._tokens = np.unique(np.array(prompt, dtype=np.int64))
        self._counts = np.zeros(len(self._tokens), dtype=np.float32)
        self._places = {token: place for place, token in enumerate(self._tokens.tolist())}

    def add(self, drawn: Iterable[int]) -> None:
        """Tokens that the sequence drew."""
        for token in drawn:
            self._tokens_before_stop -= 1
            place = self._places.setdefault(token, len(self._places))
            if place == len(self._tokens):
                self._tokens = np.append(self._tokens, np.full(place + 64, token))
                self._counts = np.append(self._counts, np.zeros(place + 64, dtype=np.float32))
            self._tokens[place] = token
            self._counts[place] += 1

    @property
    def tokens(self) -> np.ndarray:
        """Every token that a penalty concerns, once."""
        return self._tokens[: len(self._places)]

    @property
    def taken(self) -> np.ndarray:
        """What frequency and presence in the output take from the logit of each of `tokens`."""
        counts = self._counts[: len(self._places)]
        return counts * np.float32(self._frequency) + (counts > 0) * np.float32(self._presence)

    @property
    def banned(self) -> np.ndarray:
        return self._stop_ids if self._tokens_before_stop > 0 else self._stop_ids[:0]


def past_of(request: Request, vocab: int) -> Past | None:
    """None for most requests: nothing of theirs but the logits decides."""
    sampling = request.sampling
    penalties = sampling.repetition_penalty != 1.0, sampling.presence_penalty, sampling.frequency_penalty
    if any(penalties) or sampling.logit_bias or (sampling.min_tokens and request.stop_ids):
        return Past(request, vocab)
    return None


def shaped(logits: Tensor, pasts: Sequence[Past | None]) -> Tensor:
    """A copy of the logits [rows, vocab] in float32, with what the past of each row does to them."""
    logits = logits.clone()
    flat, vocab = logits.view(-1), logits.shape[-1]
    placed = [(row * vocab, past) for row, past in enumerate(pasts) if past is not None]
    _add_biases(flat, placed)
    _ban(flat, placed)
    _penalize(flat, placed)
    return logits


def _add_biases(flat: Tensor, placed: Placed) -> None:
    at = _joined([start + past.biased for start, past in placed], flat.device)
    flat[at] += _joined([past.biases for _, past in placed], flat.device)


def _ban(flat: Tensor, placed: Placed) -> None:
    flat[_joined([start + past.banned for start, past in placed], flat.device)] = -torch.inf


def _penalize(flat: Tensor, placed: Placed) -> None:
    """Repetition scales: what is likely is divided, what is unlikely multiplied. Then frequency and presence are taken."""
    at = _joined([start + past.tokens for start, past in placed], flat.device)
    factors = [np.full(len(past.tokens), past.repetition, dtype=np.float32) for _, past in placed]
    factor, taken = _joined(factors, flat.device), _joined([past.taken for _, past in placed], flat.device)
    before = flat[at]
    flat[at] = torch.where(before > 0, before / factor, before * factor).sub_(taken)


def _joined(columns: Sequence[np.ndarray], device: torch.device) -> Tensor:
    return torch.from_numpy(np.concatenate(columns)).to(device)
