"""How surprised a model is by a text, and what its matrices are multiplied with meanwhile."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from worker.native.blocks import BLOCK_TOKENS, BlockTable, PagedCache, blocks_for
from worker.native.config import DecoderConfig
from worker.native.decoder import Decoder
from worker.native.inputs import Span, build_inputs
from worker.native.linear import Linear
from worker.native.loader import MATRICES, LayerWeights, Weights

ROW_TOKENS = 512
LOGITS_AT_ONCE = 64  # rows of them: 40 MB for a vocabulary of 150,000
Progress = Callable[[int, int], None]


def rows_of(tokens: Sequence[int], row_tokens: int = ROW_TOKENS) -> list[list[int]]:
    """The tokens in rows that the model sees one by one; a last one of a single token would say nothing."""
    rows = [list(tokens[at : at + row_tokens]) for at in range(0, len(tokens), row_tokens)]
    return [row for row in rows if len(row) > 1]


@torch.inference_mode()
def perplexity(
    config: DecoderConfig,
    weights: Weights,
    rows: Sequence[Sequence[int]],
    progress: Progress = lambda done, total: None,
) -> float:
    """e to the mean surprise of each row's tokens from the second on, in nats."""
    nats, tokens = 0.0, 0
    decoder = _decoder(config, weights, max(map(len, rows)))
    for row in rows:
        hidden = _forward(decoder, row)
        for at in range(0, len(row) - 1, LOGITS_AT_ONCE):
            following = torch.tensor(row[at + 1 : at + 1 + LOGITS_AT_ONCE], device=decoder.device)
            logits = decoder.logits(hidden[at : at + len(following)]).float()
            nats += float(torch.nn.functional.cross_entropy(logits, following, reduction="sum"))
        tokens += len(row) - 1
        progress(tokens, sum(map(len, rows)) - len(rows))
    return math.exp(nats / tokens)


@torch.inference_mode()
def column_importance(config: DecoderConfig, weights: Weights, rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """By module, the mean square of each number that its matrix is multiplied with: [columns]."""
    listening = [_listening(layer) for layer in weights.layers]
    decoder = _decoder(config, replace(weights, layers=tuple(layer for layer, _ in listening)), max(map(len, rows)))
    for row in rows:
        _forward(decoder, row)
    return {
        f"model.layers.{index}.{module}": heard[name].mean()
        for index, (_, heard) in enumerate(listening)
        for name, modules in MATRICES.items()
        for module in modules
    }


@dataclass(slots=True)
class _Listener:
    """A matrix that notes what it is multiplied with."""

    linear: Linear
    squares: Tensor | None = None
    rows: int = field(default=0)

    def __call__(self, x: Tensor) -> Tensor:
        squares = x.float().square().sum(0)
        self.squares = squares if self.squares is None else self.squares + squares
        self.rows += len(x)
        return self.linear(x)

    def tensors(self) -> list[Tensor]:
        return self.linear.tensors()

    def mean(self) -> Tensor:
        assert self.squares is not None
        return self.squares.cpu() / self.rows


def _listening(layer: LayerWeights) -> tuple[LayerWeights, dict[str, _Listener]]:
    heard = {name: _Listener(getattr(layer, name)) for name in MATRICES}
    return replace(layer, **heard), heard  # type: ignore[arg-type]


def _decoder(config: DecoderConfig, weights: Weights, tokens: int) -> Decoder:
    device, dtype = weights.norm.device, weights.norm.dtype
    per_token = 2 * config.kv_heads * config.head_dim * dtype.itemsize * config.layers
    cache = PagedCache(config, blocks_for(tokens) * BLOCK_TOKENS * per_token, device, dtype)
    return Decoder(config, weights, cache)


def _forward(decoder: Decoder, row: Sequence[int]) -> Tensor:
    """What the last layer makes of a row that stands alone."""
    table = BlockTable()
    decoder.cache.grow(table, len(row))
    decoder.cache.clear_new()
    inputs = build_inputs(
        [Span(table, 0, row, delivers=False)], decoder.device, decoder.dtype, len(row), decoder.windows
    )
    hidden = decoder.forward(inputs)
    decoder.cache.truncate(table, 0)
    return hidden
