"""A decoder's config and checkpoint as a flat program of fused phases over packed weights: see `step.c`."""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import torch
import torch.nn.functional as F
from torch import Tensor

from worker.native.checkpoint import Checkpoint
from worker.native.config import DecoderConfig
from worker.native.cpu.pack import (
    BITS,
    GROUP,
    PANEL,
    Arena,
    CMatrix,
    Kernels,
    Packed,
    new_matrix,
    packed_bytes,
    rounded_up,
)
from worker.native.decoder import rope_frequencies
from worker.native.groups import Groups, for_kernel
from worker.native.loader import MATRICES, check_tensors, floats, stored_bytes, tensor_shapes

Progress = Callable[[int, int], None]
AS_STORED = "as stored"  # each matrix in the format that is nearest to what the file holds
OUTSIDE = ("model.embed_tokens.weight", "lm_head.weight")  # of the layers, the matrices
HALF_PANEL = PANEL // 2
SLAB_NUMBERS = 1 << 20  # that are taken out of a file at a time


class Kind(IntEnum):
    EMBED, LINEAR, ATTEND = range(3)


class Buffer(IntEnum):
    X, QKV, ATTENDED, INNER, LOGITS = range(5)


class Epilogue(IntEnum):
    STORE, ADD, GATED, BEST = range(4)


class CHeads(ctypes.Structure):
    _fields_ = [
        ("heads", ctypes.c_int32),
        ("kv_heads", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("num_blocks", ctypes.c_int32),
        ("eps", ctypes.c_float),
        ("scale", ctypes.c_float),
        ("frequencies", ctypes.c_void_p),
        ("length", ctypes.c_float),
    ]


class COp(ctypes.Structure):
    _fields_ = [
        ("kind", ctypes.c_int64),
        ("from_", ctypes.c_int64),
        ("to", ctypes.c_int64),
        ("epilogue", ctypes.c_int64),
        ("matrix", CMatrix),
        ("norm", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("qk_norm", ctypes.c_void_p),
        ("pages", ctypes.c_void_p),
        ("rotates", ctypes.c_int64),
        ("plan", ctypes.c_int64),
    ]


class CProgram(ctypes.Structure):
    _fields_ = [
        ("heads", CHeads),
        ("num_ops", ctypes.c_int32),
        ("num_windows", ctypes.c_int32),
        ("ops", ctypes.c_void_p),
        ("windows", ctypes.c_void_p),
        ("widths", ctypes.c_int64 * len(Buffer)),
    ]


@dataclass(frozen=True, slots=True)
class Linear:
    """A product, and the norm before it."""

    matrix: Packed
    norm: Tensor | None = None  # float32, in whole panels
    bias: Tensor | None = None  # the same

    def tensors(self) -> list[Tensor]:
        return [*self.matrix.tensors(), *(each for each in (self.norm, self.bias) if each is not None)]


@dataclass(frozen=True, slots=True)
class Layer:
    qkv: Linear
    qk_norm: Tensor | None  # [heads + kv_heads, head_dim]
    o: Linear
    gate_up: Linear  # 16 gates, 16 ups, …
    down: Linear


@dataclass(frozen=True, slots=True)
class PackedWeights:
    """All weights of a decoder; with a tied head, `head` and `embedding` are one matrix."""

    embedding: Packed
    layers: tuple[Layer, ...]
    head: Linear

    @property
    def formats(self) -> list[str]:
        """Of its matrices; first the one that most weights have."""
        count: Counter[str] = Counter()
        for linear in self._linears():
            count[linear.matrix.format] += linear.matrix.rows * linear.matrix.columns
        return list(dict.fromkeys([*(format for format, _ in count.most_common()), self.embedding.format]))

    @property
    def read_bytes(self) -> int:
        """What a step reads: everything but the input embedding."""
        return sum(tensor.nbytes for linear in self._linears() for tensor in linear.tensors())

    def tensors(self) -> list[Tensor]:
        """Every tensor once."""
        norms = [layer.qk_norm for layer in self.layers if layer.qk_norm is not None]
        found = self.embedding.tensors() + norms + [t for linear in self._linears() for t in linear.tensors()]
        return list({id(tensor): tensor for tensor in found}.values())

    def _linears(self) -> list[Linear]:
        layers = [linear for layer in self.layers for linear in (layer.qkv, layer.o, layer.gate_up, layer.down)]
        return [*layers, self.head]


# --- loading ----------------------------------------------------------------------------------------------------------


def load_packed(
    checkpoint: Checkpoint,
    config: DecoderConfig,
    format: str,
    kernels: Kernels,
    progress: Progress = lambda done, total: None,
) -> PackedWeights:
    """Packs a checkpoint tensor by tensor. Raises ValueError when it does not fit the config, or has NaN.

    `format`: of all matrices, or AS_STORED.
    """
    check_tensors(config, checkpoint)
    packer = _Packer(checkpoint, format, kernels, stored_bytes(checkpoint, config), progress)
    embedding = packer.stacked("model.embed_tokens.weight")
    layers = tuple(_pack_layer(packer, config, f"model.layers.{i}") for i in range(config.layers))
    head = embedding if config.tied_head else packer.stacked("lm_head.weight")
    return PackedWeights(embedding, layers, Linear(head, packer.vector("model.norm.weight")))


def bytes_as_stored(checkpoint: Checkpoint, config: DecoderConfig) -> int:
    """Of all weights packed AS_STORED; 0 where the checkpoint has none of few bits. Tensors that are missing count as large."""
    shapes = tensor_shapes(config)
    stacks: list[tuple[str, ...]] = [(name,) for name in OUTSIDE if name in shapes]
    for i in range(config.layers):
        stacks += [tuple(f"model.layers.{i}.{module}.weight" for module in modules) for modules in MATRICES.values()]
    there = [name for names in stacks for name in names if name in checkpoint.shapes]
    if not any(checkpoint.kernel_bits(name) < 16 for name in there):
        return 0
    total = 4 * sum(shape[0] for shape in shapes.values() if len(shape) == 1)
    for names in stacks:
        form = stored_format(checkpoint, names) if set(names) <= set(there) else ("bfloat16", False)
        total += packed_bytes(sum(shapes[name][0] for name in names), shapes[names[0]][1], *form)
    return total


def stored_format(checkpoint: Checkpoint, names: Sequence[str]) -> tuple[str, bool]:
    """The widest of some tensors' that are one matrix, and whether it has offsets."""
    bits = max(checkpoint.kernel_bits(name) for name in names)
    format = next(format for format, each in BITS.items() if each == bits)
    return format, format == "int4" and any(checkpoint.kernel_offsets(name) for name in names)


def _pack_layer(packer: _Packer, config: DecoderConfig, prefix: str) -> Layer:
    def names(kind: str, *modules: str) -> list[str]:
        return [f"{prefix}.{module}_proj.{kind}" for module in modules]

    def linear(has_bias: bool, norm: str, *modules: str) -> Linear:
        bias = packer.vector(*names("bias", *modules)) if has_bias else None
        return Linear(packer.stacked(*names("weight", *modules)), packer.norm(norm), bias)

    gate, up = "mlp.gate", "mlp.up"
    return Layer(
        qkv=linear(config.qkv_bias, f"{prefix}.input_layernorm.weight", *(f"self_attn.{name}" for name in "qkv")),
        qk_norm=_head_norms(packer, config, prefix) if config.qk_norm else None,
        o=linear(config.o_bias, "", "self_attn.o"),
        gate_up=Linear(
            packer.interleaved(*names("weight", gate, up)),
            packer.norm(f"{prefix}.post_attention_layernorm.weight"),
            packer.interleaved_vector(*names("bias", gate, up)) if config.mlp_bias else None,
        ),
        down=linear(config.mlp_bias, "", "mlp.down"),
    )


def _head_norms(packer: _Packer, config: DecoderConfig, prefix: str) -> Tensor:
    q, k = (packer.read(f"{prefix}.self_attn.{name}_norm.weight").float() for name in "qk")
    return torch.cat((q.expand(config.heads, -1), k.expand(config.kv_heads, -1))).contiguous()


class _Packer:
    """Reads tensors of a checkpoint into packed memory."""

    def __init__(
        self, checkpoint: Checkpoint, format: str, kernels: Kernels, total_bytes: int, progress: Progress
    ) -> None:
        self.checkpoint, self.format, self.kernels = checkpoint, format, kernels
        self.arena = Arena()
        self.done_bytes, self.total_bytes, self.progress = 0, total_bytes, progress

    def stacked(self, *names: str) -> Packed:
        """Tensors [rows, columns] under each other."""
        shapes = [self.checkpoint.shapes[name] for name in names]
        matrix = self._new_matrix(names, sum(shape[0] for shape in shapes), shapes[0][1])
        first = 0
        for name, shape in zip(names, shapes, strict=True):
            self._pack(matrix, name, first)
            first += shape[0]
        return matrix

    def interleaved(self, gate: str, up: str) -> Packed:
        rows, columns = self.checkpoint.shapes[gate]
        matrix = self._new_matrix((gate, up), 2 * rounded_up(rows, HALF_PANEL), columns)
        self._pack(matrix, gate, 0, is_interleaved=True)
        self._pack(matrix, up, HALF_PANEL, is_interleaved=True)
        return matrix

    def interleaved_vector(self, gate: str, up: str) -> Tensor:
        halves = [
            F.pad(self.read(name).float(), (0, -self.checkpoint.shapes[name][0] % HALF_PANEL)) for name in (gate, up)
        ]
        return torch.stack([half.view(-1, HALF_PANEL) for half in halves], 1).flatten().contiguous()

    def norm(self, name: str) -> Tensor | None:
        return self.vector(name) if name else None

    def vector(self, *names: str) -> Tensor:
        """Side by side in float32, filled up with zeros to whole panels, which are whole groups, too."""
        assert PANEL == GROUP
        joined = torch.cat([self.read(name).float() for name in names])
        return F.pad(joined, (0, -len(joined) % PANEL))

    def read(self, name: str) -> Tensor:
        source = floats(self.checkpoint.read(name))
        self._count(name)
        if not source.isfinite().all():
            raise self._not_finite(name, "float32")
        return source

    def _new_matrix(self, names: Sequence[str], rows: int, columns: int) -> Packed:
        form = stored_format(self.checkpoint, names) if self.format == AS_STORED else (self.format, False)
        return new_matrix(self.arena, rows, columns, *form)

    def _pack(self, matrix: Packed, name: str, first: int, is_interleaved: bool = False) -> None:
        rows = self.checkpoint.shapes[name][0]
        step = max(1, SLAB_NUMBERS // (PANEL * matrix.columns)) * PANEL
        for start in range(0, rows, step):
            weight = self.checkpoint.read(name, slice(start, min(start + step, rows)))
            at = first + (2 * start if is_interleaved else start)
            if not self._pack_slab(matrix, weight, at, is_interleaved):
                raise self._not_finite(name, matrix.format)
            self._tell(self.checkpoint.stored_bytes(name) * min(start + step, rows) // rows)
        self._count(name)

    def _pack_slab(self, matrix: Packed, weight: Tensor | Groups, first: int, is_interleaved: bool) -> bool:
        """False for numbers that are none."""
        is_placed = isinstance(weight, Groups) or matrix.offsets is not None
        if self.format != AS_STORED or matrix.format == "bfloat16" or not is_placed:
            return not self.kernels.pack(matrix, floats(weight), first, is_interleaved)
        if not _is_finite(weight):
            return False
        if isinstance(weight, Tensor):
            weight = F.pad(weight, (0, -weight.shape[1] % GROUP))
        self.kernels.place_groups(matrix, for_kernel(weight, BITS[matrix.format]), first, is_interleaved)
        return True

    def _not_finite(self, name: str, format: str) -> ValueError:
        place = self.checkpoint.place(name)
        return ValueError(f"{self.checkpoint.folder}: {place} has NaN or infinite values (read as {format})")

    def _count(self, name: str) -> None:
        self.done_bytes += self.checkpoint.stored_bytes(name)
        self._tell(0)

    def _tell(self, further_bytes: int) -> None:
        self.progress(self.done_bytes + further_bytes, self.total_bytes)


def _is_finite(weight: Tensor | Groups) -> bool:
    parts = (weight.scale, weight.offset) if isinstance(weight, Groups) else (weight,)
    return all(bool(part.isfinite().all()) for part in parts)


# --- the program ------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Program:
    """What the C engine runs, with all that its pointers lead to."""

    struct: CProgram
    widths: dict[Buffer, int]
    kept: list[object] = field(default_factory=list)


def build_program(config: DecoderConfig, weights: PackedWeights, pages: Sequence[Tensor], num_blocks: int) -> Program:
    """`pages`: of each layer's keys and values, in so many blocks."""
    windows = list(dict.fromkeys(config.windows))
    ops = [_embed(weights.embedding)]
    for index, layer in enumerate(weights.layers):
        ops += _layer_ops(layer, pages[index], config.rotated[index], windows.index(config.windows[index]))
    ops.append(_linear(weights.head, Buffer.X, Buffer.LOGITS))
    widths = _widths(config)
    frequencies = rope_frequencies(config.rope, config.head_dim).contiguous()
    heads = CHeads(
        config.heads,
        config.kv_heads,
        config.head_dim,
        num_blocks,
        config.eps,
        config.head_dim**-0.5,
        frequencies.data_ptr(),
        config.rope.length,
    )
    c_ops, c_windows = (COp * len(ops))(*ops), (ctypes.c_int32 * len(windows))(*windows)
    struct = CProgram(
        heads,
        len(ops),
        len(windows),
        ctypes.addressof(c_ops),
        ctypes.addressof(c_windows),
        (ctypes.c_int64 * len(Buffer))(*widths.values()),
    )
    return Program(struct, widths, [c_ops, c_windows, frequencies, weights, *pages])


def _widths(config: DecoderConfig) -> dict[Buffer, int]:
    """Numbers in a row of each buffer, in whole panels."""
    sizes = {
        Buffer.X: config.hidden,
        Buffer.QKV: (config.heads + 2 * config.kv_heads) * config.head_dim,
        Buffer.ATTENDED: config.heads * config.head_dim,
        Buffer.INNER: config.intermediate,
        Buffer.LOGITS: config.vocab,
    }
    return {buffer: rounded_up(size, PANEL) for buffer, size in sizes.items()}


def _layer_ops(layer: Layer, pages: Tensor, rotates: bool, plan: int) -> list[COp]:
    attention = COp(
        kind=Kind.ATTEND,
        from_=Buffer.QKV,
        to=Buffer.ATTENDED,
        qk_norm=_address(layer.qk_norm),
        pages=pages.data_ptr(),
        rotates=rotates,
        plan=plan,
    )
    return [
        _linear(layer.qkv, Buffer.X, Buffer.QKV),
        attention,
        _linear(layer.o, Buffer.ATTENDED, Buffer.X, Epilogue.ADD),
        _linear(layer.gate_up, Buffer.X, Buffer.INNER, Epilogue.GATED),
        _linear(layer.down, Buffer.INNER, Buffer.X, Epilogue.ADD),
    ]


def _embed(embedding: Packed) -> COp:
    return COp(kind=Kind.EMBED, to=Buffer.X, matrix=embedding.struct)


def _linear(linear: Linear, source: Buffer, to: Buffer, epilogue: Epilogue = Epilogue.STORE) -> COp:
    return COp(
        kind=Kind.LINEAR,
        from_=source,
        to=to,
        epilogue=epilogue,
        matrix=linear.matrix.struct,
        norm=_address(linear.norm),
        bias=_address(linear.bias),
    )


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
