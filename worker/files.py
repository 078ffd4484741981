"""Model files: where a model is, its configuration, and what a gateway needs of its tokenizer."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEMO = "headgate-demo"
SHIPPED = Path(__file__).parent / "models"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
NEEDED = ["*.json", "*.safetensors", "*.jinja"]


class ModelNotFound(Exception):
    """The model is not where its name says; the text is a sentence for the user."""


def find_model(name: str) -> Path:
    """The folder of a model: one that ships, a local folder, or a snapshot of a hub model, downloaded where needed.

    Raises ModelNotFound with a sentence that says what was looked for.
    """
    return find_local_model(name) or _from_hub(name)


def find_local_model(name: str) -> Path | None:
    """As `find_model`, without downloading: None where `name` can only be a hub model's."""
    for folder in (SHIPPED / name, Path(name).expanduser()):
        if (folder / "config.json").is_file():
            return folder
    if Path(name).expanduser().exists():
        raise ModelNotFound(f"{name} has no config.json; a folder with a checkpoint in Hugging Face form is needed")
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ModelNotFound(f"there is no folder {name}, and it is not the name of a hub model (OWNER/NAME)")
    return None


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download  # takes a third of a second to import; few starts need it

    try:
        return Path(snapshot_download(name, allow_patterns=NEEDED))
    except Exception as error:  # the hub's errors have many types; each ends the start with its own sentence
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelNotFound(f"the hub model {name} could not be had: {first_line}") from error


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """A tokenizer as its files say it, the ids that end a sequence, and how the model wants to be sampled."""

    tokenizer_json: str
    chat_template: str | None
    special_tokens: dict[str, str]
    eos_ids: tuple[int, ...]
    temperature: float
    top_p: float
    top_k: int

    @property
    def digest(self) -> str:
        text = self.tokenizer_json + (self.chat_template or "") + json.dumps(self.special_tokens, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_tokenizer(folder: Path) -> TokenizerFiles:
    """Raises ModelNotFound when the folder has no tokenizer.json."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ModelNotFound(f"{folder} has no tokenizer.json; only fast tokenizers are supported")
    settings = _read_json(folder / "tokenizer_config.json")
    generation = _read_json(folder / "generation_config.json")
    return TokenizerFiles(
        tokenizer_json=path.read_text("utf-8"),
        chat_template=_chat_template(folder, settings),
        special_tokens=_special_tokens(settings),
        eos_ids=_eos_ids(generation, read_config(folder)),
        temperature=float(generation.get("temperature") or 1.0),
        top_p=float(generation.get("top_p") or 1.0),
        top_k=int(generation.get("top_k") or 0),
    )


def read_config(folder: Path) -> dict[str, Any]:
    return _read_json(folder / "config.json")


def _chat_template(folder: Path, settings: dict[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text("utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):  # several named ones
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default")
    return template


def _special_tokens(settings: dict[str, Any]) -> dict[str, str]:
    """bos_token, eos_token and the like, as the chat template expects them."""
    tokens = {}
    for name, value in settings.items():
        if name.endswith("_token") and value is not None:
            content = value.get("content") if isinstance(value, dict) else value
            if isinstance(content, str):
                tokens[name] = content
    return tokens


def _eos_ids(*configs: dict[str, Any]) -> tuple[int, ...]:
    """From the first that names any."""
    for config in configs:
        ids = config.get("eos_token_id")
        if ids is not None:
            return tuple(ids) if isinstance(ids, list) else (int(ids),)
    return ()


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    data: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return data
