"""What a decoder looks like: sizes and switches, read from a checkpoint's `config.json`.

A family is one entry of `FAMILIES`. What checkpoints of a family vary among themselves is in their config; what they all
share, and what differs from Llama, is in the entry. Where a config leaves a field out, the family's own default in
transformers holds, because checkpoints are saved without the fields that are at their default.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from scheduler.model import DTYPE_BYTES, ModelShape
from worker.native.quantization import read_quantization

MOST_LAYERS = 4096  # more is a typing error, and would cost memory before anything else is looked at
MOST = 2**31 - 1  # of any other size


class Windows(Enum):
    """Which layers look back no further than `sliding_window` tokens, where the config does not list the layers itself."""

    NONE = "none"
    ALL = "all, whenever a window is given"
    LATE = "those from max_window_layers on, with use_sliding_window"
    UNROTATED = "those without rotary positions, with use_sliding_window"


@dataclass(frozen=True, slots=True)
class Family:
    """How the models of one architecture differ from plain Llama."""

    qk_norm: bool = False  # an RMS norm over each head of q and k, before RoPE
    head_dim: int | None = None  # where the config names none; None: hidden / heads
    attention_biases: tuple[bool, bool] | None = None  # of q, k, v and of o; None: both as attention_bias says
    mlp_bias: bool = True  # the config may ask for biases in the MLP
    windows: Windows = Windows.NONE
    default_window: int | None = None  # where the config does not say
    unrotated_every: int | None = None  # layers n, 2n, … have no rotary positions unless the config says otherwise
    rope_theta: float = 10000.0
    max_positions: int = 32768
    tied_head: bool = False


FAMILIES = {
    "LlamaForCausalLM": Family(max_positions=2048),  # SmolLM and SmolLM2 are Llamas, too
    "MistralForCausalLM": Family(
        attention_biases=(False, False),
        mlp_bias=False,
        windows=Windows.ALL,
        default_window=4096,
        max_positions=131072,
    ),
    "Qwen2ForCausalLM": Family(
        attention_biases=(True, False), mlp_bias=False, windows=Windows.LATE, default_window=4096
    ),
    "Qwen3ForCausalLM": Family(qk_norm=True, head_dim=128, mlp_bias=False, windows=Windows.LATE, default_window=4096),
    "SmolLM3ForCausalLM": Family(windows=Windows.UNROTATED, unrotated_every=4, rope_theta=2000000.0, tied_head=True),
}
KV_DTYPES = {"int8": "bfloat16", "int4": "bfloat16"}  # of keys and values, where the weights have another format
ROPE_KINDS = ("default", "linear", "llama3", "yarn", "divided")


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary positions. `factor` and what follows only matter to the kinds that scale.

    Kinds: default; linear (positions / factor); llama3 (long wavelengths / factor, short ones kept, those between
    blended by wavelength; source: the Llama 3.1 release); yarn (the same idea, blended by dimension, and the attention
    sharpened through longer vectors; source: arXiv 2309.00071). Both as in transformers `modeling_rope_utils.py`.
    divided (each frequency by a number of its own: how GGUF files say llama3).
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    original_max_positions: int = 8192
    low_freq_factor: float = 1.0  # llama3: what turns more often than this over the original context is blended …
    high_freq_factor: float = 4.0  # … and more often than this, kept
    slow_turns: float = 1.0  # the same two of yarn: beta_slow …
    fast_turns: float = 32.0  # … and beta_fast
    whole_dimensions: bool = True  # yarn: the two limits rounded outwards
    length: float = 1.0  # of the rotated vectors: yarn's attention factor
    divisors: tuple[float, ...] = ()  # divided: one per pair of dimensions

    @property
    def stretched_positions(self) -> int:
        """The context that yarn's factor makes of the original one, for configs that name nothing but the factor."""
        return int(self.factor * self.original_max_positions) if self.kind == "yarn" else 0


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
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    rotated: tuple[bool, ...]  # per layer: whether q and k get rotary positions
    windows: tuple[int, ...]  # per layer: how many tokens a token sees, itself included; 0: all before it

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> DecoderConfig:
        """Reads a `config.json`. Raises ValueError, naming the field, for what this engine cannot run."""
        architecture = _architecture(config)
        family = FAMILIES[architecture]
        _check_supported(config, family)
        hidden, heads = _count(config, "hidden_size"), _count(config, "num_attention_heads")
        layers = _count(config, "num_hidden_layers", most=MOST_LAYERS)
        rotated = _rotated(config, family, layers)
        rope = _rope(config, family)
        bias = _flag(config, "attention_bias", False)
        result = cls(
            architecture=architecture,
            vocab=_count(config, "vocab_size"),
            hidden=hidden,
            layers=layers,
            heads=heads,
            kv_heads=_count(config, "num_key_value_heads", heads),
            head_dim=_head_dim(config, family, hidden, heads),
            intermediate=_count(config, "intermediate_size"),
            eps=_number(config, "rms_norm_eps", 1e-6),
            rope=rope,
            max_positions=max(
                _count(config, "max_position_embeddings", family.max_positions), rope.stretched_positions
            ),
            tied_head=_flag(config, "tie_word_embeddings", family.tied_head),
            qk_norm=family.qk_norm,
            qkv_bias=family.attention_biases[0] if family.attention_biases else bias,
            o_bias=family.attention_biases[1] if family.attention_biases else bias,
            mlp_bias=family.mlp_bias and _flag(config, "mlp_bias", False),
            rotated=rotated,
            windows=_windows(config, family, rotated),
        )
        result._check_heads()
        return result

    def model_shape(self, name: str, dtype: str) -> ModelShape:
        """For the cost model. All layers keep all keys and values, whatever they see of them."""
        return ModelShape(
            name=name,
            layers=self.layers,
            hidden=self.hidden,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            intermediate=self.intermediate,
            vocabulary=self.vocab,
            context_tokens=self.max_positions,
            weight_bytes_each=DTYPE_BYTES[dtype],
            kv_bytes_each=DTYPE_BYTES[KV_DTYPES.get(dtype, dtype)],
            tied_head=self.tied_head,
        )

    def _check_heads(self) -> None:
        if self.heads % self.kv_heads or self.head_dim % 2:
            raise ValueError(
                f"config.json: {self.heads} heads over {self.kv_heads} KV heads of {self.head_dim}: "
                "heads must be a multiple of KV heads, and the head dimension even"
            )
        if self.rope.divisors and len(self.rope.divisors) != self.head_dim // 2:
            raise ValueError(
                f"config.json: {len(self.rope.divisors)} divisors of RoPE's frequencies, but {self.head_dim // 2} are "
                "needed: one per pair of a head's dimensions"
            )


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures") or []
    if not isinstance(names, list):
        raise ValueError(f"config.json: architectures is {names!r}, not a list of names")
    for name in names:
        if isinstance(name, str) and name in FAMILIES:
            return name
    found = ", ".join(map(str, names)) or "(none named)"
    raise ValueError(f"unknown architecture {found}; known: {', '.join(FAMILIES)}")


def _check_supported(config: Mapping[str, Any], family: Family) -> None:
    """A setting that is read past would give wrong tokens in silence."""
    if (activation := config.get("hidden_act", "silu")) != "silu":
        raise ValueError(f"config.json: hidden_act {activation!r}: only silu is supported")
    if config.get("per_layer_config"):
        raise ValueError("config.json: per_layer_config is set; uneven checkpoints are not supported")
    read_quantization(config)  # refuses by name what cannot be read
    unrotated = config.get("no_rope_layers")
    if family.unrotated_every is None and unrotated and not (isinstance(unrotated, list) and all(unrotated)):
        raise ValueError("config.json: no_rope_layers: this architecture rotates positions in all layers")


def _head_dim(config: Mapping[str, Any], family: Family, hidden: int, heads: int) -> int:
    if config.get("head_dim") is None and family.head_dim is None and hidden % heads:
        raise ValueError(f"config.json: hidden_size {hidden} is no multiple of {heads} num_attention_heads")
    return _count(config, "head_dim", family.head_dim or hidden // heads)


# --- layers -----------------------------------------------------------------------------------------------------------


def _rotated(config: Mapping[str, Any], family: Family, layers: int) -> tuple[bool, ...]:
    if family.unrotated_every is None:
        return (True,) * layers
    listed = config.get("no_rope_layers")  # in spite of its name, 1 where there are rotary positions
    if listed is None:
        every = _count(config, "no_rope_layer_interval", family.unrotated_every)
        return tuple((layer + 1) % every != 0 for layer in range(layers))
    if not isinstance(listed, list) or len(listed) < layers or any(value not in (0, 1) for value in listed):
        raise ValueError(f"config.json: no_rope_layers is not a list of a 0 or 1 for each of {layers} layers")
    return tuple(bool(value) for value in listed[:layers])


def _windows(config: Mapping[str, Any], family: Family, rotated: Sequence[bool]) -> tuple[int, ...]:
    window = _window(config, family)
    listed = _listed_windows(config, len(rotated))
    if listed is None:
        return tuple(window * looks for looks in _windowed_layers(config, family, rotated))
    if any(listed) and not window:
        raise ValueError("config.json: layer_types has sliding_attention, but no sliding_window is in use")
    if family.windows is Windows.ALL and all(listed) != bool(window):
        raise ValueError("config.json: layer_types and sliding_window contradict each other")
    return tuple(window * looks for looks in listed)


def _window(config: Mapping[str, Any], family: Family) -> int:
    """Tokens of a window, 0 where the config asks for none."""
    asked = _flag(config, "use_sliding_window", False)
    if family.windows is Windows.NONE and asked:
        raise ValueError("config.json: use_sliding_window: this architecture has no sliding-window attention")
    if family.windows is Windows.NONE or (family.windows is not Windows.ALL and not asked):
        return 0
    if config.get("sliding_window", family.default_window) is None:
        return 0
    return _count(config, "sliding_window", family.default_window)


def _listed_windows(config: Mapping[str, Any], layers: int) -> list[bool] | None:
    types = config.get("layer_types")
    if types is None:
        return None
    known = ("full_attention", "sliding_attention")
    if not isinstance(types, list) or len(types) != layers or any(kind not in known for kind in types):
        raise ValueError(f"config.json: layer_types is not a list of {' or '.join(known)} for each of {layers} layers")
    return [kind == "sliding_attention" for kind in types]


def _windowed_layers(config: Mapping[str, Any], family: Family, rotated: Sequence[bool]) -> list[bool]:
    if family.windows is Windows.LATE:
        first = _count(config, "max_window_layers", 28, least=0)
        return [layer >= first for layer in range(len(rotated))]
    if family.windows is Windows.UNROTATED:
        return [not rotates for rotates in rotated]
    return [family.windows is Windows.ALL] * len(rotated)


# --- positions --------------------------------------------------------------------------------------------------------


def _rope(config: Mapping[str, Any], family: Family) -> Rope:
    """transformers 5 writes all of it into `rope_parameters`; before, it was `rope_theta` and `rope_scaling`."""
    new, old = config.get("rope_parameters"), config.get("rope_scaling")
    for scaling in (new or {}, old or {}):
        if not isinstance(scaling, Mapping) or any(isinstance(value, Mapping) for value in scaling.values()):
            raise ValueError("config.json: rope_parameters (or rope_scaling) is not one flat object")
    if new and old and _without_theta(new) != _without_theta(old):
        raise ValueError("config.json has both rope_parameters and rope_scaling, and they differ")
    scaling = new or old or {}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in ROPE_KINDS:
        raise ValueError(f"config.json: RoPE of type {kind!r} is not supported; known: {', '.join(ROPE_KINDS)}")
    if any(_number(where, "partial_rotary_factor", 1.0) != 1.0 for where in (scaling, config)):
        raise ValueError("config.json: partial_rotary_factor: partial rotary positions are not supported")
    theta = _number(scaling, "rope_theta", _number(config, "rope_theta", family.rope_theta))
    if theta <= 1.0:
        raise ValueError(f"config.json: rope_theta is {theta:g}; it must be above 1")
    if kind == "default":
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, kind, _number(scaling, "factor"))
    if kind == "divided":
        return Rope(theta, kind, divisors=_divisors(scaling))
    return (_llama3 if kind == "llama3" else _yarn)(config, scaling, theta, _original(config, scaling, family))


def _without_theta(scaling: Mapping[str, Any]) -> dict[str, Any]:
    """How positions are scaled, in today's words: only the newer of the two forms also holds rope_theta."""
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    return {name: value for name, value in scaling.items() if name not in ("rope_theta", "type")} | {"rope_type": kind}


def _original(config: Mapping[str, Any], scaling: Mapping[str, Any], family: Family) -> int:
    """Positions of the context that the model was trained on before it was stretched."""
    name = "original_max_position_embeddings"
    stretched = _count(config, "max_position_embeddings", family.max_positions)
    return _count(config, name, _count(scaling, name, stretched))


def _divisors(scaling: Mapping[str, Any]) -> tuple[float, ...]:
    found = scaling.get("divisors")
    if not isinstance(found, list) or not all(isinstance(by, float) and by > 0 for by in found):
        raise ValueError("config.json: RoPE of type divided needs divisors, a list of numbers above 0")
    return tuple(found)


def _llama3(config: Mapping[str, Any], scaling: Mapping[str, Any], theta: float, original: int) -> Rope:
    low, high = _number(scaling, "low_freq_factor"), _number(scaling, "high_freq_factor")
    if low >= high:
        raise ValueError("config.json: RoPE of type llama3 needs low_freq_factor < high_freq_factor")
    factor = _number(scaling, "factor")
    return Rope(theta, "llama3", factor, original, low_freq_factor=low, high_freq_factor=high)


def _yarn(config: Mapping[str, Any], scaling: Mapping[str, Any], theta: float, original: int) -> Rope:
    factor = _number(scaling, "factor", _count(config, "max_position_embeddings", original) / original)
    slow, fast = _number(scaling, "beta_slow", 1.0), _number(scaling, "beta_fast", 32.0)
    if slow > fast:
        raise ValueError("config.json: RoPE of type yarn needs beta_slow <= beta_fast")
    return Rope(
        theta,
        "yarn",
        factor,
        original,
        slow_turns=slow,
        fast_turns=fast,
        whole_dimensions=_flag(scaling, "truncate", True),
        length=_yarn_length(scaling, factor),
    )


def _yarn_length(scaling: Mapping[str, Any], factor: float) -> float:
    """0.1 ln(factor) + 1, unless the config names it or the two numbers it comes from."""

    def scaled(by: float) -> float:
        return 0.1 * by * math.log(factor) + 1.0 if factor > 1 else 1.0

    names = ("mscale", "mscale_all_dim")
    above, below = (_number(scaling, name) if scaling.get(name) else 0.0 for name in names)
    inferred = scaled(above) / scaled(below) if above and below else scaled(1.0)
    return _number(scaling, "attention_factor", inferred)


# --- fields -----------------------------------------------------------------------------------------------------------


def _count(fields: Mapping[str, Any], name: str, default: int | None = None, least: int = 1, most: int = MOST) -> int:
    """A whole number. Where the field is absent or null, the default; without one that is an error, too."""
    value = fields.get(name)
    if value is None and default is not None:
        return default
    if value is None:
        raise ValueError(f"config.json has no {name}")
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"config.json: {name} is {_shown(value)}, not a whole number from {least} to {most}")
    return value


def _number(fields: Mapping[str, Any], name: str, default: float | None = None) -> float:
    """A number above 0."""
    value = fields.get(name)
    if value is None and default is not None:
        return default
    if value is None:
        raise ValueError(f"config.json has no {name}")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e30:  # also refuses NaN
        raise ValueError(f"config.json: {name} is {_shown(value)}, not a number above 0")
    return float(value)


def _flag(fields: Mapping[str, Any], name: str, default: bool) -> bool:
    value = fields.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise ValueError(f"config.json: {name} is {_shown(value)}, neither true nor false")
    return value


def _shown(value: Any) -> str:
    """As JSON, cut short."""
    text = json.dumps(value, default=repr)
    return text if len(text) <= 40 else f"{text[:37]}..."
