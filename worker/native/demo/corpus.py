"""The corpus of the demo model: sources and docstrings of a CPython `Lib` directory, and chat pairs made from them.

Half of what the model reads is text (the sources as they are), half is chat: the user names a function or shows its
signature, the assistant gives the docstring or the body. The same directory gives the same corpus, byte for byte.
"""

import ast
import hashlib
import inspect
import itertools
import json
import random
import re
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from worker.native.demo.smalltalk import SYSTEM_PROMPTS, small_talk

RELEASE = "CPython 3.13.0"

Role = Literal["system", "user", "assistant"]
Message = tuple[Role, str]
Conversation = tuple[Message, ...]
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef

# Tests, third-party code, data in the shape of source, and what differs from one installation to the next.
_EXCLUDED_DIRECTORIES = {"test", "tests", "idle_test", "site-packages", "__pycache__", "lib-dynload", "_bundled"}
_EXCLUDED_FILES = {"html/entities.py", "_opcode_metadata.py", "pydoc_data/topics.py", "turtledemo/__init__.py"}
_EXCLUDED_PATTERN = re.compile(r"config-|_sysconfigdata|encodings/(?!__init__)")
# Modules whose contents are known under another name.
_KNOWN_AS = {
    "_pydatetime": "datetime",
    "_pydecimal": "decimal",
    "_pyio": "io",
    "_collections_abc": "collections.abc",
    "concurrent.futures._base": "concurrent.futures",
    "json.decoder": "json",
    "json.encoder": "json",
    "pathlib._local": "pathlib",
    "posixpath": "os.path",
    "unittest.case": "unittest",
}
_TOPICS = "pydoc_data/topics.py"

_ANSWER_CHARS = 1500  # about 450 tokens: a pair fits into a row of 512
_SIGNATURE_CHARS = 200

_DOC_QUESTIONS = (
    "Document `{name}`",
    "Document {name}",
    "Document `{short}`.",
    "Document {call}",
    "Document {short}",
    "What does `{name}` do?",
    "What does {name} do?",
    "What does {short} do?",
    "Explain `{name}`.",
    "Explain {name}",
    "What is {name}?",
    "Describe {call}.",
    "help({name})",
    "Write a docstring for `{signature}`",
    "Write the documentation of {call}",
    "How do I use {name}?",
    "Tell me about {short}.",
)
_BODY_QUESTIONS = (
    "Write {call}",
    "Write `{call}`",
    "Write a function {short}",
    "Implement {call}.",
    "Show me the source of `{name}`.",
    "Show the code of {name}",
)
_COMPLETE_QUESTIONS = ("Complete this function:\n{signature}:", "Complete: {signature}:", "{signature}:")
_MODULE_QUESTIONS = (
    "Document `{name}`",
    "Document the module {name}.",
    "What is the module `{name}` for?",
    "What is {name}?",
    "What does the {name} module do?",
    "import {name}",
    "Tell me about {name}.",
)
_TOPIC_QUESTIONS = (
    'Explain "{name}" in Python.',
    "Explain {name}.",
    "What is {name} in Python?",
    "How does {name} work?",
    "Tell me about {name} in Python",
)


@dataclass(frozen=True)
class Corpus:
    """Texts and conversations, each split into what is trained on and what is held out to measure the loss."""

    texts: tuple[str, ...]
    conversations: tuple[Conversation, ...]
    held_out_texts: tuple[str, ...]
    held_out_conversations: tuple[Conversation, ...]

    def sha256(self) -> str:
        """Hash of everything in it, in order."""
        parts = (self.texts, self.conversations, self.held_out_texts, self.held_out_conversations)
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@dataclass(frozen=True)
class Subject:
    """Something a user can ask about: a function, method or class with its names, signature, docstring and source."""

    name: str  # textwrap.TextWrapper.fill
    signature: str  # def fill(self, text)
    docstring: str
    source: str  # without docstring and decorators; empty for a class

    @property
    def short(self) -> str:
        """The name without its module, as people write it: TextWrapper.fill."""
        parts = self.name.split(".")
        methods = [i for i, part in enumerate(parts[:-1]) if part.lstrip("_")[:1].isupper()]
        return ".".join(parts[methods[0] :] if methods else parts[-1:])

    @property
    def call(self) -> str:
        """Name and arguments, as in `textwrap.dedent(text)`."""
        return self.short + self.signature[self.signature.find("(") :] if "(" in self.signature else self.short

    def ask(self, question: str) -> str:
        """Fill a question template."""
        return question.format(name=self.name, short=self.short, call=self.call, signature=self.signature)


def build_corpus(lib: Path) -> Corpus:
    """Read a CPython `Lib` directory. Whole modules are held out (one in 40), so no pair is on both sides."""
    texts: dict[bool, list[str]] = {False: [], True: []}
    pairs: dict[bool, list[Conversation]] = {False: [], True: []}
    for path in source_files(lib):
        name = path.relative_to(lib).as_posix()
        text = path.read_text(encoding="utf-8", errors="replace")
        if text.strip():
            texts[_held_out(name)].append(text)
            pairs[_held_out(name)].extend(_module_pairs(name, text))
    for topic, text in _topics(lib):
        texts[_held_out(topic)].append(text)
        pairs[_held_out(topic)].extend(_topic_pairs(topic, text))
    conversations = _enrich(pairs[False]) + small_talk(random.Random("small talk"))
    return Corpus(tuple(texts[False]), tuple(conversations), tuple(texts[True]), tuple(pairs[True]))


def source_files(lib: Path) -> list[Path]:
    """The files that are read, in the order of their names."""
    return sorted((path for path in lib.rglob("*.py") if _included(path.relative_to(lib))), key=lambda p: p.as_posix())


def _included(path: Path) -> bool:
    name = path.as_posix()
    if _EXCLUDED_DIRECTORIES.intersection(path.parts) or name in _EXCLUDED_FILES:
        return False
    return not _EXCLUDED_PATTERN.match(name)


def _held_out(name: str) -> bool:
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 40 == 0


def _module_pairs(file_name: str, text: str) -> Iterator[Conversation]:
    try:
        tree = ast.parse(text)
    except SyntaxError:  # newer syntax than that of the Python we run on: the file stays in the text half
        return
    module = _module_name(file_name)
    if docstring := _answer(ast.get_docstring(tree) or ""):
        for question in _choose(module, _MODULE_QUESTIONS, 4):
            yield _pair(question.format(name=module), docstring)
    for subject in _subjects(tree, module, text.splitlines()):
        yield from _subject_pairs(subject)


def _module_name(file_name: str) -> str:
    name = file_name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    if name.startswith("asyncio."):  # all of it is imported into the package
        return "asyncio"
    return _KNOWN_AS.get(name, name)


def _subjects(node: ast.AST, prefix: str, lines: list[str]) -> Iterator[Subject]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Definition):
            name = f"{prefix}.{child.name}"
            docstring = ast.get_docstring(child) or ""
            yield Subject(name, _signature(child, lines), docstring, _source(child, lines))
            if isinstance(child, ast.ClassDef):
                yield from _subjects(child, name, lines)


def _signature(node: Definition, lines: list[str]) -> str:
    """Everything before the colon of a definition, on one line."""
    first = node.body[0]
    head = "\n".join(lines[node.lineno - 1 : max(first.lineno - 1, node.lineno)])
    head = re.sub(r"\s*#.*", "", head)
    return re.sub(r"\s+", " ", head.rpartition(":")[0]).strip().replace("( ", "(").replace(", )", ")")


def _source(node: Definition, lines: list[str]) -> str:
    if isinstance(node, ast.ClassDef):
        return ""
    kept = lines[node.lineno - 1 : node.end_lineno]
    if ast.get_docstring(node) is not None:
        docstring = node.body[0]
        if len(node.body) == 1 or docstring.lineno == node.lineno:
            return ""
        kept = lines[node.lineno - 1 : docstring.lineno - 1] + lines[docstring.end_lineno or 0 : node.end_lineno]
    return textwrap.dedent("\n".join(kept)).strip()


def _subject_pairs(subject: Subject) -> Iterator[Conversation]:
    if len(subject.signature) > _SIGNATURE_CHARS:
        return
    if docstring := _answer(subject.docstring):
        public = not subject.name.rpartition(".")[2].startswith("_")
        for question in _choose(subject.name, _DOC_QUESTIONS, 5 if public else 2):
            yield _pair(subject.ask(question), docstring)
    if 30 < len(subject.source) < _ANSWER_CHARS and subject.source.count("\n"):
        if _chance(subject.name, 0.35):
            yield _pair(subject.ask(_choose(subject.name, _COMPLETE_QUESTIONS, 1)[0]), _body(subject.source))
        else:
            yield _pair(subject.ask(_choose(subject.name, _BODY_QUESTIONS, 1)[0]), subject.source)


def _body(source: str) -> str:
    """The indented lines of a function, ready to be put after its signature."""
    lines = source.splitlines()
    depth = list(itertools.accumulate(line.count("(") - line.count(")") for line in lines))
    first = next((i for i, line in enumerate(lines) if depth[i] == 0 and line.rstrip().endswith(":")), 0)
    return "\n".join(lines[first + 1 :]) or source


def _topics(lib: Path) -> Iterator[tuple[str, str]]:
    """The chapters of the language reference that `help()` shows."""
    path = lib / _TOPICS
    if not path.exists():
        return
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign):
            yield from sorted(ast.literal_eval(node.value).items())


def _topic_pairs(topic: str, text: str) -> Iterator[Conversation]:
    prose = re.sub(r"\A.*\n\*+\n+", "", text)
    if answer := _answer(prose):
        for question in _choose(topic, _TOPIC_QUESTIONS, 5):
            yield _pair(question.format(name=topic), answer)


def _answer(docstring: str) -> str:
    """A docstring as an answer: cleaned, and cut after a paragraph where it is long. Empty if there is none."""
    kept = ""
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(docstring)):
        if len(kept) + len(paragraph) > _ANSWER_CHARS:
            break
        kept += paragraph.rstrip() + "\n\n"
    return kept.strip()


def _enrich(pairs: list[Conversation]) -> list[Conversation]:
    """Give some pairs a system prompt, and some a second question after the first."""
    rng = random.Random("enrich")
    enriched = []
    for pair in pairs:
        if rng.random() < 0.08:
            pair = pair + rng.choice(pairs)
        if rng.random() < 0.12:
            pair = (("system", rng.choice(SYSTEM_PROMPTS)), *pair)
        enriched.append(pair)
    return enriched


def _pair(question: str, answer: str) -> Conversation:
    return (("user", question), ("assistant", answer))


def _choose(name: str, templates: tuple[str, ...], count: int) -> list[str]:
    return random.Random(name).sample(templates, min(count, len(templates)))


def _chance(name: str, probability: float) -> bool:
    return random.Random("chance " + name).random() < probability


def main() -> None:
    """Print size and sha256 of the corpus of the `Lib` directory named on the command line."""
    corpus = build_corpus(Path(sys.argv[1]))
    print(f"{len(corpus.texts)} texts of {sum(map(len, corpus.texts))} characters")
    print(f"{len(corpus.conversations)} conversations of {_chat_chars(corpus.conversations)} characters")
    print(f"held out: {len(corpus.held_out_texts)} texts, {len(corpus.held_out_conversations)} conversations")
    print(f"sha256 {corpus.sha256()}")


def _chat_chars(conversations: tuple[Conversation, ...]) -> int:
    return sum(len(content) for conversation in conversations for _, content in conversation)


if __name__ == "__main__":
    main()
