"""How the C step is compiled, kept, and done without."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from worker.config import WorkerConfig
from worker.files import find_model
from worker.native import build as native_build
from worker.native.cpu import build
from worker.native.cpu.build import (
    AVX2,
    AVX512,
    NoLibrary,
    cache_folder,
    compile_to,
    cpu_features,
    cpu_flags,
    digest,
    load_library,
)

ROOT = Path(__file__).parents[2]
needs_compiler = pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler")


@pytest.fixture
def only_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A script in the compiler's place."""
    script = tmp_path / "a-compiler"
    monkeypatch.setenv("CC", str(script))
    return script


def write_script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@needs_compiler
def test_a_library_is_compiled_once(tmp_path: Path) -> None:
    said: list[str] = []
    first = load_library([], tmp_path, said.append)
    stamp = Path(first._name).stat().st_mtime_ns
    assert load_library([], tmp_path, said.append)._name == first._name
    assert Path(first._name).stat().st_mtime_ns == stamp
    assert len(said) == 1 and said[0].startswith("compiling the C step for this CPU with ")
    assert [path.name for path in tmp_path.iterdir()] == [Path(first._name).name]


@needs_compiler
def test_two_processes_that_compile_at_once_both_get_a_whole_library(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from worker.native.cpu.build import load_library; "
        "print(bool(load_library([], Path(sys.argv[1])).pool_new))"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "kernels")]
    running = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate()[0].strip() for process in running] == ["True", "True"]
    assert len(list((tmp_path / "kernels").iterdir())) == 1


@needs_compiler
def test_where_nobody_may_write_a_folder_of_this_process_alone_serves(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    library = load_library([], blocked / "kernels")
    assert not Path(library._name).is_relative_to(tmp_path)
    assert library.pool_new


def test_no_compiler_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NoLibrary, match=r"^there is no C compiler \(cc, gcc or clang\)$"):
        load_library([], tmp_path / "kernels")


def test_a_compiler_that_fails_is_told_with_what_it_said(only_compiler: Path, tmp_path: Path) -> None:
    write_script(only_compiler, "echo 'step.c:1: note: what' >&2; echo 'step.c:9: error: no such flag' >&2; exit 3")
    with pytest.raises(NoLibrary, match=r"a-compiler fails: step.c:9: error: no such flag$"):
        load_library([], tmp_path / "kernels")
    assert not list((tmp_path / "kernels").iterdir())


def test_a_compiler_that_is_none_is_told(only_compiler: Path, tmp_path: Path) -> None:
    with pytest.raises(NoLibrary, match=r"a-compiler cannot be run"):
        load_library([], tmp_path / "kernels")


def test_what_a_compiler_made_but_nobody_can_load_is_told(only_compiler: Path, tmp_path: Path) -> None:
    write_script(only_compiler, "exit 0")  # the file stays empty
    with pytest.raises(NoLibrary, match=r"cannot be loaded"):
        load_library([], tmp_path / "kernels")


def test_without_a_compiler_torch_computes_and_says_so(only_compiler: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_script(only_compiler, "echo 'error: broken' >&2; exit 1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(only_compiler.parent))
    said: list[str] = []
    config = WorkerConfig(dtype="bfloat16", device="cpu", threads=1, kv_cache_bytes=1 << 22)
    native = native_build.load(find_model("headgate-demo"), "demo", config, said.append)
    assert native.engine.dtype == "bfloat16" and not native.engine.own_flops()
    assert re.fullmatch(r"compiling .*", said[0])
    assert re.fullmatch(r"computing with torch, which is several times slower .* fails: error: broken", said[1])


def test_formats_that_only_the_c_step_has_need_it(only_compiler: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_script(only_compiler, "exit 1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(only_compiler.parent))
    with pytest.raises(ValueError, match=r"--dtype int4 needs C code compiled at start: .* fails: exit status 1"):
        native_build.load(find_model("headgate-demo"), "demo", WorkerConfig(dtype="int4", device="cpu"))


@pytest.mark.parametrize(
    ("machine", "features", "flags"),
    [
        ("x86_64", "sse2 avx", []),
        ("x86_64", "avx2 fma f16c sse2", [*AVX2.values()]),
        ("x86_64", " ".join([*AVX2, *AVX512]), [*AVX2.values(), *AVX512.values()]),
        (
            "x86_64",
            " ".join([*AVX2, *AVX512, "avx512_bf16"]),
            [*AVX2.values(), *AVX512.values(), "-mavx512bf16"],
        ),
        ("x86_64", " ".join([*AVX2, "avx512f"]), [*AVX2.values()]),
        ("aarch64", "fp asimd asimddp", ["-march=armv8.2-a+dotprod"]),
        ("aarch64", "fp asimd asimddp bf16", ["-march=armv8.2-a+dotprod+bf16"]),
        ("aarch64", "fp asimd", []),
        ("riscv64", "", []),
    ],
)
def test_flags_are_those_of_the_cpu(machine: str, features: str, flags: list[str], tmp_path: Path) -> None:
    name = "flags" if machine == "x86_64" else "Features"
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{name}\t\t: {features}\n\nprocessor\t: 1\n{name}\t: other\n")
    assert cpu_flags(tmp_path / "cpuinfo", machine) == flags


def test_a_system_that_does_not_tell_gets_plain_c(tmp_path: Path) -> None:
    assert cpu_features(tmp_path / "none") == set()
    assert cpu_flags(tmp_path / "none", "x86_64") == []


def test_the_cache_is_the_users(tmp_path: Path) -> None:
    assert cache_folder({"XDG_CACHE_HOME": "/x", "HOME": "/h"}) == Path("/x/headgate/kernels")
    assert cache_folder({"HOME": "/h"}) == Path("/h/.cache/headgate/kernels")


def test_another_source_or_flag_is_another_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plain = digest([])
    assert digest(["-mavx2"]) != plain == digest([])
    shutil.copytree(build.SOURCES, tmp_path / "sources")
    monkeypatch.setattr(build, "SOURCES", tmp_path / "sources")
    assert digest([]) == plain
    with (tmp_path / "sources" / "lanes.h").open("a") as file:
        file.write("\n")
    assert digest([]) != plain


SANITIZED = """
import sys, torch
from pathlib import Path
import ctypes
from scheduler.batch import Entry, Kind, StepPlan
from scheduler.messages import Request, Sampling
from worker.native.runner import NativeEngine

library, folder = ctypes.CDLL(sys.argv[1]), Path(sys.argv[2])
for format in ("bfloat16", "int8", "int4"):
    engine = NativeEngine.load(folder, "cpu", format, kv_cache_bytes=1 << 19, threads=3, library=library)
    prompts = [list(range(length)) for length in (1, 16, 33, 70)]
    start = tuple(Request(key, 0, prompt, 9, sampling=Sampling(0.0)) for key, prompt in enumerate(prompts))
    engine.run(StepPlan(tuple(Entry(r.key, Kind.PREFILL, 0, len(r.prompt), True) for r in start), start))
    engine.run(StepPlan(tuple(Entry(r.key, Kind.DECODE, len(r.prompt), 1, True) for r in start)))
    del engine
print("clean")
"""
CONFIG = """{"architectures": ["Qwen3ForCausalLM"], "vocab_size": 301, "hidden_size": 70, "intermediate_size": 50,
"num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 22, "attention_bias": true,
"use_sliding_window": true, "sliding_window": 20, "max_window_layers": 1, "max_position_embeddings": 512}"""


@pytest.mark.parametrize("flags", [[], cpu_flags()], ids=["plain", "own"])
def test_sanitizers_find_nothing(flags: list[str], tmp_path: Path) -> None:
    """Odd sizes, several threads; of memory and of undefined behaviour."""
    found = subprocess.run(["cc", "-print-file-name=libasan.so"], capture_output=True, text=True)
    runtime = Path(found.stdout.strip())
    if found.returncode or not runtime.is_absolute():
        pytest.skip("needs gcc and its sanitizers")
    more = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g", "-O1"]
    library = compile_to(tmp_path / "step.so", flags, more)
    (tmp_path / "config.json").write_text(CONFIG)
    environ = os.environ | {"LD_PRELOAD": str(runtime.resolve()), "ASAN_OPTIONS": "detect_leaks=0"}
    command = [sys.executable, "-c", SANITIZED, str(library), str(tmp_path / "config.json")]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "clean\n"), done.stderr[-3000:]
