"""Checkpoints to the weights the decoder runs on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from worker.native.checkpoint import Checkpoint
from worker.native.config import DecoderConfig
from worker.native.groups import Groups
from worker.native.linear import PLAIN, Linear, Products

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# What is copied at a time: on a CPU a cache still holds it when it is looked through for NaN.
SLAB_BYTES = {"cpu": 4 << 20, "cuda": 64 << 20}
# Of a layer, the matrix that is multiplied and the modules of a checkpoint that it is made of.
MATRICES = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
Progress = Callable[[int, int], None]  # bytes done, bytes in all


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

    def tensors(self) -> list[Tensor]:
        norms = [norm for norm in (self.attention_norm, self.qk_norm, self.mlp_norm) if norm is not None]
        matrices = (self.qkv, self.o, self.gate_up, self.down)
        return norms + [tensor for matrix in matrices for tensor in matrix.tensors()]


@dataclass(frozen=True, slots=True)
class Weights:
    """All weights of a decoder; with a tied head, `head` multiplies with `embedding`."""

    embedding: Tensor  # [vocab, hidden]
    layers: tuple[LayerWeights, ...]
    norm: Tensor  # [hidden]
    head: Linear  # hidden -> vocab

    def tensors(self) -> list[Tensor]:
        """Every tensor once."""
        found = [self.embedding, self.norm, *self.head.tensors()]
        found += [tensor for layer in self.layers for tensor in layer.tensors()]
        return list({id(tensor): tensor for tensor in found}.values())


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
    qkv = {"q_proj": (q, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden)}
    o = {"o_proj": (hidden, q)}
    mlp = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    modules = (("self_attn", qkv, config.qkv_bias), ("self_attn", o, config.o_bias), ("mlp", mlp, config.mlp_bias))
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    for module, matrices, bias in modules:
        for name, shape in matrices.items():
            shapes[f"{module}.{name}.weight"] = shape
            if bias:
                shapes[f"{module}.{name}.bias"] = shape[:1]
    if config.qk_norm:
        shapes |= {f"self_attn.{name}.weight": (config.head_dim,) for name in ("q_norm", "k_norm")}
    return shapes


def check_tensors(config: DecoderConfig, checkpoint: Checkpoint) -> None:
    """Raises one ValueError with everything missing, unexpected or of another shape than the config says."""
    wanted, found = tensor_shapes(config), checkpoint.shapes
    # Old checkpoints store the RoPE frequencies, some a second copy of a tied head.
    ignored = {name for name in found if name.endswith("rotary_emb.inv_freq")}
    ignored |= {"lm_head.weight"} if config.tied_head else set()
    faults = {
        "missing": [checkpoint.called(name) for name in sorted(wanted.keys() - found.keys())],
        "unexpected": sorted(checkpoint.place(name) for name in found.keys() - wanted.keys() - ignored),
        "of another shape": [
            f"{checkpoint.place(name)} {list(found[name])} instead of {list(shape)}"
            for name, shape in wanted.items()
            if found.get(name, shape) != shape
        ],
    }
    if any(faults.values()):
        told = "; ".join(_fault(*fault) for fault in faults.items() if fault[1])
        raise ValueError(f"{checkpoint.folder}: the tensors do not fit {checkpoint.described_by}: {told}")
    for name in wanted:
        checkpoint.dtype(name)
    if config.tied_head and "lm_head.weight" in found:
        _check_tied(checkpoint)


def _check_tied(checkpoint: Checkpoint) -> None:
    embedding, head = (floats(checkpoint.read(name)) for name in ("model.embed_tokens.weight", "lm_head.weight"))
    if not torch.equal(head.to(embedding.dtype), embedding):
        place = checkpoint.place("lm_head.weight")
        raise ValueError(f"config.json says tie_word_embeddings, but {place} differs from the embedding")


def _fault(kind: str, names: list[str], shown: int = 4) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return f"{kind}: {', '.join(names[:shown])}{more}"


def load_weights(
    checkpoint: Checkpoint,
    config: DecoderConfig,
    device: torch.device,
    dtype: torch.dtype,
    products: Products = PLAIN,
    progress: Progress = lambda done, total: None,
) -> Weights:
    """Reads a checkpoint tensor by tensor into memory of our own. Raises ValueError when it does not fit the config."""
    check_tensors(config, checkpoint)
    reader = _Reader(checkpoint, device, dtype, products, stored_bytes(checkpoint, config), progress)
    embedding = (reader.matrix if config.tied_head else reader.stack)("model.embed_tokens.weight")
    return Weights(
        embedding=embedding,
        layers=tuple(_load_layer(reader, config, f"model.layers.{i}") for i in range(config.layers)),
        norm=reader.stack("model.norm.weight"),
        head=reader.products.linear(embedding if config.tied_head else reader.matrix("lm_head.weight")),
    )


def _load_layer(reader: _Reader, config: DecoderConfig, prefix: str) -> LayerWeights:
    def linear(bias: bool, *modules: str) -> Linear:
        names = [f"{prefix}.{module}" for module in modules]
        weight = reader.matrix(*(f"{name}.weight" for name in names))
        return reader.products.linear(weight, reader.stack(*(f"{name}.bias" for name in names)) if bias else None)

    return LayerWeights(
        attention_norm=reader.stack(f"{prefix}.input_layernorm.weight"),
        qkv=linear(config.qkv_bias, *(f"self_attn.{name}_proj" for name in "qkv")),
        qk_norm=_head_norms(reader, config, prefix) if config.qk_norm else None,
        o=linear(config.o_bias, "self_attn.o_proj"),
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

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype,
        products: Products,
        total_bytes: int,
        progress: Progress,
    ) -> None:
        self.checkpoint, self.device, self.dtype, self.products = checkpoint, device, dtype, products
        self.done_bytes, self.total_bytes, self.progress = 0, total_bytes, progress

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
            self._copy(part, name)
        return stacked

    def _copy(self, part: Tensor, name: str) -> None:
        """Raises ValueError for a number that is none: with it, every answer would be noise."""
        step = max(1, SLAB_BYTES[self.device.type] // part[0].nbytes)
        stored_bytes = self.checkpoint.stored_bytes(name)
        for start in range(0, len(part), step):
            to, slab = part[start : start + step], floats(self.checkpoint.read(name, slice(start, start + step)))
            to.copy_(slab)
            # The smaller one is read again, on the device if that is another; there also what a float16 cannot hold.
            # Adding up rows that overlap (`random_weights`) would take twenty times as long.
            is_copy_read = self.device.type != "cpu" or to.itemsize < slab.itemsize or not slab.is_contiguous()
            if not _is_finite(to if is_copy_read else slab):
                as_read = str(self.dtype).removeprefix("torch.")
                raise ValueError(
                    f"{self.checkpoint.folder}: {self.checkpoint.place(name)} has NaN or infinite values (read as {as_read})"
                )
            self.progress(self.done_bytes + stored_bytes * (start + len(to)) // len(part), self.total_bytes)
        self.done_bytes += stored_bytes


def _is_finite(numbers: Tensor) -> bool:
    """A sum is NaN or infinite where a number is, and takes a twentieth of the time of `isfinite`; it may also overflow."""
    return bool(numbers.sum().isfinite()) or bool(numbers.isfinite().all())


def floats(weight: Tensor | Groups) -> Tensor:
    return weight.floats() if isinstance(weight, Groups) else weight


def stored_bytes(checkpoint: Checkpoint, config: DecoderConfig) -> int:
    """What reading a whole checkpoint reads."""
    return sum(checkpoint.stored_bytes(name) for name in tensor_shapes(config))
