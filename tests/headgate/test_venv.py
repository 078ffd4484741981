"""deploy/venv.py runs on any Python, and says so when that one will not do."""

from __future__ import annotations

import ast
import builtins
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import headgate

SCRIPT = Path(headgate.__file__).parent.parent / "deploy" / "venv.py"


@pytest.fixture
def venv() -> ModuleType:
    spec = importlib.util.spec_from_file_location("deploy_venv", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_python_that_is_too_old_is_named_with_the_one_that_is_needed(
    venv: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(sys, "version_info", (3, 9, 7, "final", 0))
        with pytest.raises(SystemExit) as ended:
            venv.require_python()
    assert ended.value.code == (
        "headgate: Python 3.11 or newer is needed, this is 3.9.7. Name another one: make PYTHON=python3.11 …"
    )


def test_this_python_will_do(venv: ModuleType) -> None:
    venv.require_python()


def test_a_python_without_venv_is_told_where_to_get_it(venv: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def without_ensurepip(name: str, *args: Any) -> Any:
        if name == "ensurepip":
            raise ImportError(name)
        return real_import(name, *args)

    with monkeypatch.context() as patched:
        patched.setattr(builtins, "__import__", without_ensurepip)
        with pytest.raises(SystemExit) as ended:
            venv.require_python()
    assert "apt install python3-venv" in str(ended.value.code)


def test_a_step_that_fails_is_named(venv: ModuleType) -> None:
    with pytest.raises(SystemExit) as ended:
        venv.run("trying", sys.executable, "-c", "raise SystemExit(3)")
    assert str(ended.value.code).startswith("headgate: this step failed: ")


def test_the_script_parses_on_the_pythons_it_has_to_turn_away() -> None:
    """Old ones must get as far as the sentence: no syntax that is newer than 3.6."""
    ast.parse(SCRIPT.read_text(encoding="utf-8"), feature_version=(3, 6))
