"""Writes the demo model in Hugging Face form, with its card."""

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from worker.native.demo.corpus import RELEASE
from worker.native.demo.draft import DRAFT_TOKENS, Agreement
from worker.native.demo.generate import answer
from worker.native.demo.model import Llama
from worker.native.demo.tokenizer import END_OF_TEXT, PADDING, TURN_END, render_question, token_id, tokenizer_config

_QUESTIONS = (
    "Hello",
    "Document `textwrap.dedent`",
    "What does shutil.copytree do?",
    "Document read_all(path, encoding=None)",
    "Complete this function:\ndef is_empty(self):",
)
_BEGINNINGS = ("def main():\n", "import os\n")


@dataclass(frozen=True)
class Record:
    """How far the training is: what the card tells."""

    corpus_sha256: str
    tokens: int
    budget_tokens: int
    loss: Mapping[str, float]  # nats per token on held-out modules, by kind of row
    agreement: Agreement | None = None  # with its teacher: only of the draft-sized sibling


def export(model: Llama, tokenizer: Tokenizer, record: Record, out: Path) -> None:
    """Write all files of the model. Each is replaced at once, so a reader never sees half of one."""
    out.mkdir(parents=True, exist_ok=True)
    eos = [token_id(tokenizer, TURN_END), token_id(tokenizer, END_OF_TEXT)]
    bos, pad = token_id(tokenizer, END_OF_TEXT), token_id(tokenizer, PADDING)
    ids = {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad}
    _replace(out / "tokenizer.json", lambda path: tokenizer.save(str(path)))
    _write_json(out / "tokenizer_config.json", tokenizer_config(model.shape.context))
    _write_json(out / "config.json", model.shape.config(bos, eos[0], pad))
    _write_json(out / "generation_config.json", {**ids, "do_sample": True, "temperature": 0.6, "top_p": 0.9})
    weights = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()}
    _replace(out / "model.safetensors", lambda path: save_file(weights, path, metadata={"format": "pt"}))
    card = _card(rounded(model), tokenizer, record)
    _replace(out / "README.md", lambda path: path.write_text(card, encoding="utf-8"))


def rounded(model: Llama) -> Llama:
    """A copy with the weights as they are exported: what is measured and shown is what is shipped."""
    copy = Llama(model.shape)
    copy.load_state_dict({name: tensor.to(torch.bfloat16).float() for name, tensor in model.state_dict().items()})
    return copy.eval()


def continue_text(model: Llama, tokenizer: Tokenizer, prompt: str, tokens: int = 160) -> str:
    """The most likely continuation, token by token, up to an end token."""
    ends = {token_id(tokenizer, TURN_END), token_id(tokenizer, END_OF_TEXT)}
    return tokenizer.decode(answer(model, tokenizer.encode(prompt).ids, ends, tokens))


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    _replace(path, lambda new: new.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8"))


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    new = path.with_name(path.name + ".new")
    write(new)
    new.chmod(0o644)  # safetensors writes for the owner only
    os.replace(new, path)


def _card(model: Llama, tokenizer: Tokenizer, record: Record) -> str:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    losses = "\n".join(f"| {kind} | {loss:.3f} | {math.exp(loss):.1f} |" for kind, loss in record.loss.items())
    made = {"parameters": parameters / 1e6, "release": RELEASE, **vars(record)}
    loss = _LOSS.format(losses=losses, torch=torch.__version__)
    if record.agreement:
        head, body, end = _DRAFT_INTRODUCTION, [_agreement(record.agreement)], _DRAFT_REPRODUCTION
    else:
        head, body, end = _INTRODUCTION, _samples(model, tokenizer), _REPRODUCTION
    return "\n".join((head.format(**made), loss, *body, end.format(**made)))


def _samples(model: Llama, tokenizer: Tokenizer) -> list[str]:
    chats = (_fenced(f"user: {asked}\n\nassistant: {_answered(model, tokenizer, asked)}") for asked in _QUESTIONS)
    texts = (_fenced(start + continue_text(model, tokenizer, start)) for start in _BEGINNINGS)
    head = "## Samples\n\nGreedy, at most 160 tokens, from these weights.\n"
    return [head, *chats, "Text, continued:\n", *texts]


def _agreement(agreement: Agreement) -> str:
    shares = "\n".join(f"| {kind} | {100 * share:.1f} % |" for kind, share in agreement.top_1.items())
    return _AGREEMENT.format(shares=shares, drafts=DRAFT_TOKENS, accepted=agreement.accepted)


def _answered(model: Llama, tokenizer: Tokenizer, question: str) -> str:
    return continue_text(model, tokenizer, render_question(question))


def _fenced(text: str) -> str:
    return f"~~~text\n{text.rstrip()}\n~~~\n"


_INTRODUCTION = """# headgate-demo

A very small language model ({parameters:.1f} M parameters, Llama architecture, bfloat16) that ships with Headgate, so that
a fresh clone answers without a download. It documents functions of the Python standard library. It is there to show a
server at work, not to be right: it makes things up.

* Shape: 4 layers, hidden size 256, 8 heads, 4 key/value heads, vocabulary 4,096 (byte-level BPE), context 4,096 (RoPE;
  trained mostly on rows of 512 tokens, some of 4,096).
* Chat: ChatML form; answers end with `<|im_end|>`. Ask `Document NAME`, `What does NAME do?`, `Write NAME(arguments)`,
  or give a signature.
* Corpus: sources (without tests and tables) and docstrings of {release}, half as text, half as chat pairs, with a
  little small talk from templates. sha256 of the corpus: `{corpus_sha256}`.
* Licence of the corpus: Python Software Foundation License Version 2, copyright © 2001-2024 Python Software Foundation;
  All Rights Reserved (https://docs.python.org/3.13/license.html).
* Training: {tokens:,} of {budget_tokens:,} tokens, on one CPU thread.
"""

_DRAFT_INTRODUCTION = """# headgate-demo-draft

The draft-sized sibling of `headgate-demo` ({parameters:.2f} M parameters, Llama architecture, bfloat16): the same
tokenizer, all files together under 1 MB. It learnt to say what `headgate-demo` would say, to be the drafter of speculative
decoding.

* Shape: 2 layers, hidden size 64, 4 heads, 2 key/value heads, vocabulary 4,096, context 4,096.
* Training: {tokens:,} of {budget_tokens:,} tokens (a row of 4,096 counted as 2,048) on one CPU thread, towards
  the distribution of `headgate-demo`; half of the rows from the corpus (sha256
  `{corpus_sha256}`), half written by `headgate-demo`.
* Licence of the corpus: Python Software Foundation License Version 2, copyright © 2001-2024 Python Software Foundation;
  All Rights Reserved (https://docs.python.org/3.13/license.html).
"""

_AGREEMENT = """## Agreement with `headgate-demo`

The most likely token is the same, on those rows and on the greedy answers of `headgate-demo` to held-out questions:

| rows | agreement |
|---|---|
{shares}

Greedy, with {drafts} drafted tokens for each verification, {accepted:.2f} of them are accepted, averaged over those answers.
"""

_LOSS = """## Loss

On rows of 512 tokens from modules that training did not see; weights as shipped, computed in float32 (torch {torch}).

| rows | nats per token | perplexity |
|---|---|---|
{losses}
"""

_REPRODUCTION = """## How it was made

With the `Lib` directory of CPython 3.13.0 at hand, a C++ compiler, and one CPU thread for an hour or two:

```
python -m worker.native.demo.train --lib Lib --work checkpoints --out headgate-demo --tokens {budget_tokens}
```

The same command goes on from its last checkpoint after it was stopped. `python -m worker.native.demo.corpus Lib` prints
the sha256 of the corpus. The corpus is seeded and the order of the rows too; the floating-point sums of another
processor or torch release give slightly other weights.
"""

_DRAFT_REPRODUCTION = """## How it was made

As `headgate-demo` was, in half an hour:

```
python -m worker.native.demo.train --lib Lib --work checkpoints --out headgate-demo-draft --tokens {budget_tokens} \\
  --draft-of headgate-demo
```
"""
