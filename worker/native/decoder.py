"""The forward pass over a flat batch of query tokens, decodes and prefill chunks mixed, in plain torch."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from worker.native.blocks import PagedCache
from worker.native.config import DecoderConfig, Rope
from worker.native.inputs import Read, StepInputs
from worker.native.loader import LayerWeights, Weights


class Decoder:
    """A decoder of the Llama kind. It owns neither cache nor sequences."""

    def __init__(self, config: DecoderConfig, weights: Weights, cache: PagedCache, context_tokens: int) -> None:
        self.config = config
        self.weights = weights
        self.cache = cache
        self.device, self.dtype = weights.norm.device, weights.norm.dtype
        self.rope = rope_table(config.rope, config.head_dim, context_tokens).to(weights.norm)

    def forward(self, inputs: StepInputs) -> Tensor | None:
        """Stores keys and values of all rows; returns the logits of the rows that deliver [outputs, vocab], if any do."""
        x = F.embedding(inputs.tokens, self.weights.embedding)  # [rows, hidden]
        cos, sin = self.rope.index_select(1, inputs.positions).unbind(0)  # [rows, 1, head_dim]
        for index, layer in enumerate(self.weights.layers):
            x += self._attention(index, layer, x, cos, sin, inputs)
            x += self._mlp(layer, x)
        if not inputs.delivering:
            return None
        if inputs.outputs is not None:
            x = x.index_select(0, inputs.outputs)
        return self.weights.head(self._norm(x, self.weights.norm))

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self.config.eps)

    def _attention(
        self, index: int, layer: LayerWeights, x: Tensor, cos: Tensor, sin: Tensor, inputs: StepInputs
    ) -> Tensor:
        heads, kv_heads = self.config.heads, self.config.kv_heads
        qkv = layer.qkv(self._norm(x, layer.attention_norm))
        qkv = qkv.view(len(x), -1, self.config.head_dim)  # [rows, heads + 2 * kv_heads, head_dim]
        qk = qkv[:, : heads + kv_heads]
        if layer.qk_norm is not None:
            qk.copy_(F.rms_norm(qk, qk.shape[-1:], eps=self.config.eps).mul_(layer.qk_norm))
        rotate_(qk, cos, sin)
        self.cache.slots[index].index_copy_(0, inputs.slots, qkv[:, heads:])
        pages = self.cache.layers[index]
        parts = [attend(qkv[read.start : read.stop, :heads], pages, read) for read in inputs.reads]
        attended = parts[0] if len(parts) == 1 else torch.cat(parts)  # [rows, heads * head_dim]
        return layer.o(attended)

    def _mlp(self, layer: LayerWeights, x: Tensor) -> Tensor:
        gate, up = layer.gate_up(self._norm(x, layer.mlp_norm)).chunk(2, -1)
        return layer.down(F.silu(gate).mul_(up))


def attend(q: Tensor, pages: Tensor, read: Read) -> Tensor:
    """Attention of q [rows, heads, head_dim] over the pages [num_blocks, block, 2 * kv_heads, head_dim] of one read.

    The query heads that share a KV head become, for single tokens, the rows of one product with its keys, and for a
    chunk a batch over the same keys, so that keys and values are never repeated in memory.
    """
    rows, _, head_dim = q.shape
    kv = pages.index_select(0, read.blocks).view(read.sequences, -1, pages.shape[2], head_dim)
    k, v = kv[:, : read.context].transpose(1, 2).chunk(2, 1)  # [sequences, kv_heads, context, head_dim]
    kv_heads = k.shape[1]
    q = q.view(rows, kv_heads, -1, head_dim)
    if rows == read.sequences:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=read.mask).reshape(rows, -1)
    q = q.permute(2, 1, 0, 3)  # [heads / kv_heads, kv_heads, rows, head_dim]
    k, v = k.expand(len(q), -1, -1, -1), v.expand(len(q), -1, -1, -1)
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=read.mask, is_causal=read.causal)
    return attended.permute(2, 1, 0, 3).reshape(rows, -1)


def rotate_(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """RoPE in place on x [rows, heads, head_dim], the halves of a head as the parts of its complex numbers."""
    turned = x.roll(x.shape[-1] // 2, -1)  # the halves swapped; the sign is in `sin`
    x.mul_(cos).addcmul_(turned, sin)


def rope_table(rope: Rope, head_dim: int, positions: int) -> Tensor:
    """Cosines, and sines with the sign that `rotate_` needs, per position: [2, positions, 1, head_dim] in float32."""
    angles = torch.arange(positions)[:, None].float() * rope_frequencies(rope, head_dim)
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)))[:, :, None]


def rope_frequencies(rope: Rope, head_dim: int) -> Tensor:
    """Radians per position for each pair of dimensions: [head_dim / 2]."""
    frequencies = rope.theta ** -(torch.arange(0, head_dim, 2).float() / head_dim)
    if rope.kind == "default":
        return frequencies
    if rope.kind == "linear":
        return frequencies / rope.factor
    turns = rope.original_max_positions * frequencies / (2 * math.pi)  # over the context it was trained on
    keep = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
    return keep * frequencies + (1 - keep) * frequencies / rope.factor
