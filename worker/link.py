"""The pipe between the front and the engine process: small framed messages over a Unix socket pair.

To the engine:    kind u32 | length in bytes u32 | payload
From the engine:  destination u32 | a frame of scheduler.messages, whose first word is its length in words
The destination is a gateway, everybody (`ALL`), or the front itself (`FRONT`).
"""

from __future__ import annotations

import json
import os
import select
import socket
from collections.abc import Iterator
from enum import IntEnum
from typing import Any

from scheduler.messages import words_to_bytes

ALL = 0
FRONT = 0xFFFFFFFF
BUFFER_BYTES = 4 << 20


class Command(IntEnum):
    """What the front asks of the engine process."""

    SUBMIT = 1  # ticket u32 | an encoded request
    CANCEL = 2  # gateway u32 | id u32
    GATEWAY_GONE = 3  # gateway u32


class Answer(IntEnum):
    """What the engine process tells the front itself."""

    DECISION = 100  # ticket u32 | JSON
    INFO = 101  # WorkerInfo
    METRICS = 102
    FAILED = 103  # the start failed: a sentence


def encode_command(kind: Command, payload: bytes) -> bytes:
    return words_to_bytes([kind, len(payload)]) + payload


def encode_answer(kind: Answer, payload: bytes, ticket: int | None = None) -> bytes:
    payload += b" " * (-len(payload) % 4)
    words = [] if ticket is None else [ticket]
    return words_to_bytes([FRONT, 1 + len(words) + len(payload) // 4, kind, *words]) + payload


def encode_json_answer(kind: Answer, data: dict[str, Any]) -> bytes:
    return encode_answer(kind, json.dumps(data).encode())


def cut_answers(data: bytes) -> tuple[list[tuple[int, bytes]], bytes]:
    """(destination, whole frame) of every message that is complete, and the rest."""
    messages, at, end = [], 0, len(data)
    while end - at >= 8:
        stop = at + 8 + 4 * int.from_bytes(data[at + 4 : at + 8], "little")
        if stop > end:
            break
        messages.append((int.from_bytes(data[at : at + 4], "little"), data[at + 4 : stop]))
        at = stop
    return messages, data[at:]


class LinkClosed(Exception):
    """The front is gone."""


class EngineLink:
    """The engine process's end: blocking, with a file descriptor of its own to be woken by."""

    def __init__(self, link: socket.socket) -> None:
        self._link = link
        self._rest = b""
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_write, False)
        self._poll = select.poll()
        for fd in (self._link.fileno(), self._wake_read):
            self._poll.register(fd, select.POLLIN)

    def wake(self) -> None:
        """Ends a `wait` in another thread."""
        os.write(self._wake_write, b"!")

    def wait(self, seconds: float | None) -> None:
        """Until a command arrives, `wake` is called or the time is over."""
        ready = [fd for fd, _ in self._poll.poll(None if seconds is None else max(0.0, seconds * 1000))]
        if self._wake_read in ready:
            os.read(self._wake_read, 4096)

    def commands(self) -> Iterator[tuple[Command, bytes]]:
        """What has arrived, without waiting. Raises LinkClosed when the front is gone."""
        while True:
            try:
                data = self._link.recv(1 << 18, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except ConnectionError as error:
                raise LinkClosed from error
            if not data:
                raise LinkClosed
            yield from self._cut(data)

    def _cut(self, data: bytes) -> Iterator[tuple[Command, bytes]]:
        data = self._rest + data if self._rest else data
        at = 0
        while len(data) - at >= 8:
            stop = at + 8 + int.from_bytes(data[at + 4 : at + 8], "little")
            if stop > len(data):
                break
            yield Command(int.from_bytes(data[at : at + 4], "little")), data[at + 8 : stop]
            at = stop
        self._rest = data[at:]

    def send(self, message: bytes) -> None:
        try:
            self._link.sendall(message)
        except ConnectionError as error:
            raise LinkClosed from error


def link_pair() -> tuple[socket.socket, socket.socket]:
    """(front's end, engine's end), with room for a second of steps if the front is busy."""
    front, engine = socket.socketpair()
    for end in (front, engine):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
    return front, engine
