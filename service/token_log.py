"""What an answer says of single tokens: their log probabilities, and their ids. Made only for clients that ask.

Of a token is told with the text that completes its own, so what waits (for the rest of a character, or for what may become
a stop string) waits with its log probability. What is told while streaming, put together, is what is told at once.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from tokenizers import Tokenizer

from scheduler.messages import Logprobs
from service.detokenize import ByteTable

LEAST_LOGPROB = -9999.0  # OpenAI's word for: next to impossible. JSON knows no infinity
COLUMNS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


class TokenNames:
    """What tokens are called when one speaks of them: a text, and the bytes that they stand for."""

    def __init__(self, tokenizer: Tokenizer, table: ByteTable | None) -> None:
        self._tokenizer = tokenizer
        self._table = table
        added = tokenizer.get_added_tokens_decoder()
        self._special = {id: token.content for id, token in added.items() if token.special}
        self._added = {id: token.content for id, token in added.items()}
        self._has_visible_spaces = '"▁"' in orjson.dumps(orjson.loads(tokenizer.to_str())["decoder"]).decode()

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


@dataclass(frozen=True, slots=True)
class Echoed:
    """A prompt that an answer begins with: where each of its tokens begins in its text, and how long that is."""

    ids: Sequence[int]
    starts: Sequence[int]
    length: int


class TokenLog(ABC):
    """Of one choice. Ids and rows come in as the worker sends them, and leave with the text that they belong to."""

    only_prompt = False  # what is generated is neither shown nor counted
    prompt_rows = 0  # that come in front of the first token's

    def __init__(self, names: TokenNames, wants_logprobs: bool, wants_ids: bool) -> None:
        self._ids: list[int] = []  # whatever was generated
        self._rows: list[Logprobs] = []  # that nobody was told of yet
        self._all_rows = 0
        self._names = names
        self._wants_logprobs = wants_logprobs
        self._wants_ids = wants_ids
        self._told = 0  # log probabilities
        self._told_ids = 0

    def add_rows(self, rows: Sequence[Logprobs]) -> None:
        """Of tokens that are about to be added."""
        self._rows += rows
        self._all_rows += len(rows)

    def add(self, ids: Sequence[int]) -> None:
        """Raises ValueError when the worker did not say how probable they are."""
        self._ids += ids
        if self._wants_logprobs and self._all_rows < self.prompt_rows + len(self._ids):
            raise ValueError(f"{len(self._ids)} tokens came with {self._all_rows} rows of log probabilities")

    def has_news(self, shown: int, counted: int) -> bool:
        """`shown`: tokens with all their text; `counted`: also those without, once it is known that they count."""
        return (self._wants_logprobs and shown > self._told) or (self._wants_ids and counted > self._told_ids)

    def tell(self, shown: int, counted: int, starts: Sequence[int]) -> bytes:
        """Fields of a choice, about what is new. `starts`: per token, where in the text it begins."""
        fields = b'"logprobs":' + (self._tell_logprobs(shown, starts) if self._wants_logprobs else b"null")
        if self._wants_ids:
            fields += b',"token_ids":' + orjson.dumps(self._ids[self._told_ids : counted])
            self._told_ids = counted
        return fields

    def _tell_logprobs(self, shown: int, starts: Sequence[int]) -> bytes:
        begin, self._told = self._told, shown
        return orjson.dumps(self._logprobs(starts[begin:shown]))

    @abstractmethod
    def _logprobs(self, starts: Sequence[int]) -> dict[str, Any]:
        """The value of `logprobs`, of the next tokens, which begin at these places."""

    def _next_rows(self, count: int) -> list[Logprobs]:
        rows, self._rows = self._rows[:count], self._rows[count:]
        return rows


class ChatLog(TokenLog):
    def _logprobs(self, starts: Sequence[int]) -> dict[str, Any]:
        return {"content": [self._entry(row) for row in self._next_rows(len(starts))], "refusal": None}

    def _entry(self, row: Logprobs) -> dict[str, Any]:
        return {**self._one(*row[0]), "top_logprobs": [self._one(*one) for one in row[1:]]}

    def _one(self, id: int, logprob: float) -> dict[str, Any]:
        name, raw = self._names.of(id)
        return {"token": name, "logprob": finite(logprob), "bytes": None if raw is None else list(raw)}


class CompletionLog(TokenLog):
    """May begin with the prompt, whose first token has no probability: nothing is in front of it."""

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
        self._untold_echo = echoed
        self._echo_length = 0 if echoed is None else echoed.length
        self.prompt_rows = 0 if echoed is None else len(echoed.ids) - 1

    def tell(self, shown: int, counted: int, starts: Sequence[int]) -> bytes:
        fields = super().tell(shown, counted, starts)
        if self._untold_ids is not None:
            fields += b',"prompt_token_ids":' + orjson.dumps(self._untold_ids)
            self._untold_ids = None
        return fields

    def _logprobs(self, starts: Sequence[int]) -> dict[str, Any]:
        columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}
        if self._untold_echo is not None:
            self._begin_with(self._untold_echo, columns)
            self._untold_echo = None
        self._add(self._next_rows(len(starts)), [self._echo_length + start for start in starts], columns)
        return columns

    def _begin_with(self, echoed: Echoed, columns: dict[str, list[Any]]) -> None:
        for name, value in zip(COLUMNS, (self._names.of(echoed.ids[0])[0], None, None, echoed.starts[0]), strict=True):
            columns[name].append(value)
        self._add(self._next_rows(self.prompt_rows), echoed.starts[1:], columns)

    def _add(self, rows: Sequence[Logprobs], starts: Sequence[int], columns: dict[str, list[Any]]) -> None:
        columns["tokens"] += [self._names.of(row[0][0])[0] for row in rows]
        columns["token_logprobs"] += [finite(row[0][1]) for row in rows]
        columns["top_logprobs"] += [self._likeliest(row) for row in rows]
        columns["text_offset"] += starts

    def _likeliest(self, row: Logprobs) -> dict[str, float]:
        """Always with the chosen one. Of tokens with the same text (parts of characters) the likeliest is kept."""
        likeliest: dict[str, float] = {}
        for id, logprob in row:
            likeliest.setdefault(self._names.of(id)[0], finite(logprob))
        return likeliest


def finite(logprob: float) -> float:
    """Between the least and 0; what is no number is the least."""
    return min(logprob, 0.0) if logprob > LEAST_LOGPROB else LEAST_LOGPROB
