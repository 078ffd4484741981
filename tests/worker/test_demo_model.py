"""The demo model as it lies in the package, and the corpus it was made from."""

import json
import random
import struct
from pathlib import Path

import jinja2
import pytest
from tokenizers import Tokenizer

import worker
from worker.native.demo.corpus import Corpus, build_corpus
from worker.native.demo.tokenizer import CHAT_TEMPLATE, render

MODEL = Path(worker.__file__).parent / "models" / "headgate-demo"

MODULE = '''"""Tools for greeting."""

class Greeter:
    """Says hello."""

    def greet(self, name, *,
              loud=False):
        """Greet NAME.

        Loudly, if *loud* is true.
        """
        text = f"hello {name}"
        return text.upper() if loud else text


def undocumented(values):
    total = sum(values)
    return total / len(values)
'''


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(MODEL / "tokenizer.json"))


@pytest.fixture
def lib(tmp_path: Path) -> Path:
    (tmp_path / "test").mkdir()
    (tmp_path / "greeting.py").write_text(MODULE)
    (tmp_path / "test" / "test_greeting.py").write_text('"""Nothing from here."""\n')
    (tmp_path / "new.py").write_text("type Broken = = 1\n")
    return tmp_path


def read_json(name: str) -> dict[str, object]:
    return json.loads((MODEL / name).read_text(encoding="utf-8"))


def weight_shapes() -> dict[str, list[int]]:
    with (MODEL / "model.safetensors").open("rb") as file:
        (header_bytes,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(header_bytes))
    return {name: tensor["shape"] for name, tensor in header.items() if name != "__metadata__"}


def product(shape: list[int]) -> int:
    return shape[0] * (product(shape[1:]) if len(shape) > 1 else 1)


def test_whole_model_is_at_most_ten_megabytes() -> None:
    assert sum(path.stat().st_size for path in MODEL.iterdir()) <= 10_000_000


def test_model_has_three_to_four_million_parameters() -> None:
    assert 3_000_000 <= sum(map(product, weight_shapes().values())) <= 4_000_000


def test_vocabulary_is_the_same_in_tokenizer_config_and_weights(tokenizer: Tokenizer) -> None:
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    assert sorted(vocabulary.values()) == list(range(4096))
    assert read_json("config.json")["vocab_size"] == 4096
    assert weight_shapes()["model.embed_tokens.weight"][0] == 4096


def test_end_tokens_are_in_the_vocabulary(tokenizer: Tokenizer) -> None:
    ends = read_json("generation_config.json")["eos_token_id"]
    assert ends == [tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")]
    assert read_json("config.json")["eos_token_id"] == ends[0]
    assert read_json("tokenizer_config.json")["eos_token"] == "<|im_end|>"


@pytest.mark.parametrize(
    "text",
    [
        "",
        " leading and trailing ",
        "def f(x):\n    if x:\n\n\treturn x\r\n",
        "naïve Größe, 你好世界, こんにちは, שלום",
        "👩‍👩‍👧 🏳️‍🌈 👍🏽 e\u0301",
        "".join(map(chr, range(32))) + "\x7f\x85\xa0\u2028\ufeff\ufffd",
    ],
)
def test_text_survives_the_tokenizer(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_random_unicode_survives_the_tokenizer(tokenizer: Tokenizer) -> None:
    rng = random.Random(0)
    planes = [(0, 0x80), (0x80, 0x2FFF), (0x3000, 0xD7FF), (0xE000, 0xFFFF), (0x1F000, 0x1FAFF), (0x10000, 0x10FFFF)]
    for _ in range(200):
        text = "".join(chr(rng.randint(*rng.choice(planes))) for _ in range(rng.randint(1, 60)))
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_python_takes_more_than_three_characters_per_token(tokenizer: Tokenizer) -> None:
    source = Path(json.__file__).read_text(encoding="utf-8")
    assert len(source) / len(tokenizer.encode(source).ids) > 3


def chat_template() -> jinja2.Template:
    template = read_json("tokenizer_config.json")["chat_template"]
    assert template == CHAT_TEMPLATE
    return jinja2.Environment(undefined=jinja2.StrictUndefined).from_string(template)


def test_chat_template_ends_with_the_header_of_the_answer(tokenizer: Tokenizer) -> None:
    roles = ["developer", "user", "assistant", "tool"]
    messages = [{"role": role, "content": f"said by {role}"} for role in roles]
    prompt = chat_template().render(messages=messages, add_generation_prompt=True)
    assert prompt.startswith("<|im_start|>system\nsaid by developer<|im_end|>\n<|im_start|>user\n")
    assert prompt.endswith("<|im_start|>tool\nsaid by tool<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.encode(prompt).ids.count(tokenizer.token_to_id("<|im_start|>")) == 5


def test_chat_template_takes_a_message_without_content() -> None:
    assert "assistant\n<|im_end|>" in chat_template().render(
        messages=[{"role": "assistant", "content": None}, {"role": "assistant"}], add_generation_prompt=False
    )


def test_training_sees_what_the_template_renders() -> None:
    conversation = (("system", "Be brief."), ("user", "Hello"), ("assistant", "Hi."))
    messages = [{"role": role, "content": content} for role, content in conversation]
    assert render(conversation) == chat_template().render(messages=messages, add_generation_prompt=False)


def every_conversation(corpus: Corpus) -> list[tuple[tuple[str, str], ...]]:
    return [*corpus.conversations, *corpus.held_out_conversations]


def test_same_directory_gives_the_same_corpus(lib: Path) -> None:
    assert build_corpus(lib) == build_corpus(lib)
    assert build_corpus(lib).sha256() == build_corpus(lib).sha256()


def test_other_source_gives_another_hash(lib: Path) -> None:
    before = build_corpus(lib).sha256()
    (lib / "greeting.py").write_text(MODULE.replace("Greet NAME", "Welcome NAME"))
    assert build_corpus(lib).sha256() != before


def test_corpus_leaves_tests_out_and_keeps_what_does_not_parse(lib: Path) -> None:
    corpus = build_corpus(lib)
    texts = [*corpus.texts, *corpus.held_out_texts]
    assert sorted(texts) == sorted([MODULE, "type Broken = = 1\n"])
    assert "Nothing from here." not in str(every_conversation(corpus))


def test_questions_about_a_function_are_answered_by_its_docstring(lib: Path) -> None:
    asked = [c for c in every_conversation(build_corpus(lib)) if "Greeter.greet" in str(c)]
    answers = {content for c in asked for role, content in c if role == "assistant"}
    assert "Greet NAME.\n\nLoudly, if *loud* is true." in answers


def test_every_conversation_ends_with_the_assistant(lib: Path) -> None:
    assert {conversation[-1][0] for conversation in every_conversation(build_corpus(lib))} == {"assistant"}


def test_functions_without_docstring_are_asked_for_their_body(lib: Path) -> None:
    assert "total = sum(values)" in str(every_conversation(build_corpus(lib)))
