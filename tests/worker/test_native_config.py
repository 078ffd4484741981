"""Configs: defaults are those of transformers, and what cannot be run is refused by name, never by accident."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config, SmolLM3Config

from worker.native.config import FAMILIES, DecoderConfig, Rope

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
}
LLAMA = {**SIZES, "architectures": ["LlamaForCausalLM"]}
MISTRAL = {**SIZES, "architectures": ["MistralForCausalLM"]}
QWEN2 = {**SIZES, "architectures": ["Qwen2ForCausalLM"]}
SMOLLM3 = {**SIZES, "architectures": ["SmolLM3ForCausalLM"]}
REFERENCES: dict[str, Any] = {
    "LlamaForCausalLM": LlamaConfig,
    "MistralForCausalLM": MistralConfig,
    "Qwen2ForCausalLM": Qwen2Config,
    "Qwen3ForCausalLM": Qwen3Config,
    "SmolLM3ForCausalLM": SmolLM3Config,
}


@pytest.mark.parametrize("architecture", FAMILIES)
@pytest.mark.parametrize("asked", [{}, {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 4}])
def test_a_field_that_a_config_leaves_out_is_at_the_default_of_transformers(
    architecture: str, asked: dict[str, Any]
) -> None:
    if architecture == "LlamaForCausalLM":
        asked = {}
    own = DecoderConfig.from_dict({**SIZES, **asked, "architectures": [architecture]})
    reference = REFERENCES[architecture](**SIZES, **asked, pad_token_id=None)
    assert own.rope == Rope(theta=reference.rope_parameters["rope_theta"])
    assert own.max_positions == reference.max_position_embeddings
    assert own.tied_head == reference.tie_word_embeddings
    assert own.eps == reference.rms_norm_eps
    assert own.head_dim == getattr(reference, "head_dim", 16 // 4)
    assert own.rotated == tuple(map(bool, getattr(reference, "no_rope_layers", [1] * 6)))
    window = getattr(reference, "sliding_window", None) or 0
    types = getattr(reference, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * 6
    assert own.windows == tuple(window * (kind == "sliding_attention") for kind in types)


def test_unknown_architecture_is_named_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="MambaForCausalLM") as error:
        DecoderConfig.from_dict({**LLAMA, "architectures": ["MambaForCausalLM"]})
    assert all(known in str(error.value) for known in FAMILIES)
    with pytest.raises(ValueError, match="none named"):
        DecoderConfig.from_dict({})


def test_only_the_named_biases_are_there() -> None:
    qwen2 = DecoderConfig.from_dict({**QWEN2, "attention_bias": False, "mlp_bias": True})
    assert (qwen2.qkv_bias, qwen2.o_bias, qwen2.mlp_bias) == (True, False, False)
    mistral = DecoderConfig.from_dict({**MISTRAL, "attention_bias": True})
    assert (mistral.qkv_bias, mistral.o_bias) == (False, False)
    llama = DecoderConfig.from_dict({**LLAMA, "attention_bias": True, "mlp_bias": True})
    assert (llama.qkv_bias, llama.o_bias, llama.mlp_bias) == (True, True, True)


def test_a_mistral_whose_window_is_null_sees_everything() -> None:
    assert DecoderConfig.from_dict({**MISTRAL, "sliding_window": None}).windows == (0,) * 6
    assert DecoderConfig.from_dict({**MISTRAL, "sliding_window": 8}).windows == (8,) * 6


def test_a_window_that_is_not_in_use_is_none() -> None:
    config = {**QWEN2, "use_sliding_window": False, "sliding_window": 8, "max_window_layers": 0}
    assert DecoderConfig.from_dict(config).windows == (0,) * 6
    assert DecoderConfig.from_dict({**config, "use_sliding_window": True}).windows == (8,) * 6


SLIDING = ["sliding_attention"] * 6
YARN = {"rope_type": "yarn", "factor": 4.0}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**LLAMA, "hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({**LLAMA, "quantization_config": {"bits": 4}}, "quantization_config"),
        ({**LLAMA, "per_layer_config": {"0": {}}}, "per_layer_config"),
        ({**LLAMA, "use_sliding_window": True}, "use_sliding_window"),
        ({**LLAMA, "layer_types": SLIDING}, "layer_types"),
        ({**LLAMA, "no_rope_layers": [1, 1, 1, 0, 1, 1]}, "no_rope_layers"),
        ({**MISTRAL, "layer_types": [*SLIDING[1:], "full_attention"]}, "layer_types and sliding_window contradict"),
        ({**MISTRAL, "layer_types": ["full_attention"] * 6}, "layer_types and sliding_window contradict"),
        ({**QWEN2, "layer_types": SLIDING}, "no sliding_window is in use"),
        ({**QWEN2, "layer_types": ["chunked_attention"] * 6}, "layer_types is not a list of"),
        ({**QWEN2, "layer_types": SLIDING[1:]}, "for each of 6 layers"),
        ({**QWEN2, "use_sliding_window": True, "sliding_window": 0}, "sliding_window is 0"),
        ({**SMOLLM3, "no_rope_layers": [1, 1]}, "no_rope_layers"),
        ({**SMOLLM3, "no_rope_layer_interval": 0}, "no_rope_layer_interval is 0"),
        ({**LLAMA, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic' is not supported"),
        ({**LLAMA, "rope_scaling": {"type": "linear"}}, "no factor"),
        ({**LLAMA, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "no low_freq_factor"),
        ({**LLAMA, "rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "not one flat object"),
        ({**LLAMA, "rope_parameters": {"rope_theta": 1e5}, "rope_scaling": YARN}, "they differ"),
        ({**LLAMA, "rope_parameters": YARN, "rope_scaling": {**YARN, "factor": 2.0}}, "they differ"),
        ({**LLAMA, "rope_parameters": YARN, "rope_scaling": [1]}, "not one flat object"),
        ({**LLAMA, "rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({**LLAMA, "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({**LLAMA, "rope_theta": 0}, "rope_theta is 0"),
        ({**LLAMA, "rope_scaling": {**YARN, "beta_fast": 1, "beta_slow": 2}}, "beta_slow"),
    ],
)
def test_what_would_give_wrong_tokens_is_refused_by_name(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DecoderConfig.from_dict(config)


def test_the_same_scaling_in_the_old_form_and_the_new_is_one() -> None:
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    new = {**scaling, "rope_type": "llama3", "rope_theta": 500000.0}
    for old in ({**scaling, "rope_type": "llama3"}, {**scaling, "type": "llama3"}):
        rope = DecoderConfig.from_dict({**LLAMA, "rope_parameters": new, "rope_scaling": old}).rope
        assert (rope.kind, rope.theta, rope.factor) == ("llama3", 500000.0, 8.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": "big"}, 'hidden_size is "big", not a whole number'),
        ({"hidden_size": None}, "config.json has no hidden_size"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"hidden_size": 18}, "hidden_size 18 is no multiple of 4"),
        ({"vocab_size": -1}, "vocab_size is -1"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers is 2.5"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"num_attention_heads": True}, "num_attention_heads is true"),
        ({"num_key_value_heads": 3}, "multiple of KV heads"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0"),
        ({"head_dim": 7}, "head dimension even"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is NaN"),
        ({"tie_word_embeddings": "yes"}, 'tie_word_embeddings is "yes", neither true nor false'),
        ({"architectures": "LlamaForCausalLM"}, "not a list"),
        ({"vocab_size": ["long"] * 100}, r"\.\.\."),
    ],
)
def test_a_field_of_a_wrong_kind_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DecoderConfig.from_dict({**LLAMA, **change})


FIELDS = [
    *SIZES,
    *("architectures", "head_dim", "rms_norm_eps", "tie_word_embeddings", "attention_bias", "mlp_bias", "hidden_act"),
    *("sliding_window", "use_sliding_window", "max_window_layers", "layer_types", "max_position_embeddings"),
    *("no_rope_layers", "no_rope_layer_interval", "rope_theta", "rope_scaling", "rope_parameters"),
    *("partial_rotary_factor", "original_max_position_embeddings", "quantization_config"),
]
ROPE_FIELDS = [
    *("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings", "beta_fast"),
    *("beta_slow", "mscale", "mscale_all_dim", "attention_factor", "truncate", "partial_rotary_factor", "type"),
    "divisors",
]
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["", "big", 0, 1, 2, 4, 64])
VALUES = SCALARS | st.lists(SCALARS, max_size=7) | st.fixed_dictionaries({}, optional={"a": SCALARS})
ROPES = st.builds(
    lambda kind, fields: {"rope_type": kind, **fields},
    st.sampled_from(["default", "linear", "llama3", "yarn", "divided"]),
    st.fixed_dictionaries({}, optional=dict.fromkeys(ROPE_FIELDS, VALUES)),
)


@given(
    architecture=st.sampled_from(list(FAMILIES)),
    changes=st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=4),
    rope=st.none() | ROPES,
)
def test_any_config_is_read_or_refused_with_a_sentence(
    architecture: str, changes: dict[str, Any], rope: dict[str, Any] | None
) -> None:
    config = {**SIZES, "architectures": [architecture], "rope_parameters": rope, **changes}
    try:
        own = DecoderConfig.from_dict(config)
    except ValueError as error:
        assert str(error)
    else:
        assert len(own.windows) == len(own.rotated) == own.layers
        assert own.heads % own.kv_heads == 0 and own.head_dim > 0


def test_yarn_stretches_the_context_of_a_config_that_names_the_factor_only() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    config = {**QWEN2, "max_position_embeddings": 32768}
    assert DecoderConfig.from_dict(config).max_positions == 32768
    assert DecoderConfig.from_dict({**config, "rope_scaling": yarn}).max_positions == 131072
    stretched = {**config, "rope_scaling": yarn, "max_position_embeddings": 131072}
    assert DecoderConfig.from_dict(stretched).max_positions == 131072


def test_the_cost_model_is_told_what_the_family_says_where_the_config_is_silent() -> None:
    shape = DecoderConfig.from_dict(SMOLLM3).model_shape("m", "bfloat16")
    assert shape.tied_head and shape.weight_bytes_each == 2
    qwen3 = {**SIZES, "architectures": ["Qwen3ForCausalLM"]}
    assert DecoderConfig.from_dict(qwen3).model_shape("m", "float32").head_dim == 128
