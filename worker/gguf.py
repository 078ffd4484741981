"""The head of a GGUF file: its metadata, and where each tensor lies. Standard library only; no weights are read here.

Everything in the file is taken for hostile: a size is compared with what is left of the file before anything of that size
is made. Source of the form: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MOST_HEAD_BYTES = 64 << 20  # a vocabulary of 262,144 takes 18 MB
MOST_ENTRIES = 1 << 22  # of an array: ten times the largest vocabulary
MOST_DIMENSIONS = 4
ALIGNMENT = 32  # where the file names no other
STRING, ARRAY, BOOL = 8, 9, 7
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", BOOL: "?", 10: "Q", 11: "q", 12: "d"}


class Kind(NamedTuple):
    """How the numbers of a tensor are stored: so many of them at a time, in so many bytes."""

    name: str
    block: int
    block_bytes: int


KINDS = {
    0: Kind("F32", 1, 4),
    1: Kind("F16", 1, 2),
    2: Kind("Q4_0", 32, 18),
    3: Kind("Q4_1", 32, 20),
    6: Kind("Q5_0", 32, 22),
    7: Kind("Q5_1", 32, 24),
    8: Kind("Q8_0", 32, 34),
    10: Kind("Q2_K", 256, 84),
    11: Kind("Q3_K", 256, 110),
    12: Kind("Q4_K", 256, 144),
    13: Kind("Q5_K", 256, 176),
    14: Kind("Q6_K", 256, 210),
    20: Kind("IQ4_NL", 32, 18),
    23: Kind("IQ4_XS", 256, 136),
    30: Kind("BF16", 1, 2),
}
# Those that are not read, for a sentence that names them.
OTHER_KINDS = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S", 22: "IQ2_S", 24: "I8",
    25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of the file."""

    name: str
    kind: Kind
    shape: tuple[int, ...]  # the outermost first, as torch has it
    start: int  # byte of the file

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) // self.kind.block * self.kind.block_bytes


@dataclass(frozen=True, slots=True)
class GgufFile:
    """What the head of a file says."""

    path: Path
    values: Mapping[str, Any]  # numbers, texts, booleans, and tuples of them
    tensors: Mapping[str, Entry]

    def text(self, key: str) -> str | None:
        return self._of_type(key, str, "a text")

    def count(self, key: str) -> int | None:
        found: int | None = self._of_type(key, int, "a whole number")
        if isinstance(found, bool) or (found is not None and found < 0):
            raise ValueError(f"{self.path}: {key} is {found}, not a whole number from 0 on")
        return found

    def number(self, key: str) -> float | None:
        found: float | None = self._of_type(key, int | float, "a number")
        return None if found is None else float(found)

    def flag(self, key: str) -> bool | None:
        return self._of_type(key, bool, "true or false")

    def listed(self, key: str, of: type) -> tuple[Any, ...] | None:
        """The entries of an array, all of one type."""
        found: tuple[Any, ...] | None = self._of_type(key, tuple, "an array")
        if found and not isinstance(found[0], of):  # what an array holds is of one type
            raise ValueError(f"{self.path}: {key} holds {type(found[0]).__name__}, not {of.__name__}")
        return found

    def _of_type(self, key: str, of: Any, words: str) -> Any:
        found = self.values.get(key)
        if found is not None and not isinstance(found, of):
            raise ValueError(f"{self.path}: {key} is of the wrong type: {words} is needed")
        return found


def is_gguf(path: Path) -> bool:
    """By its name, or its first bytes."""
    if not path.is_file():
        return False
    if path.suffix.lower() == ".gguf":
        return True
    try:
        with path.open("rb") as opened:
            return opened.read(len(MAGIC)) == MAGIC
    except OSError:  # whoever needs it will hear why
        return False


def read_gguf(path: Path) -> GgufFile:
    """Raises ValueError, with a sentence that names the file and what in it is wrong."""
    seen = path.stat()
    return _read(path, seen.st_size, seen.st_mtime_ns)


def forget() -> None:
    """Frees what was read last: a vocabulary takes some tens of MB."""
    _read.cache_clear()


@lru_cache(maxsize=1)  # config, tokenizer and weights are read one after another
def _read(path: Path, size: int, changed: int) -> GgufFile:
    with path.open("rb") as opened:
        if opened.read(len(MAGIC)) != MAGIC:
            raise ValueError(f"{path} is not a GGUF file: it does not begin with {MAGIC.decode()}")
        with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _Reader(path, content, size).file()


class Place(NamedTuple):
    """Of a tensor as the head says it: the number of its type, its shape, how far behind the head it begins."""

    type: int
    shape: tuple[int, ...]
    offset: int


class _Reader:
    """Goes through the head from front to back. `what` is the key or tensor at hand, for sentences."""

    def __init__(self, path: Path, content: mmap.mmap, size: int) -> None:
        self.path, self.content, self.size = path, content, size
        self.at = len(MAGIC)
        self.what = "its head"

    def file(self) -> GgufFile:
        self._check_version()
        tensors, keys = self._numbers("QQ")
        values = self._table(keys, self._pair, "key")
        if values.get("split.count", 0) not in (0, 1):
            raise self._fault(
                f"it is one of {values['split.count']} parts; join them first (llama-gguf-split --merge)", ""
            )
        places: dict[str, Place] = self._table(tensors, self._place, "tensor")
        alignment = values.get("general.alignment", ALIGNMENT)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise self._fault(f"{alignment!r} is no power of two", "general.alignment")
        start = -(-self.at // alignment) * alignment
        entries = {name: self._entry(name, place, start, alignment) for name, place in places.items()}
        return GgufFile(self.path, values, entries)

    def _check_version(self) -> None:
        (version,) = self._numbers("I")
        if version & 0xFFFF == 0:
            raise self._fault("it is big-endian; only little-endian files are read", "")
        if version not in VERSIONS:
            raise self._fault(f"its version is {version}; those that can be read are {VERSIONS}", "")

    def _table(self, count: int, read: Callable[[], tuple[str, Any]], kind: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for _ in range(count):  # ends early where the file does
            name, value = read()
            if name in found:
                raise self._fault(f"the {kind} is there twice")
            found[name] = value
        return found

    # --- metadata

    def _pair(self) -> tuple[str, Any]:
        self.what = "a key"
        name = self.what = self._text()
        (kind,) = self._numbers("I")
        return name, self._value(kind)

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._text()
        if kind == ARRAY:
            return self._array()
        if kind not in NUMBERS:
            raise self._fault(f"its value is of the unknown type {kind}")
        return self._numbers(NUMBERS[kind])[0]

    def _array(self) -> tuple[Any, ...]:
        kind, count = self._numbers("IQ")
        if kind != STRING and kind not in NUMBERS:
            raise self._fault(f"an array of the type {kind} is not read")
        if count > MOST_ENTRIES:
            raise self._fault(f"an array of {count} entries is not read: {MOST_ENTRIES} are the most")
        if kind == STRING:
            return tuple(self._text() for _ in range(count))
        return self._numbers(f"{count}{NUMBERS[kind]}")

    # --- tensors

    def _place(self) -> tuple[str, Place]:
        self.what = "a tensor"
        name = self.what = self._text()
        (dimensions,) = self._numbers("I")
        if not 1 <= dimensions <= MOST_DIMENSIONS:
            raise self._fault(f"it has {dimensions} dimensions; 1 to {MOST_DIMENSIONS} are read")
        sizes = self._numbers(f"{dimensions}Q")
        kind, offset = self._numbers("IQ")
        return name, Place(kind, sizes[::-1], offset)

    def _entry(self, name: str, place: Place, start: int, alignment: int) -> Entry:
        type, shape, offset = place
        kind = KINDS.get(type)
        if kind is None:
            known = ", ".join(kind.name for kind in KINDS.values())
            raise self._fault(f"its type is {OTHER_KINDS.get(type, type)}; what can be read is {known}", name)
        if 0 in shape or shape[-1] % kind.block:
            raise self._fault(f"rows of {shape[-1]} numbers are not made of {kind.name} blocks of {kind.block}", name)
        entry = Entry(name, kind, shape, start + offset)
        if offset % alignment:
            raise self._fault(f"it begins at byte {offset}, which is no multiple of {alignment}", name)
        if entry.start + entry.bytes > self.size:
            raise self._fault(
                f"it would end at byte {entry.start + entry.bytes} of a file of {self.size}: the file is truncated",
                name,
            )
        return entry

    # --- bytes

    def _numbers(self, form: str) -> tuple[Any, ...]:
        form = f"<{form}"
        return struct.unpack_from(form, self.content, self._pass(struct.calcsize(form)))

    def _text(self) -> str:
        (length,) = self._numbers("Q")
        start = self._pass(length)
        try:
            return self.content[start : start + length].decode()
        except UnicodeDecodeError as error:
            raise self._fault(f"a text at byte {start} is not in UTF-8") from error

    def _pass(self, count: int) -> int:
        """Where the next so many bytes begin."""
        start, self.at = self.at, self.at + count
        if self.at > self.size:
            raise self._fault(f"{count} bytes at byte {start} are more than the file has: it is truncated, or damaged")
        if self.at > MOST_HEAD_BYTES:
            raise self._fault(f"the file's head is larger than {MOST_HEAD_BYTES} bytes")
        return start

    def _fault(self, sentence: str, what: str | None = None) -> ValueError:
        what = self.what if what is None else what
        return ValueError(f"{self.path}: {_cut(what)}: {sentence}" if what else f"{self.path}: {sentence}")


def _cut(name: str) -> str:
    return name if len(name) <= 80 else f"{name[:77]}..."
