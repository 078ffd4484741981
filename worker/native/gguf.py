"""Tensors of a GGUF file: each type's blocks taken apart into numbers, scales and offsets.

A block of a type with a layout of its own is one function below; all blocks of a matrix go through it at once. Source of
the layouts: https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-common.h
"""

from __future__ import annotations

import mmap
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from worker.amounts import in_bytes
from worker.gguf import Kind, read_gguf
from worker.gguf_config import ROPE_FACTORS
from worker.native.checkpoint import Checkpoint
from worker.native.config import DecoderConfig
from worker.native.groups import GROUP, Groups

Bytes = npt.NDArray[np.uint8]  # [blocks, bytes of a block]
Numbers = npt.NDArray[np.int8]  # [blocks, parts, numbers that share a scale]
Floats = npt.NDArray[np.float32]  # [blocks, parts]
Whole = npt.NDArray[Any]  # of uint8, whose operators numpy declares as of any integer
PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# Bits of the kernel that computes with a type. Where it holds what the type says exactly, it gets that.
KERNEL_BITS = {
    "Q8_0": 8, "Q6_K": 8, "Q5_K": 8, "Q5_0": 8, "Q5_1": 8, "IQ4_XS": 8, "IQ4_NL": 8,
    "Q4_K": 4, "Q4_0": 4, "Q4_1": 4, "Q3_K": 4, "Q2_K": 4,
}  # fmt: skip
IQ4_VALUES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8)


@dataclass(frozen=True, slots=True)
class Blocks:
    """weight = scale * number, + offset where there is one."""

    numbers: Numbers
    scale: Floats
    offset: Floats | None = None

    def floats(self) -> npt.NDArray[np.float32]:
        """[blocks, numbers of a block]"""
        weights = self.numbers * self.scale[..., None]
        if self.offset is not None:
            weights += self.offset[..., None]
        return weights.reshape(len(weights), -1)


# --- the types --------------------------------------------------------------------------------------------------------


def _half(b: Bytes, at: int) -> Floats:
    """The float16 at this byte of each block, [blocks, 1]."""
    found: Floats = np.ascontiguousarray(b[:, at : at + 2]).view(np.float16).astype(np.float32)
    return found


def _nibbles(b: Bytes, run: int = 16) -> Whole:
    """Of each run of bytes first the low halves, then the high ones: [blocks, runs, 2 * run]."""
    runs = b.reshape(len(b), -1, run)
    return np.concatenate((runs & 15, runs >> 4), -1)


def _fields(b: Bytes, bits: int, run: int) -> Whole:
    """Each run of bytes as often as it holds fields of so many bits, the lowest first: [blocks, fields, run]."""
    runs = b.reshape(len(b), -1, 1, run)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    return ((runs >> shifts) & ((1 << bits) - 1)).reshape(len(b), -1, run)


def _bits32(b: Bytes) -> Whole:
    """The 32 bits of 4 bytes, [blocks, 1, 32]."""
    return np.unpackbits(b, axis=1, bitorder="little")[:, None]


def _signed(numbers: Whole, less: int) -> Numbers:
    return numbers.astype(np.int8) - np.int8(less)


def _q8_0(b: Bytes) -> Blocks:
    return Blocks(np.ascontiguousarray(b[:, 2:]).view(np.int8)[:, None], _half(b, 0))


def _q4_0(b: Bytes) -> Blocks:
    return Blocks(_signed(_nibbles(b[:, 2:]), 8), _half(b, 0))


def _q4_1(b: Bytes) -> Blocks:
    return Blocks(_signed(_nibbles(b[:, 4:]), 0), _half(b, 0), _half(b, 2))


def _q5_0(b: Bytes) -> Blocks:
    return Blocks(_signed(_nibbles(b[:, 6:]) | _bits32(b[:, 2:6]) << 4, 16), _half(b, 0))


def _q5_1(b: Bytes) -> Blocks:
    return Blocks(_signed(_nibbles(b[:, 8:]) | _bits32(b[:, 4:8]) << 4, 0), _half(b, 0), _half(b, 2))


def _q2_k(b: Bytes) -> Blocks:
    numbers = _fields(b[:, 16:80], 2, 32).reshape(len(b), 16, 16)
    scale, least = (b[:, :16] & 15).astype(np.float32), (b[:, :16] >> 4).astype(np.float32)
    return Blocks(_signed(numbers, 0), _half(b, 80) * scale, -(_half(b, 82) * least))


def _q3_k(b: Bytes) -> Blocks:
    high = _fields(b[:, :32], 1, 32)  # [blocks, 8, 32]
    numbers = (_fields(b[:, 32:96], 2, 32) | high << 2).reshape(len(b), 16, 16)
    packed = b[:, 96:108]
    low = _nibbles(packed[:, :8], 8)[:, 0]  # [blocks, 16]
    scale = _signed(low | _fields(packed[:, 8:], 2, 4).reshape(len(b), 16) << 4, 32)
    return Blocks(_signed(numbers, 4), _half(b, 108) * scale)


def _scales_of_k(b: Bytes) -> tuple[Floats, Floats]:
    """The 6-bit scales and minima of 8 parts in 12 bytes."""
    first, second, rest = b[:, :4], b[:, 4:8], b[:, 8:]
    scale = np.concatenate((first & 63, (rest & 15) | (first >> 6) << 4), 1)
    least = np.concatenate((second & 63, (rest >> 4) | (second >> 6) << 4), 1)
    return scale.astype(np.float32), least.astype(np.float32)


def _q4_k(b: Bytes) -> Blocks:
    scale, least = _scales_of_k(b[:, 4:16])
    numbers = _fields(b[:, 16:], 4, 32)
    return Blocks(_signed(numbers, 0), _half(b, 0) * scale, -(_half(b, 2) * least))


def _q5_k(b: Bytes) -> Blocks:
    scale, least = _scales_of_k(b[:, 4:16])
    numbers = _fields(b[:, 48:], 4, 32) | _fields(b[:, 16:48], 1, 32) << 4
    return Blocks(_signed(numbers, 0), _half(b, 0) * scale, -(_half(b, 2) * least))


def _q6_k(b: Bytes) -> Blocks:
    low = _fields(b[:, :128], 4, 64)  # [blocks, 4, 64]: of each half first the low, then the high fields
    numbers = (low.reshape(len(b), 8, 32) | _fields(b[:, 128:192], 2, 32) << 4).reshape(len(b), 16, 16)
    scale = np.ascontiguousarray(b[:, 192:208]).view(np.int8).astype(np.float32)
    return Blocks(_signed(numbers, 32), _half(b, 208) * scale)


def _iq4_nl(b: Bytes) -> Blocks:
    return Blocks(IQ4_VALUES[_nibbles(b[:, 2:])], _half(b, 0))


def _iq4_xs(b: Bytes) -> Blocks:
    high = _fields(b[:, 2:4], 2, 1).reshape(len(b), 8)
    low = _fields(b[:, 4:8], 4, 1).reshape(len(b), 8)
    return Blocks(IQ4_VALUES[_nibbles(b[:, 8:])], _half(b, 0) * _signed(low | high << 4, 32))


TYPES: Mapping[str, Callable[[Bytes], Blocks]] = {
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
}


def unpack(kind: Kind, rows: Bytes) -> Tensor | Groups:
    """Rows of blocks [rows, bytes of a row] as a matrix; as groups where each part of a block is one.

    Groups say exactly what the type does. Parts of 16 numbers become float32 instead.
    """
    if kind.name in PLAIN:
        return torch.from_numpy(np.ascontiguousarray(rows)).view(getattr(torch, PLAIN[kind.name]))
    blocks = TYPES[kind.name](rows.reshape(-1, kind.block_bytes))
    if blocks.numbers.shape[-1] != GROUP:
        return torch.from_numpy(blocks.floats().reshape(len(rows), -1))
    return _groups(blocks, KERNEL_BITS[kind.name], len(rows))


def _groups(blocks: Blocks, bits: int, rows: int) -> Groups:
    centre = 1 << (bits - 1) if blocks.offset is None else 0
    numbers = (blocks.numbers.astype(np.int16) + centre).astype(np.uint8)
    offset = -centre * blocks.scale if blocks.offset is None else blocks.offset
    return Groups(bits, *(torch.from_numpy(part.reshape(rows, -1)) for part in (numbers, blocks.scale, offset)))


# --- the file ---------------------------------------------------------------------------------------------------------

OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
INSIDE = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Whose rows of q and k lie in the order that rotates neighbours instead of halves.
INTERLEAVED = ("llama", "smollm3")


def usual_name(name: str) -> str:
    """As checkpoints in Hugging Face form call a tensor; its own name where they have none."""
    found = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if found and found[2] in INSIDE:
        return f"model.layers.{int(found[1])}.{INSIDE[found[2]]}.{found[3]}"
    return OUTSIDE.get(name, name)


class GgufCheckpoint(Checkpoint):
    """As `Checkpoint`, with the tensors of a GGUF file. Raises ValueError for a file that cannot be read."""

    described_by = "its metadata"

    def __init__(self, path: Path, config: DecoderConfig) -> None:
        self.folder, self.config = path, config
        self._file = read_gguf(path)
        entries = [entry for name, entry in self._file.tensors.items() if name != ROPE_FACTORS]
        self._entries = {usual_name(entry.name): entry for entry in entries}
        self.shapes = {name: entry.shape for name, entry in self._entries.items()}
        self._turns = self._file.text("general.architecture") in INTERLEAVED
        with path.open("rb") as opened:  # ACCESS_COPY: nothing is written, but torch warns of what cannot be
            self._content = np.frombuffer(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY), np.uint8)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del self._content  # the mapping ends with its last view

    def read(self, name: str, rows: slice = slice(None)) -> Tensor | Groups:
        entry, heads = self._entries[name], self._heads(name)
        content = self._content[entry.start : entry.start + entry.bytes]
        if len(entry.shape) == 1:
            found = unpack(entry.kind, content[None])
            vector = (found.floats() if isinstance(found, Groups) else found)[0]
            return vector[_halves(len(vector), heads)][rows] if heads else vector[rows]
        lines = content.reshape(entry.shape[0], -1)
        return unpack(entry.kind, lines[_halves(len(lines), heads)[rows].numpy()] if heads else lines[rows])

    def dtype(self, name: str) -> str:
        if name not in self._entries:
            raise ValueError(f"{self.folder} has no tensor {name}")
        return PLAIN.get(self._entries[name].kind.name, "bfloat16")

    def kernel_bits(self, name: str) -> int:
        return KERNEL_BITS.get(self._entries[name].kind.name, 16)

    def kernel_offsets(self, name: str) -> bool:
        return self._entries[name].kind.name != "Q4_0"

    def stored_bytes(self, name: str) -> int:
        return self._entries[name].bytes

    def place(self, name: str) -> str:
        entry = self._entries[name]
        return f"{entry.name} ({entry.kind.name})"

    def called(self, name: str) -> str:
        own = {usual: own for own, usual in (OUTSIDE | _layer_names(name)).items()}
        return own.get(name, name)

    def describe(self) -> str:
        """Its types, the commonest first, and its bytes."""
        count = Counter(entry.kind.name for entry in self._entries.values())
        types = ", ".join(f"{tensors} x {type}" for type, tensors in count.most_common())
        return f"{types}; {in_bytes(sum(entry.bytes for entry in self._entries.values()))} in the file"

    def _heads(self, name: str) -> int:
        """Of a tensor whose rows are to be put in order; else 0."""
        if not self._turns:
            return 0
        q, k = (f"self_attn.{which}_proj." in name for which in "qk")
        return self.config.heads if q else self.config.kv_heads if k else 0


def _layer_names(name: str) -> dict[str, str]:
    """The names in the file of all tensors of the layer that this one is in."""
    found = re.match(r"model\.layers\.(\d+)\.", name)
    if not found:
        return {}
    own = (f"blk.{found[1]}.{own}.{kind}" for own in INSIDE for kind in ("weight", "bias"))
    return {name: usual_name(name) for name in own}


def _halves(rows: int, heads: int) -> Tensor:
    """Where the rows lie that belong, head by head, first to the first halves of the pairs that are rotated."""
    return torch.arange(rows).view(heads, -1, 2).transpose(1, 2).flatten()
