"""What crosses a border arrives as it left."""

from __future__ import annotations

import json
import math
import sys
from array import array
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.messages import (
    LOGPROBS_PORTION,
    REASONS,
    VERSION,
    Accept,
    CachedFrame,
    Finish,
    Frame,
    FrameReader,
    Logprobs,
    LogprobsFrame,
    Reason,
    Refuse,
    Request,
    Sampling,
    Snapshot,
    StepFrame,
    TokenEvent,
    Wait,
    WorkerInfo,
    bytes_to_words,
    decode_decision,
    decode_frame,
    encode_decision,
    encode_events,
    encode_json_frame,
    encode_step,
    split_key,
    words_to_bytes,
)

words = st.integers(0, 2**32 - 1)
seconds = st.floats(0, 1e9, allow_nan=False)
requests = st.builds(
    Request,
    id=words,
    gateway=st.integers(0, 2**31),
    prompt=st.lists(words, max_size=50),
    max_tokens=st.integers(1, 10**6),
    tier=st.text(max_size=20),
    tenant=st.text(max_size=20),
    sampling=st.builds(
        Sampling, st.floats(0, 2), st.floats(0, 1, exclude_min=True), st.integers(0, 200), st.integers(0, 2**63)
    ),
    stop_ids=st.frozensets(words, max_size=5),
    ignore_eos=st.booleans(),
)
reasons = st.sampled_from(Reason)
decisions = (
    st.builds(Accept, seconds, seconds)
    | st.builds(Wait, seconds, reasons)
    | st.builds(Refuse, reasons, seconds, seconds)
)
REQUEST = Request(7, 3, [1, 2, 3], 10)


def head_of(request: Request) -> tuple[dict[str, object], bytes]:
    line, _, prompt = request.encode().partition(b"\n")
    return json.loads(line), prompt


def body_of(head: object, prompt: bytes) -> bytes:
    return json.dumps(head).encode() + b"\n" + prompt


def test_a_word_is_four_bytes_and_little_endian() -> None:
    assert array("I").itemsize == 4 and sys.byteorder == "little"
    assert words_to_bytes([1, 0x01020304, 2**32 - 1]) == b"\1\0\0\0\4\3\2\1\xff\xff\xff\xff"


@given(st.lists(words))
def test_words_come_back(values: list[int]) -> None:
    assert bytes_to_words(words_to_bytes(values)) == values


def test_half_a_word_is_an_error() -> None:
    with pytest.raises(ValueError):
        bytes_to_words(b"abcde")


@given(requests)
def test_a_request_comes_back(request: Request) -> None:
    assert Request.decode(request.encode()) == request


@given(st.integers(0, 2**31), words)
def test_a_key_is_made_of_gateway_and_id(gateway: int, number: int) -> None:
    assert split_key(replace(REQUEST, gateway=gateway, id=number).key) == (gateway, number)


def test_unknown_fields_of_a_request_are_ignored() -> None:
    head, prompt = head_of(REQUEST)
    assert Request.decode(body_of({**head, "colour": "blue"}, prompt)) == REQUEST


def test_a_request_of_another_version_is_refused_with_both_versions_named() -> None:
    head, prompt = head_of(REQUEST)
    with pytest.raises(ValueError, match=f"version {VERSION + 1}, this side speaks {VERSION}"):
        Request.decode(body_of({**head, "v": VERSION + 1}, prompt))


@pytest.mark.parametrize("field", ["v", "id", "max_tokens", "tier", "sampling", "stop_ids", "logprobs"])
def test_a_request_without_a_field_is_a_value_error(field: str) -> None:
    head, prompt = head_of(REQUEST)
    del head[field]
    with pytest.raises(ValueError, match=field):
        Request.decode(body_of(head, prompt))


@given(
    st.binary(max_size=60) | st.recursive(st.none() | st.floats() | st.text(), st.lists).map(lambda x: body_of(x, b""))
)
def test_rubbish_is_a_value_error(body: bytes) -> None:
    with pytest.raises(ValueError):
        Request.decode(body)


@pytest.mark.parametrize("wrong", [math.inf, None, [], "x", {}])
def test_a_field_of_the_wrong_kind_is_a_value_error(wrong: object) -> None:
    head, prompt = head_of(REQUEST)
    with pytest.raises(ValueError):
        Request.decode(body_of({**head, "max_tokens": wrong}, prompt))


@given(decisions)
def test_a_decision_comes_back(decision: Accept | Wait | Refuse) -> None:
    assert decode_decision(encode_decision(decision)) == decision


def test_unknown_fields_of_a_decision_are_ignored_and_unknown_decisions_are_not() -> None:
    assert decode_decision(b'{"v": 1, "decision": "wait", "predicted_wait_seconds": 2, "reason": "queue_full", "x": 1}')
    with pytest.raises(ValueError, match="not a decision"):
        decode_decision(b'{"v": 1, "decision": "perhaps"}')


def test_the_numbers_of_reasons_and_finishes_are_those_of_the_wire() -> None:
    """Append only: a gateway one version older must understand them."""
    assert REASONS[:9] == (
        Reason.TIME_BUDGET,
        Reason.KV_FOOTPRINT,
        Reason.TTFT_UNREACHABLE,
        Reason.QUEUE_FULL,
        Reason.TOO_LARGE,
        Reason.UNKNOWN_TIER,
        Reason.BAD_REQUEST,
        Reason.WORKER_FAILED,
        Reason.SHUTTING_DOWN,
    )
    assert [int(finish) for finish in Finish] == [0, 1, 2, 3, 4, 5]


def test_a_step_is_columns_of_ids_infos_and_tokens() -> None:
    key = 5 << 32 | 77
    events = [TokenEvent(key, [10, 11]), TokenEvent(key + 1, [12], Finish.STOP)]
    assert bytes_to_words(encode_step(9, events)) == [
        10,
        Frame.STEP,
        9,
        2,
        77,
        78,
        2,
        1 | Finish.STOP << 16,
        10,
        11,
        12,
    ]


def test_refusals_and_errors_carry_reason_and_retry_after_in_the_token_column() -> None:
    refused = TokenEvent(1, (), Finish.REFUSED, Reason.TTFT_UNREACHABLE, 2.5)
    failed = TokenEvent(2, (), Finish.ERROR, Reason.WORKER_FAILED)
    (frame,) = FrameReader().feed(encode_step(1, [refused, failed]))
    assert frame == StepFrame(
        1, [1, 2], [2 | Finish.REFUSED << 16, 2 | Finish.ERROR << 16], [2, 2500, REASONS.index(Reason.WORKER_FAILED), 0]
    )


@pytest.mark.parametrize("retry_after_seconds", [1e9, math.inf])
def test_a_retry_after_too_large_for_its_word_becomes_the_largest(retry_after_seconds: float) -> None:
    event = TokenEvent(1, (), Finish.REFUSED, Reason.KV_FOOTPRINT, retry_after_seconds)
    (frame,) = FrameReader().feed(encode_step(1, [event]))
    assert isinstance(frame, StepFrame) and frame.tokens == [1, 2**32 - 1]


def test_a_step_number_wraps() -> None:
    (frame,) = FrameReader().feed(encode_step(2**32 + 3, []))
    assert frame == StepFrame(3, [], [], [])


events = st.tuples(words, st.lists(words, max_size=6)).map(lambda pair: TokenEvent(*pair))
frames = st.lists(
    st.tuples(words, st.lists(events, max_size=4)).map(lambda pair: encode_step(*pair))
    | st.dictionaries(st.text(), st.integers(), max_size=3).map(lambda data: encode_json_frame(Frame.SNAPSHOT, data)),
    max_size=6,
)


@given(frames, st.lists(st.integers(0, 400), max_size=12))
def test_frames_arrive_whole_however_the_stream_is_cut(encoded: list[bytes], cuts: list[int]) -> None:
    stream = b"".join(encoded)
    at_once = FrameReader().feed(stream)
    assert len(at_once) == len(encoded)
    reader, pieces = FrameReader(), []
    borders = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    for begin, end in pairwise(borders):
        pieces += reader.feed(stream[begin:end])
    assert pieces == at_once


def test_frames_arrive_whole_byte_by_byte() -> None:
    stream = encode_step(1, [TokenEvent(1, [2, 3])]) + encode_json_frame(Frame.SNAPSHOT, {"a": 1})
    reader = FrameReader()
    got = [frame for at in range(len(stream)) for frame in reader.feed(stream[at : at + 1])]
    assert got == [StepFrame(1, [1], [2], [2, 3]), {"kind": "snapshot", "a": 1}]


def test_a_frame_over_the_limit_is_an_error_before_it_has_arrived() -> None:
    with pytest.raises(ValueError, match="over the limit"):
        FrameReader(limit_bytes=64).feed((1000).to_bytes(4, "little"))


@given(st.builds(Snapshot, words, words, words, words, seconds, seconds, st.lists(words).map(tuple)))
def test_a_snapshot_comes_back_as_a_frame(snapshot: Snapshot) -> None:
    encoded = snapshot.encode()
    assert len(encoded) % 4 == 0
    (data,) = FrameReader().feed(encoded)
    assert isinstance(data, dict) and data["kind"] == "snapshot" and data["v"] == VERSION
    assert Snapshot.from_json({**data, "unknown": 1}) == snapshot


def test_what_a_worker_says_of_itself_comes_back() -> None:
    info = WorkerInfo(
        "m",
        "v",
        1,
        2048,
        2000,
        (1, 2),
        "{}",
        None,
        {"bos_token": "<s>"},
        {"default": 60.0, "flex": math.inf},
        "native",
        "f",
    )
    assert WorkerInfo.decode(info.encode()) == info
    assert WorkerInfo.decode(json.dumps({**json.loads(info.encode()), "unknown": 1}).encode()) == info


def test_a_kind_of_frame_that_a_newer_neighbour_sends_is_passed_over() -> None:
    unknown = (2).to_bytes(4, "little") + (77).to_bytes(4, "little") + b"abcd"
    step = encode_step(1, [TokenEvent(1, [2])])
    assert FrameReader().feed(unknown + step) == [{"kind": "unknown"}, StepFrame(1, [1], [1], [2])]


@pytest.mark.parametrize("words_after_the_length", [(), (0,), (0, 1)])
def test_a_frame_without_its_columns_is_a_value_error(words_after_the_length: tuple[int, ...]) -> None:
    frame = b"".join(word.to_bytes(4, "little") for word in (len(words_after_the_length), *words_after_the_length))
    with pytest.raises(ValueError, match="frame"):
        FrameReader().feed(frame)


# --- log probabilities

cells = st.tuples(words, st.floats(-9999, 0, width=32))
rows = st.lists(cells, min_size=1, max_size=5)
told = st.lists(st.tuples(words, st.lists(rows, max_size=6)), max_size=5, unique_by=lambda pair: pair[0])


def rows_in(frames: list[object]) -> dict[int, list[Logprobs]]:
    """What LOGPROBS frames say, put together."""
    told: dict[int, list[Logprobs]] = {}
    for frame in frames:
        assert isinstance(frame, LogprobsFrame)
        for id, more in frame.rows():
            told.setdefault(id, []).extend(more)
    return told


@given(told)
def test_log_probabilities_come_back_in_front_of_their_step(told: list[tuple[int, list[Logprobs]]]) -> None:
    events = [TokenEvent(7 << 32 | id, [1] * len(rows), logprobs=rows) for id, rows in told]
    *before, step = FrameReader().feed(b"".join(encode_events(3, events)))
    assert isinstance(step, StepFrame) and step.ids == [id for id, _ in told]
    assert rows_in(before) == {id: rows for id, rows in told if rows}


def test_no_log_probabilities_are_no_frame() -> None:
    assert encode_events(3, [TokenEvent(1, [2])]) == [encode_step(3, [TokenEvent(1, [2])])]


@pytest.mark.parametrize(("requests", "rows", "width"), [(1, 65536, 1), (1, 3121, 21), (700, 1, 21), (3, 5000, 6)])
def test_many_log_probabilities_come_in_small_frames(requests: int, rows: int, width: int) -> None:
    sent = {id: [[(id * 7 + place, -0.5)] * width for place in range(rows)] for id in range(requests)}
    encoded = encode_events(1, [TokenEvent(7 << 32 | id, [], logprobs=rows) for id, rows in sent.items()])
    assert max(map(len, encoded)) < 64 << 10
    *frames, _ = FrameReader().feed(b"".join(encoded))
    assert rows_in(frames) == sent
    assert all(isinstance(frame, LogprobsFrame) and len(frame.tokens) <= LOGPROBS_PORTION + width for frame in frames)


def test_a_probability_beyond_its_word_becomes_infinite() -> None:
    event = TokenEvent(1, [2], logprobs=[[(2, -1e300), (3, -math.inf), (4, math.nan)]])
    frame, _ = FrameReader().feed(b"".join(encode_events(1, [event])))
    assert isinstance(frame, LogprobsFrame) and frame.logprobs[:2] == [-math.inf] * 2 and math.isnan(frame.logprobs[2])


@given(st.binary(max_size=200) | st.lists(st.integers(0, 6) | words, max_size=40).map(words_to_bytes))
def test_rubbish_instead_of_log_probabilities_is_a_value_error_or_fits_together(body: bytes) -> None:
    try:
        frame = decode_frame(words_to_bytes([Frame.LOGPROBS]) + body)
    except ValueError:
        return
    assert isinstance(frame, LogprobsFrame)
    told = list(frame.rows())
    assert [len(rows) for _, rows in told] == frame.counts and all(row for _, rows in told for row in rows)
    assert sum(len(row) for _, rows in told for row in rows) == len(frame.tokens) == len(frame.logprobs)


@given(told, st.data())
def test_a_damaged_frame_of_log_probabilities_is_a_value_error_or_fits_together(
    told: list[tuple[int, list[Logprobs]]], data: st.DataObject
) -> None:
    frame = encode_events(3, [TokenEvent(id, [], logprobs=[*rows, [(1, -1.0)]]) for id, rows in [*told, (9, [])]])[0]
    body = bytearray(frame[4:])
    place = data.draw(st.integers(4, len(body) - 1))
    body[place] = data.draw(st.integers(0, 255))
    cut = data.draw(st.sampled_from([len(body), place]))
    try:
        decoded = decode_frame(bytes(body[:cut]))
    except ValueError:
        return
    assert isinstance(decoded, LogprobsFrame) and [len(rows) for _, rows in decoded.rows()] == decoded.counts


def test_cached_tokens_come_before_their_step() -> None:
    events = [
        TokenEvent(1 << 32 | 5, (7,), cached_tokens=2000),
        TokenEvent(6, (8,)),
        TokenEvent(9, (9,), cached_tokens=16),
    ]
    cached, step = FrameReader().feed(b"".join(encode_events(3, events)))
    assert cached == CachedFrame([5, 9], [2000, 16])
    assert isinstance(step, StepFrame) and step.ids == [5, 6, 9]
    assert len(encode_events(3, [TokenEvent(6, (8,))])) == 1


@pytest.mark.parametrize("words", [(), (1,), (1, 5), (2, 5, 6, 16)])
def test_a_frame_of_cached_tokens_without_its_columns_is_a_value_error(words: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="cached"):
        decode_frame(words_to_bytes([Frame.CACHED, *words]))
