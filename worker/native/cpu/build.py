"""Compiles the C files beside this one: when an image is built, for every CPU; else for the one at hand, at first start.

`python -m worker.native.cpu.build` does the former. It needs a compiler, and of Python nothing but the standard library.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

SOURCES = Path(__file__).parent
MAIN = SOURCES / "step.c"
BUILT = SOURCES / "built"  # where an image has libraries for every CPU; a checkout does not
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
AVX512_BF16 = "-mavx512bf16"
DOTPROD, DOTPROD_BF16 = "-march=armv8.2-a+dotprod", "-march=armv8.2-a+dotprod+bf16"
X86, ARM = ("x86_64", "AMD64"), ("aarch64", "arm64")  # as `platform.machine` names them
COMPILE_SECONDS = 300


class NoLibrary(Exception):
    """There is no compiler, or it fails; the text says which, in one sentence."""


def load_library(
    flags: Sequence[str] | None = None, cache: Path | None = None, say: Callable[[str], None] = lambda line: None
) -> ctypes.CDLL:
    """The compiled library: as it ships, from the cache, or made now. Raises NoLibrary.

    `flags` are those of the CPU's instruction set; by default what this one has. With `cache` only that folder counts.
    """
    machine = cpu_flags() if flags is None else flags
    name = f"step-{digest(machine)}.so"
    kept = cache or cache_folder(os.environ)
    for folder in (kept,) if cache else (BUILT, kept):
        if folder and _is_ours(folder, stat.S_ISDIR) and _is_ours(folder / name, stat.S_ISREG):
            return _load(folder / name)
    if kept:
        with suppress(OSError):  # nobody may write there, or it is full
            kept.mkdir(mode=0o700, parents=True, exist_ok=True)
            if _is_ours(kept, stat.S_ISDIR):
                return _compile_and_load(kept / name, machine, "once", say)
    try:
        with tempfile.TemporaryDirectory(prefix="headgate-") as own:  # what is loaded needs its file no more
            return _compile_and_load(Path(own) / name, machine, "for this start alone", say)
    except OSError as error:
        raise NoLibrary(f"there is no folder to compile into: {error}") from error


def cache_folder(environ: Mapping[str, str]) -> Path | None:
    """None without a home: names in a folder that everybody shares could be taken by somebody else."""
    base = environ.get("XDG_CACHE_HOME") or (environ.get("HOME") and f"{environ['HOME']}/.cache")
    return Path(base) / "headgate" / "kernels" if base else None


def _is_ours(path: Path, is_kind: Callable[[int], bool]) -> bool:
    """Whether only this user, or root, can have put there what is there: it will run as this process."""
    try:
        found = path.lstat()  # not what a link leads to
    except OSError:
        return False
    others_write = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return is_kind(found.st_mode) and found.st_uid in (0, os.geteuid()) and not others_write


def _compile_and_load(path: Path, machine: Sequence[str], how_often: str, say: Callable[[str], None]) -> ctypes.CDLL:
    say(f"compiling the C step for this CPU with {find_compiler(os.environ)}, {how_often}: {path}")
    return _load(compile_to(path, machine))


def _load(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise NoLibrary(f"{path} cannot be loaded: {error}") from error


def digest(machine: Sequence[str]) -> str:
    """Of everything that a library is made of."""
    whole = hashlib.sha256(" ".join((platform.machine(), *COMMON, *machine)).encode())
    for source in sorted((*SOURCES.glob("*.c"), *SOURCES.glob("*.h"))):
        whole.update(source.name.encode() + source.read_bytes())
    return whole.hexdigest()[:16]


def compile_to(path: Path, machine: Sequence[str], more: Sequence[str] = ()) -> Path:
    """Under another name first, so that nobody loads half of a file and two at once do not disturb each other."""
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".so")
    os.close(handle)
    try:
        _compile(Path(name), [*COMMON, *machine, *more])
        os.chmod(name, 0o755)  # whatever the umask is: what others may write is not loaded
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


def all_flags(machine: str = "") -> list[list[str]]:
    """Whatever `cpu_flags` can answer on such a machine."""
    machine = machine or platform.machine()
    if machine in X86:
        wide = [*AVX2.values(), *AVX512.values()]
        return [[], [*AVX2.values()], wide, [*wide, AVX512_BF16]]
    if machine in ARM:
        return [[], [DOTPROD], [DOTPROD_BF16]]
    return [[]]


def cpu_flags(cpuinfo: Path = CPUINFO, machine: str = "") -> list[str]:
    """For the best of the variants in `lanes.h` that this CPU runs; none where only plain C will do."""
    machine = machine or platform.machine()
    features = cpu_features(cpuinfo)
    if machine in X86:
        return _x86_flags(features)
    if machine in ARM and "asimddp" in features:
        return [DOTPROD_BF16 if "bf16" in features else DOTPROD]
    return []


def _x86_flags(features: Collection[str]) -> list[str]:
    if not AVX2.keys() <= set(features):
        return []
    flags = list(AVX2.values())
    if AVX512.keys() <= set(features):
        flags += AVX512.values()
        flags += [AVX512_BF16] if "avx512_bf16" in features else []
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


# --- for every CPU of this architecture -------------------------------------------------------------------------------


def main(folder: Path) -> None:
    """Compiles a library for each. Raises NoLibrary."""
    folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    for flags in all_flags():
        print(compile_to(folder / f"step-{digest(flags)}.so", flags), *flags, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else BUILT)
