"""The forward pass over a flat batch of query tokens, decodes and prefill chunks mixed, in plain torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from worker.native.blocks import BLOCK_TOKENS, PagedCache
from worker.native.config import DecoderConfig, Rope
from worker.native.inputs import Read, Span, StepInputs, build_inputs
from worker.native.loader import LayerWeights, Weights

# What one call of attention gathers: on a CPU about what a second-level cache holds, so that it is read from there.
GATHER_BYTES = {"cpu": 1 << 20, "cuda": 256 << 20}
BY_HAND_TOKENS = 1024
TILE_ROWS = 128
TILE_SCORES = 16 << 20  # that exist at a time


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a step has computed. With logits or the best tokens, one row each, for the spans that deliver."""

    delivering: tuple[int, ...]  # spans, as given, in the order of the rows
    logits: Tensor | None  # [outputs, vocab]; None: nobody delivers, or only the best were wanted
    best: list[int] | None
    hidden: Tensor  # [rows, hidden], what the last layer made of them
    told: tuple[tuple[int, int], ...]  # spans, as given, with `is_told`, and the row where each begins


class Decoder:
    """A decoder of the Llama kind. It owns neither cache nor sequences."""

    def __init__(self, config: DecoderConfig, weights: Weights, cache: PagedCache) -> None:
        self.config = config
        self.weights = weights
        self.cache = cache
        self.device, self.dtype = weights.norm.device, weights.norm.dtype
        self.context_tokens = context_of(config, cache)
        self.rope = rope_table(config.rope, config.head_dim, self.context_tokens).to(weights.norm)
        self.windows = tuple(dict.fromkeys(config.windows))
        self.dtype_name = str(self.dtype).removeprefix("torch.")
        self._group_tokens = GATHER_BYTES[self.device.type] * BLOCK_TOKENS * config.layers // cache.block_bytes

    @property
    def threads(self) -> int:
        return torch.get_num_threads()

    def set_threads(self, threads: int) -> None:
        torch.set_num_threads(threads)

    def run(self, spans: Sequence[Span], needs_logits: bool = True) -> Outcome:
        """Stores keys and values of all tokens. Logits come whether they are needed or not."""
        inputs = build_inputs(spans, self.device, self.dtype, self._group_tokens, self.windows)
        hidden = self.forward(inputs)
        return Outcome(inputs.delivering, self.outputs(hidden, inputs), None, hidden, inputs.told)

    def forward(self, inputs: StepInputs) -> Tensor:
        """Stores keys and values of all rows; returns what its last layer makes of them [rows, hidden]."""
        x = F.embedding(inputs.tokens, self.weights.embedding)  # [rows, hidden]
        cos, sin = self.rope.index_select(1, inputs.positions).unbind(0)  # [rows, 1, head_dim]
        for index, layer in enumerate(self.weights.layers):
            x += self._attention(index, layer, x, cos, sin, inputs)
            x += self._mlp(layer, x)
        return x

    def outputs(self, x: Tensor, inputs: StepInputs) -> Tensor | None:
        """Logits [outputs, vocab] of the rows that deliver, if any do."""
        if not inputs.delivering:
            return None
        return self.logits(x if inputs.outputs is None else x.index_select(0, inputs.outputs))

    def logits(self, x: Tensor) -> Tensor:
        return self.weights.head(self._norm(x, self.weights.norm))  # [rows, vocab]

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        # Several operations inside, but by hand they are no faster: in bfloat16 0.10 ms either way for 512 rows of 576
        # (ten times that where each call gets fresh pages, as in a loop of nothing else), for one row 13 µs, not 17.
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
        if self.config.rotated[index]:
            rotate_(qk, cos, sin)
        self.cache.slots[index].index_copy_(1, inputs.slots, qkv[:, heads:].transpose(0, 1))
        pages, reads = self.cache.layers[index], inputs.reads[self.config.windows[index]]
        parts = [attend(qkv[read.start : read.stop, :heads], pages, read) for read in reads]
        attended = parts[0] if len(parts) == 1 else torch.cat(parts)  # [rows, heads * head_dim]
        return layer.o(attended)

    def _mlp(self, layer: LayerWeights, x: Tensor) -> Tensor:
        gate, up = layer.gate_up(self._norm(x, layer.mlp_norm)).chunk(2, -1)
        return layer.down(F.silu(gate).mul_(up))


def context_of(config: DecoderConfig, cache: PagedCache) -> int:
    """The longest that a sequence can get."""
    return min(config.max_positions, cache.num_blocks * BLOCK_TOKENS)


def attend(q: Tensor, pages: Tensor, read: Read) -> Tensor:
    """Attention of q [rows, heads, head_dim] over the pages [2 * kv_heads, num_blocks, block, head_dim] of one read.

    The query heads that share a KV head become, for single tokens, the rows of one product with its keys, and for a
    chunk a batch over the same keys, so that keys and values are never repeated in memory.
    """
    rows, _, head_dim = q.shape
    found = pages[:, slice(*read.run)] if read.run else pages.index_select(1, read.blocks)
    kv = found.view(len(pages), read.sequences, -1, head_dim)  # whole blocks
    kv_heads = len(pages) // 2
    q = q.view(rows, kv_heads, -1, head_dim)
    if rows == 1 and read.mask is None and is_better_by_hand(kv):
        k, v = kv[:, 0].chunk(2)
        return attend_alone(q[0], k, v, read.context).view(1, -1)
    k, v = kv[:, :, : read.context].transpose(0, 1).chunk(2, 1)  # [sequences, kv_heads, context, head_dim]
    if rows == read.sequences:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=read.mask).reshape(rows, -1)
    if read.tiled and read.mask is not None:
        return attend_tiled(q, k[0], v[0], read.mask)
    q = q.permute(2, 1, 0, 3)  # [heads / kv_heads, kv_heads, rows, head_dim]
    k, v = k.expand(len(q), -1, -1, -1), v.expand(len(q), -1, -1, -1)
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=read.mask, is_causal=read.causal)
    return attended.permute(2, 1, 0, 3).reshape(rows, -1)


def is_better_by_hand(kv: Tensor) -> bool:
    """Over a long context torch's fused attention of bfloat16 on a CPU computes for longer than it reads.

    4,096 tokens, 3 KV heads of 64, 2 threads: 0.52 ms fused, 0.28 by hand; about equal at 1,024.
    """
    return kv.device.type == "cpu" and kv.dtype == torch.bfloat16 and kv.shape[2] > BY_HAND_TOKENS


def attend_alone(q: Tensor, k: Tensor, v: Tensor, context: int) -> Tensor:
    """One token's attention: q [kv_heads, heads / kv_heads, head_dim] over k and v [kv_heads, slots, head_dim].

    oneDNN's product is three times as fast with the keys on its left. It makes a kernel for each new size, so the slots
    are whole blocks, of which those from `context` on do not count; and it reads what is in one piece only.
    """
    scores = torch.bmm(k.contiguous(), (q * k.shape[-1] ** -0.5).transpose(1, 2)).transpose(1, 2).contiguous()
    scores.narrow(2, context, scores.shape[2] - context).fill_(-torch.inf)
    return torch.bmm(scores.softmax(-1), v.contiguous())


def attend_tiled(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """A chunk's attention: q [rows, kv_heads, heads / kv_heads, head_dim] over k and v [kv_heads, context, head_dim].

    oneDNN's products of bfloat16 beat torch's fused attention, although the scores go through memory. For the heads of
    SmolLM2-135M and 2 threads, in ms: 2.1 instead of 4.2 for 512 rows from position 0 on, 31 instead of 41 for 512 rows
    of 4,096 tokens, 0.45 instead of 0.62 for 64 rows of 512. A tile leaves out what none of its rows sees.
    """
    rows, kv_heads, shared, head_dim = q.shape
    context = k.shape[1]
    q = (q * head_dim**-0.5).permute(1, 2, 0, 3)  # [kv_heads, shared, rows, head_dim]
    attended = torch.empty_like(q)
    step = max(16, min(TILE_ROWS, TILE_SCORES // (kv_heads * shared * context)))
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        seen = context - rows + stop
        scores = torch.bmm(q[:, :, start:stop].flatten(1, 2), k[:, :seen].transpose(1, 2))
        scores = scores.view(kv_heads, shared, -1, seen).add_(mask[start:stop, :seen]).softmax(-1)
        attended[:, :, start:stop] = torch.bmm(scores.flatten(1, 2), v[:, :seen]).view(kv_heads, shared, -1, head_dim)
    return attended.permute(2, 0, 1, 3).reshape(rows, -1)


def rotate_(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """RoPE in place on x [rows, heads, head_dim], the halves of a head as the parts of its complex numbers."""
    turned = x.roll(x.shape[-1] // 2, -1)  # the halves swapped; the sign is in `sin`
    x.mul_(cos).addcmul_(turned, sin)


def rope_table(rope: Rope, head_dim: int, positions: int) -> Tensor:
    """Cosines, and sines with the sign that `rotate_` needs, per position: [2, positions, 1, head_dim] in float32."""
    angles = torch.arange(positions)[:, None].float() * rope_frequencies(rope, head_dim)
    cos, sin = angles.cos() * rope.length, angles.sin() * rope.length
    return torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)))[:, :, None]


def rope_frequencies(rope: Rope, head_dim: int) -> Tensor:
    """Radians per position for each pair of dimensions: [head_dim / 2]."""
    frequencies = rope.theta ** -(torch.arange(0, head_dim, 2).float() / head_dim)
    if rope.kind == "default":
        return frequencies
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "divided":
        return frequencies / torch.tensor(rope.divisors)
    keep = _yarn_share(rope, head_dim) if rope.kind == "yarn" else _llama3_share(rope, frequencies)
    return keep * frequencies + (1 - keep) * frequencies / rope.factor


def _llama3_share(rope: Rope, frequencies: Tensor) -> Tensor:
    """How much of each frequency is kept: all of those with many turns over the context the model was trained on."""
    turns = rope.original_max_positions * frequencies / (2 * math.pi)
    return ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)


def _yarn_share(rope: Rope, head_dim: int) -> Tensor:
    """The same, falling from 1 to 0 between the dimensions with `fast_turns` and with `slow_turns` turns."""

    def dimension(turns: float) -> float:
        wavelength = rope.original_max_positions / turns
        return head_dim * math.log(wavelength / (2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.fast_turns), dimension(rope.slow_turns)
    if rope.whole_dimensions:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low or 0.001
    return 1 - ((torch.arange(head_dim // 2) - low) / width).clamp(0, 1)
