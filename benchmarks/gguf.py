"""A model of random weights in llama.cpp's file form (GGUF, version 3): matrices of 16, 8 or 4 bits, a dummy tokenizer.

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
F32 = 0  # a kind of tensors, like these: name -> (kind, numbers in a block, its bytes)
FORMATS = {"BF16": (30, 1, 2), "Q8_0": (8, 32, 34), "Q4_0": (2, 32, 18)}
ALIGNMENT = 32
SPREAD = 0.02  # standard deviation of the weights

Value = int | float | str | list[int] | list[str]


def write_random(path: Path, shape: ModelShape, rope_theta: float, eps: float, format: str = "BF16") -> None:
    """Weights of this shape. A piece of random values is repeated: nobody reads what they say."""
    piece = random_matrix(format)
    kind, numbers, block_bytes = FORMATS[format]
    tensors = list(tensors_of(shape))
    offsets, at = [], 0
    for _, sizes in tensors:
        offsets.append(at)
        at += padded(4 * sizes[0] if len(sizes) == 1 else math.prod(sizes) // numbers * block_bytes)
    values = metadata(shape, rope_theta, eps)
    with path.open("wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(values)))
        for key, value in values.items():
            file.write(text(key) + typed(value))
        for (name, sizes), offset in zip(tensors, offsets, strict=True):
            here = F32 if len(sizes) == 1 else kind
            file.write(text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, here, offset))
        file.write(bytes(padded(file.tell()) - file.tell()))
        for _, sizes in tensors:
            is_norm = len(sizes) == 1
            content = (
                np.ones(sizes, np.float32) if is_norm else np.resize(piece, (math.prod(sizes) // numbers, block_bytes))
            )
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


def random_matrix(format: str) -> np.ndarray:
    """Blocks [blocks, bytes]: upper halves of float32 values, or numbers of few bits behind a scale in float16."""
    random, (_, numbers, block_bytes) = np.random.default_rng(0), FORMATS[format]
    if format == "BF16":
        values = random.standard_normal(1 << 20, np.float32) * np.float32(SPREAD)
        return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8).reshape(-1, block_bytes)
    blocks = random.integers(0, 256, ((1 << 20) // numbers, block_bytes), np.uint8)
    blocks[:, :2] = np.array([3 * SPREAD / (128 if format == "Q8_0" else 8)], np.float16).view(np.uint8)
    return blocks


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
