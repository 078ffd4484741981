"""Trains the demo model: corpus, tokenizer, a seeded and resumable loop, an export at each checkpoint.

python -m worker.native.demo.train --lib LIB --work DIR --out DIR [--tokens N] [--draft-of DIR]

With --draft-of it trains the draft-sized sibling, taught by the demo model that lies in that directory.
"""

import argparse
import functools
import math
import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from worker.native.demo.corpus import Conversation, Corpus, build_corpus
from worker.native.demo.draft import DRAFT_SHAPE, Agreement, load_llama, measure_agreement, taught_loss
from worker.native.demo.export import Record, export, rounded
from worker.native.demo.generate import write_rows
from worker.native.demo.model import Llama, Shape
from worker.native.demo.tokenizer import END_OF_TEXT, render, render_question, token_id, train_tokenizer

_SEED = 20241007
_ROW, _LONG_ROW = 512, 4096
_WRITTEN_BATCHES, _WRITTEN_ROWS, _BEGINNING = 7, 128, 48  # what a teacher writes: batches of rows, tokens given to each
_LONG_EVERY = 8  # in the second half, one step of so many is a single long row, so that all positions are learnt
_LAST_RATE = 1e-4
_HELD_OUT_ROWS, _HELD_OUT_QUESTIONS = 24, 64


@dataclass(frozen=True)
class Recipe:
    """What sets a model apart from its sibling."""

    shape: Shape
    peak_rate: float
    warmup_steps: int
    step_tokens: int


DEMO = Recipe(Shape(), peak_rate=3e-3, warmup_steps=150, step_tokens=4096)
DRAFT = Recipe(DRAFT_SHAPE, peak_rate=8e-3, warmup_steps=60, step_tokens=2048)


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    lib: Path
    work: Path
    out: Path
    tokens: int
    checkpoint_seconds: float
    draft_of: Path | None

    @property
    def recipe(self) -> Recipe:
        return DRAFT if self.draft_of else DEMO


class Rows:
    """Draws rows of token ids: even ones are cut from the texts, odd ones are chats laid end to end.

    Where a teacher has written rows, every second pair of rows is made of those.
    """

    def __init__(self, tokenizer: Tokenizer, texts: Sequence[str], conversations: Sequence[Conversation]) -> None:
        end = token_id(tokenizer, END_OF_TEXT)
        self.texts = np.concatenate([_ids(tokenizer, text, end) for text in texts])
        self.chats = [_ids(tokenizer, render(conversation), end) for conversation in conversations]
        self.written: list[np.ndarray] = []

    def draw(self, rng: np.random.Generator, tokens: int, first: int, count: int) -> Tensor:
        """Rows `first` … `first + count`, each of `tokens` inputs and one more to predict: [count, tokens + 1]."""
        rows = [self.row(rng, tokens + 1, i) for i in range(first, first + count)]
        return torch.from_numpy(np.stack(rows).astype(np.int64))

    def row(self, rng: np.random.Generator, tokens: int, number: int) -> np.ndarray:
        """Of the kind that is the number's turn."""
        if self.written and number % 4 >= 2:
            return _laid_end_to_end(rng, self.written, tokens)
        return self.text(rng, tokens) if number % 2 == 0 else _laid_end_to_end(rng, self.chats, tokens)

    def text(self, rng: np.random.Generator, tokens: int) -> np.ndarray:
        """A piece of the texts from anywhere."""
        start = int(rng.integers(len(self.texts) - tokens))
        return self.texts[start : start + tokens]


def _laid_end_to_end(rng: np.random.Generator, pieces: Sequence[np.ndarray], tokens: int) -> np.ndarray:
    """Random pieces until the row is full."""
    parts: list[np.ndarray] = []
    while sum(map(len, parts)) < tokens:
        parts.append(pieces[int(rng.integers(len(pieces)))])
    return np.concatenate(parts)[:tokens]


def _ids(tokenizer: Tokenizer, text: str, end: int) -> np.ndarray:
    return np.array([*tokenizer.encode(text).ids, end], dtype=np.uint16)


class Training:
    """Model, optimizer and position of a run, and the file that keeps them."""

    def __init__(self, options: Options, corpus: Corpus, tokenizer: Tokenizer) -> None:
        torch.manual_seed(_SEED)
        self.options, self.corpus_sha256, self.tokenizer = options, corpus.sha256(), tokenizer
        self.rows = Rows(tokenizer, corpus.texts, corpus.conversations)
        self.held_out = Rows(tokenizer, corpus.held_out_texts, corpus.held_out_conversations)
        self.questions = held_out_questions(tokenizer, corpus)
        self.teacher = load_llama(options.draft_of, DEMO.shape) if options.draft_of else None
        self.model = Llama(options.recipe.shape)
        self.loss = torch.compile(self.lesson(), dynamic=False)
        self.optimizer = torch.optim.AdamW(_groups(self.model), betas=(0.9, 0.95), fused=True)
        self.step = 0
        self.steps = options.tokens // options.recipe.step_tokens
        self.file = options.work / "checkpoint.pt"

    def lesson(self) -> Callable[[Tensor], Tensor]:
        """The loss of some rows: against the rows themselves, or against the teacher's view of them."""
        if self.teacher is None:
            return self.model.loss
        self.rows.written = written_by(self.teacher, self.rows, self.options.work)
        return functools.partial(taught_loss, self.model, self.teacher)

    def resume(self) -> None:
        """Go on from the checkpoint if there is one."""
        if self.file.exists():
            state = torch.load(self.file)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step = state["step"]

    def save(self) -> None:
        """Write the checkpoint, then the model in Hugging Face form."""
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step}
        new = self.file.with_suffix(".new")
        torch.save(state, new)
        os.replace(new, self.file)
        shipped, tokens = rounded(self.model), self.step * self.options.recipe.step_tokens
        record = Record(
            self.corpus_sha256, tokens, self.options.tokens, self.measure(shipped), self.measure_agreement(shipped)
        )
        export(self.model, self.tokenizer, record, self.options.out)
        losses = ", ".join(f"{kind} {loss:.3f}" for kind, loss in record.loss.items())
        print(f"saved at step {self.step}; held-out loss: {losses} {record.agreement or ''}", flush=True)

    def advance(self) -> float:
        """One step of the optimizer; the loss before it."""
        rate = learning_rate(self.options.recipe, self.step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast("cpu", torch.bfloat16):
            loss = self.loss(self.batch())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return loss.item()

    def batch(self) -> Tensor:
        """The rows of this step: they depend on the seed and the step only, so a resumed run sees the same."""
        rng = np.random.default_rng((_SEED, self.step))
        if self.step >= self.steps // 2 and self.step % _LONG_EVERY == 0:
            return self.rows.draw(rng, _LONG_ROW, first=self.step // _LONG_EVERY, count=1)
        return self.rows.draw(rng, _ROW, first=0, count=self.options.recipe.step_tokens // _ROW)

    @torch.no_grad()
    def measure(self, model: Llama) -> dict[str, float]:
        """Loss on fixed rows of the held-out modules, in nats per token."""
        losses = [model.loss(row.unsqueeze(0)).item() for row in self.held_out_rows()]
        return {"text": float(np.mean(losses[::2])), "chat": float(np.mean(losses[1::2]))}

    def measure_agreement(self, model: Llama) -> Agreement | None:
        """With the teacher, if there is one: on the same rows, and on its greedy answers to held-out questions."""
        if self.teacher is None:
            return None
        return measure_agreement(model, self.teacher, self.held_out_rows(), self.questions)

    def held_out_rows(self) -> Tensor:
        """Always the same, texts and chats in turn."""
        return self.held_out.draw(np.random.default_rng(_SEED), _ROW, first=0, count=2 * _HELD_OUT_ROWS)


def learning_rate(recipe: Recipe, step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine down to the last rate."""
    if step < recipe.warmup_steps:
        return recipe.peak_rate * (step + 1) / recipe.warmup_steps
    done = (step - recipe.warmup_steps) / max(steps - recipe.warmup_steps, 1)
    return _LAST_RATE + (recipe.peak_rate - _LAST_RATE) * (1 + math.cos(math.pi * done)) / 2


def held_out_questions(tokenizer: Tokenizer, corpus: Corpus) -> list[list[int]]:
    """Some of the questions that training did not see, as the model gets them."""
    held_out = corpus.held_out_conversations
    pairs = random.Random(_SEED).sample(held_out, min(_HELD_OUT_QUESTIONS, len(held_out)))
    return [tokenizer.encode(render_question(pair[0][1])).ids for pair in pairs]


def written_by(teacher: Llama, rows: Rows, work: Path) -> list[np.ndarray]:
    """Rows in the teacher's words, from beginnings of texts and chats; written once, then read."""
    path = work / "written.npy"
    if not path.exists():
        batches = []
        for batch in range(_WRITTEN_BATCHES):
            beginnings = rows.draw(np.random.default_rng((_SEED, batch, 1)), _BEGINNING - 1, 0, _WRITTEN_ROWS)
            batches.append(write_rows(teacher, beginnings, _ROW + 1, _SEED + batch).numpy().astype(np.uint16))
        np.save(path, np.concatenate(batches))
    return list(np.load(path))


def _groups(model: Llama) -> list[dict[str, object]]:
    matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    scales = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    return [{"params": matrices, "weight_decay": 0.1}, {"params": scales, "weight_decay": 0.0}]


def load_or_train_tokenizer(options: Options, corpus: Corpus) -> Tokenizer:
    """The tokenizer of this run: a teacher's, or trained once, then read, because the weights depend on it."""
    path = (options.draft_of or options.work) / "tokenizer.json"
    if not path.exists():
        chats = (content for conversation in corpus.conversations[::4] for _, content in conversation)
        tokenizer = train_tokenizer([*corpus.texts, *chats])
        tokenizer.save(str(path))
    return Tokenizer.from_file(str(path))


def train(training: Training) -> None:
    """Run to the end of the token budget, or until SIGTERM or SIGINT; either way the last state is saved."""
    stop: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda caught, frame: stop.append(caught))
    saved = began = time.monotonic()
    first, mean = training.step, math.nan
    while training.step < training.steps and not stop:
        loss = training.advance()
        mean = loss if math.isnan(mean) else 0.98 * mean + 0.02 * loss
        if training.step % 20 == 0:
            speed = (training.step - first) * training.options.recipe.step_tokens / (time.monotonic() - began)
            print(f"step {training.step}/{training.steps} loss {mean:.3f} tokens/s {speed:.0f}", flush=True)
        if time.monotonic() - saved > training.options.checkpoint_seconds:
            training.save()
            saved = time.monotonic()
    training.save()


def parse_options(arguments: Sequence[str] | None = None) -> Options:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--lib", type=Path, required=True, help="the Lib directory of CPython 3.13.0")
    parser.add_argument("--work", type=Path, required=True, help="directory for tokenizer and checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="directory for the model in Hugging Face form")
    parser.add_argument("--tokens", type=int, default=16_000_000, help="token budget; sets the schedule")
    parser.add_argument("--checkpoint-seconds", type=float, default=600.0)
    parser.add_argument("--draft-of", type=Path, help="the demo model's directory: train its draft-sized sibling")
    return Options(**vars(parser.parse_args(arguments)))


def main() -> None:
    """Train, or go on training."""
    options = parse_options()
    torch.set_num_threads(1)
    options.work.mkdir(parents=True, exist_ok=True)
    corpus = build_corpus(options.lib)
    tokenizer = load_or_train_tokenizer(options, corpus)
    training = Training(options, corpus, tokenizer)
    training.resume()
    print(f"corpus {corpus.sha256()}: {len(training.rows.texts)} text tokens,", end=" ")
    print(f"{sum(map(len, training.rows.chats))} chat tokens; at step {training.step} of {training.steps}", flush=True)
    train(training)
    if training.step >= training.steps:
        print("done", flush=True)


if __name__ == "__main__":
    main()
