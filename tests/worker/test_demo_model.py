"""The demo model and its draft-sized sibling as they lie in the package, and the corpus they were made from."""

import ctypes
import json
import random
import struct
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import jinja2
import numpy as np
import pytest
import torch
from gguf_maker import rounded, tensors_of, values_of, write_gguf
from safetensors.torch import load_file
from tokenizers import Tokenizer

import worker
from scheduler.batch import Entry, Kind, StepPlan
from scheduler.messages import Request, Sampling
from worker.native.cpu.build import NoLibrary, load_library
from worker.native.cpu.program import AS_STORED
from worker.native.demo.corpus import Corpus, build_corpus
from worker.native.demo.draft import DRAFT_SHAPE, accepted_drafts, greedy_agreement, load_llama
from worker.native.demo.generate import answer, write_rows
from worker.native.demo.model import Llama, Shape
from worker.native.demo.tokenizer import CHAT_TEMPLATE, render, render_question
from worker.native.demo.train import Rows
from worker.native.memory import PACKED_DTYPE
from worker.native.runner import NativeEngine
from worker.tokenizer import read_tokenizer

MODEL = Path(worker.__file__).parent / "models" / "headgate-demo"
DRAFT = MODEL.with_name("headgate-demo-draft")
QUESTIONS = (  # with short answers: those that repeat themselves flatter the draft
    "Hello",
    "Who are you?",
    "What does shutil.copytree do?",
    "Document read_all(path, encoding=None)",
    "Complete this function:\ndef is_empty(self):",
    "What is asyncio.Queue.get?",
)

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


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Two that wait for each other on busy cores take thirty times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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


def test_draft_with_its_tokenizer_is_under_a_megabyte() -> None:
    assert sum(path.stat().st_size for path in DRAFT.iterdir()) < 1_000_000


def test_draft_has_the_tokenizer_and_the_template_of_the_demo_model() -> None:
    draft, demo = read_tokenizer(DRAFT), read_tokenizer(MODEL)
    assert draft.digest == demo.digest
    assert draft == demo


@pytest.fixture(scope="module")
def demo() -> Llama:
    return load_llama(MODEL, Shape())


@pytest.fixture(scope="module")
def draft() -> Llama:
    return load_llama(DRAFT, DRAFT_SHAPE)


def asked(tokenizer: Tokenizer, question: str) -> list[int]:
    return tokenizer.encode(render_question(question)).ids


def test_draft_often_says_what_the_demo_model_says(draft: Llama, demo: Llama, tokenizer: Tokenizer) -> None:
    agreed = [greedy_agreement(draft, demo, asked(tokenizer, question)) for question in QUESTIONS]
    accepted, verifications = np.sum([accepted_drafts(one) for one in agreed], axis=0)
    assert np.concatenate(agreed).mean() > 0.5  # 0.61; its card: 54.5 % for questions that training did not see
    assert accepted / verifications > 0.9  # 1.15; its card: 1.00


def test_engine_that_loads_the_draft_answers_in_its_words(draft: Llama, tokenizer: Tokenizer) -> None:
    prompt = asked(tokenizer, "Who are you?")
    words = answer(draft, prompt, ends=(0, 2), tokens=12)
    engine = NativeEngine.load(DRAFT, "cpu", "float32", kv_cache_bytes=1 << 20, threads=1)
    request = Request(1, 0, prompt, 64, sampling=Sampling(temperature=0.0))
    said = engine.run(StepPlan((Entry(1, Kind.PREFILL, 0, len(prompt), True),), (request,))).tokens[1]
    for length in range(len(prompt), len(prompt) + len(words) - 1):
        said += engine.run(StepPlan((Entry(1, Kind.DECODE, length, 1, True),))).tokens[1]
    assert said == words
    assert any(letter.isalpha() for letter in tokenizer.decode(said))


@pytest.mark.parametrize(
    ("agreed", "accepted", "verifications"),
    [
        ("", 0, 0),
        ("0", 0, 1),
        ("1", 1, 1),
        ("0000", 0, 4),
        ("1111", 4, 1),
        ("11110", 4, 1),
        ("111111", 5, 2),
        ("1101", 3, 2),
    ],
)
def test_verification_accepts_up_to_the_first_wrong_draft(agreed: str, accepted: int, verifications: int) -> None:
    assert accepted_drafts(np.array([int(digit) > 0 for digit in agreed], dtype=bool)) == (accepted, verifications)


@pytest.fixture(scope="module")
def small() -> Llama:
    torch.manual_seed(0)
    model = Llama(Shape(vocab=50, hidden=16, layers=2, heads=4, kv_heads=2, head_dim=4, intermediate=24, context=64))
    for parameter in model.parameters():
        parameter.data *= 20  # far from uniform
    return model.eval()


def test_cached_answer_is_that_of_the_whole_model(small: Llama) -> None:
    ids = [1, 2, 3, 4, 5]
    written = answer(small, ids, ends=(), tokens=20)
    best = small(torch.tensor([[*ids, *written]]))[0].argmax(-1)
    assert best[len(ids) - 1 : -1].tolist() == written
    assert answer(small, ids, ends=written[7:8], tokens=20) == written[: written.index(written[7])]


def test_written_rows_keep_their_beginnings_and_depend_on_the_seed_alone(small: Llama) -> None:
    beginnings = torch.arange(24).view(6, 4)
    rows = write_rows(small, beginnings, tokens=30, seed=1)
    assert rows.shape == (6, 30)
    assert torch.equal(rows[:, :4], beginnings)
    assert torch.equal(rows, write_rows(small, beginnings, tokens=30, seed=1))
    assert not torch.equal(rows, write_rows(small, beginnings, tokens=30, seed=2))


def test_every_second_pair_of_rows_is_the_teachers(tokenizer: Tokenizer) -> None:
    rows = Rows(tokenizer, ["def f(x): return x"] * 9, [(("user", "Hello"), ("assistant", "Hi."))])
    rows.written = [np.full(5, 77, dtype=np.uint16)]
    drawn = rows.draw(np.random.default_rng(0), tokens=11, first=0, count=6)
    assert [bool((row == 77).all()) for row in drawn] == [False, False, True, True, False, False]


def perplexity(engine: NativeEngine, rows: list[list[int]]) -> float:
    told: list[float] = []
    for key, row in enumerate(rows):
        start = (Request(key, 0, row, 1, sampling=Sampling(0.0), logprobs=0, prompt_logprobs=True),)
        result = engine.run(StepPlan((Entry(key, Kind.PREFILL, 0, len(row), True),), start))
        told += [of_token[0][1] for of_token in result.logprobs[key][:-1]]
        engine.run(StepPlan(stop=(key,)))
    return float(np.exp(-np.mean(told)))


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    try:
        return load_library()
    except NoLibrary as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def rows(tokenizer: Tokenizer) -> list[list[int]]:
    """Of modules of the standard library that the model has not seen."""
    texts = build_corpus(Path(sysconfig.get_path("stdlib"))).held_out_texts
    ids = tokenizer.encode("\n".join(texts)[:40_000], add_special_tokens=False).ids
    return [ids[start : start + 256] for start in range(0, len(ids) - 256, 256)]


def test_int8_the_default_of_the_c_step_costs_less_than_a_hundredth_of_perplexity(
    library: ctypes.CDLL, rows: list[list[int]]
) -> None:
    of = {
        dtype: perplexity(NativeEngine.load(MODEL, "cpu", dtype, 1 << 24, threads=1, library=library), rows)
        for dtype in ("float32", "bfloat16", PACKED_DTYPE, "int4")
    }
    assert of["bfloat16"] < 1.003 * of["float32"]
    assert of[PACKED_DTYPE] < 1.01 * of["float32"]
    assert of["int4"] < 1.05 * of["float32"]


@pytest.mark.parametrize("type", ["Q8_0", "Q4_0"])
def test_a_file_of_few_bits_has_the_same_perplexity_packed_as_in_float32(
    type: str, library: ctypes.CDLL, rows: list[list[int]], tmp_path: Path
) -> None:
    config = json.loads((MODEL / "config.json").read_text())
    weights = {name: tensor.float().numpy() for name, tensor in load_file(MODEL / "model.safetensors").items()}
    tensors = {
        name: rounded(type, tensor) if len(tensor.sizes) == 2 else tensor
        for name, tensor in tensors_of(config, weights).items()
    }
    path = write_gguf(tmp_path / "m.gguf", values_of(config), tensors)
    packed, whole = (
        perplexity(NativeEngine.load(path, "cpu", dtype, 1 << 24, threads=1, library=library), rows)
        for dtype in (AS_STORED, "float32")
    )
    assert packed == pytest.approx(whole, rel=0.001)
