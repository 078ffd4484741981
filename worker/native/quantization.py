"""How the weights of a checkpoint are quantized: the `quantization_config` of its `config.json`, read and checked.

Read: GPTQ (4 and 8 bits), AWQ (4 bits), compressed-tensors (integers of 4 and 8 bits, float8) and fp8, the plain form of
DeepSeek's and Qwen's float8 checkpoints. That activations are to be quantized as well is no duty: they stay as they are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

WHERE = "config.json: quantization_config"
METHODS = ("gptq", "awq", "compressed-tensors", "fp8")
COMPRESSED_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")


@dataclass(frozen=True, slots=True)
class Scheme:
    """How the matrices of some modules are stored."""

    bits: int
    is_float: bool = False
    group: int = 0  # numbers of a row that share a scale; 0: all of them
    is_packed: bool = False  # several numbers in an int32
    targets: tuple[str, ...] = ("Linear",)  # names, or patterns behind `re:`


@dataclass(frozen=True, slots=True)
class Quantization:
    """Of a whole checkpoint. `zero_shift`: what older GPTQ files subtracted from their zero points before they were stored."""

    method: str
    schemes: tuple[Scheme, ...]
    zero_shift: int = 0
    block: tuple[int, int] | None = None  # rows and columns that share a scale, in fp8 files

    def scheme(self, module: str) -> Scheme | None:
        """That of a linear module: what names it goes before what names all of them."""
        named = [scheme for scheme in self.schemes if any(_matches(module, target) for target in scheme.targets)]
        general = [scheme for scheme in self.schemes if "Linear" in scheme.targets]
        return next(iter(named + general), None)


def _matches(module: str, target: str) -> bool:
    if target.startswith("re:"):
        return re.match(target[3:], module) is not None
    return module == target or module.endswith(f".{target}")


def read_quantization(config: Mapping[str, Any]) -> Quantization | None:
    """None for a plain checkpoint. Raises ValueError, naming the field, for what cannot be read."""
    found = config.get("quantization_config") or config.get("compression_config")
    if not found:
        return None
    if not isinstance(found, Mapping):
        raise ValueError(f"{WHERE} is not an object")
    method = found.get("quant_method")
    if method not in METHODS:
        raise ValueError(f"{WHERE}: quant_method {method!r} is not read; known: {', '.join(METHODS)}")
    readers = {"gptq": _gptq, "awq": _awq, "fp8": _fp8, "compressed-tensors": _compressed}
    return readers[method](found)


def _gptq(found: Mapping[str, Any]) -> Quantization:
    form = found.get("checkpoint_format") or "gptq"
    if form not in ("gptq", "gptq_v2"):
        raise ValueError(f"{WHERE}: checkpoint_format {form!r} is not read; known: gptq, gptq_v2")
    if found.get("dynamic"):
        raise ValueError(f"{WHERE}: dynamic: settings of single modules are not read")
    if found.get("pack_dtype") not in (None, "int32"):
        raise ValueError(f"{WHERE}: pack_dtype {found['pack_dtype']!r} is not read, only int32")
    scheme = Scheme(_bits(found.get("bits"), 4, 8), group=_group(found.get("group_size")), is_packed=True)
    return Quantization("gptq", (scheme,), zero_shift=int(form == "gptq"))


def _awq(found: Mapping[str, Any]) -> Quantization:
    version = found.get("version") or "gemm"
    if not isinstance(version, str) or version.lower() != "gemm":
        raise ValueError(f"{WHERE}: version {version!r} of AWQ is not read, only gemm")
    bits = _bits(found.get("bits", found.get("w_bit")), 4)
    return Quantization(
        "awq", (Scheme(bits, group=_group(found.get("group_size", found.get("q_group_size"))), is_packed=True),)
    )


def _fp8(found: Mapping[str, Any]) -> Quantization:
    if (form := found.get("fmt", "e4m3")) != "e4m3":
        raise ValueError(f"{WHERE}: fmt {form!r} is not read, only e4m3")
    block = found.get("weight_block_size")
    if block is not None and not (
        isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)
    ):
        raise ValueError(f"{WHERE}: weight_block_size is {block!r}, not two whole numbers")
    return Quantization("fp8", (Scheme(8, is_float=True),), block=(block[0], block[1]) if block else None)


# --- compressed-tensors -----------------------------------------------------------------------------------------------


def _compressed(found: Mapping[str, Any]) -> Quantization:
    groups = found.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise ValueError(f"{WHERE} has no config_groups")
    for name in ("sparsity_config", "transform_config"):
        if (other := found.get(name)) and other != {"format": "dense"}:
            raise ValueError(f"{WHERE}: {name} is set, which is not read")
    return Quantization("compressed-tensors", tuple(_scheme(name, group, found) for name, group in groups.items()))


def _scheme(name: str, group: Any, found: Mapping[str, Any]) -> Scheme:
    where = f"{WHERE}: {name}"
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping):
        raise ValueError(f"{where} has no weights")
    form, type = group.get("format") or found.get("format"), weights.get("type", "int")
    if form not in COMPRESSED_FORMATS:
        raise ValueError(f"{where}: format {form!r} is not read; known: {', '.join(COMPRESSED_FORMATS)}")
    if type not in ("int", "float"):
        raise ValueError(f"{where}: type {type!r} is not read; known: int, float")
    if type == "float" and form == "pack-quantized":
        raise ValueError(f"{where}: float weights are not read from the format {form}")
    targets = group.get("targets", ["Linear"])
    if not isinstance(targets, list) or not all(isinstance(target, str) and _is_pattern(target) for target in targets):
        raise ValueError(f"{where}: targets is not a list of names, or patterns behind `re:`")
    bits = _bits(weights.get("num_bits"), *((8,) if type == "float" else (4, 8)))
    return Scheme(bits, type == "float", _strategy(where, weights), form == "pack-quantized", tuple(targets))


def _is_pattern(target: str) -> bool:
    try:
        re.compile(target.removeprefix("re:"))
    except re.error:
        return not target.startswith("re:")
    return True


def _strategy(where: str, weights: Mapping[str, Any]) -> int:
    size = weights.get("group_size")
    strategy = weights.get("strategy") or ("group" if size not in (None, -1) else "tensor")
    if strategy not in ("tensor", "channel", "group"):
        raise ValueError(f"{where}: strategy {strategy!r} is not read; known: tensor, channel, group")
    return _group(size) if strategy == "group" else 0


# --- fields -----------------------------------------------------------------------------------------------------------


def _bits(value: Any, *known: int) -> int:
    if type(value) is not int or value not in known:
        raise ValueError(f"{WHERE}: weights of {value!r} bits are not read; known: {', '.join(map(str, known))}")
    return value


def _group(value: Any) -> int:
    """Numbers of a row that share a scale; -1 in the file, and 0 here, for all of them."""
    if value == -1 and type(value) is int:
        return 0
    if type(value) is not int or value < 1:
        raise ValueError(f"{WHERE}: group_size is {value!r}, not a whole number above 0 (or -1)")
    return value
