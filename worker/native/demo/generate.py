"""Text in the demo model's own words, many rows at once: what its draft-sized sibling is trained on."""

from collections.abc import Container, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from worker.native.demo.model import Attention, Layer, Llama, rotate

_TEMPERATURES = (0.3, 0.6, 1.0)  # taken in turn by the rows


class CachedModel:
    """A model with the keys and values of the rows it is writing."""

    def __init__(self, model: Llama, rows: int, tokens: int) -> None:
        shape = model.shape
        self.model = model
        weight = model.model.embed_tokens.weight
        self.cache = weight.new_zeros(shape.layers, 2, rows, shape.kv_heads, tokens, shape.head_dim)

    def __call__(self, ids: Tensor, start: int) -> Tensor:
        """Logits after the last of `ids`, which stand from position `start` on: [rows, vocab]."""
        decoder = self.model.model
        x = decoder.embed_tokens(ids)
        for layer, cache in zip(decoder.layers, self.cache, strict=True):
            assert isinstance(layer, Layer)
            x = x + self._attend(layer.self_attn, layer.input_layernorm(x), cache, start)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return F.linear(decoder.norm(x[:, -1]), decoder.embed_tokens.weight)

    def _attend(self, attention: Attention, x: Tensor, cache: Tensor, start: int) -> Tensor:
        rows, tokens, _ = x.shape
        split, end = (rows, tokens, -1, attention.shape.head_dim), start + tokens
        cos, sin = self.model.model.cos[start:end], self.model.model.sin[start:end]
        q = rotate(attention.q_proj(x).view(split).transpose(1, 2), cos, sin)  # [rows, heads, tokens, head_dim]
        cache[0, :, :, start:end] = rotate(attention.k_proj(x).view(split).transpose(1, 2), cos, sin)
        cache[1, :, :, start:end] = attention.v_proj(x).view(split).transpose(1, 2)
        k, v = cache[:, :, :, :end]
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=tokens > 1, enable_gqa=True)
        return attention.o_proj(mixed.transpose(1, 2).reshape(rows, tokens, -1))


@torch.no_grad()
def write_rows(model: Llama, beginnings: Tensor, tokens: int, seed: int) -> Tensor:
    """The beginnings, continued by the model to `tokens` each: [rows, tokens].

    Rows are sampled at different temperatures. Where an answer ends the model goes on with the next question, as it
    saw in training, so every row is full.
    """
    rows, given = beginnings.shape
    cached = CachedModel(model, rows, tokens)
    temperature = torch.tensor(_TEMPERATURES).repeat(rows)[:rows].unsqueeze(1)
    noise = torch.Generator().manual_seed(seed)
    ids = torch.cat((beginnings, beginnings.new_zeros(rows, tokens - given)), dim=1)
    logits = cached(beginnings, 0)
    for position in range(given, tokens):
        gumbel = -torch.empty_like(logits, dtype=torch.float32).exponential_(generator=noise).log()
        ids[:, position] = (logits.float() / temperature + gumbel).argmax(-1)
        logits = cached(ids[:, position : position + 1], position)
    return ids


@torch.no_grad()
def answer(model: Llama, prompt: Sequence[int], ends: Container[int], tokens: int) -> list[int]:
    """The most likely continuation, token by token, up to `tokens` or before an end token."""
    cached = CachedModel(model, rows=1, tokens=len(prompt) + tokens)
    written: list[int] = []
    logits = cached(torch.tensor([prompt]), 0)
    while len(written) < tokens and (best := int(logits.argmax())) not in ends:
        written.append(best)
        logits = cached(torch.tensor([[best]]), len(prompt) + len(written) - 1)
    return written
