"""The pipe between front and engine process: messages arrive whole and in order, however the bytes were cut."""

from __future__ import annotations

import random
import socket
import threading

import pytest

from scheduler.messages import Snapshot, TokenEvent, encode_step, words_to_bytes
from worker.link import (
    ALL,
    FRONT,
    Answer,
    Command,
    EngineLink,
    LinkClosed,
    cut_answers,
    encode_answer,
    encode_command,
    encode_json_answer,
)

Link = tuple[socket.socket, EngineLink]


def in_pieces(data: bytes, seed: int) -> list[bytes]:
    rng = random.Random(seed)
    cuts = sorted(rng.randrange(len(data) + 1) for _ in range(rng.randrange(1, 40)))
    return [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]


@pytest.mark.parametrize("seed", range(20))
def test_answers_are_cut_alike_however_they_arrive(seed: int) -> None:
    frames = [
        (7, encode_step(1, [TokenEvent(7 << 32 | 1, [5, 6])])),
        (ALL, Snapshot(1, 2, 3, 4, 0.5, 0.25).encode()),
        (FRONT, encode_json_answer(Answer.METRICS, {"counters": {"a": 1.5}})[4:]),
        (0xFFFFFFFE, encode_step(2, [TokenEvent(0xFFFFFFFE << 32 | n, list(range(n))) for n in range(60)])),
    ]
    stream = b"".join(words_to_bytes([to]) + frame for to, frame in frames)
    got, rest = [], b""
    for piece in in_pieces(stream, seed):
        messages, rest = cut_answers(rest + piece)
        got += messages
    assert got == frames and rest == b""


@pytest.mark.parametrize("seed", range(10))
def test_commands_are_cut_alike_however_they_arrive(link: Link, seed: int) -> None:
    front, engine = link
    sent = [
        (Command.SUBMIT, b"ticket" + bytes(range(256)) * 40),
        (Command.CANCEL, words_to_bytes([7, 1])),
        (Command.SUBMIT, b""),
        (Command.GATEWAY_GONE, words_to_bytes([7])),
    ]
    got: list[tuple[Command, bytes]] = []
    for piece in in_pieces(b"".join(encode_command(*command) for command in sent), seed):
        front.sendall(piece)
        got += engine.commands()
    assert got == sent


def test_asking_for_commands_never_waits(link: Link) -> None:
    assert list(link[1].commands()) == []


def test_waiting_ends_with_a_command(link: Link) -> None:
    front, engine = link
    front.sendall(encode_command(Command.CANCEL, b""))
    engine.wait(None)
    assert [kind for kind, _ in engine.commands()] == [Command.CANCEL]


def test_waiting_ends_when_another_thread_wakes_it_and_only_once(link: Link) -> None:
    engine = link[1]
    waker = threading.Thread(target=engine.wake)
    waker.start()
    engine.wait(None)
    waker.join()
    engine.wait(0.0)  # nothing is left of it


def test_waiting_ends_when_the_front_is_gone_and_asking_says_so(link: Link) -> None:
    front, engine = link
    front.close()
    engine.wait(None)
    with pytest.raises(LinkClosed):
        list(engine.commands())


def test_what_was_said_before_the_front_went_is_still_taken(link: Link) -> None:
    front, engine = link
    front.sendall(encode_command(Command.CANCEL, b"1234"))
    front.close()
    got = []
    with pytest.raises(LinkClosed):
        for command in engine.commands():
            got.append(command)
    assert got == [(Command.CANCEL, b"1234")]


def test_sending_to_a_front_that_is_gone_says_so(link: Link) -> None:
    front, engine = link
    front.close()
    with pytest.raises(LinkClosed):
        engine.send(b"x" * 64)


def test_an_answer_is_padded_to_whole_words_and_json_bears_it() -> None:
    for size in range(8):
        message = encode_answer(Answer.DECISION, b"7" * size, ticket=3)
        ((to, frame),), rest = cut_answers(message)
        assert (to, rest) == (FRONT, b"") and len(frame) % 4 == 0
        assert frame[4:12] == words_to_bytes([Answer.DECISION, 3])
        assert frame[12:].rstrip(b" ") == b"7" * size
