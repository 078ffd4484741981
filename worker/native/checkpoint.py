"""The safetensors files of a checkpoint in Hugging Face form, and what is said about those that cannot be read.

Other forms (`worker.native.forms`) answer the same questions: their tensors have the names and shapes of this one.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from worker.files import INDEX, WHOLE
from worker.native.groups import Groups

SAFETENSORS_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
LFS_POINTER = b"version https://git-lfs"


class Checkpoint:
    """The memory-mapped safetensors files of a folder. Raises ValueError when they are not all there and whole."""

    described_by = "config.json"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        weight_map = {} if (folder / WHOLE).is_file() else _read_index(folder)
        names = sorted(set(weight_map.values())) or [WHOLE]
        absent = [name for name in names if not (folder / name).is_file()]
        if absent:
            raise ValueError(f"{folder} lacks {', '.join(absent)}, which {INDEX} names")
        self._files = {name: _open(folder / name) for name in names}
        held = {name: set(file.keys()) for name, file in self._files.items()}
        for tensor, name in weight_map.items():
            if tensor not in held[name]:
                raise ValueError(f"{folder / name} has no {tensor}, which {INDEX} says is in it")
        self._file_of = {tensor: name for name, tensors in held.items() for tensor in tensors} | weight_map
        self.shapes = {name: tuple(self._slice(name).get_shape()) for name in self._file_of}

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.__exit__(kind, error, trace)

    def read(self, name: str, rows: slice = slice(None)) -> Tensor | Groups:
        """A view of the file's memory; groups where the file has numbers of few bits that groups hold exactly."""
        return self._tensor(name)[rows]

    def dtype(self, name: str) -> str:
        """float32, bfloat16 or float16: of few bits, what they may be computed in. Raises ValueError for any other."""
        if name not in self._file_of:
            raise ValueError(f"{self.folder} has no tensor {name}")
        stored = self._slice(name).get_dtype()
        if stored not in SAFETENSORS_DTYPES:
            known = ", ".join(SAFETENSORS_DTYPES)
            raise ValueError(f"{self.folder}: {self.place(name)} is stored as {stored}; what can be read is {known}")
        return SAFETENSORS_DTYPES[stored]

    def kernel_bits(self, name: str) -> int:
        """Of the kernel that computes with this matrix where weights stay packed: 16, 8 or 4."""
        return 16

    def kernel_offsets(self, name: str) -> bool:
        """Whether that kernel, where it is the one of 4 bits, needs offsets for it."""
        return True

    def stored_bytes(self, name: str) -> int:
        """In the file."""
        return math.prod(self.shapes[name]) * ITEM_BYTES[self.dtype(name)]

    def place(self, name: str) -> str:
        """A tensor and its file, for errors."""
        return f"{name} in {self._file_of[name]}"

    def called(self, name: str) -> str:
        """What the file calls a tensor, for errors about one that it lacks."""
        return name

    def describe(self) -> str:
        """Of few bits, what the file holds and in how many bytes; else nothing."""
        return ""

    def _tensor(self, name: str) -> Tensor:
        tensor: Tensor = self._files[self._file_of[name]].get_tensor(name)
        return tensor

    def _slice(self, name: str) -> Any:
        return self._files[self._file_of[name]].get_slice(name)


def _read_index(folder: Path) -> dict[str, str]:
    """Which file each tensor is in."""
    path = folder / INDEX
    if not path.is_file():
        raise ValueError(_what_is_there_instead(folder))
    try:
        index = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    found = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(found, dict) or not found:
        raise ValueError(f"{path} has no weight_map")
    for tensor, name in found.items():
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{path}: the weight_map says that {tensor} is in {name!r}, which is no name of a file")
    return found


def _what_is_there_instead(folder: Path) -> str:
    others = sorted(path.name for kind in ("*.bin", "*.pth", "*.pt", "*.gguf") for path in folder.glob(kind))
    if others:
        advice = (
            "name that file itself"
            if others[0].endswith(".gguf")
            else "weights are read from safetensors and GGUF files"
        )
        return f"{folder} holds {others[0]}, but no {WHOLE}: {advice}"
    return f"{folder} has neither {WHOLE} nor {INDEX}"


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(_why_unreadable(file) or f"{file} is not a safetensors file: {error}") from error


def _why_unreadable(file: Path) -> str | None:
    """The commonest reasons in plain words; None for any other."""
    with file.open("rb") as opened:
        start = opened.read(len(LFS_POINTER))
        if start == LFS_POINTER:
            return f"{file} is a pointer of Git LFS: the weights themselves were not fetched"
        opened.seek(8)
        header_bytes = int.from_bytes(start[:8], "little")
        here = file.stat().st_size - 8 - header_bytes  # bytes of tensors
        if here < 0:
            return None
        try:
            header = json.loads(opened.read(header_bytes))
            ends = {name: entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"}
            cut = min((end, name) for name, end in ends.items() if end > here)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            return None
    return f"{file} is truncated: {cut[1]} would end at byte {cut[0]} of its tensors, of which {here} are there"
