"""A decoder's config and checkpoint as a flat program of fused phases over packed weights: see `step.c`."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import torch
import torch.nn.functional as F
from torch import Tensor

from worker.native.checkpoint import Checkpoint
from worker.native.config import DecoderConfig
from worker.native.cpu.pack import GROUP, PANEL, Arena, CMatrix, Kernels, Packed, new_matrix, rounded_up
from worker.native.decoder import rope_frequencies
from worker.native.loader import check_tensors, floats, stored_bytes

Progress = Callable[[int, int], None]
HALF_PANEL = PANEL // 2


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

    format: str
    embedding: Packed
    layers: tuple[Layer, ...]
    head: Linear

    def tensors(self) -> list[Tensor]:
        """Every tensor once."""
        linears = [matrix for layer in self.layers for matrix in (layer.qkv, layer.o, layer.gate_up, layer.down)]
        norms = [layer.qk_norm for layer in self.layers if layer.qk_norm is not None]
        found = self.embedding.tensors() + norms + [t for linear in (*linears, self.head) for t in linear.tensors()]
        return list({id(tensor): tensor for tensor in found}.values())


# --- loading ----------------------------------------------------------------------------------------------------------


def load_packed(
    checkpoint: Checkpoint,
    config: DecoderConfig,
    format: str,
    kernels: Kernels,
    progress: Progress = lambda done, total: None,
) -> PackedWeights:
    """Packs a checkpoint tensor by tensor. Raises ValueError when it does not fit the config, or has NaN."""
    check_tensors(config, checkpoint)
    packer = _Packer(checkpoint, format, kernels, stored_bytes(checkpoint, config), progress)
    embedding = packer.stacked("model.embed_tokens.weight")
    layers = tuple(_pack_layer(packer, config, f"model.layers.{i}") for i in range(config.layers))
    head = embedding if config.tied_head else packer.stacked("lm_head.weight")
    return PackedWeights(format, embedding, layers, Linear(head, packer.vector("model.norm.weight")))


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
        matrix = new_matrix(self.arena, sum(shape[0] for shape in shapes), shapes[0][1], self.format)
        first = 0
        for name, shape in zip(names, shapes, strict=True):
            self._pack(matrix, name, first)
            first += shape[0]
        return matrix

    def interleaved(self, gate: str, up: str) -> Packed:
        rows, columns = self.checkpoint.shapes[gate]
        matrix = new_matrix(self.arena, 2 * rounded_up(rows, HALF_PANEL), columns, self.format)
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
            raise self._not_finite(name)
        return source

    def _pack(self, matrix: Packed, name: str, first: int, is_interleaved: bool = False) -> None:
        source = floats(self.checkpoint.read(name))
        if self.kernels.pack(matrix, source, first, is_interleaved):
            raise self._not_finite(name)
        self._count(name)

    def _not_finite(self, name: str) -> ValueError:
        place = self.checkpoint.place(name)
        return ValueError(f"{self.checkpoint.folder}: {place} has NaN or infinite values (read as {self.format})")

    def _count(self, name: str) -> None:
        self.done_bytes += self.checkpoint.stored_bytes(name)
        self.progress(self.done_bytes, self.total_bytes)


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
