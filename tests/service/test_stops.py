"""Stop strings through the whole gateway."""

from __future__ import annotations

import pytest

from scheduler.messages import Finish

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


def text_of(gateway, path, stream, **fields):
    """(text, finish reason, completion tokens) of an answer, streamed or not."""
    if not stream:
        answer = gateway.post(path, **fields).json()
        (choice,) = answer["choices"]
        text = choice["text"] if path == TEXT else choice["message"]["content"]
        return text, choice["finish_reason"], answer["usage"]["completion_tokens"]
    *chunks, last = gateway.chunks(path, stream_options={"include_usage": True}, **fields)
    choices = [chunk["choices"][0] for chunk in chunks]
    text = "".join(choice["text"] if path == TEXT else choice["delta"].get("content", "") for choice in choices)
    return text, choices[-1]["finish_reason"], last["usage"]["completion_tokens"]


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize("stream", [False, True])
def test_stop_across_tokens_is_cut_exactly_and_withdrawn(gateway, ids, path, stream):
    """36: same streamed or not, chat or completions. 13: tokens past the stop are not counted."""
    gateway.worker.script = ids.bytewise("one two STOP three")
    gateway.worker.finish = Finish.RUNNING
    assert text_of(gateway, path, stream, stop="STOP") == ("one two ", "stop", len("one two STOP"))
    assert gateway.worker.next_cancelled() == gateway.worker.next_request().id


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize("stream", [False, True])
def test_half_a_stop_at_the_end_is_text(gateway, ids, path, stream):
    """35: released when nothing more comes."""
    gateway.worker.script = ids.bytewise("one STO")
    gateway.worker.finish = Finish.LENGTH
    assert text_of(gateway, path, stream, stop=["STOP", "nothing"]) == ("one STO", "length", 7)


@pytest.mark.parametrize("stream", [False, True])
def test_stop_in_the_last_delivery_wins(gateway, ids, stream):
    """13 and 16: neither what follows it nor the end-of-text id counts."""
    gateway.worker.script = [[*ids.of("a"), *ids.of("!"), *ids.of("b"), ids.end]]
    assert text_of(gateway, CHAT, stream, stop="!") == ("a", "stop", 2)


def test_stop_found_while_a_character_is_split(gateway, ids):
    gateway.worker.script = [*ids.bytewise("日本語"), [ids.end]]
    assert text_of(gateway, CHAT, True, stop="本")[:2] == ("日", "stop")


def test_open_character_at_the_end_is_dropped(gateway, ids):
    """38: its missing bytes were never generated."""
    gateway.worker.script = ids.bytewise("a😀")[:-1]
    gateway.worker.finish = Finish.LENGTH
    assert text_of(gateway, CHAT, False)[0] == "a"
    assert text_of(gateway, CHAT, True)[0] == "a"


def test_end_id_is_counted_but_not_shown_even_when_it_has_a_text(gateways, ids):
    """13 and 39: some models end with an ordinary token."""
    ordinary = ids.of("!")[0]
    gateway = gateways(info={"eos_ids": (ordinary,)})
    gateway.worker.script = [*ids.one_by_one("hello"), [ordinary]]
    assert text_of(gateway, CHAT, False) == ("hello", "stop", len(ids.of("hello")) + 1)
