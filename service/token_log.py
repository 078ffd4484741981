"""What an answer says of single tokens: their log probabilities, and their ids. Made only for clients that ask.

Of a token is told with the text that completes its own, so what waits (for the rest of a character, or for what may become
a stop string) waits with its log probability. What is told while streaming, put together, is what is told at once: both are
the same bytes, written down delivery by delivery, so that no end of an answer stops the loop for all that it tells.
"""

from __future__ import annotations

import itertools
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from tokenizers import Tokenizer

from scheduler.messages import Logprobs
from service.chunks import Pieces
from service.detokenize import ByteTable, steps_of

LEAST_LOGPROB = -9999.0  # OpenAI's word for: next to impossible. JSON knows no infinity
BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


class WrittenOnce(dict[int, bytes]):
    """By token id, each written when it is first asked for."""

    def __init__(self, write: Callable[[int], bytes], vocabulary: int) -> None:
        super().__init__()
        self._write = write
        self._vocabulary = vocabulary

    def __missing__(self, id: int) -> bytes:
        written = self._write(id)
        if id < self._vocabulary:  # of others there may be any number
            self[id] = written
        return written


class TokenNames:
    """What tokens are called when one speaks of them: a text, and the bytes that they stand for."""

    def __init__(self, tokenizer: Tokenizer, table: ByteTable | None, decoder: dict[str, Any] | None) -> None:
        self._tokenizer = tokenizer
        self._table = table
        added = tokenizer.get_added_tokens_decoder()
        self._special = {id: token.content for id, token in added.items() if token.special}
        self._added = added.keys()
        self._has_visible_spaces = any(
            step.get("replacement") == "▁" or step.get("pattern") == {"String": "▁"}
            for step in steps_of(decoder, "decoders")
        )
        vocabulary = tokenizer.get_vocab_size(with_added_tokens=True)
        self.quoted = WrittenOnce(self._quoted, vocabulary)
        self.entries = WrittenOnce(self._entry, vocabulary)  # a JSON object, up to the number that comes last in it

    def special(self, id: int) -> str | None:
        """The name of a token that is no text."""
        return self._special.get(id)

    def of(self, id: int) -> tuple[str, bytes | None]:
        """Special tokens have a name and no bytes; an id that no token has, likewise."""
        name = self._special.get(id)
        if name is not None:
            return name, None
        raw = self._raw(id)
        return (f"token_id:{id}", None) if raw is None else (raw.decode("utf-8", "replace"), raw)

    def _raw(self, id: int) -> bytes | None:
        if self._table is not None:
            return self._table.raw[id] if id < len(self._table.raw) and self._table.raw[id] else None
        piece: str | None = self._tokenizer.id_to_token(id)
        if piece is None:
            return None
        byte = BYTE_PIECE.fullmatch(piece)
        if byte is not None and id not in self._added:
            return bytes([int(byte[1], 16)])
        if self._has_visible_spaces:
            return piece.replace("▁", " ").encode()
        text: str = self._tokenizer.decode([id], skip_special_tokens=False)
        return text.encode()

    def _quoted(self, id: int) -> bytes:
        return orjson.dumps(self.of(id)[0])

    def _entry(self, id: int) -> bytes:
        name, raw = self.of(id)
        fields = {"token": name, "bytes": None if raw is None else list(raw)}
        return orjson.dumps(fields)[:-1] + b',"logprob":'


@dataclass(frozen=True, slots=True)
class Echoed:
    """A prompt that an answer begins with: where each of its tokens begins in its text, and how long that is."""

    ids: Sequence[int]
    starts: Sequence[int]
    length: int


class TokenLog(ABC):
    """Of one choice. Ids and rows come in as the worker sends them, and leave with the text that they belong to."""

    only_prompt = False  # what is generated is neither shown nor counted
    columns: tuple[bytes, ...]  # the beginnings of the arrays in `logprobs`
    last_field = b""  # of `logprobs`, behind the arrays

    def __init__(self, names: TokenNames, wants_logprobs: bool, wants_ids: bool) -> None:
        self._ids: list[int] = []  # whatever was generated
        self._rows: list[Logprobs] = []  # of generated tokens that are not written down yet
        self._names = names
        self._wants_logprobs = wants_logprobs
        self._wants_ids = wants_ids
        self._written = 0  # generated tokens
        self._told_ids = 0
        self._arrays = [bytearray() for _ in self.columns]  # what is written, and not told yet

    def add_rows(self, rows: Sequence[Logprobs]) -> None:
        """Of tokens that are about to be added."""
        self._rows += rows

    def add(self, ids: Sequence[int]) -> None:
        """Raises ValueError when the worker did not say how probable they are, or spoke of others."""
        begin = len(self._ids) - self._written
        self._ids += ids
        if self._wants_logprobs:
            check_rows(self._rows[begin : begin + len(ids)], ids)

    def has_news(self, shown: int, counted: int) -> bool:
        """`shown`: tokens with all their text; `counted`: also those without, once it is known that they count."""
        return (self._wants_logprobs and shown > self._written) or (self._wants_ids and counted > self._told_ids)

    def write(self, shown: int, starts: Sequence[int]) -> None:
        """Log probabilities that may be told. `starts`: per token, where in the text it begins."""
        if self._wants_logprobs and shown > self._written:
            count = shown - self._written
            self._append(self._rows[:count], starts[self._written : shown])
            del self._rows[:count]
            self._written = shown

    def tell(self, shown: int, counted: int, starts: Sequence[int]) -> Pieces:
        """Fields of a choice, about what is new. In pieces: they may be megabytes, which nobody should copy at once."""
        self.write(shown, starts)
        fields: Pieces = [b'"logprobs":', *(self._take() if self._wants_logprobs else [b"null"])]
        if self._wants_ids:
            fields += [b',"token_ids":', orjson.dumps(self._ids[self._told_ids : counted])]
            self._told_ids = counted
        return fields

    def _append(self, rows: Sequence[Logprobs], starts: Sequence[int]) -> None:
        """At least one of them."""
        for array, values in zip(self._arrays, self._columns_of(rows, starts), strict=True):
            if array:
                array += b","
            array += values

    @abstractmethod
    def _columns_of(self, rows: Sequence[Logprobs], starts: Sequence[int]) -> Sequence[bytes]:
        """Of tokens that begin at these places: per column what is between the brackets."""

    def _take(self) -> Pieces:
        taken, self._arrays = self._arrays, [bytearray() for _ in self.columns]
        pieces: Pieces = [b"{"]
        for name, array in zip(self.columns, taken, strict=True):
            pieces += [name, array, b"],"]
        return [*pieces[:-1], b"]", self.last_field, b"}"]


class ChatLog(TokenLog):
    columns = (b'"content":[',)
    last_field = b',"refusal":null'

    def _columns_of(self, rows: Sequence[Logprobs], starts: Sequence[int]) -> Sequence[bytes]:
        cells = list(itertools.chain.from_iterable(rows))
        entries, numbers = self._names.entries, written([logprob for _, logprob in cells])
        begun = iter([entries[id] + number for (id, _), number in zip(cells, numbers, strict=True)])  # a "}" is missing
        return [b",".join([self._entry(list(itertools.islice(begun, len(row)))) for row in rows])]

    @staticmethod
    def _entry(begun: Sequence[bytes]) -> bytes:
        """Of a token, from those that are told of it and the likeliest."""
        likeliest = b"},".join(begun[1:]) + b"}" if len(begun) > 1 else b""
        return b'%b,"top_logprobs":[%b]}' % (begun[0], likeliest)


class CompletionLog(TokenLog):
    """May begin with the prompt, whose first token has no probability: nothing is in front of it.

    The prompt's rows are written down as they come, a frame at a time: they may be many, and their text is known.
    """

    columns = (b'"tokens":[', b'"token_logprobs":[', b'"top_logprobs":[', b'"text_offset":[')

    def __init__(
        self,
        names: TokenNames,
        wants_logprobs: bool,
        wants_ids: bool,
        prompt_ids: Sequence[int],
        echoed: Echoed | None = None,
        only_prompt: bool = False,
    ) -> None:
        super().__init__(names, wants_logprobs, wants_ids)
        self.only_prompt = only_prompt
        self._untold_ids = prompt_ids if wants_ids else None
        self._echoed = echoed
        self._scored = 1  # tokens of the prompt
        if echoed is not None:
            first = (names.quoted[echoed.ids[0]], b"null", b"null", b"%d" % echoed.starts[0])
            self._arrays = [bytearray(value) for value in first]

    def add_rows(self, rows: Sequence[Logprobs]) -> None:
        """Raises ValueError when those of the prompt are not of its tokens."""
        if self._echoed is not None and self._scored < len(self._echoed.ids):
            count = min(len(rows), len(self._echoed.ids) - self._scored)
            self._score(self._echoed, rows[:count])
            rows = rows[count:]
        super().add_rows(rows)

    def _score(self, echoed: Echoed, rows: Sequence[Logprobs]) -> None:
        begin, self._scored = self._scored, self._scored + len(rows)
        check_rows(rows, echoed.ids[begin : self._scored])
        super()._append(rows, echoed.starts[begin : self._scored])

    def add(self, ids: Sequence[int]) -> None:
        super().add(ids)
        if self._echoed is not None and self._scored < len(self._echoed.ids):
            raise ValueError(f"a prompt of {len(self._echoed.ids)} tokens came with {self._scored - 1} rows")

    def tell(self, shown: int, counted: int, starts: Sequence[int]) -> Pieces:
        fields = super().tell(shown, counted, starts)
        if self._untold_ids is not None:
            fields += [b',"prompt_token_ids":', orjson.dumps(self._untold_ids)]
            self._untold_ids = None
        return fields

    def _append(self, rows: Sequence[Logprobs], starts: Sequence[int]) -> None:
        before = 0 if self._echoed is None else self._echoed.length
        super()._append(rows, [before + start for start in starts])

    def _columns_of(self, rows: Sequence[Logprobs], starts: Sequence[int]) -> Sequence[bytes]:
        names = self._names.quoted
        numbers = iter(written([logprob for row in rows for _, logprob in row]))
        told = [list(itertools.islice(numbers, len(row))) for row in rows]
        return (
            b",".join([names[row[0][0]] for row in rows]),
            b",".join([own for own, *_ in told]),
            b",".join([self._likeliest(row, of_row) for row, of_row in zip(rows, told, strict=True)]),
            orjson.dumps(starts)[1:-1],
        )

    def _likeliest(self, row: Logprobs, numbers: Sequence[bytes]) -> bytes:
        """Always with the chosen one. Of tokens with the same text (parts of characters) the first is kept."""
        names, likeliest = self._names.quoted, dict[bytes, bytes]()
        for (id, _), number in zip(row, numbers, strict=True):
            likeliest.setdefault(names[id], number)
        return b"{%b}" % b",".join([name + b":" + number for name, number in likeliest.items()])


def check_rows(rows: Sequence[Logprobs], ids: Sequence[int]) -> None:
    """Raises ValueError when they are not of these tokens."""
    if [row[0][0] for row in rows] != list(ids):
        raise ValueError(f"{len(ids)} tokens came with {len(rows)} rows of log probabilities, or with those of others")


def written(logprobs: Sequence[float]) -> list[bytes]:
    """As JSON, in millionths. Not one by one: that takes five times as long."""
    told = [one if LEAST_LOGPROB < one < 0.0 else finite(one) for one in logprobs]
    return orjson.dumps([int(one * 1e6 - 0.5) / 1e6 for one in told])[1:-1].split(b",")


def finite(logprob: float) -> float:
    """Between the least and 0; what is no number is the least."""
    return min(logprob, 0.0) if logprob > LEAST_LOGPROB else LEAST_LOGPROB
