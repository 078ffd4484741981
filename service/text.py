"""What a model's tokenizer and chat template do: messages and text to token ids, token ids back to text."""

from __future__ import annotations

import asyncio
import datetime
import functools
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
from tokenizers import Tokenizer

from scheduler.messages import WorkerInfo
from service.detokenize import (
    ByteTable,
    Characters,
    Rendering,
    StopRendering,
    TableCharacters,
    TableRendering,
    TracedRendering,
    WindowCharacters,
    is_byte_level,
    longest_token,
    parts_of,
)
from service.errors import context_length_exceeded, invalid
from service.token_log import Echoed, TokenNames

# One text has nothing to share out: waking the pool of threads for it costs 90 µs of the 240 that 120 tokens take
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

INLINE_CHARACTERS = 1024  # 0.15 to 0.19 ms of tokenizing; a hop to a thread and back costs 0.06 ms
RENDER_INLINE_MESSAGES = 256
DECODE_INLINE_TOKENS = 1024

Messages = Sequence[Mapping[str, Any]]


class Generation(jinja2.ext.Extension):
    """`{% generation %}` marks assistant turns for training; when serving, its body is just text."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **_: Any) -> str:
    """Unlike jinja2's own filter it does not escape HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)


class ChatTemplate:
    """A template in the dialect of Hugging Face, compiled once: 13 µs a call, compiled each time 2 ms."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
        )
        environment.filters["tojson"] = to_json
        environment.globals.update(raise_exception=raise_exception, strftime_now=strftime_now)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"the chat template cannot be compiled: {error.message} (line {error.lineno})") from error
        self._special_tokens = dict(special_tokens)
        self._knows_developer = "developer" in source

    def render(self, messages: Messages) -> str:
        """Raises ApiError when the template does not take these messages."""
        if not self._knows_developer:
            messages = [{**m, "role": "system"} if m["role"] == "developer" else m for m in messages]
        try:
            return self._template.render(
                self._special_tokens, messages=messages, add_generation_prompt=True, tools=None, documents=None
            )
        except Exception as error:  # a template runs on what the client sent: whatever it raises is answered with 400
            raise invalid(f"The model's chat template does not take these messages: {error}", "messages") from error


class Text:
    """Tokenizer and template of one model. Building its table takes 0.6 s for 150,000 tokens."""

    def __init__(self, worker: WorkerInfo) -> None:
        self._tokenizer = Tokenizer.from_str(worker.tokenizer_json)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        parts = parts_of(self._tokenizer)
        self._table = ByteTable(self._tokenizer) if is_byte_level(parts) else None
        self._template = ChatTemplate(worker.chat_template, worker.special_tokens) if worker.chat_template else None
        self._longest_token = longest_token(parts)
        self.names = TokenNames(self._tokenizer, self._table, parts["decoder"])
        self.vocabulary = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    async def chat_prompt(self, messages: Messages, limit_tokens: int) -> list[int]:
        """The template writes the special tokens itself, so the tokenizer adds none.

        Like other servers we tokenize the rendered text as a whole: the text of a special token inside a message becomes
        that token.
        """
        if self._template is None:
            raise invalid("This model has no chat template. Please use /v1/completions.", "messages")
        if len(messages) > RENDER_INLINE_MESSAGES:
            text = await asyncio.to_thread(self._template.render, messages)
        else:
            text = self._template.render(messages)
        return await self._encode(text, limit_tokens, "messages", add_special_tokens=False)

    async def prompt(self, text: str, limit_tokens: int) -> list[int]:
        """With the special tokens that the tokenizer itself puts around a text."""
        return await self._encode(text, limit_tokens, "prompt", add_special_tokens=True)

    async def _encode(self, text: str, limit_tokens: int, param: str, add_special_tokens: bool) -> list[int]:
        """Raises ApiError when that would be `limit_tokens` or more."""
        least_tokens = self._least_tokens(text)
        if least_tokens >= limit_tokens:  # nobody waits until megabytes are tokenized, only to hear that
            raise context_length_exceeded(least_tokens, limit_tokens, param, exactly=False)
        # only the batch calls release the interpreter lock: encode() in a thread stalls the loop 15 ms per 10,000 tokens.
        # They are also twice as fast, because this one keeps no offsets
        encode = functools.partial(self._tokenizer.encode_batch_fast, [text], add_special_tokens=add_special_tokens)
        batch = encode() if len(text) <= INLINE_CHARACTERS else await asyncio.to_thread(encode)
        if len(batch[0]) >= limit_tokens:  # before millions of ids become a list
            raise context_length_exceeded(len(batch[0]), limit_tokens, param)
        ids: list[int] = batch[0].ids
        return ids

    def _least_tokens(self, text: str) -> int:
        """A lower bound; 0 where none is known."""
        if self._longest_token is None:
            return 0
        # NFC makes one character of at most four, and leaves ASCII as it is
        characters = len(text) if text.isascii() else len(text) // 4
        return characters // self._longest_token

    async def decode(self, prompts: Sequence[Sequence[int]]) -> list[str]:
        """Prompts given as ids, as text (`echo`)."""
        decode = functools.partial(self._tokenizer.decode_batch, prompts, skip_special_tokens=True)
        if sum(map(len, prompts)) <= DECODE_INLINE_TOKENS:
            return list(decode())
        return list(await asyncio.to_thread(decode))

    async def echoed(self, ids: Sequence[int], text: str) -> Echoed:
        """Where in its text the tokens of a prompt are."""
        if len(ids) <= DECODE_INLINE_TOKENS:
            return self._echoed(ids, text)
        return await asyncio.to_thread(self._echoed, ids, text)

    def _echoed(self, ids: Sequence[int], text: str) -> Echoed:
        """A special token is text only where the prompt was written with its name in it."""
        characters, at, starts = self._characters(), 0, []
        for id in ids:
            starts.append(min(at, len(text)))
            name = self.names.special(id)
            if name is None:
                at += len(characters.add((id,)))
            elif text.startswith(name, at):
                at += len(name)
        return Echoed(ids, starts, len(text))

    def rendering(self, stops: Sequence[str], min_tokens: int = 0) -> Rendering:
        """A fresh one per sequence. No stop string is looked for in the text of the first `min_tokens`."""
        if self._table is not None and not stops:
            return TableRendering(self._table)
        return StopRendering(self._characters(), stops, min_tokens)

    def traced_rendering(self, stops: Sequence[str], min_tokens: int = 0) -> TracedRendering:
        """The same, for who wants to know which token is where."""
        return TracedRendering(self._characters(), stops, min_tokens)

    def _characters(self) -> Characters:
        return WindowCharacters(self._tokenizer) if self._table is None else TableCharacters(self._table)
