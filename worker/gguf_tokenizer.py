"""The tokenizer that a GGUF file describes, as a `tokenizer.json`, and what else of its metadata a gateway needs.

Two kinds are read: byte-level BPE (gpt2), whose way of cutting a text into words has a name of its own, and the BPE of
SentencePiece (llama), which merges by scores and falls back to bytes. Source of names and patterns: llama.cpp's
`src/llama-vocab.cpp` and the models' own tokenizers.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any, NamedTuple

from worker.gguf import GgufFile

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # types of tokens
SPACE = "\u2581"  # SentencePiece's
MOST_CHARACTERS = 512  # of one of its pieces: the real ones have up to some tens
CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]*[{LOWER}]+|[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]+[{LOWER}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Words(NamedTuple):
    """How a byte-level BPE cuts a text before it merges: by each pattern in turn."""

    patterns: tuple[str, ...]
    takes_whole_words: bool = False  # a word that is a token is not merged
    begins_texts: bool = False  # with bos, where the file does not say
    normalizer: str | None = None


WORDS = {
    "gpt-2": Words((GPT2,)),
    "phi-2": Words((GPT2,)),
    "olmo": Words((GPT2,)),
    "smollm": Words((r"\p{N}", GPT2)),
    "starcoder": Words((r"\p{N}", GPT2)),
    "refact": Words((r"\p{N}", GPT2)),
    "qwen2": Words((QWEN2,), normalizer="NFC"),
    "deepseek-r1-qwen": Words((QWEN2,), normalizer="NFC"),
    "llama-bpe": Words((LLAMA3,), takes_whole_words=True, begins_texts=True),
    "llama3": Words((LLAMA3,), takes_whole_words=True, begins_texts=True),
    "llama-v3": Words((LLAMA3,), takes_whole_words=True, begins_texts=True),
    "smaug-bpe": Words((LLAMA3,)),
    "tekken": Words((TEKKEN,), takes_whole_words=True, begins_texts=True),
    "default": Words((r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
}
SPECIAL = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")
# Control tokens that end a text although the file may name only one.
ENDING_TEXTS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<end_of_turn>",
)
SAMPLING = {
    "temperature": "temp",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "penalty_repeat",
}


class Vocabulary(NamedTuple):
    """The tokens of a file by their ids."""

    texts: tuple[str, ...]
    types: tuple[int, ...]

    def ids(self, type: int) -> list[int]:
        return [id for id, of in enumerate(self.types) if of == type]


def tokenizer_json(file: GgufFile) -> str:
    """Raises ValueError, naming the file and the key, for a tokenizer that the metadata does not describe."""
    kind = file.text("tokenizer.ggml.model")
    if kind is None:
        raise ValueError(f"{file.path} names no tokenizer.ggml.model")
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    if kind not in builders:
        raise ValueError(f"{file.path}: unknown tokenizer.ggml.model {kind[:40]}; known: {', '.join(builders)}")
    vocabulary = _vocabulary(file)
    parts = builders[kind](file, vocabulary)
    whole = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": _added(vocabulary)}
    return json.dumps(whole | parts, ensure_ascii=False)


def special_tokens(file: GgufFile) -> dict[str, str]:
    texts = _vocabulary(file).texts
    ids = {name: _id(file, key, len(texts)) for name, key in SPECIAL.items()}
    return {name: texts[id] for name, id in ids.items() if id is not None}


def eos_ids(file: GgufFile) -> tuple[int, ...]:
    """All that end a text, the file's own eos first. Raises ValueError where there is none."""
    vocabulary = _vocabulary(file)
    named = [_id(file, key, len(vocabulary.texts)) for key in ENDS]
    known = [id for id in vocabulary.ids(CONTROL) if vocabulary.texts[id] in ENDING_TEXTS]
    found = tuple(dict.fromkeys(id for id in [*named, *known] if id is not None))
    if not found:
        raise ValueError(f"{file.path} names no token that ends a text: it has no tokenizer.ggml.eos_token_id")
    return found


def sampling(file: GgufFile) -> dict[str, float]:
    """In the words of generation_config.json."""
    found = {name: file.number(f"general.sampling.{key}") for name, key in SAMPLING.items()}
    return {name: value for name, value in found.items() if value is not None}


# --- tokens -----------------------------------------------------------------------------------------------------------


def _vocabulary(file: GgufFile) -> Vocabulary:
    texts = file.listed("tokenizer.ggml.tokens", str)
    if not texts:
        raise ValueError(f"{file.path} has no tokenizer.ggml.tokens")
    types = file.listed("tokenizer.ggml.token_type", int) or (NORMAL,) * len(texts)
    if len(types) != len(texts):
        raise ValueError(f"{file.path}: {len(texts)} tokenizer.ggml.tokens, but {len(types)} tokenizer.ggml.token_type")
    if len(set(texts)) != len(texts):
        (twice, _), *_ = Counter(texts).most_common(1)
        raise ValueError(f"{file.path}: tokenizer.ggml.tokens holds {twice[:40]!r} more than once")
    return Vocabulary(texts, types)


def _id(file: GgufFile, key: str, tokens: int) -> int | None:
    found = file.count(f"tokenizer.ggml.{key}")
    if found is not None and found >= tokens:
        raise ValueError(f"{file.path}: tokenizer.ggml.{key} is {found}, but there are {tokens} tokens")
    return found


def _added(vocabulary: Vocabulary) -> list[dict[str, Any]]:
    """Tokens that are found in a text before it is cut into words."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return [
        {"id": id, "content": vocabulary.texts[id], **flags, "special": vocabulary.types[id] != USER_DEFINED}
        for id in sorted(vocabulary.ids(CONTROL) + vocabulary.ids(USER_DEFINED) + vocabulary.ids(UNKNOWN))
        if vocabulary.texts[id]
    ]


def _template(file: GgufFile, vocabulary: Vocabulary, begins: bool) -> dict[str, Any] | None:
    """Which tokens stand before and behind every text."""
    flags = {"bos": file.flag("tokenizer.ggml.add_bos_token"), "eos": file.flag("tokenizer.ggml.add_eos_token")}
    flags["bos"] = begins if flags["bos"] is None else flags["bos"]
    ids = {name: _id(file, f"{name}_token_id", len(vocabulary.texts)) for name, flag in flags.items() if flag}
    if not ids:
        return None
    if None in ids.values():
        raise ValueError(f"{file.path}: tokenizer.ggml.add_bos_token or add_eos_token is set, but not the token's id")
    special = {name: {"SpecialToken": {"id": vocabulary.texts[id or 0], "type_id": 0}} for name, id in ids.items()}
    text = [{"Sequence": {"id": "A", "type_id": 0}}]
    around = ([special["bos"]] if "bos" in special else []) + text + ([special["eos"]] if "eos" in special else [])
    tokens = {vocabulary.texts[id or 0]: id or 0 for id in ids.values()}
    return {
        "type": "TemplateProcessing",
        "single": around,
        "pair": [*around, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {text: {"id": text, "ids": [id], "tokens": [text]} for text, id in tokens.items()},
    }


# --- byte-level BPE ---------------------------------------------------------------------------------------------------


def _byte_level(file: GgufFile, vocabulary: Vocabulary) -> dict[str, Any]:
    name = file.text("tokenizer.ggml.pre")
    if name is None:
        raise ValueError(f"{file.path} names no tokenizer.ggml.pre: how a text is to be cut into words")
    if name not in WORDS:
        raise ValueError(f"{file.path}: unknown tokenizer.ggml.pre {name[:40]}; known: {', '.join(WORDS)}")
    words = WORDS[name]
    cuts = [_split(pattern) for pattern in words.patterns]
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "normalizer": {"type": words.normalizer} if words.normalizer else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*cuts, bytes_]},
        "post_processor": _template(file, vocabulary, words.begins_texts),
        "decoder": bytes_,
        "model": {
            **_bpe(vocabulary, _merges(file, set(vocabulary.texts))),
            "ignore_merges": words.takes_whole_words,
        },
    }


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _bpe(vocabulary: Vocabulary, merges: list[tuple[str, str]]) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": {text: id for id, text in enumerate(vocabulary.texts)},
        "merges": merges,
    }


def _merges(file: GgufFile, texts: set[str]) -> list[tuple[str, str]]:
    listed = file.listed("tokenizer.ggml.merges", str)
    if listed is None:
        raise ValueError(f"{file.path} has no tokenizer.ggml.merges")
    merges = []
    for merge in listed:
        left, _, right = merge.partition(" ")
        if not left or not right or not {left, right, left + right} <= texts:
            raise ValueError(
                f"{file.path}: tokenizer.ggml.merges holds {merge[:40]!r}, which makes no token of two others"
            )
        merges.append((left, right))
    return merges


# --- SentencePiece ----------------------------------------------------------------------------------------------------


def _sentencepiece(file: GgufFile, vocabulary: Vocabulary) -> dict[str, Any]:
    scores = file.listed("tokenizer.ggml.scores", float)
    if scores is None or len(scores) != len(vocabulary.texts):
        raise ValueError(f"{file.path}: tokenizer.ggml.scores must hold one for each of {len(vocabulary.texts)} tokens")
    prefix = file.flag("tokenizer.ggml.add_space_prefix") is not False
    unknown = _id(file, "unknown_token_id", len(vocabulary.texts))
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    start = [{"type": "Prepend", "prepend": SPACE}] if prefix else []
    decoders = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        *([{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []),
    ]
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*start, spaces]},
        "pre_tokenizer": None,
        "post_processor": _template(file, vocabulary, begins=True),
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            **_bpe(vocabulary, _merges_by_score(file, vocabulary, scores)),
            "unk_token": None if unknown is None else vocabulary.texts[unknown],
            "fuse_unk": True,
            "byte_fallback": True,
        },
    }


def _merges_by_score(file: GgufFile, vocabulary: Vocabulary, scores: tuple[float, ...]) -> list[tuple[str, str]]:
    """SentencePiece merges any two pieces that make a third, of the highest score first; BPE wants them listed."""
    pieces = {vocabulary.texts[id]: id for id in vocabulary.ids(NORMAL)}
    merges = []
    for text, id in pieces.items():
        if len(text) > MOST_CHARACTERS:
            raise ValueError(f"{file.path}: tokenizer.ggml.tokens: token {id} has {len(text)} characters")
        halves = ((text[:at], text[at:]) for at in range(1, len(text)))
        known = [(left, right) for left, right in halves if left in pieces and right in pieces]
        merges += [(-scores[id], id, pieces[left], pieces[right], left, right) for left, right in known]
    return [(left, right) for *_, left, right in sorted(merges)]
