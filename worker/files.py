"""Where a model is: one that ships, a folder, a GGUF file, a hub model, or a config alone, whose weights are then random."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from worker.gguf import is_gguf, read_gguf
from worker.gguf_config import config_of
from worker.hub import HubName, from_hub

DEMO = "headgate-demo"
SHIPPED = Path(__file__).parent / "models"
WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# All that is served from: no consolidated or sharded copies in other forms, no optimizer, nothing of other frameworks.
SERVED_FROM = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    WHOLE,
    INDEX,
    "model-*-of-*.safetensors",
]


class ModelNotFound(Exception):
    """The model is not where its name says; the text is a sentence for the user."""


def find_model(name: str, say: Callable[[str], None] = print) -> Path:
    """The folder of a model, its GGUF file, or the config.json of one that ships without weights (`has_random_weights`).

    A hub model is downloaded where needed; `say` is told when that is not possible and the cache has it.
    Raises ModelNotFound with a sentence that says what was looked for.
    """
    local = find_local_model(name)
    if local is not None:
        return local
    hub_name = HubName.parse(name)
    assert hub_name is not None  # else nothing else could have been meant
    try:
        folder = from_hub(hub_name, SERVED_FROM, _lacks, say)
    except OSError as error:
        raise ModelNotFound(str(error)) from error
    if not has_weights(folder):
        raise ModelNotFound(f"the hub model {name} has no {WHOLE}; other forms of weights are not read")
    return folder


def find_local_model(name: str) -> Path | None:
    """As `find_model`, without downloading: None where `name` can only be a hub model's."""
    if name in shipped_models():
        return SHIPPED / name if has_weights(SHIPPED / name) else SHIPPED / name / "config.json"
    path = Path(name).expanduser()
    if (path / "config.json").is_file() or is_gguf(path):
        return path
    if path.exists():
        raise ModelNotFound(f"{name} {_what_it_lacks(path)}")
    if HubName.parse(name) is None:
        raise ModelNotFound(
            f"there is no folder {name}, and it is not the name of a hub model (OWNER/NAME) nor of one that ships "
            f"({', '.join(shipped_models())})"
        )
    return None


def _what_it_lacks(path: Path) -> str:
    """To be served from."""
    if path.is_file():
        return "is neither a folder nor a GGUF file (--random-weights serves a config without weights)"
    files = sorted(file.name for file in path.glob("*.gguf"))
    if files:
        return f"has no config.json, but {files[0]}: name that file itself"
    return "has no config.json; a folder with a checkpoint in Hugging Face form, or a GGUF file, is needed"


def find_config(name: str) -> Path:
    """The config.json that is to be served with random weights: a file, a folder that holds one, or a model that ships."""
    path = SHIPPED / name if name in shipped_models() else Path(name).expanduser()
    for file in (path, path / "config.json"):
        if file.is_file():
            return file
    raise ModelNotFound(f"--random-weights {name}: there is no such config.json, nor a folder that holds one")


def shipped_models() -> list[str]:
    return sorted(config.parent.name for config in SHIPPED.glob("*/config.json"))


def has_weights(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (WHOLE, INDEX))


def _lacks(folder: Path) -> str:
    """The first file without which nothing can be served, where it is not there; else nothing."""
    absent = [name for name in ("config.json", "tokenizer.json") if not (folder / name).is_file()]
    return (absent or [""])[0] if has_weights(folder) else WHOLE


def has_random_weights(model: Path) -> bool:
    """A model is a folder with a checkpoint, or a GGUF file. Where it is a config's file, its weights are made up."""
    return model.is_file() and not is_gguf(model)


def read_config(model: Path) -> dict[str, Any]:
    """Raises ValueError with a sentence when it is not there or cannot be read."""
    if is_gguf(model):
        return config_of(read_gguf(model))
    path = model if has_random_weights(model) else model / "config.json"
    if not path.is_file():
        raise ValueError(f"{model} has no config.json: not a folder with a checkpoint")
    return read_json(path)


def read_json(path: Path) -> dict[str, Any]:
    """Empty where there is no such file. Raises ValueError, naming it, when it is not a JSON object."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a JSON object")
    return content
