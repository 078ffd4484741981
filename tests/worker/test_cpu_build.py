"""How the C step is compiled, kept, and done without."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
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
    all_flags,
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
    """A script in the compiler's place; no library ships."""
    script = tmp_path / "a-compiler"
    monkeypatch.setattr(build, "BUILT", tmp_path / "built")
    monkeypatch.setenv("CC", str(script))
    return script


def write_script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def quick_compiler(only_compiler: Path) -> None:
    """A script that compiles something else, in no time: what matters is where it goes."""
    source = only_compiler.with_suffix(".c")
    source.write_text("void *pool_new(void) { return 0; }\n")
    write_script(only_compiler, f'while [ "$1" != -o ]; do shift; done; cc -shared -fPIC -o "$2" {source}')


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
def test_where_nobody_may_write_a_folder_of_this_process_alone_serves(quick_compiler: None, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    said: list[str] = []
    library = load_library([], blocked / "kernels", said.append)
    assert is_of_this_start_alone(library, tmp_path)
    assert ", for this start alone: " in said[0]


def is_of_this_start_alone(library: ctypes.CDLL, kept: Path) -> bool:
    """It is loaded, but nothing is left of it."""
    path = Path(library._name)
    return bool(library.pool_new) and not path.is_relative_to(kept) and not path.parent.exists()


@needs_compiler
@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o775], ids=oct)
def test_nothing_is_loaded_from_a_folder_that_others_write_to(mode: int, quick_compiler: None, tmp_path: Path) -> None:
    planted = Path(load_library([], tmp_path / "kernels")._name)
    planted.parent.chmod(mode)
    assert is_of_this_start_alone(load_library([], planted.parent), tmp_path)


@needs_compiler
def test_a_folder_of_somebody_else_is_not_used(
    quick_compiler: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    somebody = os.geteuid() + 1
    if os.geteuid() == 0:  # may give it away; anybody else has to be somebody else
        os.chown(tmp_path, somebody, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: somebody)
    assert is_of_this_start_alone(load_library([], tmp_path), tmp_path)


@needs_compiler
@pytest.mark.parametrize("plant", ["writable", "link", "stranger"])
def test_a_file_that_others_could_have_put_there_is_compiled_anew(
    plant: str, quick_compiler: None, tmp_path: Path
) -> None:
    path, broken = tmp_path / f"step-{digest([])}.so", tmp_path / "broken"
    broken.touch()
    if plant == "link":
        path.symlink_to(broken)
    else:
        path.touch()
        path.chmod(0o666)
    if plant == "stranger":
        if os.geteuid():
            pytest.skip("only root can give a file away")
        path.chmod(0o755)
        os.chown(path, 12345, -1)
    assert load_library([], tmp_path).pool_new
    found = path.lstat()
    assert stat.S_ISREG(found.st_mode) and stat.S_IMODE(found.st_mode) == 0o755 and found.st_uid == os.geteuid()
    assert not broken.read_bytes()


@needs_compiler
def test_what_is_kept_can_be_loaded_again_whatever_the_umask(quick_compiler: None, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        first = load_library([], tmp_path / "cache" / "kernels")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "cache" / "kernels").stat().st_mode) == 0o700
    said: list[str] = []
    assert load_library([], tmp_path / "cache" / "kernels", said.append)._name == first._name and not said


@needs_compiler
def test_without_a_home_nothing_is_kept(quick_compiler: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(build, "BUILT", tmp_path / "built")
    assert cache_folder(os.environ) is None
    assert is_of_this_start_alone(load_library([]), tmp_path)


def test_no_folder_to_compile_into_is_told(
    monkeypatch: pytest.MonkeyPatch, only_compiler: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with pytest.raises(NoLibrary, match=r"^there is no folder to compile into: "):
        load_library([], tmp_path / "file")


@needs_compiler
def test_libraries_that_ship_come_first_and_need_neither_compiler_nor_home(
    quick_compiler: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    built = tmp_path / "built"
    built.mkdir(mode=0o755)
    shipped = compile_to(built / f"step-{digest([])}.so", [])
    monkeypatch.setattr(build, "BUILT", built)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path / "none"))
    for name in ("CC", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    said: list[str] = []
    assert load_library([], say=said.append)._name == str(shipped) and not said
    with pytest.raises(NoLibrary, match=r"^there is no C compiler"):  # of other flags none ships
        load_library(["-O1"])


def test_an_image_gets_a_library_for_every_cpu(only_compiler: Path, tmp_path: Path) -> None:
    """Without torch: Python runs without the packages that are installed."""
    write_script(only_compiler, f'echo "$@" >>{tmp_path}/log')
    command = [sys.executable, "-S", "-m", "worker.native.cpu.build", str(tmp_path / "built")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert {path.name for path in (tmp_path / "built").iterdir()} == {f"step-{digest(f)}.so" for f in all_flags()}
    assert len((tmp_path / "log").read_text().splitlines()) == len(all_flags())
    assert cpu_flags() in all_flags()


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
    assert flags in all_flags(machine)


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
