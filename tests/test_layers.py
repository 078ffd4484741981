"""The import rules of DESIGN.md section 4. Changing a table is a decision, made visible here."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent

# Which of our packages a package may import. `headgate` is the command: it imports anything, and nobody imports it.
PACKAGES = {
    "scheduler": set(),
    "service": {"scheduler"},
    "worker": {"scheduler"},
    "headgate": {"scheduler", "service", "worker"},
}

# The scheduler is pure: all it may import. No I/O, no clock, no threads, no randomness.
PURE = {
    "__future__",
    "array",
    "bisect",
    "collections",
    "contextlib",
    "dataclasses",
    "enum",
    "functools",
    "heapq",
    "itertools",
    "json",
    "math",
    "numpy",
    "operator",
    "statistics",
    "types",
    "typing",
}

# Libraries with a home: only modules that begin with one of these names may import them.
HOMES = {
    "torch": ("worker.native",),
    "triton": ("worker.native",),
    "redis": ("service.store", "worker"),
    "pydantic": ("service.schema", "service.settings", "worker.settings", "headgate.settings"),
    "prometheus_client": ("service.metrics", "worker.metrics"),
    "fastapi": ("service", "worker"),
    "starlette": ("service", "worker"),
    "uvicorn": ("service", "worker"),
}

# What the command does not import at the top of a file, since `headgate --help` and the supervisor start without it.
HEAVY = {
    "torch", "triton", "numpy", "safetensors", "huggingface_hub", "tokenizers", "transformers", "jinja2", "fastapi",
    "starlette", "pydantic", "uvicorn", "uvloop", "httpx", "redis", "prometheus_client", "service", "worker", "scheduler",
}  # fmt: skip
LIGHT = (
    *("headgate.main", "headgate.__main__", "headgate.serve", "headgate.supervisor", "headgate.lifeline"),
    *("headgate.start", "headgate.child", "headgate.gateway", "headgate.worker", "headgate.secret_file"),
)


class Import(NamedTuple):
    """One imported module; `line` for the message; `at_top`: it runs when the file is imported."""

    name: str
    line: int
    at_top: bool


def imports_of(source: str, module: str, is_package: bool = False) -> list[Import]:
    """Everything a source text imports, in functions too; what only a type checker sees is left out."""
    return list(_walk(ast.parse(source), module.split(".") if is_package else module.split(".")[:-1], True))


def _walk(node: ast.AST, parents: list[str], at_top: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(alias.name, child.lineno, at_top)
        elif isinstance(child, ast.ImportFrom):
            base = parents[: len(parents) - child.level + 1] if child.level else []
            origin = ".".join([*base, *([child.module] if child.module else [])])
            yield Import(origin, child.lineno, at_top)
            for alias in child.names:  # a name imported from a package may be a module
                yield Import(f"{origin}.{alias.name}", child.lineno, at_top)
        elif isinstance(child, ast.Call) and _called(child) in ("import_module", "__import__") and child.args:
            if isinstance(child.args[0], ast.Constant):
                yield Import(str(child.args[0].value), child.lineno, at_top)
            yield from _walk(child, parents, at_top)
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            for other in child.orelse:
                yield from _walk(ast.Module([other], []), parents, at_top)
        else:
            is_later = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _walk(child, parents, at_top and not is_later)


def _called(call: ast.Call) -> str:
    return getattr(call.func, "attr", getattr(call.func, "id", ""))


def _is_below(name: str, home: str) -> bool:
    return name == home or name.startswith(home + ".")


def faults(source: str, module: str, is_package: bool = False) -> list[str]:
    """The rules that a module breaks, a sentence each."""
    package = module.split(".")[0]
    found = set()
    for name, line, at_top in imports_of(source, module, is_package):
        top = name.split(".")[0]
        where = f"{module}, line {line}"
        if top in PACKAGES and top != package and top not in PACKAGES[package]:
            found.add(f"{where}: {package} imports {top}")
        if package == "scheduler" and top not in PURE | {"scheduler"}:
            found.add(f"{where}: the scheduler is pure, and imports {top}")
        if package == "headgate":
            if at_top and (top in HEAVY) and any(_is_below(module, light) for light in LIGHT):
                found.add(f"{where}: {top} at the top of a file that must start without it")
            if at_top and top in ("torch", "fastapi", "uvicorn"):
                found.add(f"{where}: the command imports {top} lazily only")
        elif top in HOMES and not any(_is_below(module, home) for home in HOMES[top]):
            found.add(f"{where}: {top} belongs to {', '.join(HOMES[top])}")
    return sorted(found)


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Circles of modules that import each other when they are imported."""
    found: list[list[str]] = []
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> None:
        if module in path:
            found.append([*path[path.index(module) :], module])
        elif module not in done:
            for other in sorted(graph.get(module, ())):
                visit(other, [*path, module])
            done.add(module)

    for module in sorted(graph):
        visit(module, [])
    return found


def graph_of(sources: dict[str, tuple[str, bool]]) -> dict[str, set[str]]:
    """Module -> those of ours it needs to be imported. A package stands for its __init__."""
    graph = {}
    for module, (source, is_package) in sources.items():
        names = {name for name, _, at_top in imports_of(source, module, is_package) if at_top}
        graph[module] = {name for name in names if name in sources and name != module and not _is_below(module, name)}
    return graph


def our_sources() -> dict[str, tuple[str, bool]]:
    sources = {}
    for package in PACKAGES:
        for file in sorted((ROOT / package).rglob("*.py")):
            parts = list(file.relative_to(ROOT).with_suffix("").parts)
            is_package = parts[-1] == "__init__"
            sources[".".join(parts[:-1] if is_package else parts)] = file.read_text("utf-8"), is_package
    return sources


SOURCES = our_sources()


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_of_the_table_is_there(package: str) -> None:
    assert package in SOURCES


@pytest.mark.parametrize("module", SOURCES)
def test_every_module_keeps_the_import_rules(module: str) -> None:
    source, is_package = SOURCES[module]
    assert faults(source, module, is_package) == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert cycles(graph_of(SOURCES)) == []


def test_what_the_light_modules_need_at_start_is_light_too() -> None:
    graph = graph_of(SOURCES)
    needed, todo = set(), [module for module in LIGHT if module in SOURCES]
    while todo:
        module = todo.pop()
        needed.add(module)
        todo += graph[module] - needed
    heavy = {
        f"{module} imports {name}"
        for module in needed
        for name, _, at_top in imports_of(SOURCES[module][0], module, SOURCES[module][1])
        if at_top and name.split(".")[0] in HEAVY
    }
    assert len(needed) >= 3 and heavy == set()


def test_what_the_scheduler_may_import_is_the_standard_library_and_numpy() -> None:
    assert PURE - set(sys.stdlib_module_names) == {"numpy"}
    forbidden = {"time", "random", "os", "io", "socket", "asyncio", "threading", "subprocess", "pathlib", "logging"}
    assert not PURE & forbidden


# --- the checker itself -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "source", "word"),
    [
        ("service.chat", "import worker.core", "service imports worker"),
        ("service.chat", "def f():\n    from worker import core", "service imports worker"),
        ("worker.app", "from service.schema import Chat", "worker imports service"),
        ("worker.app", "import importlib\nimportlib.import_module('service.app')", "worker imports service"),
        ("scheduler.gate", "from worker.engine import Engine", "scheduler imports worker"),
        ("scheduler.gate", "import headgate", "scheduler imports headgate"),
        ("service.app", "from headgate.settings import Settings", "service imports headgate"),
        ("scheduler.gate", "import time", "pure, and imports time"),
        ("scheduler.gate", "def f():\n    import asyncio", "pure, and imports asyncio"),
        ("scheduler.gate", "from random import Random", "pure, and imports random"),
        ("scheduler.gate", "import orjson", "pure, and imports orjson"),
        ("worker.core", "import torch", "torch belongs to worker.native"),
        ("worker.natively", "from torch import nn", "torch belongs to worker.native"),
        ("service.text", "import torch.nn.functional as F", "torch belongs to worker.native"),
        ("service.limits", "import redis.asyncio", "redis belongs to service.store"),
        ("service.chat", "from pydantic import BaseModel", "pydantic belongs to service.schema"),
        ("service.chat", "import prometheus_client", "prometheus_client belongs to service.metrics"),
        ("headgate.main", "import torch", "torch at the top"),
        ("headgate.supervisor", "from worker.app import main", "worker at the top"),
        ("headgate.main", "try:\n    import uvicorn\nexcept ImportError:\n    pass", "uvicorn at the top"),
        ("headgate.doctor", "import torch", "lazily only"),
    ],
)
def test_the_checker_finds_what_breaks_a_rule(module: str, source: str, word: str) -> None:
    assert any(word in fault for fault in faults(source, module)), faults(source, module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("service.chat", "from scheduler.messages import Request"),
        ("worker.native.runner", "import torch\nimport triton\nfrom safetensors import safe_open"),
        ("scheduler.gate", "from . import ledger\nfrom .tiers import Tier\nimport numpy as np"),
        ("headgate.doctor", "def main():\n    import torch\n    from worker import core"),
        ("service.store", "import redis"),
        ("worker.app", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"),
    ],
)
def test_the_checker_lets_pass_what_keeps_the_rules(module: str, source: str) -> None:
    assert faults(source, module) == []


def test_the_checker_understands_relative_imports() -> None:
    assert [name for name, _, _ in imports_of("from ..schema import Chat", "service.api.chat")] == [
        "service.schema",
        "service.schema.Chat",
    ]
    assert imports_of("from . import b", "a", is_package=True)[1].name == "a.b"


def test_the_checker_finds_a_circle_and_lets_a_late_import_pass() -> None:
    top = {"a.x": ("from a import y", False), "a.y": ("import a.z", False), "a.z": ("from a.x import f", False)}
    assert cycles(graph_of(top)) == [["a.x", "a.y", "a.z", "a.x"]]
    late = {**top, "a.z": ("def f():\n    from a.x import f", False)}
    assert cycles(graph_of(late)) == []
