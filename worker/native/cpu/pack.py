"""Weights in the packed forms that the C step reads: see `matrix.h`."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from worker.native.groups import Groups, half

PANEL = 32  # rows that are stored, and computed, side by side
GROUP = 32  # numbers of few bits that share a scale
FORMATS = {"bfloat16": 0, "int8": 1, "int4": 2}
BITS = {"bfloat16": 16, "int8": 8, "int4": 4}
SOURCE_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.uint8: 3}
CHUNK_BYTES = 256 << 20
LINE_BYTES = 64
SLACK_BYTES = 256  # the last vector of an odd row reads past it


class CMatrix(ctypes.Structure):
    _fields_ = [
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("format", ctypes.c_int64),
        ("numbers", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
    ]


class CSource(ctypes.Structure):
    _fields_ = [
        ("from_", ctypes.c_void_p),
        ("kind", ctypes.c_int64),
        ("stride", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("first", ctypes.c_int64),
        ("interleaved", ctypes.c_int64),
    ]


def rounded_up(count: int, unit: int) -> int:
    return -(-count // unit) * unit


class Arena:
    """Memory in large pieces that the system may back with huge pages. Cleared, and never given back one by one."""

    def __init__(self, chunk_bytes: int = CHUNK_BYTES) -> None:
        self._chunk_bytes = chunk_bytes
        self._chunk: mmap.mmap | None = None
        self._used_bytes = 0

    def take(self, num_bytes: int) -> Tensor:
        """So many bytes, at the beginning of a cache line: [bytes] in uint8."""
        wanted = rounded_up(num_bytes + SLACK_BYTES, LINE_BYTES)
        if self._chunk is None or self._used_bytes + wanted > len(self._chunk):
            self._chunk = anonymous_memory(max(wanted, self._chunk_bytes))
            self._used_bytes = 0
        taken = torch.frombuffer(self._chunk, dtype=torch.uint8, count=num_bytes, offset=self._used_bytes)
        self._used_bytes += wanted
        return taken


def anonymous_memory(num_bytes: int) -> mmap.mmap:
    """Private: what is shared with children gets no huge pages."""
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


@dataclass(frozen=True, slots=True)
class Packed:
    """A matrix [rows, columns] in panels; memory of its own."""

    rows: int
    columns: int
    format: str
    numbers: Tensor  # uint8
    scales: Tensor | None = None  # float16
    offsets: Tensor | None = None  # float16

    @property
    def struct(self) -> CMatrix:
        scales, offsets = (0 if each is None else each.data_ptr() for each in (self.scales, self.offsets))
        return CMatrix(self.rows, self.columns, FORMATS[self.format], self.numbers.data_ptr(), scales, offsets)

    def tensors(self) -> list[Tensor]:
        """What a step reads."""
        return [tensor for tensor in (self.numbers, self.scales, self.offsets) if tensor is not None]


def packed_bytes(rows: int, columns: int, format: str, has_offsets: bool = False) -> int:
    """Of a matrix, in whole panels and groups."""
    groups = rounded_up(rows, PANEL) * (rounded_up(columns, GROUP) // GROUP)
    per_group = GROUP * BITS[format] // 8 + (0 if format == "bfloat16" else 2 + 2 * has_offsets)
    return groups * per_group


def new_matrix(arena: Arena, rows: int, columns: int, format: str, has_offsets: bool = False) -> Packed:
    """Cleared: what is not packed into it counts as nothing."""
    panels, groups = rounded_up(rows, PANEL) // PANEL, rounded_up(columns, GROUP) // GROUP
    numbers = arena.take(panels * groups * PANEL * GROUP * BITS[format] // 8)
    if format == "bfloat16":
        return Packed(rows, columns, format, numbers)
    scales, offsets = (
        arena.take(panels * groups * PANEL * 2).view(torch.float16) if is_there else None
        for is_there in (True, has_offsets)
    )
    return Packed(rows, columns, format, numbers, scales, offsets)


class Kernels:
    """The compiled library and a pool of its threads."""

    def __init__(self, library: ctypes.CDLL, threads: int) -> None:
        self.library = library
        declare(library)
        self.pool = library.pool_new(threads)
        if not self.pool:
            raise MemoryError("no memory for threads")
        self.threads = int(library.pool_threads(self.pool))  # the system may give fewer

    def __del__(self) -> None:
        if getattr(self, "pool", None):
            self.library.pool_free(self.pool)

    def pack(self, matrix: Packed, source: Tensor, first: int = 0, is_interleaved: bool = False) -> int:
        """Packs source [rows, columns] into the matrix's rows from `first` on. Returns 0 if all numbers are finite.

        Interleaved, 16 rows of source and 16 of another tensor make a panel: `first` is then 0 or 16.
        """
        assert source.shape[1] == matrix.columns and source.is_floating_point()
        return self._pack(matrix, source, None, None, first, is_interleaved)

    def place(
        self,
        matrix: Packed,
        stored: Tensor,
        scales: Tensor,
        offsets: Tensor | None = None,
        first: int = 0,
        is_interleaved: bool = False,
    ) -> None:
        """Rows whose groups are what the matrix holds, bit for bit: [rows, columns] in uint8, scales [rows, groups].

        Of a number q, q + 128 is stored; in 4 bits q + 8, or q with offsets. Rows as for `pack`.
        """
        assert stored.dtype == torch.uint8 and stored.shape[1] >= matrix.columns
        assert (offsets is None) == (matrix.offsets is None)
        for each in (scales, offsets):
            assert each is None or (each.is_contiguous() and each.dtype == torch.float16)
        self._pack(matrix, stored, scales, offsets, first, is_interleaved)

    def place_groups(self, matrix: Packed, groups: Groups, first: int = 0, is_interleaved: bool = False) -> None:
        """As `place`: groups of as many bits as the matrix has, centred unless it has offsets."""
        assert groups.bits == BITS[matrix.format] and (matrix.offsets is not None or groups.is_centred)
        scales, offsets = (half(numbers).half().contiguous() for numbers in (groups.scale, groups.offset))
        has_offsets = matrix.offsets is not None
        self.place(matrix, groups.values, scales, offsets if has_offsets else None, first, is_interleaved)

    def _pack(
        self,
        matrix: Packed,
        source: Tensor,
        scales: Tensor | None,
        offsets: Tensor | None,
        first: int,
        is_interleaved: bool,
    ) -> int:
        assert source.stride(1) == 1
        kind = SOURCE_KINDS[source.dtype]
        described = CSource(source.data_ptr(), kind, source.stride(0), len(source), first, is_interleaved)
        of_groups = (0 if each is None else each.data_ptr() for each in (scales, offsets))
        pointers = ctypes.byref(matrix.struct), ctypes.byref(described), *of_groups
        faults = int(self.library.pack_rows(self.pool, *pointers))
        if faults < 0:
            raise MemoryError("no memory to pack weights in")
        return faults

    def multiply(self, matrix: Packed, x: Tensor, times: int = 1) -> Tensor:
        """x [rows, columns] in float32 times the matrix: [rows, rows of the matrix]. The same is done `times` over."""
        whole = F.pad(x, (0, -matrix.columns % GROUP)).contiguous()
        product = torch.empty(len(x), rounded_up(matrix.rows, PANEL))
        pointers = ctypes.byref(matrix.struct), whole.data_ptr(), len(x), product.data_ptr()
        if not self.library.multiply_rows(self.pool, *pointers, times):
            raise MemoryError("no memory for a product")
        return product[:, : matrix.rows]

    def unpack(self, matrix: Packed) -> Tensor:
        """What the matrix stands for, in float32 [rows, columns]."""
        unpacked = torch.empty(matrix.rows, matrix.columns)
        for row in range(matrix.rows):
            self.library.unpack_row(ctypes.byref(matrix.struct), row, unpacked[row].data_ptr())
        return unpacked


def declare(library: ctypes.CDLL) -> None:
    """Arguments and results of the functions that step.c exports."""
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    functions: dict[str, tuple[object, Sequence[object]]] = {
        "pool_new": (pointer, [ctypes.c_int]),
        "pool_threads": (ctypes.c_int, [pointer]),
        "pool_free": (None, [pointer]),
        "pack_rows": (ctypes.c_int, [pointer, pointer, pointer, pointer, pointer]),
        "unpack_row": (None, [pointer, number, pointer]),
        "multiply_rows": (ctypes.c_bool, [pointer, pointer, pointer, number, pointer, ctypes.c_int]),
        "engine_new": (pointer, [pointer, pointer]),
        "engine_step": (ctypes.c_bool, [pointer, pointer]),
        "engine_free": (None, [pointer]),
    }
    for name, (result, arguments) in functions.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
