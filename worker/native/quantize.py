"""Makes checkpoints of fewer bits, in the form of compressed-tensors, which vLLM, SGLang and transformers read as well.

Only the linear layers are quantized; embedding, head and norms stay as they are. What is written is dequantized exactly by
whoever reads it, so the perplexity measured here is everybody's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from worker.files import INDEX, WHOLE
from worker.native.checkpoint import Checkpoint
from worker.native.config import DecoderConfig
from worker.native.groups import LEAST, SEARCH_STEPS, Groups, Search, nonzero
from worker.native.loader import DTYPES, floats, tensor_shapes

FP8 = torch.float8_e4m3fn
FP8_MOST = 448.0  # the largest number of float8
SHARD_BYTES = 2 << 30
SLAB_NUMBERS = 1 << 18  # that are searched through at a time: what a cache holds
SHRINK = 0.04  # of the range of a group of 4 bits, from one that is tried to the next
LINEAR = "_proj.weight"  # how their names end
Parts = dict[str, Tensor]  # by the last part of their names


@dataclass(frozen=True, slots=True)
class Recipe:
    """What becomes of a matrix. `scale_dtype`: how scales are stored, so what numbers are rounded for."""

    name: str  # int8, int4 or fp8
    group: int = 32  # numbers of a row that share a scale; of fp8 it is all of them
    scale_dtype: torch.dtype = torch.bfloat16

    def fits(self, shape: tuple[int, ...]) -> bool:
        return self.name == "fp8" or shape[1] % self.group == 0

    def parts(self, weight: Tensor, importance: Tensor | None = None) -> Parts:
        """The tensors that stand for a matrix [rows, columns] in a checkpoint."""
        if self.name == "fp8":
            return self._fp8(weight)
        step = max(1, SLAB_NUMBERS // weight.shape[1])
        slabs = [self._integers(slab.float(), importance) for slab in weight.split(step)]
        numbers, scale, zero = (torch.cat(tensors) for tensors in zip(*slabs, strict=True))
        parts = {"weight_packed": packed(numbers, self.bits), "weight_scale": scale.to(self.scale_dtype)}
        if self.name == "int4":
            parts["weight_zero_point"] = packed(zero.t(), 4).t().contiguous()
        return parts | {"weight_shape": torch.tensor(weight.shape)}

    def floats(self, weight: Tensor, importance: Tensor | None = None) -> Tensor:
        """The matrix as its parts would be read."""
        if self.name == "fp8":
            parts = self._fp8(weight)
            return parts["weight"].float() * parts["weight_scale"].float()
        numbers, scale, zero = self._integers(weight.float(), importance)
        grouped = numbers.unflatten(1, (-1, self.group)).float() - zero[..., None].float()
        return (grouped * scale[..., None]).flatten(1)

    @property
    def bits(self) -> int:
        return 4 if self.name == "int4" else 8

    def stored_bytes(self, shape: tuple[int, ...]) -> int:
        """Of a matrix's parts."""
        rows, columns = shape
        scale_bytes = rows * self.scale_dtype.itemsize
        if self.name == "fp8":
            return rows * columns + scale_bytes
        groups = columns // self.group
        zero_bytes = -(-rows // 8) * 4 * groups if self.name == "int4" else 0
        return rows * (-(-columns * self.bits // 32)) * 4 + scale_bytes * groups + zero_bytes

    def config(self, ignored: list[str]) -> dict[str, Any]:
        """The quantization_config of config.json."""
        weights = {"num_bits": self.bits, "type": "int", "symmetric": self.name == "int8", "dynamic": False}
        weights |= {"strategy": "group", "group_size": self.group}
        form = "pack-quantized"
        if self.name == "fp8":
            weights |= {"type": "float", "symmetric": True, "strategy": "channel", "group_size": None}
            form = "naive-quantized"
        activations = {"input_activations": None, "output_activations": None}
        group = {"targets": ["Linear"], "weights": weights, **activations, "format": form}
        return {
            "quant_method": "compressed-tensors",
            "format": form,
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": ignored,
            "kv_cache_scheme": None,
        }

    def _fp8(self, weight: Tensor) -> Parts:
        """A scale for each row."""
        weight = weight.float()
        scale = self._stored(weight.abs().amax(1, keepdim=True) / FP8_MOST)
        numbers = (weight / nonzero(scale)).clamp_(-FP8_MOST, FP8_MOST).to(FP8)
        return {"weight": numbers, "weight_scale": scale.to(self.scale_dtype)}

    def _integers(self, weight: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Numbers from 0 on [rows, columns], scales and zero points [rows, groups]: weight = scale * (number - zero)."""
        grouped = weight.unflatten(1, (-1, self.group))
        if self.name == "int4":
            return self._four(grouped, importance)
        scale = self._stored(grouped.abs().amax(-1) / 127)
        numbers = (grouped / nonzero(scale)[..., None]).round_().clamp_(-127, 127).add_(128).to(torch.uint8)
        return numbers.flatten(1), scale, torch.full_like(scale, 128, dtype=torch.uint8)

    def _four(self, w: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Of some ranges, each with the scale that then fits best, the one of the least squared error."""
        search = Search(w, importance)
        low, high = w.amin(-1).clamp_max_(0), w.amax(-1).clamp_min_(0)
        widest = nonzero((high - low) / 15)
        zero = (-low / widest).round_().clamp_(0, 15)
        for step in range(SEARCH_STEPS):
            scale = self._stored(_fitting(search, widest * (1 - SHRINK * step), zero))
            search.offer(scale, -zero * scale)
        return search.values.to(torch.uint8).flatten(1), search.scale, zero.to(torch.uint8)

    def _stored(self, scale: Tensor) -> Tensor:
        """Rounded to what the file holds."""
        return scale.to(self.scale_dtype).float()


def _fitting(search: Search, scale: Tensor, zero: Tensor) -> Tensor:
    """The scale with which the values that this scale gives have the least error."""
    signed = search.nearest(scale, -zero * scale) - zero[..., None]
    fitted = search.sum(signed * search.w) / search.sum(signed.square()).clamp_min(LEAST)
    return torch.where(fitted > 0, fitted, scale)


def packed(numbers: Tensor, bits: int) -> Tensor:
    """Numbers [rows, columns] in words of 32 bits, the lowest bits first, the last word filled up: [rows, words]."""
    each = 32 // bits
    padded = torch.nn.functional.pad(numbers.long(), (0, -numbers.shape[1] % each))
    words = (padded.unflatten(1, (-1, each)) << torch.arange(0, 32, bits)).sum(-1)
    return words.to(torch.int32)  # the upper half of the range becomes negative


# --- checkpoints ------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Work:
    """A model that is to be quantized: its tensors, and what each column of a matrix counts, by module, if that is known."""

    checkpoint: Checkpoint
    config: DecoderConfig
    importance: Mapping[str, Tensor] = field(default_factory=dict)

    def is_quantized(self, name: str, recipe: Recipe) -> bool:
        return name.endswith(LINEAR) and recipe.fits(self.checkpoint.shapes[name])

    def importance_of(self, name: str) -> Tensor | None:
        return self.importance.get(name.removesuffix(".weight"))


class AsIfQuantized(Checkpoint):
    """The model as it would be read once it were quantized; nothing is written."""

    def __init__(self, work: Work, recipe: Recipe) -> None:
        self.work, self.recipe = work, recipe
        self.folder, self.shapes = work.checkpoint.folder, work.checkpoint.shapes

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass  # the checkpoint is open for others, too

    def read(self, name: str, rows: slice = slice(None)) -> Tensor | Groups:
        found = self.work.checkpoint.read(name, rows)
        if not self.work.is_quantized(name, self.recipe):
            return found
        return self.recipe.floats(floats(found), self.work.importance_of(name))

    def dtype(self, name: str) -> str:
        return self.work.checkpoint.dtype(name)

    def stored_bytes(self, name: str) -> int:
        return self.work.checkpoint.stored_bytes(name)

    def place(self, name: str) -> str:
        return self.work.checkpoint.place(name)


def write_quantized(
    work: Work, recipe: Recipe, config: dict[str, Any], folder: Path, progress: Callable[[int, int], None]
) -> None:
    """config.json and the weights, into an empty folder, tensor by tensor."""
    shapes = tensor_shapes(work.config)
    shards, total = _Shards(folder), sum(work.checkpoint.stored_bytes(name) for name in shapes)
    done, ignored = 0, [] if work.config.tied_head else ["lm_head"]
    for name, shape in shapes.items():
        found = work.checkpoint.read(name)
        if work.is_quantized(name, recipe):
            for part, tensor in recipe.parts(floats(found), work.importance_of(name)).items():
                shards.add(f"{name.removesuffix('weight')}{part}", tensor)
        else:
            shards.add(name, floats(found).to(DTYPES[work.checkpoint.dtype(name)]))
            ignored += [name.removesuffix(".weight")] if name.endswith(LINEAR) and len(shape) == 2 else []
        done += work.checkpoint.stored_bytes(name)
        progress(done, total)
    shards.finish()
    dtype = str(recipe.scale_dtype).removeprefix("torch.")
    described = config | {"torch_dtype": dtype, "quantization_config": recipe.config(ignored)}
    (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n", "utf-8")


class _Shards:
    """Safetensors files of bounded size; how many they are is only known in the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._held: dict[str, Tensor] = {}
        self._held_bytes = self._total_bytes = 0
        self._tensors: list[list[str]] = []  # by shard

    def add(self, name: str, tensor: Tensor) -> None:
        if self._held and self._held_bytes + tensor.nbytes > SHARD_BYTES:
            self._write()
        self._held[name] = tensor.contiguous()
        self._held_bytes += tensor.nbytes

    def finish(self) -> None:
        self._write()
        count = len(self._tensors)
        names = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)] if count > 1 else [WHOLE]
        for i, name in enumerate(names):
            self._file(i).chmod(0o644)  # safetensors makes files that nobody else may read
            self._file(i).rename(self.folder / name)
        if count > 1:
            weight_map = {tensor: name for name, held in zip(names, self._tensors, strict=True) for tensor in held}
            index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
            (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")

    def _write(self) -> None:
        save_file(self._held, self._file(len(self._tensors)), metadata={"format": "pt"})
        self._tensors.append(list(self._held))
        self._total_bytes += self._held_bytes
        self._held, self._held_bytes = {}, 0

    def _file(self, index: int) -> Path:
        return self.folder / f"part-{index}.safetensors"
