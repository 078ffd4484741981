"""Where a model is computed, in which format, and what fits into memory: known before anything is allocated."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from scheduler.model import ModelShape
from worker.amounts import in_bytes, in_millions
from worker.calibrate import LEAST_CACHE_TOKENS, LEAST_CONTEXT_TOKENS
from worker.config import WorkerConfig
from worker.native.config import DecoderConfig
from worker.native.cpu.pack import BITS
from worker.native.cpu.program import AS_STORED
from worker.native.linear import can_pack
from worker.native.loader import DTYPES, tensor_shapes
from worker.native.topology import Node, available_cpus, cgroup_free_bytes, choose_node, cpu_caches

RESERVE_BYTES = {"cpu": 128 << 20, "cuda": 1 << 30}  # for activations, logits, and the probes at start
CPU_SHARE = 0.25  # of the memory that the weights leave, for the KV cache
CUDA_SHARE = 0.85
PACKING_SHARE = 0.5  # of what two copies of the weights leave; where the cache takes more, there is one copy
FULL_CONTEXTS = 64  # more than so many full sequences of KV cache help nobody on a CPU
PACKED_DTYPE = "int8"  # of weights of 16 bits, where the C step computes: see the test of its perplexity
USEFUL_CONTEXT_TOKENS = 2048  # with room for less, or than the model's own context, nobody is served


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    device: str
    dtype: str
    kv_cache_bytes: int
    packs: bool  # there is room for a second copy of the weights, in the order that torch's products of many rows want
    node: Node | None = None  # whose memory it is
    place: str = ""  # what is to be said of memory nodes


@dataclass(frozen=True, slots=True)
class Need:
    """What a model takes at least, and what there is."""

    name: str
    parameters: int
    dtype: str
    bytes_each: float  # of a parameter
    kv_bytes: float
    kv_reason: str
    reserve_bytes: int
    free_bytes: int

    @property
    def weight_bytes(self) -> float:
        return self.parameters * self.bytes_each

    @property
    def bytes(self) -> float:
        return self.weight_bytes + self.kv_bytes + self.reserve_bytes

    def spare_bytes(self, copies: int = 1) -> float:
        """What so many copies of the weights, and the reserve, leave."""
        return self.free_bytes - self.reserve_bytes - copies * self.weight_bytes

    def check(self) -> None:
        """Raises ValueError, with the arithmetic, when it does not fit."""
        if self.bytes > self.free_bytes:
            raise ValueError(
                f"{self.name} needs {in_bytes(self.weight_bytes)} for its weights {self._form} "
                f"({in_millions(self.parameters)} parameters x {round(self.bytes_each, 4):g} bytes), "
                f"{in_bytes(self.kv_bytes)} for a KV cache {self.kv_reason} and {in_bytes(self.reserve_bytes)} "
                f"to compute in, but {in_bytes(self.free_bytes)} are free; choose {', or '.join(self._ways_out())}"
            )

    @property
    def _form(self) -> str:
        return self.dtype if self.dtype == AS_STORED else f"in {self.dtype}"

    def _ways_out(self) -> list[str]:
        asked = [f"less {self.kv_reason.split()[1]}"] if self.kv_reason.startswith("as --") else []
        if asked and self.spare_bytes() > 0:
            return asked  # the weights are not what is too large
        ways = ["a smaller model"]
        if self.dtype == "float32":
            ways.append("--dtype bfloat16")
        return ways + asked


def plan_memory(
    decoder: DecoderConfig,
    stored_dtype: str,
    name: str,
    wanted: WorkerConfig,
    has_kernels: bool = False,
    packed_bytes: int = 0,
) -> MemoryPlan:
    """How much KV cache there will be: what is asked for, else a sensible share of what the weights leave.

    `stored_dtype` is that of the checkpoint's tensors. `has_kernels`: a CPU computes with those of our own; a checkpoint of
    few bits is then packed as it is stored, in `packed_bytes`. Raises ValueError with a sentence when the device is not
    there, weights and cache do not fit it, or the cache is too small to serve from.
    """
    device = find_device(wanted.device)
    parameters = sum(math.prod(size) for size in tensor_shapes(decoder).values())
    dtype = wanted.dtype
    if dtype == "auto" and packed_bytes and has_kernels and device.type == "cpu":
        dtype = AS_STORED
    elif dtype == "auto":
        dtype = auto_dtype(device, stored_dtype, parameters, wanted.threads, has_kernels)
    is_packed = has_kernels and device.type == "cpu" and dtype in (*BITS, AS_STORED)
    if dtype not in DTYPES and not is_packed:
        raise ValueError(f"--dtype {dtype} is computed on a CPU only, by C code that a compiler has to be there for")
    shape = decoder.model_shape(name, "int8" if dtype == AS_STORED else dtype)
    bytes_each = packed_bytes / parameters if dtype == AS_STORED else shape.weight_bytes_each
    context = min(shape.context_tokens, wanted.context_tokens or shape.context_tokens)
    _check_serves(shape, context, wanted.kv_cache_bytes)
    kv_bytes, kv_reason = _kv_need(shape, context, wanted)
    need = Need(
        name, parameters, dtype, bytes_each, kv_bytes, kv_reason, RESERVE_BYTES[device.type], _free_bytes(device)
    )
    need.check()
    node, place = choose_node(need.bytes, wanted.threads) if device.type == "cpu" else (None, "")
    if node:
        need = replace(need, free_bytes=min(need.free_bytes, node.free_bytes))
    packs = not is_packed and can_pack(device, DTYPES[dtype]) and need.kv_bytes <= PACKING_SHARE * need.spare_bytes(2)
    kv_cache_bytes = wanted.kv_cache_bytes or _kv_share(need, device, 2 if packs else 1, shape.kv_bytes(context))
    return MemoryPlan(str(device), dtype, kv_cache_bytes, packs, node, place)


def _check_serves(shape: ModelShape, context_tokens: int, kv_cache_bytes: int) -> None:
    """Raises ValueError where not even the smallest step could be timed at start."""
    if context_tokens < LEAST_CONTEXT_TOKENS:
        raise ValueError(
            f"{shape.name} cannot be served with a context of {context_tokens} tokens: "
            f"{LEAST_CONTEXT_TOKENS} are the least (--context)"
        )
    least = math.ceil(shape.kv_bytes(LEAST_CACHE_TOKENS))
    if 0 < kv_cache_bytes < least:
        raise ValueError(
            f"--kv-cache {kv_cache_bytes} holds {int(kv_cache_bytes / shape.kv_bytes(1))} tokens of {shape.name}: "
            f"{LEAST_CACHE_TOKENS} are the least (--kv-cache {least})"
        )


def _kv_need(shape: ModelShape, context_tokens: int, wanted: WorkerConfig) -> tuple[float, str]:
    """The least KV cache to start with, and of what it is."""
    if wanted.kv_cache_bytes:
        return wanted.kv_cache_bytes, "as --kv-cache asks"
    if wanted.context_tokens:
        return shape.kv_bytes(max(context_tokens, LEAST_CACHE_TOKENS)), f"as --context {context_tokens:,} asks"
    tokens = max(min(context_tokens, USEFUL_CONTEXT_TOKENS), LEAST_CACHE_TOKENS)
    return shape.kv_bytes(tokens), f"of {tokens:,} tokens"


def _kv_share(need: Need, device: torch.device, copies: int, context_bytes: float) -> int:
    """Of what the weights leave: on a GPU nobody else wants it, on a CPU the whole system does."""
    if device.type == "cuda":
        return int(max(CUDA_SHARE * need.spare_bytes(), need.kv_bytes))
    share = min(CPU_SHARE * need.spare_bytes(copies), FULL_CONTEXTS * context_bytes)
    return int(max(share, need.kv_bytes))


# --- where, and in which format ---------------------------------------------------------------------------------------


def find_device(name: str) -> torch.device:
    """auto, cpu, cuda or cuda:N. Raises ValueError for any other, or one that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ValueError(f"--device {name}: known are auto, cpu, cuda and cuda:N")
    device, seen = torch.device(name), torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= seen:
        raise ValueError(f"--device {name}: torch sees {seen or 'no'} CUDA device{'s' if seen > 1 else ''} here")
    return device


def auto_dtype(device: torch.device, stored: str, parameters: int, threads: int = 0, has_kernels: bool = False) -> str:
    """The checkpoint's own; on a CPU bfloat16 for any 16-bit one, and float32 where bytes are not what it waits for.

    That is, with torch, where the weights fit a cache, or where the CPU is slow at 16 bits.
    """
    if device.type != "cpu" or stored == "float32":
        return stored
    if has_kernels:
        return PACKED_DTYPE
    cache_bytes = max(cpu_caches(threads or available_cpus()).values())
    return "bfloat16" if can_pack(device, torch.bfloat16) and 4 * parameters > cache_bytes else "float32"


# --- what there is ----------------------------------------------------------------------------------------------------


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return free_memory_bytes()


def free_memory_bytes(meminfo: Path = Path("/proc/meminfo")) -> int:
    """Memory that can be had: the system's, or what the control groups leave."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if meminfo.is_file():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    return int(min(free, cgroup_free_bytes()))


@contextmanager
def enough_memory(name: str) -> Iterator[None]:
    """Memory that was free when the plan was made may be gone, or not be had in one piece: ValueError with a sentence."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"memory ran out while {name} was being loaded or measured ({reason}); "
            "choose a smaller model, or less --kv-cache"
        ) from error


def _is_out_of_memory(error: Exception) -> bool:
    """Of a CPU, torch says it in a RuntimeError like any other."""
    told = ("can't allocate memory", "not enough memory", "out of memory")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(words in str(error) for words in told)
