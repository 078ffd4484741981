"""Where a model is, and what a gateway needs of its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from worker.files import DEMO, ModelNotFound, find_local_model, find_model, read_config, read_tokenizer


def a_model(folder: Path, **files: Any) -> Path:
    """`name=content` becomes name.json; text becomes the file as it is."""
    folder.mkdir(exist_ok=True)
    for name, content in {"config": {}, "tokenizer": {"version": "1.0"}, **files}.items():
        path = folder / (name.replace("__", ".") if "__" in name else f"{name}.json")
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def test_the_model_that_ships_is_found_and_complete() -> None:
    folder = find_model(DEMO)
    files = read_tokenizer(folder)
    assert files.chat_template and files.eos_ids and read_config(folder)["vocab_size"]


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


def test_a_hub_model_that_cannot_be_had_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def offline(name: str, **_: Any) -> str:
        raise OSError("We cannot reach the hub.\nAnd here is a long story.")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ModelNotFound) as raised:
        find_model("nobody/no-such-model")
    assert str(raised.value) == "the hub model nobody/no-such-model could not be had: We cannot reach the hub."


def test_a_model_without_a_tokenizer_is_told(tmp_path: Path) -> None:
    folder = a_model(tmp_path / "mine")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelNotFound, match=r"has no tokenizer.json"):
        read_tokenizer(folder)


def test_special_tokens_are_texts_whether_written_plain_or_as_objects(tmp_path: Path) -> None:
    settings = {
        "bos_token": "<s>",
        "eos_token": {"content": "</s>", "lstrip": False},
        "pad_token": None,
        "unk_token": 7,
        "add_bos_token": True,
        "model_max_length": 4096,
    }
    files = read_tokenizer(a_model(tmp_path / "mine", tokenizer_config=settings))
    assert files.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [5, 6]}, {"eos_token_id": 1}, (5, 6)),
        ({"eos_token_id": 0}, {"eos_token_id": 1}, (0,)),
        ({}, {"eos_token_id": 1}, (1,)),
        ({"eos_token_id": None}, {"eos_token_id": [2]}, (2,)),
        ({}, {}, ()),
    ],
)
def test_end_ids_come_from_the_generation_config_first(
    tmp_path: Path, generation: dict[str, Any], config: dict[str, Any], expected: tuple[int, ...]
) -> None:
    folder = a_model(tmp_path / "mine", generation_config=generation, config=config)
    assert read_tokenizer(folder).eos_ids == expected


def test_a_template_of_its_own_file_wins(tmp_path: Path) -> None:
    settings = {"chat_template": "from settings"}
    folder = a_model(tmp_path / "mine", tokenizer_config=settings, chat_template__jinja="from its file")
    assert read_tokenizer(folder).chat_template == "from its file"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("plain", "plain"),
        ([{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}], "d"),
        ([{"name": "tool_use", "template": "t"}], None),
        (None, None),
    ],
)
def test_a_template_is_looked_up_in_the_tokenizers_settings(
    tmp_path: Path, template: Any, expected: str | None
) -> None:
    folder = a_model(tmp_path / "mine", tokenizer_config={"chat_template": template})
    assert read_tokenizer(folder).chat_template == expected


def test_the_digest_changes_with_tokenizer_template_and_special_tokens(tmp_path: Path) -> None:
    variants = [
        {},
        {"tokenizer": {"version": "2.0"}},
        {"tokenizer_config": {"chat_template": "x"}},
        {"tokenizer_config": {"eos_token": "x"}},
    ]
    digests = [read_tokenizer(a_model(tmp_path / str(n), **files)).digest for n, files in enumerate(variants)]
    assert len(set(digests)) == len(variants)
    assert digests[0] == read_tokenizer(a_model(tmp_path / "again")).digest
