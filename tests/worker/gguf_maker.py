"""Writes small GGUF files, whole ones and wrong ones. Not the code under test, and none of the readers'."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ALIGNMENT = 32
F32 = 0


class Tensor(NamedTuple):
    """`content` is the tensor's bytes, `sizes` the innermost first."""

    kind: int
    sizes: Sequence[int]
    content: bytes


def floats(array: Any) -> Tensor:
    numbers = np.ascontiguousarray(array, np.float32)
    return Tensor(F32, numbers.shape[::-1], numbers.tobytes())


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def typed(value: Any) -> bytes:
    """A value behind its type: Python's bool, int, float, str or a list of one of them."""
    if isinstance(value, list):
        parts = [typed(each) for each in value] or [typed(0)]
        return (
            struct.pack("<I", 9)
            + parts[0][:4]
            + struct.pack("<Q", len(value))
            + b"".join(p[4:] for p in parts[: len(value)])
        )
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + text(value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    return struct.pack("<II", 4, value) if value >= 0 else struct.pack("<Ii", 5, value)


def gguf_bytes(values: Mapping[str, Any], tensors: Mapping[str, Tensor], version: int = 3) -> bytes:
    places, contents, at = b"", b"", 0
    for name, tensor in tensors.items():
        places += text(name) + struct.pack(
            f"<I{len(tensor.sizes)}QIQ", len(tensor.sizes), *tensor.sizes, tensor.kind, at
        )
        contents += tensor.content + bytes(-len(tensor.content) % ALIGNMENT)
        at = len(contents)
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(values))
    head += b"".join(text(key) + typed(value) for key, value in values.items()) + places
    return head + bytes(-len(head) % ALIGNMENT) + contents


def write_gguf(path: Path, values: Mapping[str, Any], tensors: Mapping[str, Tensor], version: int = 3) -> Path:
    path.write_bytes(gguf_bytes(values, tensors, version))
    return path


# --- models -----------------------------------------------------------------------------------------------------------

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def own_name(name: str) -> str:
    """Of a tensor that a checkpoint in Hugging Face form calls so."""
    module, _, kind = name.rpartition(".")
    if module in NAMES:
        return f"{NAMES[module]}.{kind}"
    _, _, layer, rest = module.split(".", 3)
    return f"blk.{layer}.{NAMES[rest]}.{kind}"


def turned(array: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k as files of the llama architecture have them: the pairs that are rotated side by side."""
    return array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def values_of(config: Mapping[str, Any], kind: str = "llama") -> dict[str, Any]:
    """The metadata of a model with this config.json, without its tokenizer."""
    own = {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "rope.freq_base": float(config["rope_theta"]),
    }
    if "head_dim" in config:
        own |= {"attention.key_length": config["head_dim"], "attention.value_length": config["head_dim"]}
    return {"general.architecture": kind, **{f"{kind}.{key}": value for key, value in own.items()}}


def tensors_of(
    config: Mapping[str, Any], weights: Mapping[str, np.ndarray], is_turned: bool = True
) -> dict[str, Tensor]:
    """The tensors of a model in float32."""
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    found = {}
    for name, array in weights.items():
        count = heads.get(name.split(".")[-2], 0) if is_turned else 0
        found[own_name(name)] = floats(turned(array, count) if count else array)
    return found


def tokenizer_values(tokenizer: Mapping[str, Any], pre: str, **more: Any) -> dict[str, Any]:
    """The metadata of a byte-level BPE, from its tokenizer.json."""
    vocabulary = tokenizer["model"]["vocab"]
    texts = sorted(vocabulary, key=vocabulary.__getitem__)
    added = {token["content"] for token in tokenizer["added_tokens"]}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]]
    own = {
        "model": "gpt2",
        "pre": pre,
        "tokens": texts,
        "token_type": [3 if each in added else 1 for each in texts],
        "merges": merges,
        **more,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in own.items()}


# --- types of few bits ------------------------------------------------------------------------------------------------

# Type, numbers and bytes of a block, and where its float16 scales lie.
BLOCKS = {
    "Q8_0": (8, 32, 34, (0,)),
    "Q4_0": (2, 32, 18, (0,)),
    "Q4_K": (12, 256, 144, (0, 2)),
    "Q6_K": (14, 256, 210, (208,)),
}


def random_blocks(type: str, rows: int, columns: int, seed: int = 0) -> Tensor:
    """A matrix [rows, columns] of random numbers."""
    kind, numbers, size, scales = BLOCKS[type]
    chance = np.random.default_rng(seed)
    blocks = chance.integers(0, 256, (rows * columns // numbers, size), np.uint8)
    for at in scales:
        blocks[:, at : at + 2] = chance.uniform(0.001, 0.002, (len(blocks), 1)).astype(np.float16).view(np.uint8)
    return Tensor(kind, (columns, rows), blocks.tobytes())


def rounded(type: str, tensor: Tensor) -> Tensor:
    """One of float32 in Q8_0 or Q4_0, scaled by the largest number of each block."""
    groups = np.frombuffer(tensor.content, np.float32).reshape(-1, 32)
    most = {"Q8_0": 127, "Q4_0": 7}[type]
    scales = (np.abs(groups).max(1, keepdims=True) / most).astype(np.float16)
    numbers = np.clip(np.rint(groups / np.maximum(scales.astype(np.float32), 1e-8)), -most, most).astype(np.int8)
    if type == "Q4_0":
        high_and_low = (numbers + 8).astype(np.uint8)
        stored = high_and_low[:, :16] | high_and_low[:, 16:] << 4
    else:
        stored = numbers.view(np.uint8)
    return Tensor(BLOCKS[type][0], tensor.sizes, np.hstack((scales.view(np.uint8), stored)).tobytes())
