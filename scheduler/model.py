"""The shape of a model, as far as bytes and operations go: what a step reads, computes and keeps."""

from __future__ import annotations

from dataclasses import dataclass

# Of a weight. In the formats of few bits, groups of 32 share a scale of 2 bytes.
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "int8": 1.0625, "int4": 0.5625}


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Layers that keep the same kind of KV: `window` 0 is full attention, otherwise at most `window` tokens are kept."""

    layers: int
    window: int = 0


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A decoder's sizes. Mixture-of-experts models set `experts`; dense ones leave it 0."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int  # of one expert, where there are experts
    vocabulary: int
    context_tokens: int
    weight_bytes_each: float = 2.0
    kv_bytes_each: float = 2.0
    tied_head: bool = False
    experts: int = 0
    experts_per_token: int = 0
    groups: tuple[LayerGroup, ...] = ()

    @property
    def layer_groups(self) -> tuple[LayerGroup, ...]:
        return self.groups or (LayerGroup(self.layers),)

    # --- parameters ---------------------------------------------------------------------------------------------------

    @property
    def attention_parameters(self) -> int:
        """Of one layer: q, k, v and o."""
        return self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)

    @property
    def mlp_parameters(self) -> int:
        """Of one layer's MLP, or of one expert: gate, up and down."""
        return 3 * self.hidden * self.intermediate

    @property
    def head_parameters(self) -> int:
        return self.hidden * self.vocabulary

    @property
    def parameters(self) -> int:
        mlp = self.mlp_parameters * max(1, self.experts)
        embeddings = self.head_parameters * (1 if self.tied_head else 2)
        return self.layers * (self.attention_parameters + mlp) + embeddings

    @property
    def resident_bytes(self) -> float:
        return self.parameters * self.weight_bytes_each

    def weight_bytes(self, tokens: int) -> float:
        """Weights that a step over `tokens` tokens reads: everything but the input embedding.

        An MoE layer reads U = E·(1 − (1 − k/E)^T) experts: the expected number of distinct ones under uniform routing.
        """
        experts = 1.0
        if self.experts:
            share = self.experts_per_token / self.experts
            experts = self.experts * (1 - (1 - share) ** tokens)
        per_layer = self.attention_parameters + self.mlp_parameters * experts
        return (self.layers * per_layer + self.head_parameters) * self.weight_bytes_each

    def matmul_flops(self, tokens: int, sampled: int) -> float:
        """2 operations per active parameter and token; the head only where logits are wanted."""
        active = self.attention_parameters + self.mlp_parameters * max(1, self.experts_per_token)
        return 2.0 * (self.layers * active * tokens + self.head_parameters * sampled)

    def attention_flops(self, query_tokens: int, position: int) -> float:
        """Scores and weighted sum of a chunk that starts at `position`: 4·h_q·layers·c·(x + c/2), less beyond a window."""
        pairs = 0.0  # of a query and a token it looks at, over all layers
        for group in self.layer_groups:
            rising = query_tokens if not group.window else min(query_tokens, max(0, group.window - position))
            pairs += group.layers * (rising * (position + rising / 2) + (query_tokens - rising) * group.window)
        return 4.0 * self.heads * self.head_dim * pairs

    def decode_attention_flops(self, kv_bytes: float) -> float:
        """Of sequences that compute one token each and read `kv_bytes` of KV cache in all."""
        return 4.0 * self.heads * self.head_dim * kv_bytes / self.kv_bytes_per_layer_token

    # --- KV cache -----------------------------------------------------------------------------------------------------

    @property
    def kv_bytes_per_layer_token(self) -> float:
        return 2 * self.kv_heads * self.head_dim * self.kv_bytes_each

    def kv_bytes(self, tokens: int) -> float:
        """KV cache of a sequence of `tokens` tokens, over all layers; what a decode step reads of it, too."""
        if not self.groups:
            return self.layers * self.kv_bytes_per_layer_token * tokens
        return self.kv_bytes_per_layer_token * sum(
            group.layers * (min(tokens, group.window) if group.window else tokens) for group in self.groups
        )

    def kv_bytes_of_all(self, contexts: list[int]) -> float:
        """KV cache of several sequences; one multiplication where every layer keeps everything."""
        if not self.groups:
            return self.layers * self.kv_bytes_per_layer_token * sum(contexts)
        return sum(self.kv_bytes(tokens) for tokens in contexts)

    @property
    def phases(self) -> int:
        """Kernel phases of a step: five fused ones a layer, and embedding, norm, head."""
        return 5 * self.layers + 3


SHAPES: dict[str, ModelShape] = {
    shape.name: shape
    for shape in (
        ModelShape("smollm2-135m", 30, 576, 9, 3, 64, 1536, 49152, 8192, tied_head=True),
        ModelShape("qwen3-0.6b", 28, 1024, 16, 8, 128, 3072, 151936, 40960, tied_head=True),
        ModelShape("llama-3.2-1b", 16, 2048, 32, 8, 64, 8192, 128256, 131072, tied_head=True),
        ModelShape("llama-3.1-8b", 32, 4096, 32, 8, 128, 14336, 128256, 131072),
        ModelShape("qwen3-8b", 36, 4096, 32, 8, 128, 12288, 151936, 40960),
        ModelShape("llama-3.1-70b", 80, 8192, 64, 8, 128, 28672, 128256, 131072),
        ModelShape("qwen3-30b-a3b", 48, 2048, 32, 4, 128, 768, 151936, 40960, experts=128, experts_per_token=8),
    )
}
