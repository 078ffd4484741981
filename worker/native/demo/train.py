"""Trains the demo model: corpus, tokenizer, a seeded and resumable loop, an export at each checkpoint.

python -m worker.native.demo.train --lib LIB --work DIR --out DIR [--tokens N]
"""

import argparse
import math
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from worker.native.demo.corpus import Conversation, Corpus, build_corpus
from worker.native.demo.export import Record, export, rounded
from worker.native.demo.model import Llama, Shape
from worker.native.demo.tokenizer import END_OF_TEXT, render, token_id, train_tokenizer

_SEED = 20241007
_ROW, _LONG_ROW = 512, 4096
_STEP_TOKENS = 4096
_LONG_EVERY = 8  # in the second half, one step of so many is a single long row, so that all positions are learnt
_PEAK_RATE, _LAST_RATE, _WARMUP_STEPS = 3e-3, 1e-4, 150
_HELD_OUT_ROWS = 24


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    lib: Path
    work: Path
    out: Path
    tokens: int
    checkpoint_seconds: float


class Rows:
    """Draws rows of token ids: even ones are cut from the texts, odd ones are chats laid end to end."""

    def __init__(self, tokenizer: Tokenizer, texts: Sequence[str], conversations: Sequence[Conversation]) -> None:
        end = token_id(tokenizer, END_OF_TEXT)
        self.texts = np.concatenate([_ids(tokenizer, text, end) for text in texts])
        self.chats = [_ids(tokenizer, render(conversation), end) for conversation in conversations]

    def draw(self, rng: np.random.Generator, tokens: int, first: int, count: int) -> Tensor:
        """Rows `first` … `first + count`, each of `tokens` inputs and one more to predict: [count, tokens + 1]."""
        rows = [
            self.text(rng, tokens + 1) if i % 2 == 0 else self.chat(rng, tokens + 1)
            for i in range(first, first + count)
        ]
        return torch.from_numpy(np.stack(rows).astype(np.int64))

    def text(self, rng: np.random.Generator, tokens: int) -> np.ndarray:
        """A piece of the texts from anywhere."""
        start = int(rng.integers(len(self.texts) - tokens))
        return self.texts[start : start + tokens]

    def chat(self, rng: np.random.Generator, tokens: int) -> np.ndarray:
        """Random conversations until the row is full."""
        parts: list[np.ndarray] = []
        while sum(map(len, parts)) < tokens:
            parts.append(self.chats[int(rng.integers(len(self.chats)))])
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
        self.model = Llama(Shape())
        self.loss = torch.compile(self.model.loss, dynamic=False)
        self.optimizer = torch.optim.AdamW(_groups(self.model), betas=(0.9, 0.95), fused=True)
        self.step = 0
        self.steps = options.tokens // _STEP_TOKENS
        self.file = options.work / "checkpoint.pt"

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
        record = Record(self.corpus_sha256, self.step * _STEP_TOKENS, self.options.tokens, self.measure())
        export(self.model, self.tokenizer, record, self.options.out)
        losses = ", ".join(f"{kind} {loss:.3f}" for kind, loss in record.loss.items())
        print(f"saved at step {self.step}; held-out loss: {losses}", flush=True)

    def advance(self) -> float:
        """One step of the optimizer; the loss before it."""
        rate = learning_rate(self.step, self.steps)
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
        return self.rows.draw(rng, _ROW, first=0, count=_STEP_TOKENS // _ROW)

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Loss of the weights as exported on fixed rows of the held-out modules, in nats per token."""
        model = rounded(self.model)
        rng = np.random.default_rng(_SEED)
        rows = self.held_out.draw(rng, _ROW, first=0, count=2 * _HELD_OUT_ROWS)
        losses = [model.loss(row.unsqueeze(0)).item() for row in rows]
        return {"text": float(np.mean(losses[::2])), "chat": float(np.mean(losses[1::2]))}


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine down to the last rate."""
    if step < _WARMUP_STEPS:
        return _PEAK_RATE * (step + 1) / _WARMUP_STEPS
    done = (step - _WARMUP_STEPS) / max(steps - _WARMUP_STEPS, 1)
    return _LAST_RATE + (_PEAK_RATE - _LAST_RATE) * (1 + math.cos(math.pi * done)) / 2


def _groups(model: Llama) -> list[dict[str, object]]:
    matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    scales = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    return [{"params": matrices, "weight_decay": 0.1}, {"params": scales, "weight_decay": 0.0}]


def load_or_train_tokenizer(work: Path, corpus: Corpus) -> Tokenizer:
    """The tokenizer of this run; trained once, then read, because the weights depend on it."""
    path = work / "tokenizer.json"
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
            speed = (training.step - first) * _STEP_TOKENS / (time.monotonic() - began)
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
    return Options(**vars(parser.parse_args(arguments)))


def main() -> None:
    """Train, or go on training."""
    options = parse_options()
    torch.set_num_threads(1)
    options.work.mkdir(parents=True, exist_ok=True)
    corpus = build_corpus(options.lib)
    tokenizer = load_or_train_tokenizer(options.work, corpus)
    training = Training(options, corpus, tokenizer)
    training.resume()
    print(f"corpus {corpus.sha256()}: {len(training.rows.texts)} text tokens,", end=" ")
    print(f"{sum(map(len, training.rows.chats))} chat tokens; at step {training.step} of {training.steps}", flush=True)
    train(training)
    if training.step >= training.steps:
        print("done", flush=True)


if __name__ == "__main__":
    main()
