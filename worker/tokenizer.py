"""What a gateway needs of a model's files: tokenizer, template, the ids that end a text, and sampling defaults.

A GGUF file says all of it in its metadata (`worker.gguf_tokenizer`). A model with random weights (see `worker.files`) gets the tokenizer of the model that ships, with further tokens whose
text says that they are random.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
from tokenizers import Tokenizer

from worker import gguf_tokenizer
from worker.files import DEMO, SHIPPED, ModelNotFound, has_random_weights, read_config, read_json
from worker.gguf import is_gguf, read_gguf

MOST_IDS = 2**32 - 1  # on the wire


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """A tokenizer as its files say it, the ids that end a sequence, and how the model wants to be sampled."""

    tokenizer_json: str
    chat_template: str | None
    special_tokens: dict[str, str]
    eos_ids: tuple[int, ...]
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    is_random: bool = False

    @property
    def digest(self) -> str:
        text = self.tokenizer_json + (self.chat_template or "") + json.dumps(self.special_tokens, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_tokenizer(model: Path) -> TokenizerFiles:
    """Raises ModelNotFound or ValueError, with a sentence that names the file, when one is not there or of no use."""
    if is_gguf(model):
        return _gguf_tokenizer(model)
    return _random_tokenizer(model) if has_random_weights(model) else _read_tokenizer(model)


def _read_tokenizer(folder: Path) -> TokenizerFiles:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ModelNotFound(f"{folder} has no tokenizer.json; only fast tokenizers are supported")
    text, tokenizer = _load(path)
    config, settings = read_config(folder), read_json(folder / "tokenizer_config.json")
    _check_vocabulary(path, folder / "config.json", tokenizer, config)
    special_tokens = _special_tokens(read_json(folder / "special_tokens_map.json")) | _special_tokens(settings)
    return TokenizerFiles(
        tokenizer_json=text,
        chat_template=_chat_template(folder, settings),
        special_tokens=special_tokens,
        eos_ids=_eos_ids(folder, config, tokenizer.token_to_id(special_tokens.get("eos_token", ""))),
        **_sampling(folder / "generation_config.json", read_json(folder / "generation_config.json")),
    )


def _gguf_tokenizer(path: Path) -> TokenizerFiles:
    file = read_gguf(path)
    text, tokenizer = _parsed(gguf_tokenizer.tokenizer_json(file), path)
    config, template = read_config(path), file.text("tokenizer.chat_template")
    _check_vocabulary(path, path, tokenizer, config)
    eos_ids = gguf_tokenizer.eos_ids(file)
    if max(eos_ids) >= config["vocab_size"]:
        raise ValueError(f"{path}: token {max(eos_ids)} ends a text, but the model has {config['vocab_size']} tokens")
    return TokenizerFiles(
        tokenizer_json=text,
        chat_template=None if template is None else _compiled(template, f"{path}: tokenizer.chat_template"),
        special_tokens=gguf_tokenizer.special_tokens(file),
        eos_ids=eos_ids,
        **_sampling(path, gguf_tokenizer.sampling(file)),
    )


# --- the tokenizer ----------------------------------------------------------------------------------------------------


def _load(path: Path) -> tuple[str, Tokenizer]:
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a tokenizer: {error}") from error
    return _parsed(text, path)


def _parsed(text: str, path: Path) -> tuple[str, Tokenizer]:
    try:
        return text, Tokenizer.from_str(text)
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"{path} is not a tokenizer: {str(error).splitlines()[0]}") from error


def _check_vocabulary(path: Path, config_path: Path, tokenizer: Tokenizer, config: dict[str, Any]) -> None:
    """A text with an id that has no embedding could not be computed.

    Added tokens may lie beyond: fine-tuning often adds one for padding, which no text holds. Who sends it all the same is
    refused.
    """
    most = max(tokenizer.get_vocab(with_added_tokens=False).values(), default=-1)
    size = config.get("vocab_size")
    if isinstance(size, int) and most >= size:
        raise ValueError(
            f"{path} has token {most} ({tokenizer.id_to_token(most)!r}), but vocab_size in {config_path} is {size}"
        )


def _special_tokens(settings: dict[str, Any]) -> dict[str, str]:
    """bos_token, eos_token and the like, as the chat template expects them."""
    tokens = {}
    for name, value in settings.items():
        if name.endswith("_token") and value is not None:
            content = value.get("content") if isinstance(value, dict) else value
            if isinstance(content, str):
                tokens[name] = content
    return tokens


def _eos_ids(folder: Path, config: dict[str, Any], of_tokenizer: int | None) -> tuple[int, ...]:
    """Those of generation_config.json, else of config.json; and the tokenizer's own, if it can be drawn."""
    generation, size = folder / "generation_config.json", config.get("vocab_size")
    most = size - 1 if isinstance(size, int) else MOST_IDS
    ids = _ids(generation, read_json(generation), most) or _ids(folder / "config.json", config, most)
    if of_tokenizer is not None and of_tokenizer <= most and of_tokenizer not in ids:
        ids = (*ids, of_tokenizer)
    if not ids:
        raise ValueError(
            f"{folder} names no token that ends a text: neither eos_token_id in generation_config.json or config.json, "
            "nor a known eos_token in tokenizer_config.json"
        )
    return ids


def _ids(path: Path, config: dict[str, Any], most: int) -> tuple[int, ...]:
    value = config.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(id, int) and not isinstance(id, bool) and id >= 0 for id in ids):
        raise ValueError(f"{path}: eos_token_id must be a token id or a list of them, not {json.dumps(value)}")
    if max(ids, default=0) > most:
        raise ValueError(f"{path}: eos_token_id {max(ids)} is no token of the model: vocab_size is {most + 1}")
    return tuple(ids)


# --- the chat template ------------------------------------------------------------------------------------------------


class Generation(jinja2.ext.Extension):
    """`{% generation %}`, which marks answers for training. The gateway knows it, so it is no error here."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _chat_template(folder: Path, settings: dict[str, Any]) -> str | None:
    """From its own file, else from the tokenizer's settings: one text, or several with names."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return _compiled(path.read_text("utf-8"), str(path))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not a text in UTF-8: {error}") from error
    where, template = f"{folder / 'tokenizer_config.json'}: chat_template", settings.get("chat_template")
    if isinstance(template, list):
        if not all(isinstance(entry, dict) and {"name", "template"} <= entry.keys() for entry in template):
            raise ValueError(f"{where}: each in the list needs a name and a template")
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    if template is None:
        return None
    if not isinstance(template, str):
        raise ValueError(f"{where} must be a text, or a list of named ones")
    return _compiled(template, where)


def _compiled(template: str, where: str) -> str:
    """The template, once it is known to be one."""
    try:
        jinja2.sandbox.ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols", Generation]).from_string(
            template
        )
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(
            f"{where}, line {error.lineno}: the chat template does not compile: {error.message}"
        ) from error
    except SyntaxError as error:  # of Python, which it is compiled to: a break outside of a loop
        raise ValueError(f"{where}: the chat template does not compile: {error.msg}") from error
    return template


# --- generation_config.json -------------------------------------------------------------------------------------------


class Field(NamedTuple):
    """A number of generation_config.json."""

    name: str
    must: str
    fits: Callable[[float], bool]


FIELDS = (
    Field("temperature", "be 0 or more", lambda value: value >= 0),
    Field("top_p", "be more than 0 and at most 1", lambda value: 0 < value <= 1),
    Field("top_k", "be a whole number, 0 or more (or -1: off)", lambda value: value >= -1 and value == int(value)),
    Field("min_p", "be from 0 to 1", lambda value: 0 <= value <= 1),
    Field("repetition_penalty", "be more than 0", lambda value: value > 0),
)


def _sampling(path: Path, generation: dict[str, Any]) -> dict[str, Any]:
    """The fields that are there and not null. Raises ValueError, naming file and field, for one that means nothing."""
    given = {field.name: generation[field.name] for field in FIELDS if generation.get(field.name) is not None}
    for name, must, fits in FIELDS:
        if name in given and not (_is_number(given[name]) and fits(given[name])):
            raise ValueError(f"{path}: {name} must {must}, not {json.dumps(given[name])}")
    if "top_k" in given:
        given["top_k"] = max(0, int(given["top_k"]))
    return given | ({"temperature": 0.0} if generation.get("do_sample") is False else {})


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


# --- random weights ---------------------------------------------------------------------------------------------------


def _random_tokenizer(config: Path) -> TokenizerFiles:
    demo = _read_tokenizer(SHIPPED / DEMO)
    extended = _extended(demo.tokenizer_json, _vocabulary(config))
    return TokenizerFiles(extended, demo.chat_template, demo.special_tokens, demo.eos_ids, is_random=True)


def _vocabulary(config: Path) -> int:
    size = read_config(config).get("vocab_size")
    if not isinstance(size, int):
        raise ValueError(f"{config} has no vocab_size")
    return size


def _extended(tokenizer_json: str, vocabulary: int) -> str:
    """A byte-level BPE tokenizer whose further tokens no text can become, since no merge makes them.

    They are written into its vocabulary, which takes 0.1 s for 128,000; `add_tokens` would look for them in prompts.
    """
    parts = json.loads(tokenizer_json)
    known = parts["model"]["vocab"]
    if vocabulary < len(known):
        raise ValueError(
            f"vocab_size is {vocabulary}; with random weights it must be {len(known)} or more, "
            f"since the tokenizer is that of {DEMO}"
        )
    space = "\u0120"  # as byte-level BPE writes it
    parts["model"]["vocab"] = known | {f"{space}[random{space}{id}]": id for id in range(len(known), vocabulary)}
    return json.dumps(parts, ensure_ascii=False)
