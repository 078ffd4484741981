"""What a worker says of itself before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from worker.build import StartFailed, build, own_name
from worker.config import WorkerConfig
from worker.files import find_config, find_model


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "tiny-llama"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "other.json").write_text("{}")
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("headgate-demo", "headgate-demo"),
        ("wall", "wall"),
        (".", "tiny-llama"),
        ("../tiny-llama", "tiny-llama"),
        ("~/tiny-llama", "tiny-llama"),
    ],
)
def test_a_model_is_called_as_its_folder(folder: Path, name: str, expected: str) -> None:
    assert own_name(WorkerConfig(model=name), find_model(name)) == expected


def test_a_hub_model_is_called_by_its_whole_name(folder: Path) -> None:
    assert own_name(WorkerConfig(model="acme/tiny"), folder / "snapshots" / "abc") == "acme/tiny"


@pytest.mark.parametrize(
    ("name", "expected"),
    [("wall", "wall"), (".", "tiny-llama"), ("config.json", "tiny-llama"), ("other.json", "other")],
)
def test_random_weights_are_called_as_the_config_or_its_folder(folder: Path, name: str, expected: str) -> None:
    assert own_name(WorkerConfig(random_weights=name), find_config(name)) == expected


def test_what_stops_a_start_is_one_line(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(StartFailed, match=r"tokenizer\.json is not a tokenizer") as raised:
        build(WorkerConfig(model="."))
    assert "\n" not in str(raised.value)
