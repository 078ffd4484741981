"""Compiles the C files beside this one for the CPU at hand, once, into a folder of the user's cache."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

SOURCES = Path(__file__).parent
MAIN = SOURCES / "step.c"
CPUINFO = Path("/proc/cpuinfo")
# No -ffast-math: the order of additions is written down, and NaN must stay NaN.
COMMON = ("-std=gnu11", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fvisibility=hidden")
SHARED = ("-shared", "-fPIC", "-pthread")
AVX2 = {"avx2": "-mavx2", "fma": "-mfma", "f16c": "-mf16c"}
AVX512 = {
    "avx512f": "-mavx512f",
    "avx512bw": "-mavx512bw",
    "avx512vl": "-mavx512vl",
    "avx512dq": "-mavx512dq",
    "avx512_vnni": "-mavx512vnni",
}
COMPILE_SECONDS = 300


class NoLibrary(Exception):
    """There is no compiler, or it fails; the text says which, in one sentence."""


def load_library(
    flags: Sequence[str] | None = None, cache: Path | None = None, say: Callable[[str], None] = lambda line: None
) -> ctypes.CDLL:
    """The compiled library, from the cache or made now. Raises NoLibrary.

    `flags` are those of the CPU's instruction set; by default what this one has.
    """
    machine = cpu_flags() if flags is None else flags
    folder = cache or cache_folder(os.environ)
    path = folder / f"step-{digest(machine)}.so"
    if not path.is_file():
        say(f"compiling the C step for this CPU with {find_compiler(os.environ)}, once: {path}")
        try:
            path = compile_to(path, machine)
        except OSError:  # nobody may write there
            path = compile_to(Path(tempfile.mkdtemp(prefix="headgate-")) / path.name, machine)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise NoLibrary(f"{path} cannot be loaded: {error}") from error


def cache_folder(environ: Mapping[str, str]) -> Path:
    base = environ.get("XDG_CACHE_HOME") or Path(environ.get("HOME") or tempfile.gettempdir()) / ".cache"
    return Path(base) / "headgate" / "kernels"


def digest(machine: Sequence[str]) -> str:
    """Of everything that a library is made of."""
    whole = hashlib.sha256(" ".join((platform.machine(), *COMMON, *machine)).encode())
    for source in sorted((*SOURCES.glob("*.c"), *SOURCES.glob("*.h"))):
        whole.update(source.name.encode() + source.read_bytes())
    return whole.hexdigest()[:16]


def compile_to(path: Path, machine: Sequence[str], more: Sequence[str] = ()) -> Path:
    """Under another name first, so that nobody loads half of a file and two at once do not disturb each other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".so")
    os.close(handle)
    try:
        _compile(Path(name), [*COMMON, *machine, *more])
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)
    return path


def _compile(path: Path, flags: Sequence[str]) -> None:
    compiler = find_compiler(os.environ)
    command = [compiler, *flags, *SHARED, "-o", str(path), str(MAIN), "-lm"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoLibrary(f"{compiler} cannot be run: {error}") from error
    if done.returncode:
        said = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[-200:])
        raise NoLibrary(f"{compiler} fails: {said or f'exit status {done.returncode}'}")


def find_compiler(environ: Mapping[str, str]) -> str:
    """What CC names, else the first there is. Raises NoLibrary."""
    if environ.get("CC"):
        return environ["CC"]
    for name in ("cc", "gcc", "clang"):
        if found := shutil.which(name):
            return found
    raise NoLibrary("there is no C compiler (cc, gcc or clang)")


# --- what the CPU has -------------------------------------------------------------------------------------------------


def cpu_flags(cpuinfo: Path = CPUINFO, machine: str = "") -> list[str]:
    """For the best of the variants in `lanes.h` that this CPU runs; none where only plain C will do."""
    machine = machine or platform.machine()
    features = cpu_features(cpuinfo)
    if machine in ("x86_64", "AMD64"):
        return _x86_flags(features)
    if machine in ("aarch64", "arm64") and "asimddp" in features:
        return ["-march=armv8.2-a+dotprod+bf16" if "bf16" in features else "-march=armv8.2-a+dotprod"]
    return []


def _x86_flags(features: Collection[str]) -> list[str]:
    if not AVX2.keys() <= set(features):
        return []
    flags = list(AVX2.values())
    if AVX512.keys() <= set(features):
        flags += AVX512.values()
        flags += ["-mavx512bf16"] if "avx512_bf16" in features else []
    return flags


def cpu_features(cpuinfo: Path = CPUINFO) -> set[str]:
    """As Linux names them; nothing where it does not tell."""
    try:
        text = cpuinfo.read_text()
    except OSError:
        return set()
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return set(value.split())
    return set()
