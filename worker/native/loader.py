"""Safetensors checkpoints in the Hugging Face form to the weights the decoder runs on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from worker.native.config import DecoderConfig
from worker.native.linear import Linear

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SAFETENSORS_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer. What reads the same input is one matrix: q, k and v; gate and up."""

    attention_norm: Tensor  # [hidden]
    qkv: Linear  # hidden -> (heads + 2 * kv_heads) * head_dim
    qk_norm: Tensor | None  # [heads + kv_heads, head_dim]
    o: Linear  # heads * head_dim -> hidden
    mlp_norm: Tensor  # [hidden]
    gate_up: Linear  # hidden -> 2 * intermediate
    down: Linear  # intermediate -> hidden


@dataclass(frozen=True, slots=True)
class Weights:
    """All weights of a decoder; with a tied head, `head` multiplies with `embedding`."""

    embedding: Tensor  # [vocab, hidden]
    layers: tuple[LayerWeights, ...]
    norm: Tensor  # [hidden]
    head: Linear  # hidden -> vocab

    def tensors(self) -> list[Tensor]:
        """Every tensor once."""
        parts: list[Any] = [self.embedding, self.norm, self.head]
        parts += [getattr(layer, part.name) for layer in self.layers for part in fields(layer)]
        found = [tensor for part in parts for tensor in _tensors(part)]
        return list({id(tensor): tensor for tensor in found}.values())


def _tensors(part: Linear | Tensor | None) -> list[Tensor]:
    if part is None:
        return []
    return part.tensors() if isinstance(part, Linear) else [part]


def tensor_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a checkpoint of this config holds."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab, config.hidden),
        "model.norm.weight": (config.hidden,),
    }
    if not config.tied_head:
        shapes["lm_head.weight"] = (config.vocab, config.hidden)
    layer = _layer_shapes(config)
    for i in range(config.layers):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes


def _layer_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    hidden, inner = config.hidden, config.intermediate
    q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    attention = {"q_proj": (q, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, q)}
    mlp = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    for module, matrices, bias in (("self_attn", attention, config.attention_bias), ("mlp", mlp, config.mlp_bias)):
        for name, shape in matrices.items():
            shapes[f"{module}.{name}.weight"] = shape
            if bias:
                shapes[f"{module}.{name}.bias"] = shape[:1]
    if config.qk_norm:
        shapes |= {f"self_attn.{name}.weight": (config.head_dim,) for name in ("q_norm", "k_norm")}
    return shapes


class Checkpoint:
    """The memory-mapped safetensors files of a directory. Raises ValueError when they are not all there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files: list[Any] = []
        self._file_of: dict[str, Any] = {}
        for file in self._find():
            handle = safe_open(file, framework="pt")
            self._files.append(handle)
            self._file_of |= dict.fromkeys(handle.keys(), handle)
        self.shapes = {name: tuple(file.get_slice(name).get_shape()) for name, file in self._file_of.items()}

    def _find(self) -> list[Path]:
        index = self.path / "model.safetensors.index.json"
        weight_map = json.loads(index.read_text())["weight_map"] if index.exists() else {"": "model.safetensors"}
        files = [self.path / name for name in sorted(set(weight_map.values()))]
        absent = [file.name for file in files if not file.exists()]
        if absent:
            raise ValueError(f"{self.path} lacks {', '.join(absent)}")
        return files

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files:
            file.__exit__(kind, error, trace)

    def read(self, name: str) -> Tensor:
        tensor: Tensor = self._file_of[name].get_tensor(name)
        return tensor

    def dtype(self, name: str) -> str:
        """float32, bfloat16 or float16. Raises ValueError for any other."""
        stored = self._file_of[name].get_slice(name).get_dtype()
        if stored not in SAFETENSORS_DTYPES:
            raise ValueError(f"{name} is stored as {stored}; known: {', '.join(SAFETENSORS_DTYPES)}")
        return SAFETENSORS_DTYPES[stored]


def check_tensors(config: DecoderConfig, found: dict[str, tuple[int, ...]]) -> None:
    """Raises one ValueError with everything missing, unexpected or of another shape than the config says."""
    wanted = tensor_shapes(config)
    # Old checkpoints store the RoPE frequencies, some a second copy of a tied head.
    ignored = {name for name in found if name.endswith("rotary_emb.inv_freq")}
    ignored |= {"lm_head.weight"} if config.tied_head else set()
    faults = {
        "missing": sorted(wanted.keys() - found.keys()),
        "unexpected": sorted(found.keys() - wanted.keys() - ignored),
        "of another shape": [
            f"{name} {list(found[name])} instead of {list(shape)}"
            for name, shape in wanted.items()
            if found.get(name, shape) != shape
        ],
    }
    if any(faults.values()):
        raise ValueError("the tensors do not fit the config: " + "; ".join(_fault(*f) for f in faults.items() if f[1]))


def _fault(kind: str, names: list[str], shown: int = 4) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return f"{kind}: {', '.join(names[:shown])}{more}"


def load_weights(checkpoint: Checkpoint, config: DecoderConfig, device: torch.device, dtype: torch.dtype) -> Weights:
    """Reads a checkpoint tensor by tensor into memory of our own. Raises ValueError when it does not fit the config."""
    check_tensors(config, checkpoint.shapes)
    reader = _Reader(checkpoint, device, dtype)
    embedding = (reader.matrix if config.tied_head else reader.stack)("model.embed_tokens.weight")
    return Weights(
        embedding=embedding,
        layers=tuple(_load_layer(reader, config, f"model.layers.{i}") for i in range(config.layers)),
        norm=reader.stack("model.norm.weight"),
        head=Linear(embedding if config.tied_head else reader.matrix("lm_head.weight")),
    )


def _load_layer(reader: _Reader, config: DecoderConfig, prefix: str) -> LayerWeights:
    def linear(bias: bool, *modules: str) -> Linear:
        names = [f"{prefix}.{module}" for module in modules]
        weight = reader.matrix(*(f"{name}.weight" for name in names))
        return Linear(weight, reader.stack(*(f"{name}.bias" for name in names)) if bias else None)

    return LayerWeights(
        attention_norm=reader.stack(f"{prefix}.input_layernorm.weight"),
        qkv=linear(config.attention_bias, *(f"self_attn.{name}_proj" for name in "qkv")),
        qk_norm=_head_norms(reader, config, prefix) if config.qk_norm else None,
        o=linear(config.attention_bias, "self_attn.o_proj"),
        mlp_norm=reader.stack(f"{prefix}.post_attention_layernorm.weight"),
        gate_up=linear(config.mlp_bias, "mlp.gate_proj", "mlp.up_proj"),
        down=linear(config.mlp_bias, "mlp.down_proj"),
    )


def _head_norms(reader: _Reader, config: DecoderConfig, prefix: str) -> Tensor:
    """The scales of q's and k's norms, repeated for each head: [heads + kv_heads, head_dim]."""
    q, k = (reader.stack(f"{prefix}.self_attn.{name}_norm.weight") for name in "qk")
    return torch.cat((q.expand(config.heads, -1), k.expand(config.kv_heads, -1)))


class _Reader:
    """Copies tensors out of the mapping, several of them under each other."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        self.checkpoint, self.device, self.dtype = checkpoint, device, dtype

    def stack(self, *names: str) -> Tensor:
        first, *others = (self.checkpoint.shapes[name] for name in names)
        rows = first[0] + sum(shape[0] for shape in others)
        return self._fill(torch.empty(rows, *first[1:], dtype=self.dtype, device=self.device), names)

    def matrix(self, *names: str) -> Tensor:
        """A stack that is multiplied with: the same [out, in], but in float32 on a CPU column after column in memory.

        With a few rows of input the product then reads long runs: for 15 MB of small matrices and one row 0.41 ms
        instead of 0.68 (torch 2.13, MKL, one thread of an EPYC 9004); with many rows, or long ones, both are the same.
        """
        if self.device.type != "cpu" or self.dtype != torch.float32:
            return self.stack(*names)
        shapes = [self.checkpoint.shapes[name] for name in names]
        by_column = torch.empty(shapes[0][1], sum(shape[0] for shape in shapes), dtype=self.dtype)
        return self._fill(by_column.t(), names)

    def _fill(self, stacked: Tensor, names: Sequence[str]) -> Tensor:
        parts = stacked.split([self.checkpoint.shapes[name][0] for name in names])
        for part, name in zip(parts, names, strict=True):
            part.copy_(self.checkpoint.read(name))
        return stacked
