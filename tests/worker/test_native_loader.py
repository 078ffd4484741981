"""Configs and checkpoints: what is read, and what is said about one that does not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from worker.native.config import DecoderConfig, Rope
from worker.native.loader import Checkpoint, load_weights, tensor_shapes

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
CPU = torch.device("cpu")


def random_tensors(config: dict[str, Any], dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    shapes = tensor_shapes(DecoderConfig.from_dict(config))
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def load(path: Path, config: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    with Checkpoint(path) as checkpoint:
        return load_weights(checkpoint, DecoderConfig.from_dict(config), CPU, dtype)


def test_unknown_architecture_is_named_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"MambaForCausalLM.*LlamaForCausalLM, Qwen3ForCausalLM"):
        DecoderConfig.from_dict({**CONFIG, "architectures": ["MambaForCausalLM"]})
    with pytest.raises(ValueError, match="none named"):
        DecoderConfig.from_dict({})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act gelu"),
        ({"quantization_config": {"bits": 4}}, "quantized"),
        ({"use_sliding_window": True}, "sliding-window"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4}}, "yarn"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial"),
        ({"num_key_value_heads": 3}, "multiple of KV heads"),
    ],
)
def test_what_would_give_wrong_tokens_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DecoderConfig.from_dict({**CONFIG, **change})


def test_a_config_that_lacks_a_field_names_it() -> None:
    with pytest.raises(ValueError, match="intermediate_size"):
        DecoderConfig.from_dict({name: value for name, value in CONFIG.items() if name != "intermediate_size"})


def test_old_and_new_forms_of_rope_are_the_same() -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    old = DecoderConfig.from_dict({**CONFIG, "rope_theta": 5e5, "rope_scaling": scaling})
    new = DecoderConfig.from_dict({**CONFIG, "rope_parameters": {**scaling, "rope_theta": 5e5}})
    assert old.rope == new.rope == Rope(5e5, "llama3", 8.0, 1.0, 4.0, 16)
    assert DecoderConfig.from_dict(CONFIG).rope == Rope()


def test_qwen3_differs_by_its_table_entry() -> None:
    config = DecoderConfig.from_dict({**CONFIG, "architectures": ["Qwen3ForCausalLM"], "mlp_bias": True})
    assert config.qk_norm and config.head_dim == 128 and not config.mlp_bias


def test_what_reads_the_same_input_becomes_one_matrix(tmp_path: Path) -> None:
    tensors = random_tensors(CONFIG)
    save_file(tensors, tmp_path / "model.safetensors")
    weights = load(tmp_path, CONFIG)
    parts = [tensors[f"model.layers.1.self_attn.{name}_proj.weight"] for name in "qkv"]
    assert torch.equal(weights.layers[1].qkv.weight, torch.cat(parts))
    parts = [tensors[f"model.layers.1.mlp.{name}_proj.weight"] for name in ("gate", "up")]
    assert torch.equal(weights.layers[1].gate_up.weight, torch.cat(parts))
    assert torch.equal(weights.head.weight, tensors["lm_head.weight"])
    assert sum(t.numel() for t in weights.tensors()) == sum(t.numel() for t in tensors.values())


def test_sharded_checkpoint_is_the_same_as_a_whole_one(tmp_path: Path) -> None:
    tensors = random_tensors(CONFIG)
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, tmp_path / file)
    weight_map = {name: file for file, part in shards.items() for name in part}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    weights = load(tmp_path, CONFIG)
    assert torch.equal(weights.embedding, tensors["model.embed_tokens.weight"])
    assert torch.equal(weights.layers[0].down.weight, tensors["model.layers.0.mlp.down_proj.weight"])
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks b\.safetensors"):
        load(tmp_path, CONFIG)


def test_bfloat16_checkpoint_is_exact_in_float32(tmp_path: Path) -> None:
    tensors = random_tensors(CONFIG, torch.bfloat16)
    save_file(tensors, tmp_path / "model.safetensors")
    weights = load(tmp_path, CONFIG)
    assert weights.norm.dtype == torch.float32
    assert torch.equal(weights.layers[0].o.weight, tensors["model.layers.0.self_attn.o_proj.weight"].float())
    with Checkpoint(tmp_path) as checkpoint:
        assert checkpoint.dtype("model.norm.weight") == "bfloat16"


def test_everything_wrong_with_a_checkpoint_is_in_one_error(tmp_path: Path) -> None:
    tensors = random_tensors(CONFIG)
    del tensors["model.layers.1.mlp.down_proj.weight"]
    tensors["model.norm.weight"] = torch.ones(7)
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(16)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as error:
        load(tmp_path, CONFIG)
    assert "missing: model.layers.1.mlp.down_proj.weight" in str(error.value)
    assert "unexpected: model.layers.0.self_attn.q_proj.bias" in str(error.value)
    assert "model.norm.weight [7] instead of [16]" in str(error.value)


def test_a_second_copy_of_a_tied_head_and_stored_frequencies_do_no_harm(tmp_path: Path) -> None:
    tied = {**CONFIG, "tie_word_embeddings": True}
    tensors = random_tensors(CONFIG)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    save_file(tensors, tmp_path / "model.safetensors")
    weights = load(tmp_path, tied)
    assert weights.head.weight is weights.embedding
    assert torch.equal(weights.embedding, tensors["model.embed_tokens.weight"])


def test_a_checkpoint_without_its_head_is_told_so(tmp_path: Path) -> None:
    tensors = random_tensors({**CONFIG, "tie_word_embeddings": True})
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing: lm_head\.weight"):
        load(tmp_path, CONFIG)
