"""Tokenizers out of the metadata of GGUF files: they cut and merge like those that the files were made from."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from gguf_maker import floats, tokenizer_values, values_of, write_gguf
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from worker.files import SHIPPED
from worker.gguf_tokenizer import WORDS
from worker.tokenizer import TokenizerFiles, read_tokenizer

DEMO = SHIPPED / "headgate-demo"
TEXTS = [
    "Hello world, it's 12345 o'clock; WE'LL see",
    "  indented\n\n\tcode = [1, 22, 333, 4444]\r\n  x",
    "日本語 テスト 🙂 cafe\u0301 café \u00a0 \u2003 ½²",
    "a  b   c    \n",
    "$x + <y> = ~z | w^2 ... ,,, !!!",
    "<|im_start|>user\nhi<|im_end|>",
    "CamelCase HTTPServer éÉ ǅ",
    "",
    " ",
]
CORPUS = [*TEXTS, (DEMO / "README.md").read_text("utf-8")]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def byte_level(pre: Any, normalizer: Any = None, **model: Any) -> Tokenizer:
    """Trained on the spot."""
    tokenizer = Tokenizer(models.BPE(**model))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre, decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def split(pattern: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2])
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# As the tokenizer.json files of these models have them.
MADE = {
    "gpt-2": lambda: byte_level(GPT2),
    "smollm": lambda: byte_level(DIGITS),
    "qwen2": lambda: byte_level(split(LLAMA3.replace("{1,3}", "")), normalizers.NFC()),
    "llama-bpe": lambda: byte_level(split(LLAMA3), ignore_merges=True),
}


def file_of(folder: Path, tokenizer: Tokenizer, pre: str, **more: Any) -> Path:
    parts = json.loads(tokenizer.to_str())
    values = MODEL | tokenizer_values(parts, pre, **({"eos_token_id": 2} | more))
    return write_gguf(folder / "m.gguf", values, {"token_embd.weight": floats([[0.0]] * len(parts["model"]["vocab"]))})


MODEL = values_of(
    {
        "hidden_size": 1,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "intermediate_size": 1,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e4,
    }
)


def both(files: TokenizerFiles, right: Tokenizer) -> None:
    """Asserts that all texts become the same tokens, and these the same texts."""
    own = Tokenizer.from_str(files.tokenizer_json)
    for text in CORPUS:
        for with_special in (False, True):
            ids = own.encode(text, add_special_tokens=with_special).ids
            assert ids == right.encode(text, add_special_tokens=with_special).ids
            for skips in (False, True):
                assert own.decode(ids, skip_special_tokens=skips) == right.decode(ids, skip_special_tokens=skips)


@pytest.mark.parametrize("name", MADE)
def test_a_byte_level_tokenizer_is_the_one_it_was_made_from(name: str, tmp_path: Path) -> None:
    tokenizer = MADE[name]()
    both(read_tokenizer(file_of(tmp_path, tokenizer, name, add_bos_token=False)), tokenizer)


@pytest.mark.parametrize("name", WORDS)
def test_every_way_of_cutting_keeps_the_text(name: str, tmp_path: Path) -> None:
    own = Tokenizer.from_str(read_tokenizer(file_of(tmp_path, MADE["gpt-2"](), name, bos_token_id=0)).tokenizer_json)
    for text in CORPUS:
        if WORDS[name].normalizer is None:
            assert own.decode(own.encode(text, add_special_tokens=False).ids, skip_special_tokens=False) == text


@pytest.mark.parametrize(
    ("name", "flag", "begins"), [("llama-bpe", None, True), ("llama-bpe", False, False), ("smollm", True, True)]
)
def test_bos_stands_before_a_text_as_the_file_or_its_kind_wants(
    name: str, flag: bool | None, begins: bool, tmp_path: Path
) -> None:
    flags = {} if flag is None else {"add_bos_token": flag}
    tokenizer = MADE["smollm" if name == "smollm" else "llama-bpe"]()
    files = read_tokenizer(file_of(tmp_path, tokenizer, name, bos_token_id=0, **flags))
    if begins:
        template = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
        tokenizer.post_processor = template
    both(files, tokenizer)
    assert files.special_tokens["bos_token"] == "<|endoftext|>"


def test_the_demo_model_tokenizer_survives_the_way_through_a_file(tmp_path: Path) -> None:
    right = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    right.pre_tokenizer, right.model.ignore_merges = split(LLAMA3), True  # its own way of cutting has no name in files
    template = json.loads((DEMO / "tokenizer_config.json").read_text())["chat_template"]
    files = read_tokenizer(DEMO)
    values = MODEL | tokenizer_values(
        json.loads(right.to_str()), "llama-bpe", bos_token_id=0, eos_token_id=2, padding_token_id=3, add_bos_token=False
    )
    values |= {"tokenizer.chat_template": template, "general.sampling.temp": 0.5, "general.sampling.top_k": 20}
    path = write_gguf(tmp_path / "m.gguf", values, {"token_embd.weight": floats([[0.0]] * 4096)})
    own = read_tokenizer(path)
    both(own, right)
    assert own.chat_template == files.chat_template and own.eos_ids == files.eos_ids == (2, 0)
    assert own.special_tokens == files.special_tokens
    assert (own.temperature, own.top_k, own.top_p) == (0.5, 20, 1.0)


# --- SentencePiece ----------------------------------------------------------------------------------------------------

PIECES = ["▁", "t", "h", "e", "o", "w", "r", "l", "d", "th", "the", "▁the", "▁t", "he", "▁th", "▁the▁", "lo", "wo", "or",
          "▁wo", "▁wor", "▁worl", "rl", "ld", "rld", "world", "▁world", "▁▁", "▁▁▁▁", "ee", "tt"]  # fmt: skip


def piece_values(**more: Any) -> dict[str, Any]:
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES, "<user>"]
    types = [2, 3, 3] + [6] * 256 + [1] * len(PIECES) + [4]
    scores = [0.0] * 259 + [-float(rank) for rank in range(len(PIECES))] + [0.0]
    own = {
        "model": "llama",
        "tokens": texts,
        "token_type": types,
        "scores": scores,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    own |= {"unknown_token_id": 0} | more
    return MODEL | {f"tokenizer.ggml.{key}": value for key, value in own.items() if value is not None}


def pieces_of(text: str, prefix: bool = True) -> list[int]:
    """SentencePiece's own algorithm, as slow as it reads: merge the best neighbours until none make a piece."""
    if not text:
        return []
    ranks = {piece: rank for rank, piece in enumerate(PIECES)}
    symbols = list((" " if prefix else "").join(["", text]).replace(" ", "▁"))
    while True:
        pairs = [(ranks[a + b], at) for at, (a, b) in enumerate(itertools.pairwise(symbols)) if a + b in ranks]
        if not pairs:
            break
        _, at = min(pairs)
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    ids: list[int] = []
    for symbol in symbols:
        ids += [259 + ranks[symbol]] if symbol in ranks else [3 + byte for byte in symbol.encode()]
    return ids


def a_piece_file(folder: Path, **more: Any) -> Path:
    values = piece_values(**more)
    tensors = {"token_embd.weight": floats([[0.0]] * len(values["tokenizer.ggml.tokens"]))}
    return write_gguf(folder / "m.gguf", values, tensors)


@pytest.mark.parametrize("prefix", [True, False])
def test_a_sentencepiece_tokenizer_merges_by_score_and_falls_back_to_bytes(prefix: bool, tmp_path: Path) -> None:
    files = read_tokenizer(a_piece_file(tmp_path, add_space_prefix=prefix))
    own = Tokenizer.from_str(files.tokenizer_json)
    for text in ["the world", "thee  the   world wold", "hallo é 日本\n", "    ttheeld", "", *CORPUS[:5]]:
        ids = pieces_of(text, prefix)
        assert own.encode(text, add_special_tokens=False).ids == ids
        assert own.encode(text).ids == [1, *ids]
        assert own.decode(ids) == text
    assert files.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    assert files.eos_ids == (2,)


def test_tokens_of_the_user_are_found_in_a_text_and_told(tmp_path: Path) -> None:
    own = Tokenizer.from_str(read_tokenizer(a_piece_file(tmp_path)).tokenizer_json)
    ids = own.encode("the<user>the</s>", add_special_tokens=False).ids
    assert ids == [*pieces_of("the"), 259 + len(PIECES), *pieces_of("the"), 2]
    assert own.decode(ids) == "the<user> the"


# --- what is no tokenizer ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"model": None}, "names no tokenizer.ggml.model"),
        ({"model": "t5"}, "unknown tokenizer.ggml.model t5; known: gpt2, llama"),
        ({"model": "gpt2"}, "names no tokenizer.ggml.pre: how a text is to be cut into words"),
        ({"model": "gpt2", "pre": "martian"}, "unknown tokenizer.ggml.pre martian; known: gpt-2"),
        ({"model": "gpt2", "pre": "gpt-2"}, "has no tokenizer.ggml.merges"),
        ({"model": "gpt2", "pre": "gpt-2", "merges": ["t h", "t q"]}, "merges holds 't q', which makes no token"),
        ({"model": "gpt2", "pre": "gpt-2", "merges": ["th"]}, "merges holds 'th', which makes no token"),
        ({"model": "gpt2", "pre": "gpt-2", "merges": [1]}, "tokenizer.ggml.merges holds int, not str"),
        ({"tokens": None}, "has no tokenizer.ggml.tokens"),
        ({"tokens": ["a", "a"], "token_type": [1, 1]}, "tokens holds 'a' more than once"),
        ({"token_type": [1]}, "291 tokenizer.ggml.tokens, but 1 tokenizer.ggml.token_type"),
        ({"scores": None}, "scores must hold one for each of 291 tokens"),
        ({"scores": [0.0]}, "scores must hold one for each of 291 tokens"),
        ({"eos_token_id": None}, "names no token that ends a text"),
        ({"eos_token_id": 999}, "tokenizer.ggml.eos_token_id is 999, but there are 291 tokens"),
        ({"bos_token_id": None}, "add_bos_token or add_eos_token is set, but not the token's id"),
        ({"chat_template": "{% if"}, "the chat template does not compile"),
        ({"temp": -1.0}, "temperature must be 0 or more, not -1"),
    ],
)
def test_a_tokenizer_that_is_not_described_is_one_sentence(more: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    outside = {"chat_template": "tokenizer.chat_template", "temp": "general.sampling.temp"}
    values = piece_values(**{key: value for key, value in more.items() if key not in outside})
    values |= {outside[key]: value for key, value in more.items() if key in outside}
    tensors = {"token_embd.weight": floats([[0.0]] * 291)}
    path = write_gguf(tmp_path / "m.gguf", values, tensors)
    with pytest.raises(ValueError, match=sentence) as raised:
        read_tokenizer(path)
    assert str(raised.value).startswith(str(path))


def test_more_tokens_than_the_model_has_are_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", piece_values(), {"token_embd.weight": floats([[0.0]] * 100)})
    with pytest.raises(ValueError, match=r"m\.gguf has token 290 .* but vocab_size in .*m\.gguf is 100"):
        read_tokenizer(path)
