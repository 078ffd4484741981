"""What is told of single tokens, over random texts cut into random tokens, deliveries and stop strings."""

from __future__ import annotations

import itertools
import random
import struct

import orjson
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scripted_worker import row_of
from tokenizers import AddedToken, Tokenizer, decoders, models

from service.detokenize import ByteTable, TableCharacters, TracedRendering, WindowCharacters, byte_alphabet, parts_of
from service.token_log import ChatLog, CompletionLog, Echoed, TokenNames, written

TRICKY = 'aé한😀👩‍👩‍👧日本\u0301 \n"\\END\x00'
texts = st.text(st.sampled_from(TRICKY), max_size=25)
stops = st.lists(st.text(st.sampled_from("aé한END "), min_size=1, max_size=3), max_size=3)


def names_of(tokenizer: Tokenizer, table: ByteTable | None = None) -> TokenNames:
    return TokenNames(tokenizer, table, parts_of(tokenizer)["decoder"])


@pytest.fixture(scope="module")
def table(tokenizer):
    return ByteTable(tokenizer)


@pytest.fixture(scope="module")
def names(tokenizer, table):
    return names_of(tokenizer, table)


def ids_of(tokenizer: Tokenizer, text: str, chance: random.Random) -> list[int]:
    """Real tokens, single bytes and special tokens, mixed."""
    letters = {byte: char for char, byte in byte_alphabet().items()}
    ids: list[int] = []
    for token in tokenizer.encode(text).tokens:
        raw = [byte_alphabet()[char] for char in token]
        pieces = [letters[byte] for byte in raw] if chance.random() < 0.5 else [token]
        ids += map(tokenizer.token_to_id, pieces)
        if chance.random() < 0.1:
            ids.append(tokenizer.token_to_id("<|eot|>"))
    return ids


def read(fields: list[bytes]) -> dict:
    return orjson.loads(b"{%b}" % b"".join(fields))


class Reader:
    """Feeds a rendering as a choice does, and keeps each delivery's text and what was told with it."""

    def __init__(self, rendering: TracedRendering, log: ChatLog | CompletionLog) -> None:
        self.rendering, self.log = rendering, log
        self.texts: list[str] = []
        self.told: list[dict] = []
        self.counted = 0

    def read(self, deliveries: list[list[int]]) -> Reader:
        for ids in deliveries:
            self.log.add_rows([row_of(id, 2) for id in ids])
            self.log.add(ids)
            self.counted += len(ids)
            self.keep(self.rendering.add(ids), self.rendering.shown())
            if self.rendering.stopped:
                self.counted -= self.rendering.unused
                break
        self.keep(self.rendering.end(), self.counted)
        return self

    def keep(self, text: bytes, counted: int) -> None:
        self.texts.append(orjson.loads(b'"%b"' % text))
        told = self.log.tell(self.rendering.shown(), counted, self.rendering.starts)
        self.told.append(read(told))

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def column(self, name: str) -> list:
        return [value for told in self.told for value in told["logprobs"][name]]


def deliveries_of(ids: list[int], chance: random.Random) -> list[list[int]]:
    cuts = sorted(chance.choices(range(len(ids) + 1), k=chance.randint(0, len(ids))))
    return [ids[begin:end] for begin, end in itertools.pairwise([0, *cuts, len(ids)])]


@given(text=texts, stops=stops, seed=st.integers(0, 10_000))
@example(text="ab😀END", stops=["END"], seed=1)
@settings(max_examples=300, deadline=None)
def test_told_in_pieces_is_told_at_once(tokenizer, table, names, text, stops, seed):
    """32: the entries of a stream, put together, are those of an answer in one piece; so are the ids."""
    chance = random.Random(seed)
    ids = ids_of(tokenizer, text, chance)

    def read(log, deliveries):
        return Reader(TracedRendering(TableCharacters(table), stops), log).read(deliveries)

    pieces = read(ChatLog(names, True, True), deliveries_of(ids, chance))
    whole = read(ChatLog(names, True, True), [ids])
    assert pieces.text == whole.text
    assert pieces.column("content") == whole.column("content")
    told_ids = [id for told in pieces.told for id in told["token_ids"]]
    assert told_ids == [id for told in whole.told for id in told["token_ids"]] == ids[: len(told_ids)]
    assert len(told_ids) == pieces.counted


@given(text=texts, stops=stops, seed=st.integers(0, 10_000))
@settings(max_examples=300, deadline=None)
def test_entries_are_those_of_the_text_beside_them(tokenizer, table, names, text, stops, seed):
    """32: never of a token whose text is still held back. 33: the bytes of the entries are the text's."""
    chance = random.Random(seed)
    rendering = TracedRendering(TableCharacters(table), stops)
    reader = Reader(rendering, ChatLog(names, True, False)).read(deliveries_of(ids_of(tokenizer, text, chance), chance))
    shown = raw = b""
    for piece, told in zip(reader.texts[:-1], reader.told[:-1], strict=True):
        shown += piece.encode()
        raw += b"".join(bytes(entry["bytes"] or ()) for entry in told["logprobs"]["content"])
        assert shown.startswith(raw) or rendering.stopped
    raw = b"".join(bytes(entry["bytes"] or ()) for entry in reader.column("content"))
    whole = reader.text.encode()
    assert raw == whole if not rendering.stopped else raw.startswith(whole)
    if rendering.stopped and whole:  # beyond the text only by the end of the token in which the stop string begins
        last = next(entry for entry in reversed(reader.column("content")) if entry["bytes"])
        assert len(raw) - len(last["bytes"]) < len(whole)


@given(text=texts, stops=stops, seed=st.integers(0, 10_000))
@settings(max_examples=300, deadline=None)
def test_offsets_are_places_in_the_text(tokenizer, table, names, text, stops, seed):
    """31: also behind an echo, and while streaming."""
    chance = random.Random(seed)
    echo = "say "
    prompt = tokenizer.encode(echo).ids
    log = CompletionLog(names, True, False, prompt, Echoed(prompt, [0] * len(prompt), len(echo)))
    log.add_rows([row_of(id, 2) for id in prompt[1:]])
    rendering = TracedRendering(TableCharacters(table), stops)
    reader = Reader(rendering, log).read(deliveries_of(ids_of(tokenizer, text, chance), chance))
    whole = echo + reader.text
    offsets = reader.column("text_offset")[len(prompt) :]
    tokens = reader.column("tokens")[len(prompt) :]
    assert offsets == sorted(offsets)
    for token, begin in zip(tokens, offsets, strict=True):
        if "\ufffd" not in token and not token.startswith("<|"):
            there = whole[begin : begin + len(token)]
            assert there == token or (rendering.stopped and token.startswith(there))


def test_what_is_held_back_takes_its_entries_with_it(tokenizer, table, names):
    """32: a character in four tokens, then what may be a stop string."""
    letters = {byte: char for char, byte in byte_alphabet().items()}
    ids = [tokenizer.token_to_id(letters[byte]) for byte in "😀EN!".encode()]
    reader = Reader(TracedRendering(TableCharacters(table), ["END"]), ChatLog(names, True, True))
    reader.read([[id] for id in ids])
    assert reader.texts == ["", "", "", "😀", "", "", "EN!", ""]
    assert [len(told["logprobs"]["content"]) for told in reader.told] == [0, 0, 0, 4, 0, 0, 3, 0]
    assert [len(told["token_ids"]) for told in reader.told] == [0, 0, 0, 4, 0, 0, 3, 0]
    assert [entry["bytes"] for entry in reader.column("content")[:4]] == [[byte] for byte in "😀".encode()]
    assert reader.column("content")[0]["token"] == "\ufffd"


def test_no_stop_string_ends_a_text_that_must_be_longer(tokenizer, table, names):
    ids = [id for char in "aEbEcEd" for id in tokenizer.encode(char).ids]
    for min_tokens, text in [(0, "a"), (1, "a"), (2, "aEb"), (3, "aEb"), (5, "aEbEc"), (6, "aEbEcEd"), (9, "aEbEcEd")]:
        reader = Reader(TracedRendering(TableCharacters(table), ["E"], min_tokens), ChatLog(names, True, True))
        assert reader.read([ids]).text == text


def test_stop_string_is_not_made_of_tokens_that_must_be_there(tokenizer, table, names):
    ids = [id for char in "aEND" for id in tokenizer.encode(char).ids]
    reader = Reader(TracedRendering(TableCharacters(table), ["END"], 2), ChatLog(names, True, True))
    assert reader.read([[id] for id in ids]).text == "aEND"


def test_what_is_nearly_impossible_is_a_number(names):
    """33."""
    for logprob, told in [
        (float("-inf"), -9999.0),
        (float("nan"), -9999.0),
        (-1e6, -9999.0),
        (1e-9, 0.0),
        (-2.5, -2.5),
    ]:
        log = ChatLog(names, True, False)
        log.add_rows([[(70, logprob), (71, logprob)]])
        log.add([70])
        (entry,) = read(log.tell(1, 1, [0]))["logprobs"]["content"]
        assert (entry["logprob"], entry["top_logprobs"][0]["logprob"]) == (told, told)


def test_of_tokens_with_the_same_text_the_first_is_kept(tokenizer, names):
    """The chosen one, then the likeliest: parts of characters all look alike."""
    letters = {byte: char for char, byte in byte_alphabet().items()}
    chosen, likelier, third = (tokenizer.token_to_id(letters[byte]) for byte in (0xF0, 0x9F, 0x98))
    (other,) = tokenizer.encode("a").ids
    log = CompletionLog(names, True, False, [])
    log.add_rows([[(chosen, -3.0), (likelier, -0.5), (other, -1.0), (third, -2.0)]])
    log.add([chosen])
    told = read(log.tell(1, 1, [0]))["logprobs"]
    assert told["top_logprobs"] == [{"\ufffd": -3.0, "a": -1.0}] and told["token_logprobs"] == [-3.0]


@pytest.mark.parametrize("make", [ChatLog, lambda *wants: CompletionLog(*wants, [])])
@pytest.mark.parametrize("told", [[], [71], [70, 71][::-1], [71, 70]])
def test_rows_of_other_tokens_are_noticed(names, make, told):
    log = make(names, True, False)
    log.add_rows([row_of(id, 1) for id in told])
    with pytest.raises(ValueError, match="log probabilities"):
        log.add([70])


def test_rows_may_come_before_their_tokens(names):
    """Steps that come together are dealt after all their rows."""
    log = ChatLog(names, True, False)
    log.add_rows([row_of(70, 1), row_of(71, 1)])
    log.add([70])
    assert len(read(log.tell(1, 1, [0]))["logprobs"]["content"]) == 1
    log.add([71])
    with pytest.raises(ValueError, match="log probabilities"):
        log.add([72])


@pytest.mark.parametrize("rows", [[71], [71, 73], [72, 71]])
def test_scores_that_are_missing_or_of_other_tokens_are_noticed(names, rows):
    prompt = [70, 71, 72]
    log = CompletionLog(names, True, False, prompt, Echoed(prompt, [0, 1, 2], 3), only_prompt=True)
    with pytest.raises(ValueError, match="rows"):
        log.add_rows([row_of(id, 1) for id in rows])
        log.add([])


def test_names_are_written_once_but_not_those_of_unknown_ids(names):
    assert names.quoted[70] is names.quoted[70] and names.entries[70] is names.entries[70]
    assert names.quoted[10**6] == b'"token_id:1000000"' and 10**6 not in names.quoted


def test_numbers_have_six_places(names):
    """They came as 32-bit floats: what is behind is noise."""
    (number,) = struct.unpack("f", struct.pack("f", -1.234567))
    assert written([number, -0.5, -1e-7, -12.25]) == [b"-1.234567", b"-0.5", b"0.0", b"-12.25"]


def test_special_and_unknown_tokens_have_a_name_and_no_bytes(tokenizer, names):
    assert names.of(tokenizer.token_to_id("<|im_end|>")) == ("<|im_end|>", None)
    assert names.of(10**6) == ("token_id:1000000", None)
    assert names.of(tokenizer.encode("hello").ids[0])[1] is not None


def test_names_of_a_sentencepiece_tokenizer():
    """39: its mark for the space is a space, its byte tokens are bytes."""
    pieces = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁hello", "ld", "é"]
    tokenizer = Tokenizer(models.BPE({piece: id for id, piece in enumerate(pieces)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken("<s>", special=True)])
    names = names_of(tokenizer)
    for piece, expected in [
        ("▁hello", (" hello", b" hello")),
        ("ld", ("ld", b"ld")),
        ("é", ("é", "é".encode())),
        ("<0xE2>", ("\ufffd", b"\xe2")),
        ("<0x0A>", ("\n", b"\n")),
        ("<s>", ("<s>", None)),
    ]:
        assert names.of(tokenizer.token_to_id(piece)) == expected
    letters = ["▁hello", "▁", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>", "<s>", "ld"]
    ids = [tokenizer.token_to_id(letter) for letter in letters]
    reader = Reader(TracedRendering(WindowCharacters(tokenizer), ["x"]), ChatLog(names, True, True))
    reader.read([[id] for id in ids])
    assert reader.text == "hello 😀ld"
    assert [len(told["logprobs"]["content"]) for told in reader.told] == [1, 1, 0, 0, 0, 4, 1, 1, 0]
    assert b"".join(bytes(entry["bytes"] or ()) for entry in reader.column("content")) == " hello 😀ld".encode()


def test_names_of_word_pieces():
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "hel": 1, "##lo": 2}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    assert names_of(tokenizer).of(1) == ("hel", b"hel")
