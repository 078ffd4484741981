"""What a decoder looks like: sizes and switches, read from a checkpoint's `config.json`.

A family is one entry of `FAMILIES`. What checkpoints of a family vary among themselves is in their config; what they all
share, and what differs from Llama, is in the entry.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Family:
    """How the models of one architecture differ from plain Llama."""

    qk_norm: bool = False  # an RMS norm over each head of q and k, before RoPE
    head_dim: int | None = None  # where the config names none; None: hidden / heads
    mlp_bias: bool = True  # the config may ask for biases in the MLP


FAMILIES = {
    "LlamaForCausalLM": Family(),
    "Qwen3ForCausalLM": Family(qk_norm=True, head_dim=128, mlp_bias=False),
}


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary positions. `factor` and what follows only matter to the kinds that scale.

    Kinds: default; linear (positions / factor); llama3 (long wavelengths / factor, short ones kept, those between
    blended; source: the Llama 3.1 release, as in transformers `modeling_rope_utils.py`).
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """Sizes and switches of a decoder-only model."""

    architecture: str
    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    eps: float
    rope: Rope
    max_positions: int
    tied_head: bool
    qk_norm: bool
    attention_bias: bool  # biases of q, k, v and o
    mlp_bias: bool

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> DecoderConfig:
        """Reads a `config.json`. Raises ValueError, naming the field, for what this engine cannot run."""
        architecture = _architecture(config)
        family = FAMILIES[architecture]
        _check_supported(config)
        try:
            heads = int(config["num_attention_heads"])
            hidden = int(config["hidden_size"])
            result = cls(
                architecture=architecture,
                vocab=int(config["vocab_size"]),
                hidden=hidden,
                layers=int(config["num_hidden_layers"]),
                heads=heads,
                kv_heads=int(config.get("num_key_value_heads") or heads),
                head_dim=int(config.get("head_dim") or family.head_dim or hidden // heads),
                intermediate=int(config["intermediate_size"]),
                eps=float(config.get("rms_norm_eps", 1e-6)),
                rope=_rope(config),
                max_positions=int(config.get("max_position_embeddings", 2048)),
                tied_head=bool(config.get("tie_word_embeddings", False)),
                qk_norm=family.qk_norm,
                attention_bias=bool(config.get("attention_bias", False)),
                mlp_bias=family.mlp_bias and bool(config.get("mlp_bias", False)),
            )
        except KeyError as error:
            raise ValueError(f"config.json has no {error.args[0]}") from error
        if result.heads % result.kv_heads or result.head_dim % 2:
            raise ValueError(
                f"{result.heads} heads over {result.kv_heads} KV heads of {result.head_dim}: "
                "heads must be a multiple of KV heads, and the head dimension even"
            )
        return result


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures") or []
    for name in names:
        if name in FAMILIES:
            return str(name)
    raise ValueError(f"unknown architecture {', '.join(names) or '(none named)'}; known: {', '.join(FAMILIES)}")


def _check_supported(config: Mapping[str, Any]) -> None:
    """A setting that is read past would give wrong tokens in silence."""
    if config.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act {config['hidden_act']}: only silu is supported")
    if config.get("quantization_config"):
        raise ValueError("quantized checkpoints are not supported")
    if config.get("use_sliding_window") or "sliding_attention" in (config.get("layer_types") or ()):
        raise ValueError("sliding-window attention is not supported")


def _rope(config: Mapping[str, Any]) -> Rope:
    """transformers 5 writes all of it into `rope_parameters`; before, it was `rope_theta` and `rope_scaling`."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in ("default", "linear", "llama3"):
        raise ValueError(f"RoPE of type {kind!r} is not supported; known: default, linear, llama3")
    if float(scaling.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0) != 1.0:
        raise ValueError("partial rotary positions are not supported")
    return Rope(
        theta=float(scaling.get("rope_theta") or config.get("rope_theta") or 10000.0),
        kind=kind,
        factor=float(scaling.get("factor", 1.0)),
        low_freq_factor=float(scaling.get("low_freq_factor", 1.0)),
        high_freq_factor=float(scaling.get("high_freq_factor", 4.0)),
        original_max_positions=int(scaling.get("original_max_position_embeddings", 8192)),
    )
