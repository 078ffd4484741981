"""Token ids to text: split characters, stop strings, and tokenizers of both families."""

from __future__ import annotations

import codecs
import random
from dataclasses import replace

import pytest
from gateway_under_test import build_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from service.detokenize import (
    ByteTable,
    Rendering,
    StopFinder,
    StopRendering,
    TableCharacters,
    TableRendering,
    WindowCharacters,
    byte_alphabet,
    escape,
    is_byte_level,
    longest_token,
    parts_of,
)
from service.text import Text

TRICKY = 'aé한😀👩‍👩‍👧日本\u0301 \n"\\\u2028\x00'
texts = st.text(st.sampled_from(TRICKY), max_size=30)


@pytest.fixture(scope="module")
def table(tokenizer):
    return ByteTable(tokenizer)


@pytest.fixture(scope="module")
def byte_ids(tokenizer):
    return {byte: tokenizer.token_to_id(char) for char, byte in byte_alphabet().items()}


def rendered(rendering: Rendering, ids: list[int], seed: int) -> str:
    """Fed in random deliveries. Every piece has to be whole characters."""
    chance, pieces, at = random.Random(seed), [], 0
    while at < len(ids):
        size = chance.choice((0, 1, 1, 1, 2, 3, 7))
        pieces.append(rendering.add(ids[at : at + size]))
        at += size
    return b"".join([*pieces, rendering.end()]).decode()


def split_randomly(tokenizer, byte_ids, text: str, seed: int) -> list[int]:
    """Real tokens and single bytes, mixed."""
    chance = random.Random(seed)
    ids: list[int] = []
    for id in tokenizer.encode(text).ids:
        raw = bytes(byte_alphabet()[char] for char in tokenizer.id_to_token(id))
        ids += [byte_ids[byte] for byte in raw] if chance.random() < 0.5 else [id]
    return ids


@given(text=texts, seed=st.integers(0, 1000))
@settings(max_examples=200, deadline=None)
def test_any_split_gives_the_text_and_no_replacement_character(tokenizer, table, byte_ids, text, seed):
    """38: both paths, any token boundaries, any deliveries."""
    ids = split_randomly(tokenizer, byte_ids, text, seed)
    assert rendered(TableRendering(table), ids, seed) == escape(text).decode()
    assert rendered(StopRendering(TableCharacters(table), ()), ids, seed) == escape(text).decode()


@given(raw=st.binary(max_size=20), seed=st.integers(0, 1000))
@settings(max_examples=200, deadline=None)
def test_bytes_that_are_no_text_become_replacement_characters(tokenizer, table, byte_ids, raw, seed):
    """38: genuinely invalid bytes are U+FFFD, an open character at the end is dropped."""
    expected = codecs.getincrementaldecoder("utf-8")("replace").decode(raw)
    ids = [byte_ids[byte] for byte in raw]
    assert rendered(TableRendering(table), ids, seed) == escape(expected).decode()
    assert (
        rendered(StopRendering(TableCharacters(table), ("\x01\x02",)), ids, seed)
        == escape(expected.partition("\x01\x02")[0]).decode()
    )


def test_special_tokens_and_unknown_ids_are_no_text(tokenizer, table):
    """39."""
    ids = [*tokenizer.encode("a<|im_end|>b").ids, 10**6]
    assert TableRendering(table).add(ids) == b"ab"
    assert TableRendering(table).add([10**6]) == b""
    assert TableRendering(table).add([tokenizer.token_to_id("<|eot|>")]) == b""


def test_added_token_that_is_not_special_is_text(tokenizer):
    """39."""
    other = Tokenizer.from_str(tokenizer.to_str())
    other.add_tokens([AddedToken("<tool call>", special=False)])
    assert TableRendering(ByteTable(other)).add(other.encode("x<tool call>é").ids) == "x<tool call>é".encode()


# --- stop strings


def cut(text: str, stops: tuple[str, ...]) -> str:
    """What a reader who goes character by character would cut."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)]
    return text


short = st.text(st.sampled_from("ab\n"), min_size=1, max_size=5)


@given(text=st.text(st.sampled_from("ab\n"), max_size=30), stops=st.lists(short, max_size=4), seed=st.integers(0, 1000))
@settings(max_examples=300, deadline=None)
def test_stop_is_found_wherever_the_text_is_split(text, stops, seed):
    """35, 36 and 38: cut exactly before it, held back at most what may become one."""
    chance, finder, shown, at = random.Random(seed), StopFinder(stops), "", 0
    while at < len(text) and not finder.found:
        size = chance.randint(1, 4)
        shown += finder.feed(text[at : at + size])
        at += size
        assert finder.held == "" or any(stop.startswith(finder.held) for stop in stops)
    assert shown + finder.held == cut(text, tuple(stops))


def test_only_what_may_become_a_stop_is_held_back():
    """35."""
    finder = StopFinder(["END"])
    assert finder.feed("hello E") == "hello "
    assert finder.feed("N") == ""
    assert finder.feed("Emy") == "ENEmy"
    assert finder.held == ""


def test_tokens_after_the_stop_are_not_used(tokenizer, table):
    """13."""
    rendering = StopRendering(TableCharacters(table), ["llo"])
    ids = [id for char in "hello!?" for id in tokenizer.encode(char).ids]
    assert rendering.add(ids) == b"he"
    assert (rendering.stopped, rendering.unused) == (True, 2)


# --- SentencePiece's way


@pytest.fixture(scope="module")
def spaced():
    """As Llama 2 and Gemma write: ▁ for the space, <0xNN> for bytes without a token, the first space dropped."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁hello", "▁wor", "ld", "!"]
    tokenizer = Tokenizer(models.BPE({piece: id for id, piece in enumerate(pieces)}, [], byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    return tokenizer


def test_leading_space_is_as_in_the_whole_text(spaced):
    """39: streamed like decoded at once, special tokens not leaked."""
    assert not is_byte_level(parts_of(spaced))
    names = ["<s>", "▁hello", "▁wor", "ld", "▁", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>", "▁hello", "!", "</s>"]
    ids = [spaced.token_to_id(name) for name in names]
    whole = spaced.decode(ids, skip_special_tokens=True)
    assert whole == "hello world 😀 hello!"
    characters = WindowCharacters(spaced)
    pieces = [characters.add([id]) for id in ids]
    assert "".join(pieces) == whole
    assert not any("\ufffd" in piece for piece in pieces)


def test_endless_garbage_does_not_pile_up(spaced):
    characters = WindowCharacters(spaced)
    bad = spaced.token_to_id("<0xFF>")
    shown = "".join([characters.add([bad]) for _ in range(100)])
    assert set(shown) == {"\ufffd"}
    assert len(shown) >= 80


def test_byte_level_is_recognised(tokenizer):
    assert is_byte_level(parts_of(tokenizer))


def test_longest_token_is_known_for_byte_level(tokenizer):
    assert longest_token(parts_of(tokenizer)) == max(map(len, tokenizer.get_vocab()))


def sweeping():
    """An added token that swallows the spaces in front of it, however many."""
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    return tokenizer


def shortening():
    tokenizer = build_tokenizer()
    tokenizer.normalizer = normalizers.Strip()
    return tokenizer


def words():
    return Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))


@pytest.mark.parametrize("build", [sweeping, shortening, words])
def test_longest_token_is_unknown_where_text_may_vanish(build):
    assert longest_token(parts_of(build())) is None


@pytest.mark.parametrize("character", ["a\u0323\u0302", "\u1112\u1161\u11ab", "\u03b1\u0313\u0300\u0345", "x"])
def test_least_tokens_is_a_lower_bound_also_when_characters_are_composed(worker_info, character):
    tokenizer = build_tokenizer()
    tokenizer.normalizer = normalizers.NFC()
    text = Text(replace(worker_info, tokenizer_json=tokenizer.to_str()))
    assert 0 < text._least_tokens(character * 500) <= len(tokenizer.encode(character * 500).ids)
