"""What a gateway needs of a model's files, and what is said of files that are of no use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from worker.files import DEMO, ModelNotFound, find_model, read_config
from worker.tokenizer import read_tokenizer


def a_tokenizer(*words: str) -> dict[str, Any]:
    """A word of a text is a token; `</s>` is the last."""
    vocabulary = {word: id for id, word in enumerate([*words, "</s>"])}
    return {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "</s>"},
    }


FILES: dict[str, Any] = {"config": {"eos_token_id": 1}, "tokenizer": a_tokenizer("a")}


def a_model(folder: Path, **files: Any) -> Path:
    """`name=content` becomes name.json; text becomes the file as it is."""
    folder.mkdir(exist_ok=True)
    for name, content in {**FILES, **files}.items():
        path = folder / (name.replace("__", ".") if "__" in name else f"{name}.json")
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def refused(folder: Path) -> str:
    """The sentence, which names the folder."""
    with pytest.raises((ModelNotFound, ValueError)) as raised:
        read_tokenizer(folder)
    assert str(folder) in str(raised.value) and "\n" not in str(raised.value)
    return str(raised.value)


def test_the_model_that_ships_is_complete() -> None:
    files = read_tokenizer(find_model(DEMO))
    assert files.chat_template and files.eos_ids == (2, 0) and not files.is_random
    assert (files.temperature, files.top_p, files.top_k) == (0.6, 0.9, 0)


def test_a_model_without_a_tokenizer_is_told(tmp_path: Path) -> None:
    folder = a_model(tmp_path)
    (folder / "tokenizer.json").unlink()
    assert "has no tokenizer.json" in refused(folder)


@pytest.mark.parametrize("content", ["{", "{}", '{"version": "1.0"}', json.dumps({**a_tokenizer(), "model": {}})])
def test_a_tokenizer_that_is_broken_is_told(content: str, tmp_path: Path) -> None:
    assert "tokenizer.json is not a tokenizer: " in refused(a_model(tmp_path, tokenizer=content))


def test_a_tokenizer_with_more_tokens_than_the_model_is_told(tmp_path: Path) -> None:
    folder = a_model(tmp_path, config={"vocab_size": 2, "eos_token_id": 1}, tokenizer=a_tokenizer("a", "b"))
    assert "has token 2 ('</s>'), but vocab_size in" in refused(folder)
    a_model(tmp_path, config={"vocab_size": 3, "eos_token_id": 1})
    assert Tokenizer.from_str(read_tokenizer(a_model(tmp_path)).tokenizer_json).encode("a").ids == [0]


def test_an_added_token_may_lie_beyond_the_models_vocabulary(tmp_path: Path) -> None:
    padding = {"id": 2, "content": "<pad>", "special": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokenizer = {**a_tokenizer("a"), "added_tokens": [{**padding, **flags}]}
    settings = {"eos_token": "<pad>"}
    config = {"vocab_size": 2, "eos_token_id": 1}
    files = read_tokenizer(a_model(tmp_path, config=config, tokenizer=tokenizer, tokenizer_config=settings))
    assert files.eos_ids == (1,), "the model never draws the padding"


def test_special_tokens_are_texts_whether_written_plain_or_as_objects(tmp_path: Path) -> None:
    settings = {
        "bos_token": "<s>",
        "eos_token": {"content": "</s>", "lstrip": False},
        "pad_token": None,
        "unk_token": 7,
        "add_bos_token": True,
        "model_max_length": 4096,
    }
    files = read_tokenizer(a_model(tmp_path, tokenizer_config=settings))
    assert files.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}


def test_special_tokens_may_have_a_file_of_their_own_which_the_settings_overrule(tmp_path: Path) -> None:
    own = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "additional_special_tokens": ["<x>"]}
    folder = a_model(tmp_path, config={}, special_tokens_map=own, tokenizer_config={"bos_token": "<begin>"})
    files = read_tokenizer(folder)
    assert files.special_tokens == {"bos_token": "<begin>", "eos_token": "</s>"}
    assert files.eos_ids == (1,)


# --- end --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("generation", "config", "tokenizer", "expected"),
    [
        ({"eos_token_id": [5, 6]}, {"eos_token_id": 1}, {}, (5, 6)),
        ({"eos_token_id": 0}, {"eos_token_id": 1}, {}, (0,)),
        ({}, {"eos_token_id": 1}, {}, (1,)),
        ({"eos_token_id": None}, {"eos_token_id": [2]}, {}, (2,)),
        ({"eos_token_id": []}, {"eos_token_id": [2]}, {}, (2,)),
        ({"eos_token_id": 7}, {}, {"eos_token": "</s>"}, (7, 1)),
        ({"eos_token_id": [7, 1]}, {}, {"eos_token": {"content": "</s>"}}, (7, 1)),
        ({}, {}, {"eos_token": "</s>"}, (1,)),
        ({"eos_token_id": 7}, {}, {"eos_token": "nobody knows it"}, (7,)),
    ],
)
def test_end_ids_are_those_of_the_generation_config_else_the_config_and_the_tokenizers(
    tmp_path: Path,
    generation: dict[str, Any],
    config: dict[str, Any],
    tokenizer: dict[str, Any],
    expected: tuple[int, ...],
) -> None:
    folder = a_model(tmp_path, generation_config=generation, config=config, tokenizer_config=tokenizer)
    assert read_tokenizer(folder).eos_ids == expected


@pytest.mark.parametrize("settings", [{}, {"eos_token": None}, {"eos_token": "nobody knows it"}])
def test_a_model_that_knows_no_end_is_told_with_the_files_looked_at(tmp_path: Path, settings: dict[str, Any]) -> None:
    sentence = refused(a_model(tmp_path, config={}, tokenizer_config=settings))
    assert all(f"{name}.json" in sentence for name in ("generation_config", "config", "tokenizer_config"))


@pytest.mark.parametrize("value", ["</s>", 1.5, -1, True, [1, "x"], {"id": 1}])
def test_end_ids_that_are_none_are_told(tmp_path: Path, value: Any) -> None:
    sentence = refused(a_model(tmp_path, generation_config={"eos_token_id": value}))
    assert "generation_config.json: eos_token_id must be a token id or a list of them, not " in sentence


@pytest.mark.parametrize("name", ["generation_config", "config"])
def test_an_end_id_beyond_the_vocabulary_is_told(tmp_path: Path, name: str) -> None:
    files = {"config": {"vocab_size": 2, "eos_token_id": 1}}
    files[name] = {**files.get(name, {}), "eos_token_id": [1, 2]}
    sentence = refused(a_model(tmp_path, **files))
    assert sentence.endswith(f"{name}.json: eos_token_id 2 is no token of the model: vocab_size is 2")


# --- how it wants to be sampled ---------------------------------------------------------------------------------------


def test_sampling_defaults_come_from_the_generation_config(tmp_path: Path) -> None:
    given = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": 0.05, "repetition_penalty": 1.05}
    files = read_tokenizer(a_model(tmp_path, generation_config={**given, "do_sample": True}))
    assert {name: getattr(files, name) for name in given} == given


@pytest.mark.parametrize("generation", [{}, {"temperature": None, "top_p": None, "top_k": None}])
def test_what_the_generation_config_leaves_open_is_off(tmp_path: Path, generation: dict[str, Any]) -> None:
    files = read_tokenizer(a_model(tmp_path, generation_config=generation))
    assert (files.temperature, files.top_p, files.top_k) == (1.0, 1.0, 0)
    assert (files.min_p, files.repetition_penalty) == (0.0, 1.0)


def test_a_model_that_does_not_want_to_be_sampled_is_greedy(tmp_path: Path) -> None:
    files = read_tokenizer(a_model(tmp_path, generation_config={"do_sample": False, "temperature": 0.6}))
    assert files.temperature == 0.0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", "0.6"),
        ("temperature", -1),
        ("temperature", True),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0),
        ("top_p", 1.5),
        ("top_p", [0.9]),
        ("top_k", -2),
        ("top_k", 0.5),
        ("min_p", -0.1),
        ("repetition_penalty", 0),
        ("repetition_penalty", "high"),
    ],
)
def test_a_sampling_default_that_means_nothing_is_told(tmp_path: Path, name: str, value: Any) -> None:
    sentence = refused(a_model(tmp_path, generation_config={name: value}))
    assert f"generation_config.json: {name} must be " in sentence and sentence.endswith(f", not {json.dumps(value)}")


@pytest.mark.parametrize(("given", "top_k"), [(-1, 0), (0, 0), (50.0, 50), (-1.0, 0)])
def test_top_k_may_be_off_in_the_other_way_and_a_whole_float(tmp_path: Path, given: float, top_k: int) -> None:
    found = read_tokenizer(a_model(tmp_path, generation_config={"top_k": given})).top_k
    assert found == top_k and isinstance(found, int)


def test_a_generation_config_that_is_not_json_is_told(tmp_path: Path) -> None:
    assert "generation_config.json is not JSON" in refused(a_model(tmp_path, generation_config="{,}"))


# --- chat template ----------------------------------------------------------------------------------------------------


def test_a_template_of_its_own_file_wins(tmp_path: Path) -> None:
    settings = {"chat_template": "from settings"}
    folder = a_model(tmp_path, tokenizer_config=settings, chat_template__jinja="from its file")
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
    folder = a_model(tmp_path, tokenizer_config={"chat_template": template})
    assert read_tokenizer(folder).chat_template == expected


@pytest.mark.parametrize("template", [7, {"default": "d"}, [{"name": "default"}], ["default"]])
def test_a_template_that_is_no_text_is_told(tmp_path: Path, template: Any) -> None:
    assert "tokenizer_config.json: chat_template" in refused(
        a_model(tmp_path, tokenizer_config={"chat_template": template})
    )


@pytest.mark.parametrize(
    "template", ["ok\n{% if %}", "ok\n{{ messages", "ok\n{% nonsense %}", "ok\n{{ 1 | nonsense }}"]
)
def test_a_template_that_does_not_compile_is_told_with_its_file_and_line(tmp_path: Path, template: str) -> None:
    inline = a_model(tmp_path / "inline", tokenizer_config={"chat_template": template})
    assert "tokenizer_config.json: chat_template, line 2: the chat template does not compile: " in refused(inline)
    apart = a_model(tmp_path / "apart", chat_template__jinja=template)
    assert "chat_template.jinja, line 2: the chat template does not compile: " in refused(apart)


def test_a_template_that_jinja_takes_and_python_does_not_is_told_with_its_file(tmp_path: Path) -> None:
    sentence = refused(a_model(tmp_path, chat_template__jinja="{% break %}"))
    assert "chat_template.jinja: the chat template does not compile: 'break' outside loop" in sentence


def test_a_template_that_is_not_utf_8_is_told_with_its_file(tmp_path: Path) -> None:
    (a_model(tmp_path) / "chat_template.jinja").write_bytes(b"caf\xe9")
    assert "chat_template.jinja is not a text in UTF-8: " in refused(tmp_path)


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{% if loop.index > 9 %}{% break %}{% endif %}{% endfor %}",
        "{% generation %}{{ messages[0].content }}{% endgeneration %}",
        "{{ messages | tojson }}{{ raise_exception('no') if not messages }}{{ strftime_now('%Y') }}",
    ],
)
def test_the_dialect_of_chat_templates_compiles(tmp_path: Path, template: str) -> None:
    assert read_tokenizer(a_model(tmp_path, chat_template__jinja=template)).chat_template == template


def test_the_digest_changes_with_tokenizer_template_and_special_tokens(tmp_path: Path) -> None:
    variants: list[dict[str, Any]] = [
        {},
        {"tokenizer": a_tokenizer("b")},
        {"tokenizer_config": {"chat_template": "x"}},
        {"tokenizer_config": {"eos_token": "x"}},
    ]
    digests = [read_tokenizer(a_model(tmp_path / str(n), **files)).digest for n, files in enumerate(variants)]
    assert len(set(digests)) == len(variants)
    assert digests[0] == read_tokenizer(a_model(tmp_path / "again")).digest


# --- random text ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["wall", "llama-3.2-1b"])
def test_random_weights_speak_with_tokens_that_say_so(name: str) -> None:
    files, demo = read_tokenizer(find_model(name)), read_tokenizer(find_model(DEMO))
    tokenizer, vocabulary = Tokenizer.from_str(files.tokenizer_json), read_config(find_model(name))["vocab_size"]
    assert tokenizer.get_vocab_size() == vocabulary
    assert tokenizer.decode([4096, vocabulary - 1]) == f" [random 4096] [random {vocabulary - 1}]"
    assert files.is_random and files.temperature == 1.0
    assert (files.chat_template, files.eos_ids, files.special_tokens) == (
        demo.chat_template,
        demo.eos_ids,
        demo.special_tokens,
    )


def test_no_prompt_becomes_a_random_token() -> None:
    wall, demo = (Tokenizer.from_str(read_tokenizer(find_model(name)).tokenizer_json) for name in ("wall", DEMO))
    for text in ("Hello, world", " [random 4096]", "[random 5000] [random 49151]", "Ġ[randomĠ4096]", "<|im_end|>é😀\n"):
        ids = wall.encode(text).ids
        assert ids == demo.encode(text).ids and max(ids) < 4096
        assert wall.decode(ids) == demo.decode(ids)


@pytest.mark.parametrize(
    ("config", "message"), [('{"vocab_size": 4095}', "must be 4096 or more"), ("{}", "no vocab_size")]
)
def test_a_vocabulary_that_the_tokenizer_does_not_fit_is_told(tmp_path: Path, config: str, message: str) -> None:
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match=message):
        read_tokenizer(tmp_path / "config.json")
