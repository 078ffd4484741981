"""How far loading is, for whoever waits for it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TextIO

WIDTH = 24
TERMINAL_SECONDS = 0.1  # between two drawings of the bar
LOG_SECONDS = 5.0  # between two lines in a log: a quick start writes none


class LoadingBar:
    """A bar on a terminal, elsewhere a line now and then. Call it with the bytes done and the bytes in all.

    The bar goes to stderr, as bars do; lines go where those of the other stages go, and leave stderr to what went wrong.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        what: str = "loading weights",
    ) -> None:
        self._what = what
        self._stream = stream or (sys.stderr if sys.stderr.isatty() else sys.stdout)
        self._clock = clock
        self._is_terminal = self._stream.isatty()
        self._pause_seconds = TERMINAL_SECONDS if self._is_terminal else LOG_SECONDS
        self._began = clock()
        self._next = self._began + self._pause_seconds
        self._is_drawn = False

    def __enter__(self) -> LoadingBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_drawn:
            self._write("\n")

    def __call__(self, done_bytes: int, total_bytes: int) -> None:
        now = self._clock()
        is_last = self._is_drawn and done_bytes >= total_bytes
        if now < self._next and not is_last:
            return
        self._next = now + self._pause_seconds
        share = done_bytes / max(1, total_bytes)
        speed = done_bytes / max(1e-9, now - self._began)
        text = f"{100 * share:3.0f} % of {total_bytes / 1e9:.2f} GB, {speed / 1e9:.2f} GB/s"
        if self._is_terminal:
            self._is_drawn = True
            self._write(f"\r{self._what} [{'#' * int(WIDTH * share):<{WIDTH}}] {text}")
        else:
            self._write(f"headgate: {self._what}: {text}\n")

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()
