"""Checkpoints of GPTQ, AWQ, compressed-tensors and fp8: the parts of a matrix put together again.

A matrix lies in several tensors, whose names are that of its module and one of the `PARTS`. Integers become groups where
those of the file are made of ours, and nothing is lost; everything else becomes float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from worker.amounts import in_bytes
from worker.native.checkpoint import Checkpoint
from worker.native.config import DecoderConfig
from worker.native.groups import GROUP, Groups
from worker.native.loader import tensor_shapes
from worker.native.quantization import Quantization, Scheme

GPTQ_PARTS = ("qweight", "qzeros", "scales", "g_idx")
PARTS = {
    "gptq": GPTQ_PARTS,
    "awq": GPTQ_PARTS[:3],
    "compressed-tensors": (
        "weight_packed",
        "weight",
        "weight_scale",
        "weight_zero_point",
        "weight_shape",
        "weight_g_idx",
    ),
    "fp8": ("weight", "weight_scale_inv", "weight_scale"),
}
# Of activations and of the KV cache, which are not quantized here.
IGNORED = ("input_scale", "input_zero_point", "output_scale", "k_scale", "v_scale", "input_global_scale")
SCALES = ("scales", "weight_scale", "weight_scale_inv")  # one of them says that a module is quantized
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where in an int32 a number's 4 bits are
FLOATS = ("F32", "F16", "BF16")
INTEGERS = ("I32", "I64")


@dataclass(frozen=True, slots=True)
class Stored:
    """A matrix's numbers [rows, cols] from 0 on, which scale and zero point [rows, groups] belong to each column."""

    numbers: Tensor
    scale: Tensor
    zero: Tensor
    group: int  # columns that share a scale
    index: Tensor | None  # the group of each column, where they are not in order

    def matrix(self, bits: int) -> Tensor | Groups:
        if self.index is None and self.group % GROUP == 0:
            scale, zero = (t.repeat_interleave(self.group // GROUP, 1) for t in (self.scale, self.zero))
            return Groups(bits, self.numbers, scale, -zero * scale)
        columns = torch.arange(self.numbers.shape[1]) // self.group if self.index is None else self.index
        return (self.numbers - self.zero[:, columns]) * self.scale[:, columns]


class QuantizedCheckpoint(Checkpoint):
    """As `Checkpoint`, with whole matrices for the parts in the files. Raises ValueError where they do not fit together."""

    def __init__(self, folder: Path, quantization: Quantization, config: DecoderConfig) -> None:
        super().__init__(folder)
        self.quantization = quantization
        self._parts_of: dict[str, dict[str, str]] = {}  # of a matrix: part -> tensor
        for module in self._modules():
            self._parts_of[f"{module}.weight"] = self._parts(module)
        taken = {tensor for parts in self._parts_of.values() for tensor in parts.values()}
        wanted = tensor_shapes(config)
        plain = {
            name: shape
            for name, shape in self.shapes.items()
            if name not in taken and (name in wanted or not self._says_nothing(name))
        }
        self.shapes = plain | {name: self._checked_shape(name) for name in self._parts_of}

    def _says_nothing(self, name: str) -> bool:
        """Of activations; or a bias of zeros, which older GPTQ tools gave to every matrix."""
        module, _, part = name.rpartition(".")
        if part == "bias" and f"{module}.weight" in self._parts_of:
            return not bool(self._tensor(name).any())
        return part in IGNORED

    def read(self, name: str, rows: slice = slice(None)) -> Tensor | Groups:
        if name not in self._parts_of:
            return super().read(name, rows)
        scheme = self._scheme(name)
        if scheme.is_float:
            return self._floats(name, rows)
        if self.quantization.method == "compressed-tensors":
            stored = self._compressed(name, scheme, rows)
        else:
            stored = self._by_column(name, scheme, rows)
        return stored.matrix(scheme.bits)

    def dtype(self, name: str) -> str:
        return "bfloat16" if name in self._parts_of else super().dtype(name)

    def kernel_bits(self, name: str) -> int:
        return self._scheme(name).bits if name in self._parts_of else 16

    def kernel_offsets(self, name: str) -> bool:
        """Not for groups like ours around the same centre."""
        scheme = self._scheme(name)
        group, index = self._index(name, "weight_g_idx" if "weight_g_idx" in self._parts_of[name] else "g_idx", scheme)
        if index is not None or group % GROUP:
            return True
        if self.quantization.method == "compressed-tensors":
            return "weight_zero_point" in self._parts_of[name]
        zero = unpacked(self._part(name, "qzeros"), scheme.bits).int() + self.quantization.zero_shift
        return bool((zero != 1 << (scheme.bits - 1)).any())

    def stored_bytes(self, name: str) -> int:
        if name not in self._parts_of:
            return super().stored_bytes(name)
        return sum(self._tensor(part).nbytes for part in self._parts_of[name].values())

    def place(self, name: str) -> str:
        if name not in self._parts_of:
            return super().place(name)
        return super().place(next(iter(self._parts_of[name].values())))

    def describe(self) -> str:
        kinds = sorted({_name(self._scheme(name)) for name in self._parts_of})
        total = sum(self._tensor(name).nbytes for name in self._file_of)
        return f"{len(self._parts_of)} matrices in {', '.join(kinds)} ({self.quantization.method}); {in_bytes(total)} in the files"

    # --- what is there

    def _modules(self) -> Iterable[str]:
        found = (name.rpartition(".") for name in self.shapes)
        known = PARTS[self.quantization.method]
        return sorted({module for module, _, part in found if part in SCALES and part in known})

    def _parts(self, module: str) -> dict[str, str]:
        names = {part: f"{module}.{part}" for part in PARTS[self.quantization.method]}
        return {part: name for part, name in names.items() if name in self.shapes}

    def _scheme(self, name: str) -> Scheme:
        module = name.removesuffix(".weight")
        found = self.quantization.scheme(module)
        if found is None:
            raise self._fault(name, "weight_scale", "no group of quantization_config is for it")
        return found

    def _checked_shape(self, name: str) -> tuple[int, ...]:
        """Of the whole matrix. Raises ValueError where a part is missing, or of another kind or shape."""
        scheme, method = self._scheme(name), self.quantization.method
        if method == "compressed-tensors":
            shape = self._shape_compressed(name, scheme)
        elif method == "fp8":
            shape = self._shape_of(name, "weight", ("F8_E4M3",), 2)
        else:
            shape = self._shape_by_column(name, scheme)
        if method == "fp8" or scheme.is_float:
            self._check_float_scale(name, shape)
        return shape

    def _shape_by_column(self, name: str, scheme: Scheme) -> tuple[int, ...]:
        """GPTQ packs the numbers of a column, AWQ those of a row, of what is [in, out]."""
        each = 32 // scheme.bits
        first, second = self._shape_of(name, "qweight", INTEGERS, 2)
        columns, rows = (first, second * each) if self.quantization.method == "awq" else (first * each, second)
        groups = self._groups(name, scheme, columns)
        self._expect(name, "scales", (groups, rows), FLOATS)
        self._expect(name, "qzeros", (groups, rows // each), INTEGERS)
        if "g_idx" in self._parts_of[name]:
            self._expect(name, "g_idx", (columns,), INTEGERS)
        return rows, columns

    def _shape_compressed(self, name: str, scheme: Scheme) -> tuple[int, ...]:
        each = 32 // scheme.bits
        if scheme.is_packed:
            rows, words = self._shape_of(name, "weight_packed", INTEGERS, 2)
            columns = self._columns(name, rows, words, each)
        else:
            rows, columns = self._shape_of(name, "weight", ("F8_E4M3",) if scheme.is_float else ("I8",), 2)
        if scheme.is_float and not scheme.group:
            return rows, columns
        groups = self._groups(name, scheme, columns)
        if math.prod(self._shape_of(name, "weight_scale", FLOATS)) != 1:
            self._expect(name, "weight_scale", (rows, groups), FLOATS)
        if "weight_zero_point" in self._parts_of[name]:
            zeros = (-(-rows // each), groups) if scheme.is_packed else (rows, groups)
            self._expect(name, "weight_zero_point", zeros, (*INTEGERS, "I8"))
        if "weight_g_idx" in self._parts_of[name]:
            self._expect(name, "weight_g_idx", (columns,), INTEGERS)
        return rows, columns

    def _columns(self, name: str, rows: int, words: int, each: int) -> int:
        """Of a packed matrix, whose last word may not be full."""
        if "weight_shape" not in self._parts_of[name]:
            return words * each
        self._expect(name, "weight_shape", (2,), INTEGERS)
        told = tuple(int(size) for size in self._part(name, "weight_shape"))
        if told[0] != rows or not 0 <= words * each - told[1] < each:
            raise self._fault(name, "weight_shape", f"it says {list(told)}, but there are {rows} rows of {words} words")
        return told[1]

    def _check_float_scale(self, name: str, shape: tuple[int, ...]) -> None:
        """One for all, one per row, per group of a row, or per block of rows and columns."""
        part = "weight_scale_inv" if "weight_scale_inv" in self._parts_of[name] else "weight_scale"
        found, block = self._shape_of(name, part, FLOATS), self.quantization.block
        group = self._scheme(name).group
        fits = [(), (1,), (1, 1), (shape[0],), (shape[0], 1)]
        if block:
            fits = [(-(-shape[0] // block[0]), -(-shape[1] // block[1]))]
        elif group:
            fits = [(shape[0], self._groups(name, self._scheme(name), shape[1]))]
        if found not in fits:
            raise self._fault(name, part, f"its shape is {list(found)}, which does not fit a matrix {list(shape)}")

    def _groups(self, name: str, scheme: Scheme, columns: int) -> int:
        if columns % (scheme.group or columns):
            part = next(iter(self._parts_of[name]))
            raise self._fault(name, part, f"{columns} columns are not made of groups of {scheme.group}")
        return columns // (scheme.group or columns)

    def _expect(self, name: str, part: str, shape: tuple[int, ...], types: tuple[str, ...]) -> None:
        found = self._shape_of(name, part, types)
        if found != shape and not (len(shape) == 2 and shape[1] == 1 and found == shape[:1]):
            raise self._fault(name, part, f"its shape is {list(found)} instead of {list(shape)}")

    def _shape_of(self, name: str, part: str, types: tuple[str, ...], dimensions: int = 0) -> tuple[int, ...]:
        tensor = self._parts_of[name].get(part)
        if tensor is None:
            raise ValueError(f"{self.folder}: {name.removesuffix('weight')}{part} is missing")
        stored, shape = self._slice(tensor).get_dtype(), tuple(self._slice(tensor).get_shape())
        if stored not in types:
            raise self._fault(name, part, f"it is stored as {stored} instead of {' or '.join(types)}")
        if dimensions and (len(shape) != dimensions or 0 in shape):
            raise self._fault(name, part, f"its shape is {list(shape)}, which is no matrix")
        return shape

    def _fault(self, name: str, part: str, sentence: str) -> ValueError:
        tensor = self._parts_of[name][part]
        return ValueError(f"{self.folder}: {super().place(tensor)}: {sentence}")

    # --- its numbers

    def _part(self, name: str, part: str) -> Tensor:
        return self._tensor(self._parts_of[name][part])

    def _by_column(self, name: str, scheme: Scheme, rows: slice) -> Stored:
        first, last, _ = rows.indices(self.shapes[name][0])
        words = slice(first * scheme.bits // 32, -(-last * scheme.bits // 32))  # of a row that holds these numbers
        within = slice(first - words.start * 32 // scheme.bits, last - words.start * 32 // scheme.bits)
        is_awq = self.quantization.method == "awq"
        order = AWQ_ORDER if is_awq else None
        zero = unpacked(self._part(name, "qzeros")[:, words], scheme.bits, order)[:, within].int()
        zero = (zero + self.quantization.zero_shift) & ((1 << scheme.bits) - 1)
        weight = self._part(name, "qweight")
        if is_awq:
            numbers = unpacked(weight[:, words], scheme.bits, order)[:, within].t()
        else:
            numbers = unpacked(weight[:, first:last].t(), scheme.bits)
        scale = self._part(name, "scales")[:, first:last].float().t()
        group, index = self._index(name, "g_idx", scheme)
        return Stored(numbers.contiguous(), scale.contiguous(), zero.t().float(), group, index)

    def _compressed(self, name: str, scheme: Scheme, rows: slice) -> Stored:
        count, columns = self.shapes[name]
        first, last, _ = rows.indices(count)
        centre = 1 << (scheme.bits - 1)
        if scheme.is_packed:
            numbers = unpacked(self._part(name, "weight_packed")[first:last], scheme.bits)[:, :columns].contiguous()
        else:
            numbers = (self._part(name, "weight")[first:last].short() + centre).to(torch.uint8)
        group, index = self._index(name, "weight_g_idx", scheme)
        scale = self._part(name, "weight_scale").float()
        groups = columns // group
        scale = (scale.reshape(count, groups) if scale.numel() > 1 else scale.expand(count, groups))[first:last]
        zero = (
            self._zeros(name, scheme, count, groups)[first:last] if "weight_zero_point" in self._parts_of[name] else 0
        )
        return Stored(numbers, scale.contiguous(), torch.zeros_like(scale) + zero + centre, group, index)

    def _zeros(self, name: str, scheme: Scheme, rows: int, groups: int) -> Tensor:
        """Signed; those of packed matrices lie packed as well, along the rows, and then with the centre added."""
        stored = self._part(name, "weight_zero_point").reshape(-1, groups)
        if not scheme.is_packed:
            return stored.float()
        return unpacked(stored.t(), scheme.bits).t()[:rows].float() - (1 << (scheme.bits - 1))

    def _index(self, name: str, part: str, scheme: Scheme) -> tuple[int, Tensor | None]:
        """Columns of a group; and of which group each column is, where that is not simply the order."""
        columns = self.shapes[name][1]
        group = scheme.group or columns
        if part not in self._parts_of[name]:
            return group, None
        index = self._part(name, part).long()
        if torch.equal(index, torch.arange(columns) // group):
            return group, None
        if int(index.min()) < 0 or int(index.max()) >= columns // group:
            if part == "weight_g_idx" and bool((index == -1).all()):
                return group, None  # there, but never filled
            raise self._fault(name, part, f"it names groups from {int(index.min())} to {int(index.max())}")
        return group, index

    def _floats(self, name: str, rows: slice) -> Tensor:
        parts = self._parts_of[name]
        numbers = self._part(name, "weight")[rows].float()
        scale = self._part(name, "weight_scale_inv" if "weight_scale_inv" in parts else "weight_scale").float()
        count, columns = self.shapes[name]
        if self.quantization.block:
            down, across = self.quantization.block
            lines = torch.arange(count)[rows] // down
            return numbers * scale[lines].repeat_interleave(across, 1)[:, :columns]
        if scale.numel() == 1:
            return numbers * scale.reshape(())
        scale = scale.reshape(count, -1)[rows]
        return numbers * scale.repeat_interleave(columns // scale.shape[1], 1)


def unpacked(words: Tensor, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """The numbers in int32 words [rows, words] as uint8 [rows, numbers], the lowest bits first unless another order is given."""
    shifts = torch.tensor([bits * at for at in order or range(32 // bits)], dtype=torch.int32)
    return ((words.int()[..., None] >> shifts) & ((1 << bits) - 1)).to(torch.uint8).flatten(1)


def _name(scheme: Scheme) -> str:
    kind = "float8" if scheme.is_float else f"int{scheme.bits}"
    return f"{kind}, groups of {scheme.group}" if scheme.group else kind
