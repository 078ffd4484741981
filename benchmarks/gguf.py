"""A model of random weights in llama.cpp's file form (GGUF, version 3): bfloat16 matrices, float32 norms, a dummy tokenizer.

Source of the form: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from scheduler.model import ModelShape

UINT32, FLOAT32, STRING, ARRAY = 4, 6, 8, 9  # kinds of values
F32, BF16 = 0, 30  # kinds of tensors
ALIGNMENT = 32
SPREAD = 0.02  # standard deviation of the weights

Value = int | float | str | list[int] | list[str]


def write_random(path: Path, shape: ModelShape, rope_theta: float, eps: float) -> None:
    """Weights of this shape. A block of random values is repeated: nobody reads what they say."""
    block = random_bfloat16(1 << 20)
    tensors = list(tensors_of(shape))
    offsets, at = [], 0
    for _, sizes in tensors:
        offsets.append(at)
        at += padded(tensor_bytes(sizes))
    values = metadata(shape, rope_theta, eps)
    with path.open("wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(values)))
        for key, value in values.items():
            file.write(text(key) + typed(value))
        for (name, sizes), offset in zip(tensors, offsets, strict=True):
            kind = F32 if len(sizes) == 1 else BF16
            file.write(text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset))
        file.write(bytes(padded(file.tell()) - file.tell()))
        for _, sizes in tensors:
            content = np.ones(sizes, np.float32) if len(sizes) == 1 else np.resize(block, math.prod(sizes))
            file.write(content.tobytes())
            file.write(bytes(padded(content.nbytes) - content.nbytes))


def metadata(shape: ModelShape, rope_theta: float, eps: float) -> Mapping[str, Value]:
    return {
        "general.architecture": "llama",
        "general.name": shape.name,
        "llama.vocab_size": shape.vocabulary,
        "llama.context_length": shape.context_tokens,
        "llama.embedding_length": shape.hidden,
        "llama.block_count": shape.layers,
        "llama.feed_forward_length": shape.intermediate,
        "llama.attention.head_count": shape.heads,
        "llama.attention.head_count_kv": shape.kv_heads,
        "llama.attention.layer_norm_rms_epsilon": eps,
        "llama.rope.dimension_count": shape.head_dim,
        "llama.rope.freq_base": rope_theta,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [f"t{id}" for id in range(shape.vocabulary)],
        "tokenizer.ggml.merges": ["t 0"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 0,
    }


def tensors_of(shape: ModelShape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and sizes, the innermost dimension first. A tied head is not stored."""
    hidden, inner = shape.hidden, shape.intermediate
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    yield "token_embd.weight", (hidden, shape.vocabulary)
    for layer in range(shape.layers):
        matrices = {
            "attn_q": (hidden, q),
            "attn_k": (hidden, kv),
            "attn_v": (hidden, kv),
            "attn_output": (q, hidden),
            "ffn_gate": (hidden, inner),
            "ffn_up": (hidden, inner),
            "ffn_down": (inner, hidden),
        }
        for name, sizes in {"attn_norm": (hidden,), "ffn_norm": (hidden,), **matrices}.items():
            yield f"blk.{layer}.{name}.weight", sizes
    yield "output_norm.weight", (hidden,)
    if not shape.tied_head:
        yield "output.weight", (hidden, shape.vocabulary)


def random_bfloat16(count: int) -> np.ndarray:
    """The upper halves of float32 values."""
    values = np.random.default_rng(0).standard_normal(count, np.float32) * np.float32(SPREAD)
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def tensor_bytes(sizes: tuple[int, ...]) -> int:
    return math.prod(sizes) * (4 if len(sizes) == 1 else 2)


def padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def text(value: str) -> bytes:
    encoded = value.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def typed(value: Value) -> bytes:
    """A value behind its kind; in an array, the kind of all of them comes first."""
    if isinstance(value, list):
        parts = [typed(one) for one in value]
        return struct.pack("<I", ARRAY) + parts[0][:4] + struct.pack("<Q", len(parts)) + b"".join(p[4:] for p in parts)
    if isinstance(value, str):
        return struct.pack("<I", STRING) + text(value)
    if isinstance(value, float):
        return struct.pack("<If", FLOAT32, value)
    return struct.pack("<II", UINT32, value)
