"""Where a model is: one that ships, a folder, or a config alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from worker.files import (
    DEMO,
    SHIPPED,
    ModelNotFound,
    find_config,
    find_local_model,
    find_model,
    has_random_weights,
    read_config,
    shipped_models,
)


def a_model(folder: Path, config: str = "{}") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(config)
    return folder


def test_the_model_that_ships_is_found() -> None:
    folder = find_model(DEMO)
    assert not has_random_weights(folder) and read_config(folder)["vocab_size"] == 4096


@pytest.mark.parametrize("name", ["wall", "llama-3.2-1b"])
def test_a_model_that_ships_without_weights_has_random_ones(name: str) -> None:
    assert has_random_weights(find_model(name))
    assert read_config(find_model(name))["architectures"] == ["LlamaForCausalLM"]


def test_a_folder_of_ones_own_without_weights_does_not_get_random_ones(tmp_path: Path) -> None:
    assert not has_random_weights(find_model(str(a_model(tmp_path / "wall"))))


def test_a_folder_is_found(tmp_path: Path) -> None:
    assert find_model(str(a_model(tmp_path / "mine"))) == tmp_path / "mine"


def test_a_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = a_model(tmp_path / "mine")
    assert find_model("~/mine") == folder


def test_a_folder_without_a_config_is_told(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"has no config.json; a folder with a checkpoint"):
        find_model(str(tmp_path))


@pytest.mark.parametrize("name", ["missing", "./missing", "/missing/model", "~/missing", "a/b/c", "../a"])
def test_what_can_be_neither_a_folder_nor_on_the_hub_is_told(name: str) -> None:
    with pytest.raises(ModelNotFound, match=f"there is no folder {name}, and it is not the name of a hub model"):
        find_model(name)


def test_a_hub_name_is_left_to_the_hub() -> None:
    assert find_local_model("nobody/no-such-model") is None


def test_what_is_no_model_is_told_with_the_names_that_are() -> None:
    with pytest.raises(ModelNotFound) as raised:
        find_model("nonsense")
    assert all(name in str(raised.value) for name in (*shipped_models(), DEMO, "wall", "llama-3.2-1b"))


@pytest.mark.parametrize("form", ["folder", "config.json", "other.json", "~", "name"])
def test_a_config_for_random_weights_may_be_a_folder_a_file_or_a_name(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = a_model(tmp_path / "mine")
    (folder / "other.json").write_text("{}")
    config = folder / "config.json"
    name, expected = {
        "folder": (str(folder), config),
        "config.json": (str(config), config),
        "other.json": (str(folder / "other.json"), folder / "other.json"),
        "~": ("~/mine", config),
        "name": ("wall", SHIPPED / "wall" / "config.json"),
    }[form]
    assert find_config(name) == expected
    assert has_random_weights(expected)


def test_a_config_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"--random-weights .*: there is no such config.json"):
        find_config(str(tmp_path))


def test_a_config_as_a_model_is_told_about_random_weights(tmp_path: Path) -> None:
    config = a_model(tmp_path / "mine") / "config.json"
    with pytest.raises(ModelNotFound, match="--random-weights serves a config without weights"):
        find_model(str(config))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"config.json is not JSON: Expecting"),
        ("[]", r"config.json is not a JSON object"),
        (None, "no config.json"),
    ],
)
def test_a_config_that_cannot_be_read_is_told(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        a_model(tmp_path, content)
    with pytest.raises(ValueError, match=message):
        read_config(tmp_path)
