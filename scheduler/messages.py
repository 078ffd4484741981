"""What crosses a border between processes: requests and decisions, tokens, snapshots, step reports.

Two borders use this module. The gateway submits a `Request` and reads a stream of frames; the front and the engine process
exchange the same bytes over a pipe, so the front passes most of them on unread. Durations cross a border, timestamps never do.
Every JSON form carries `v`; unknown fields are ignored, so that neighbours one version apart understand each other.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from enum import IntEnum, StrEnum
from itertools import chain, islice
from typing import Any, NamedTuple

VERSION = 2


class Reason(StrEnum):
    """Why a request was refused or failed. The order is part of the wire format: append only."""

    TIME_BUDGET = "time_budget"  # another sequence would push a step beyond somebody's floor
    KV_FOOTPRINT = "kv_footprint"  # the predicted KV cache does not fit
    TTFT_UNREACHABLE = "ttft_unreachable"  # the predicted wait exceeds what the tier allows
    QUEUE_FULL = "queue_full"  # the waiting list is full
    TOO_LARGE = "too_large"  # can never run here: more context or memory than the worker has
    UNKNOWN_TIER = "unknown_tier"
    BAD_REQUEST = "bad_request"
    WORKER_FAILED = "worker_failed"  # the engine raised, or its process died
    SHUTTING_DOWN = "shutting_down"


REASONS = tuple(Reason)


class Finish(IntEnum):
    """How far a request is: the upper half of an info word. The numbers are part of the wire format."""

    RUNNING = 0
    STOP = 1
    LENGTH = 2
    REFUSED = 3  # before its first token; the token column holds [reason index, retry-after in ms]
    ERROR = 4  # the token column holds [reason index]
    CANCELLED = 5


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is drawn. Temperature 0 is greedy; the defaults of the others are off.

    A draw depends on (seed, position) and the sequence's own tokens alone, never on what else is in the batch.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    min_p: float = 0.0  # rules out what is less likely than this share of the likeliest token
    repetition_penalty: float = 1.0  # logits of tokens in prompt or output: divided by it, below zero multiplied
    presence_penalty: float = 0.0  # taken from the logits of tokens in the output
    frequency_penalty: float = 0.0  # the same, for each time that they are there
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token, what is added to its logit)
    min_tokens: int = 0  # of output, before a stop id can be drawn


SAMPLING_DEFAULTS = asdict(Sampling())
SAMPLING_CASTS: dict[str, Callable[[Any], Any]] = {
    **{name: type(default) for name, default in SAMPLING_DEFAULTS.items()},
    "logit_bias": lambda pairs: tuple((int(token), float(bias)) for token, bias in pairs),
}


@dataclass(frozen=True, slots=True)
class Request:
    """One sequence to generate. `id` is unique within its gateway; `key` within a worker."""

    id: int
    gateway: int
    prompt: Sequence[int]
    max_tokens: int
    tier: str = "default"
    tenant: str = ""
    sampling: Sampling = field(default_factory=Sampling)
    stop_ids: frozenset[int] = frozenset()  # generating one of these ends the sequence
    ignore_eos: bool = False
    logprobs: int | None = None  # how many alternatives are told beside each token; None: no probabilities at all
    prompt_logprobs: bool = False  # … also of the prompt's own tokens
    resumed_tokens: int = 0  # so many at the end of the prompt are output of an earlier run; stays within a worker

    @property
    def key(self) -> int:
        return self.gateway << 32 | self.id

    def with_stop_ids(self, more: frozenset[int]) -> Request:
        return replace(self, stop_ids=self.stop_ids | more) if more else self

    def encode(self) -> bytes:
        """One line of JSON, then the prompt as little-endian uint32 ids."""
        head = {
            "v": VERSION,
            "id": self.id,
            "gateway": self.gateway,
            "max_tokens": self.max_tokens,
            "tier": self.tier,
            "tenant": self.tenant,
            "sampling": self._sampling_head(),
            "stop_ids": sorted(self.stop_ids),
            "ignore_eos": self.ignore_eos,
            "logprobs": self.logprobs,
            "prompt_logprobs": self.prompt_logprobs,
        }
        return json.dumps(head).encode() + b"\n" + words_to_bytes(self.prompt)

    def _sampling_head(self) -> dict[str, Any]:
        """Only what differs from the defaults: most requests say little."""
        sampling = self.sampling
        return {name: value for name, off in SAMPLING_DEFAULTS.items() if (value := getattr(sampling, name)) != off}

    @classmethod
    def decode(cls, body: bytes) -> Request:
        """Raises ValueError when the body is not a request of a version this side understands."""
        line, _, prompt = body.partition(b"\n")
        try:
            head = json.loads(line)
            if head["v"] != VERSION:
                raise ValueError(f"message version {head['v']}, this side speaks {VERSION}")
            return cls(
                id=int(head["id"]),
                gateway=int(head["gateway"]),
                prompt=bytes_to_words(prompt),
                max_tokens=int(head["max_tokens"]),
                tier=str(head["tier"]),
                tenant=str(head["tenant"]),
                sampling=Sampling(**{name: SAMPLING_CASTS[name](value) for name, value in head["sampling"].items()}),
                stop_ids=frozenset(head["stop_ids"]),
                ignore_eos=bool(head["ignore_eos"]),
                logprobs=None if head["logprobs"] is None else int(head["logprobs"]),
                prompt_logprobs=bool(head["prompt_logprobs"]),
            )
        except (KeyError, TypeError, OverflowError, AttributeError) as error:
            raise ValueError(f"not a request: {error!r}") from error


def split_key(key: int) -> tuple[int, int]:
    """(gateway, id) of a request key."""
    return key >> 32, key & 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Accept:
    """The request starts with the next step."""

    predicted_ttft_seconds: float = 0.0
    predicted_utps: float = 0.0


@dataclass(frozen=True, slots=True)
class Wait:
    """The request is in the waiting list, and is expected to start after this many seconds."""

    predicted_wait_seconds: float
    reason: Reason


@dataclass(frozen=True, slots=True)
class Refuse:
    """The request is not taken. Whoever comes back after `retry_after_seconds` should be let in."""

    reason: Reason
    retry_after_seconds: float
    predicted_wait_seconds: float = 0.0


Decision = Accept | Wait | Refuse
DECISIONS: dict[str, type[Decision]] = {"accept": Accept, "wait": Wait, "refuse": Refuse}


def encode_decision(decision: Decision) -> bytes:
    return json.dumps({"v": VERSION, "decision": type(decision).__name__.lower(), **asdict(decision)}).encode()


def decode_decision(body: bytes) -> Decision:
    """Raises ValueError when the body is not a decision."""
    data = json.loads(body)
    kind = DECISIONS.get(data.get("decision"))
    if kind is None:
        raise ValueError("not a decision")
    values = {name: value for name, value in data.items() if name in kind.__slots__}
    if "reason" in values:
        values["reason"] = Reason(values["reason"])
    decision: Decision = kind(**values)
    return decision


Logprobs = Sequence[tuple[int, float]]
"""Of one token: itself, then the likeliest of its place, each with the natural logarithm of its probability.

The probabilities are the model's own, before penalties, biases, temperature and what else shapes the draw.
"""


class TokenEvent(NamedTuple):
    """What one step (or one decision of the gate) brought for one request.

    `logprobs`: one per token, where the request asks for them. Those of its prompt, from the second token on, come in
    front of the first token's. `cached_tokens`: with its first tokens, how many of its prompt came from the prefix cache.
    """

    key: int
    tokens: Sequence[int]
    finish: Finish = Finish.RUNNING
    reason: Reason | None = None
    retry_after_seconds: float = 0.0
    logprobs: Sequence[Logprobs] = ()
    cached_tokens: int = 0


# --- frames -----------------------------------------------------------------------------------------------------------
# A frame is little-endian uint32 words:  length | kind | step | n | id[n] | info[n] | token[...]
# `length` counts the words after itself; info = number of tokens | finish << 16. This is a STEP. LOGPROBS come right before
# the step they belong to, in as many frames as they need:
#   length | kind | n | id[n] | number of rows[n] | width[row] | token[...] | float32[...]
# where a row is `Logprobs`. So does CACHED, how many tokens of its prompt each request found in the prefix cache:
#   length | kind | n | id[n] | tokens[n]
# The payload of all others is JSON, padded with spaces to whole words.


MOST_WORD = 0xFFFFFFFF
LOGPROBS_PORTION = 4096  # probabilities in a frame, where a row counts as some more: writing them down takes 3 ms
ROW_PORTION = 3


class Frame(IntEnum):
    STEP = 0
    SNAPSHOT = 1
    LOGPROBS = 2
    CACHED = 3


def words_to_bytes(words: Sequence[int]) -> bytes:
    return array("I", words).tobytes()  # "I" is 4 bytes and little-endian on every platform we run on (a test says so)


def bytes_to_words(data: bytes) -> list[int]:
    """Raises ValueError when the data is not whole words."""
    return array("I", data).tolist()


def encode_events(step: int, events: Sequence[TokenEvent]) -> list[bytes]:
    """The frames with the events of one gateway: a STEP, behind CACHED and LOGPROBS where any of them has some."""
    cached = [(event.key & 0xFFFFFFFF, event.cached_tokens) for event in events if event.cached_tokens]
    told = [(event.key & 0xFFFFFFFF, event.logprobs) for event in events if event.logprobs]
    return [
        *([encode_cached(cached)] if cached else []),
        *map(encode_logprobs, in_portions(told)),
        encode_step(step, events),
    ]


RowsOf = tuple[int, Sequence[Logprobs]]  # a request's id, and rows of it


def in_portions(told: Sequence[RowsOf]) -> Iterator[list[RowsOf]]:
    """The same rows in the same order, for a frame each: small ones, so that a gateway can do other things in between."""
    portion: list[RowsOf] = []
    room = LOGPROBS_PORTION
    for id, rows in told:
        begin = 0
        for end, row in enumerate(rows):
            if room <= 0:
                yield [*portion, (id, rows[begin:end])]
                portion, begin, room = [], end, LOGPROBS_PORTION
            room -= len(row) + ROW_PORTION
        portion.append((id, rows[begin:]))
    if portion:
        yield portion


def encode_logprobs(told: Sequence[RowsOf]) -> bytes:
    """One LOGPROBS frame."""
    rows = [row for _, rows in told for row in rows]
    cells = list(chain.from_iterable(rows))
    logprobs = array("f", [logprob for _, logprob in cells])
    tokens = [token for token, _ in cells]
    columns = [*(id for id, _ in told), *(len(rows) for _, rows in told), *map(len, rows), *tokens]
    return words_to_bytes([2 + len(columns) + len(logprobs), Frame.LOGPROBS, len(told), *columns]) + logprobs.tobytes()


def encode_cached(cached: Sequence[tuple[int, int]]) -> bytes:
    """One CACHED frame of (id, tokens)."""
    columns = [*(id for id, _ in cached), *(tokens for _, tokens in cached)]
    return words_to_bytes([2 + len(columns), Frame.CACHED, len(cached), *columns])


def encode_step(step: int, events: Sequence[TokenEvent]) -> bytes:
    """One STEP frame with the events of one gateway."""
    ids: list[int] = []
    info: list[int] = []
    tokens: list[int] = []
    for key, new, finish, reason, retry_after_seconds, *_ in events:
        if finish >= Finish.REFUSED:
            retry_ms = round(min(retry_after_seconds * 1000, MOST_WORD))
            new = [REASONS.index(reason or Reason.WORKER_FAILED), retry_ms]
        ids.append(key & 0xFFFFFFFF)
        info.append(len(new) | finish << 16)
        tokens += new
    return words_to_bytes(
        [3 + 2 * len(ids) + len(tokens), Frame.STEP, step & 0xFFFFFFFF, len(ids), *ids, *info, *tokens]
    )


def encode_json_frame(kind: Frame, data: dict[str, Any]) -> bytes:
    payload = json.dumps(data).encode()
    payload += b" " * (-len(payload) % 4)
    return words_to_bytes([1 + len(payload) // 4, kind]) + payload


class StepFrame(NamedTuple):
    """The columns of a STEP frame: per request its id and info word, and all their tokens one after the other."""

    step: int
    ids: list[int]
    info: list[int]
    tokens: list[int]


class LogprobsFrame(NamedTuple):
    """The columns of a LOGPROBS frame: per request its id and number of rows, per row its width, per cell the two values."""

    ids: list[int]
    counts: list[int]
    widths: list[int]
    tokens: list[int]
    logprobs: Sequence[float]

    def rows(self) -> Iterator[tuple[int, list[Logprobs]]]:
        """Per request its id and rows."""
        cells, widths = zip(self.tokens, self.logprobs, strict=True), iter(self.widths)
        for id, count in zip(self.ids, self.counts, strict=True):
            yield id, [list(islice(cells, width)) for width in islice(widths, count)]


class CachedFrame(NamedTuple):
    """The columns of a CACHED frame."""

    ids: list[int]
    tokens: list[int]


AnyFrame = StepFrame | LogprobsFrame | CachedFrame | dict[str, Any]


class FrameReader:
    """Cuts a byte stream into frames; a frame may arrive in pieces, or several at once."""

    def __init__(self, limit_bytes: int = 64 << 20) -> None:
        self.limit_bytes = limit_bytes
        self._rest = b""

    def feed(self, data: bytes) -> list[AnyFrame]:
        """Frames that are complete now, in order. Raises ValueError on a frame longer than the limit."""
        if self._rest:
            data = self._rest + data
        frames: list[AnyFrame] = []
        at, end = 0, len(data)
        while end - at >= 4:
            stop = at + 4 + 4 * int.from_bytes(data[at : at + 4], "little")
            if stop - at > self.limit_bytes:
                raise ValueError("frame over the limit")
            if stop > end:
                break
            frames.append(decode_frame(data[at + 4 : stop]))
            at = stop
        self._rest = data[at:]
        return frames


def decode_frame(body: bytes) -> AnyFrame:
    """A frame without its length word: its columns, or the JSON of any other kind (`kind` is its name)."""
    if len(body) < 4:
        raise ValueError("a frame without a kind")
    kind = int.from_bytes(body[:4], "little")
    if kind == Frame.STEP:
        words = memoryview(body).cast("I").tolist()
        if len(words) < 3:
            raise ValueError("a step frame without its columns")
        n = words[2]
        return StepFrame(words[1], words[3 : 3 + n], words[3 + n : 3 + 2 * n], words[3 + 2 * n :])
    if kind == Frame.LOGPROBS:
        return decode_logprobs(memoryview(body)[4:])
    if kind == Frame.CACHED:
        words = memoryview(body)[4:].cast("I").tolist()
        if not words or len(words) != 1 + 2 * words[0]:
            raise ValueError("a frame about cached tokens without its columns")
        return CachedFrame(words[1 : 1 + words[0]], words[1 + words[0] :])
    if kind not in set(Frame):
        return {"kind": "unknown"}  # of a newer neighbour
    data: dict[str, Any] = json.loads(body[4:])
    return {"kind": Frame(kind).name.lower(), **data}


def decode_logprobs(columns: memoryview) -> LogprobsFrame:
    """Raises ValueError when they do not fit together: what is read by one column's numbers is there in the others."""
    if not columns or len(columns) % 4:
        raise ValueError("a log probabilities frame without its columns")
    words = columns.cast("I")
    n, end = words[0], len(words)
    ids, counts = words[1 : 1 + n].tolist(), words[1 + n : 1 + 2 * n].tolist()
    at = 1 + 2 * n + sum(counts)
    if at > end:
        raise ValueError(f"a log probabilities frame of {end} words whose rows end at word {at}")
    widths = words[1 + 2 * n : at].tolist()
    cells = sum(widths)
    if at + 2 * cells != end or 0 in widths:
        raise ValueError(f"a log probabilities frame of {end} words whose {len(widths)} rows hold {cells} pairs")
    return LogprobsFrame(ids, counts, widths, words[at : at + cells].tolist(), columns.cast("f")[at + cells :].tolist())


# --- what a worker says of itself -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A worker's state as others may know it; at most 4 a second, and one a second when nothing happens."""

    running: int = 0
    waiting: int = 0
    kv_reserved_bytes: int = 0
    kv_capacity_bytes: int = 0
    stalled_seconds: float = 0.0  # how long the running step has been running
    predicted_wait_seconds: float = 0.0  # for a request of the default tier that came now
    prefix_marks: Sequence[int] = ()  # of what is in the prefix cache, see `scheduler/prefix.py`

    def encode(self) -> bytes:
        return encode_json_frame(Frame.SNAPSHOT, {"v": VERSION, **asdict(self)})

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Snapshot:
        values = {f.name: data[f.name] for f in fields(cls) if f.name in data}
        return cls(**{**values, "prefix_marks": tuple(data.get("prefix_marks", ()))})


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """What a gateway needs to know before it can serve a worker's model (`GET /model`).

    `variant` is a hash of tokenizer and template: gateways need not build their tables anew while it stays the same.
    """

    model: str
    variant: str
    created: int  # Unix seconds
    context_tokens: int
    max_prompt_tokens: int  # what can ever run here, by memory
    eos_ids: tuple[int, ...]
    tokenizer_json: str
    chat_template: str | None
    special_tokens: dict[str, str]  # bos_token, eos_token, … as the template expects them
    tier_wait_seconds: dict[str, float]  # the tiers, and how long a request of each may wait for its first step
    engine: str  # native | simulated
    fingerprint: str
    coalesce_seconds: float = 0.0
    temperature: float = 1.0  # this and the next four: how the model wants to be sampled where a client says nothing
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    random_weights: bool = False  # the text says nothing
    block_tokens: int = 0  # of the prefix cache's blocks; 0: there is none
    shared_prefix: bool = False  # … which tenants share
    vocabulary: int = 0  # ids that the model knows, its tokenizer may know more or fewer; 0: as many as the tokenizer

    def encode(self) -> bytes:
        return json.dumps({"v": VERSION, **asdict(self)}).encode()

    @classmethod
    def decode(cls, body: bytes) -> WorkerInfo:
        data = json.loads(body)
        values = {f.name: data[f.name] for f in fields(cls) if f.name in data}
        return cls(**{**values, "eos_ids": tuple(values["eos_ids"])})


@dataclass(frozen=True, slots=True)
class StepReport:
    """The record of one step: what it carried, what was predicted, what was measured.

    `seconds` by cause sum to `measured_seconds`; `bytes_moved` is by cause too (weights, kv_read, kv_write).
    """

    step: int
    sequences: int
    prefill_tokens: int
    decode_tokens: int
    delivered_tokens: int
    bytes_moved: dict[str, float]
    flops: float
    seconds: dict[str, float]
    predicted_seconds: float
    measured_seconds: float
    limit_seconds: float
    budget_seconds: float  # what the strictest floor in the step allowed; infinite without one
