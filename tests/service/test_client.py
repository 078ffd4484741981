"""The parts of the worker's client that need no worker."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys

import pytest

import service.client
from scheduler.messages import (
    Accept,
    Finish,
    Frame,
    LogprobsFrame,
    Request,
    StepFrame,
    TokenEvent,
    encode_decision,
    encode_events,
    encode_step,
)
from service.client import (
    FRAME_LIMIT_BYTES,
    LOGPROBS_FRAMES_AT_ONCE,
    StepStream,
    WorkerClient,
    first_turn,
    has_failure,
    merge,
)
from service.exchange import Connection, Pool, connect, notice_silence


class Ear:
    """A receiver that remembers."""

    def __init__(self):
        self.withdrawn = False
        self.last_at = 0.0
        self.heard = []
        self.rows = []

    def take_logprobs(self, rows):
        self.rows += rows

    def take(self, ids, finish, now):
        self.last_at = now
        self.heard.append((list(ids), finish))


class Deaf(Ear):
    """A receiver with a bug."""

    def take(self, ids, finish, now):
        super().take(ids, finish, now)
        if finish < Finish.REFUSED:
            raise RuntimeError("bug")


class DeafToRows(Ear):
    """A receiver that finds fault with what it is told."""

    def take_logprobs(self, rows):
        raise ValueError("not mine")


async def nothing(worker):
    pass


def make_client():
    return WorkerClient("/nowhere", 7, nothing, connections=1, submit_seconds=1.0)


def test_ids_wrap_past_those_that_are_open():
    client = asyncio.run(as_coroutine(make_client))
    assert [client.next_id(), client.next_id()] == [1, 2]
    client._last_id = 0xFFFFFFFE
    client._open[1] = Ear()
    assert [client.next_id(), client.next_id(), client.next_id()] == [0xFFFFFFFF, 2, 3]


def test_clients_of_one_gateway_never_take_the_same_id():
    async def ids_of_three():
        clients = [
            WorkerClient("/nowhere", 7, nothing, connections=1, submit_seconds=1.0, first_id=first, id_step=3)
            for first in (1, 2, 3)
        ]
        ids = [client.next_id() for _ in range(5) for client in clients]
        for client in clients:
            client._last_id += (0xFFFFFFFF - client._last_id) // 3 * 3  # the last of its own
        return ids, [client._last_id for client in clients], [client.next_id() for client in clients]

    ids, last, wrapped = asyncio.run(ids_of_three())
    assert ids == list(range(1, 16))
    assert sorted(last) == [0xFFFFFFFD, 0xFFFFFFFE, 0xFFFFFFFF] and wrapped == [1, 2, 3]


async def as_coroutine(make):
    return make()


def test_steps_of_one_read_are_merged_in_order():
    steps = [
        StepFrame(1, [5, 6], [1, 2], [50, 60, 61]),
        StepFrame(2, [5], [2 | Finish.LENGTH << 16], [51, 52]),
        StepFrame(3, [6], [0 | Finish.STOP << 16], []),
    ]
    assert merge(steps) == StepFrame(3, [5, 6], [3 | Finish.LENGTH << 16, 2 | Finish.STOP << 16], [50, 51, 52, 60, 61])


def test_failures_are_not_merged_with_tokens():
    assert has_failure(StepFrame(1, [5], [2 | Finish.REFUSED << 16], [0, 1000]))
    assert not has_failure(StepFrame(1, [5], [2 | Finish.LENGTH << 16], [0, 1000]))


def test_one_receivers_bug_reaches_nobody_else(caplog):
    async def deliver():
        client = make_client()
        deaf, ear = Deaf(), Ear()
        client._open = {1: deaf, 2: ear}
        client.deliver([StepFrame(1, [1, 2], [1, 1], [10, 20])])
        return client, deaf, ear

    client, deaf, ear = asyncio.run(deliver())
    assert ear.heard == [([20], Finish.RUNNING)]
    assert deaf.heard[-1][1] == Finish.ERROR
    assert client._open.keys() == {2}
    assert "delivering to request 1 failed" in caplog.text


class WithdrawnWhileDeciding:
    """A pool whose worker decides only after the request has been withdrawn, with or without tokens before that."""

    def __init__(self, client, with_tokens):
        self.client = client
        self.with_tokens = with_tokens
        self.methods = []

    async def exchange(self, method, target, body=b""):
        self.methods.append(method)
        if method == "POST":
            if self.with_tokens:
                self.client.deliver([StepFrame(1, [1], [1], [10])])
            self.client.withdraw(1)
            await asyncio.sleep(0)  # the first DELETE goes out
        return 200, encode_decision(Accept())


@pytest.mark.parametrize(("with_tokens", "deletes"), [(False, 2), (True, 1)])
def test_delete_is_repeated_only_if_it_may_have_overtaken_the_request(with_tokens, deletes):
    async def submit():
        client = make_client()
        client.connected = True
        client._pool = pool = WithdrawnWhileDeciding(client, with_tokens)
        await client.submit(Request(1, 7, [1], 5), Ear())
        await asyncio.gather(*client._withdrawals)
        return pool.methods

    assert asyncio.run(submit()) == ["POST"] + ["DELETE"] * deletes


def test_a_read_with_a_failure_keeps_everybodys_tokens_in_order():
    """Steps with a failure are not merged; what a first token put off still comes before the next step."""

    async def deliver():
        client = make_client()
        fresh, running, failing = Ear(), Ear(), Ear()
        client._open, client._fresh = {1: fresh, 2: running, 3: failing}, {1}
        client.deliver(
            [
                StepFrame(1, [1, 2], [1, 1], [10, 20]),
                StepFrame(2, [2, 3, 1], [1 | Finish.LENGTH << 16, 2 | Finish.ERROR << 16, 1], [21, 0, 1000, 11]),
            ]
        )
        await asyncio.sleep(0)  # what is still put off comes in the next turn of the loop
        return fresh, running, failing

    fresh, running, failing = asyncio.run(deliver())
    assert fresh.heard == [([10], Finish.RUNNING), ([11], Finish.RUNNING)]
    assert running.heard == [([20], Finish.RUNNING), ([21], Finish.LENGTH)]
    assert failing.heard == [([0, 1000], Finish.ERROR)]


# --- log probabilities


def rows_frame(**rows_of):
    """By id (`_1`), the tokens of one-cell rows."""
    ids = [int(name[1:]) for name in rows_of]
    tokens = [token for row in rows_of.values() for token in row]
    counts = [len(row) for row in rows_of.values()]
    return LogprobsFrame(ids, counts, [1] * len(tokens), tokens, [-0.5] * len(tokens))


def test_rows_of_an_unknown_or_finished_request_are_passed_over():
    async def deliver():
        client = make_client()
        ear, done = Ear(), Ear()
        client._open = {1: ear, 2: done}
        client.deliver([StepFrame(1, [2], [1 | Finish.LENGTH << 16], [20])])
        client.deliver([rows_frame(_9=[90, 91], _2=[21], _1=[10]), StepFrame(2, [1], [1], [10])])
        return ear, done

    ear, done = asyncio.run(deliver())
    assert ear.rows == [[(10, -0.5)]] and ear.heard == [([10], Finish.RUNNING)]
    assert done.rows == []


def test_a_receiver_that_finds_fault_with_its_rows_ends_alone(caplog):
    async def deliver():
        client = make_client()
        deaf, ear = DeafToRows(), Ear()
        client._open = {1: deaf, 2: ear}
        client.deliver([rows_frame(_1=[10], _2=[20]), StepFrame(1, [1, 2], [1, 1], [10, 20])])
        return client, deaf, ear

    client, deaf, ear = asyncio.run(deliver())
    assert [finish for _, finish in deaf.heard] == [Finish.ERROR]
    assert ear.rows == [[(20, -0.5)]] and ear.heard == [([20], Finish.RUNNING)]
    assert client._open.keys() == {2}
    assert "request 1 failed" in caplog.text


def test_rows_beside_a_step_that_holds_a_failure_reach_their_tokens():
    async def deliver():
        client = make_client()
        ear, failing = Ear(), Ear()
        client._open = {1: ear, 2: failing}
        client.deliver(
            [
                rows_frame(_1=[10], _2=[20]),
                StepFrame(1, [1, 2], [1, 1], [10, 20]),
                rows_frame(_1=[11]),
                StepFrame(2, [1, 2], [1, 2 | Finish.ERROR << 16], [11, 0, 1000]),
            ]
        )
        return ear, failing

    ear, failing = asyncio.run(deliver())
    assert ear.rows == [[(10, -0.5)], [(11, -0.5)]]
    assert ear.heard == [([10], Finish.RUNNING), ([11], Finish.RUNNING)]
    assert failing.rows == [[(20, -0.5)]] and failing.heard[-1] == ([0, 1000], Finish.ERROR)


def test_so_many_log_probabilities_are_dealt_at_once_and_no_more():
    step, rows = StepFrame(1, [], [], []), rows_frame(_1=[1])
    most = [rows] * LOGPROBS_FRAMES_AT_ONCE
    assert first_turn([step] * 50) == ([step] * 50, [])
    assert first_turn([*most, step, step]) == ([*most, step, step], [])
    assert first_turn([step, *most, step, rows, step]) == ([step, *most, step], [rows, step])


class Pipe:
    """A transport that may be paused, and remembers."""

    def __init__(self):
        self.is_paused = self.is_closed = False
        self.pauses = 0

    def write(self, data):
        pass

    def pause_reading(self):
        assert not self.is_paused
        self.is_paused = True
        self.pauses += 1

    def resume_reading(self):
        assert self.is_paused
        self.is_paused = False

    def is_closing(self):
        return self.is_closed

    def abort(self):
        self.is_closed = True


def scored_prompt(probabilities, width):
    """The frames of a step with the scores of one prompt."""
    rows = [[(id, -0.5)] * width for id in range(probabilities // width)]
    return encode_events(1, [TokenEvent(7 << 32 | 1, [5], Finish.LENGTH, logprobs=rows)])


@pytest.mark.parametrize("width", [1, 6, 21])
def test_others_have_their_turn_while_a_long_prompt_is_scored(width):
    """What comes in one read is dealt in order, a part in each turn of the loop; nothing is read meanwhile."""

    async def read():
        turns, pipe = [], Pipe()
        stream = StepStream(b"", turns.append)
        stream.connection_made(pipe)
        frames = [*scored_prompt(65536, width), encode_step(2, [])]
        assert max(map(len, frames)) < FRAME_LIMIT_BYTES / 100
        stream.data_received(b"HTTP/1.1 200 OK\r\n\r\n" + b"".join(frames))
        assert len(turns) == 1 and pipe.is_paused
        for _ in frames:
            await asyncio.sleep(0)
        return turns, pipe, len(frames)

    turns, pipe, count = asyncio.run(read())
    assert [len(turn) for turn in turns[:-1]] == [LOGPROBS_FRAMES_AT_ONCE] * (len(turns) - 1)
    assert sum(map(len, turns)) == count and not pipe.is_paused and pipe.pauses == len(turns) - 1
    told = [frame for turn in turns for frame in turn]
    assert [len(frame.widths) for frame in told[:-2]] and isinstance(told[-2], StepFrame)
    assert [token for frame in told[:-2] for token in frame.tokens[::width]] == list(range(65536 // width))
    assert max(sum(frame.widths) for frame in told[:-2]) <= 4096 + width


def test_a_stream_that_ends_while_it_is_paused_deals_no_more():
    async def read():
        turns, pipe = [], Pipe()
        stream = StepStream(b"", turns.append)
        stream.connection_made(pipe)
        stream.data_received(b"HTTP/1.1 200 OK\r\n\r\n" + b"".join(scored_prompt(65536, 21)))
        stream.close()
        for _ in range(50):
            await asyncio.sleep(0)
        return turns

    assert len(asyncio.run(read())) == 1


def test_rows_that_do_not_fit_together_end_the_stream(caplog):
    async def read():
        pipe = Pipe()
        stream = StepStream(b"", [].append)
        stream.connection_made(pipe)
        words = [3, Frame.LOGPROBS, 7, 1]
        stream.data_received(b"HTTP/1.1 200 OK\r\n\r\n" + b"".join(word.to_bytes(4, "little") for word in words))
        return pipe.is_closed

    assert asyncio.run(read()) and "what is not a frame" in caplog.text


def test_a_fault_is_forgotten_with_the_worker_that_had_it(tmp_path):
    async def follow():
        client = WorkerClient(str(tmp_path / "nobody"), 7, nothing, connections=1, submit_seconds=1.0)
        client.fault = "its template cannot be compiled"
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.01):  # it asks at once, and then goes on for ever
                await client.run()
        assert not client.fault

    asyncio.run(follow())


# --- connections ------------------------------------------------------------------------------------------------------


class Listener:
    """Accepts on TCP, and answers every request as it is told."""

    def __init__(self, host, answers=()):
        self.host = host
        self.answers = list(answers)
        self.heads = []
        self._connections = {}

    async def __aenter__(self):
        self.server = await asyncio.start_server(self._serve, self.host, 0)
        self.port = self.server.sockets[0].getsockname()[1]
        return self

    async def _serve(self, reader, writer):
        self._connections[asyncio.current_task()] = writer
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                self.heads.append((await reader.readuntil(b"\r\n\r\n")).decode())
                status = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
                writer.write(f"HTTP/1.1 {status} X\r\ncontent-length: 0\r\n\r\n".encode())
        writer.close()

    async def __aexit__(self, *_):
        self.server.close()
        for writer in self._connections.values():
            writer.close()
        await asyncio.gather(*self._connections)


@pytest.mark.parametrize(
    ("host", "address"), [("127.0.0.1", "127.0.0.1"), ("127.0.0.1", "localhost"), ("::1", "[::1]")]
)
def test_a_worker_is_reached_by_address_or_name(host, address):
    async def ask():
        async with Listener(host, [204]) as listener:
            pool = Pool(f"{address}:{listener.port}", "s" * 32, 1)
            answer = await pool.exchange("GET", "/model")
            pool.close()
            return answer, listener.heads

    try:
        (status, _), (head,) = asyncio.run(ask())
    except OSError:
        if host == "::1" and not socket.has_dualstack_ipv6():
            pytest.skip("no IPv6 here")
        raise
    assert status == 204
    assert f"authorization: Bearer {'s' * 32}" in head.split("\r\n")


def test_a_name_is_looked_up_for_every_new_connection(monkeypatch):
    """A container that is started again may have another address."""

    async def ask():
        asked = []
        loop = asyncio.get_running_loop()
        real = loop.getaddrinfo

        async def getaddrinfo(host, *more, **fields):
            asked.append(host)
            return await real("127.0.0.1", *more, **fields)

        monkeypatch.setattr(loop, "getaddrinfo", getaddrinfo)
        async with Listener("127.0.0.1", [200]) as listener:
            pool = Pool(f"worker.test:{listener.port}", "", 1)
            await pool.exchange("GET", "/model")
            await pool.exchange("GET", "/model")
            pool.close()
            await pool.exchange("GET", "/model")
            pool.close()
        return asked

    assert asyncio.run(ask()) == ["worker.test", "worker.test"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have other names for these options")
def test_both_sides_of_a_connection_notice_a_machine_that_has_vanished():
    def options(sock):
        names = ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT", "TCP_USER_TIMEOUT")
        kept = sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        return kept, *(sock.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) for name in names)

    async def connect_here():
        with socket.create_server(("127.0.0.1", 0)) as listener:
            notice_silence(listener)
            connection = await connect(Connection, f"127.0.0.1:{listener.getsockname()[1]}")
            accepted, _ = listener.accept()
            with accepted:
                both = options(connection._transport.get_extra_info("socket")), options(accepted)
            connection.close()
            return both

    assert set(asyncio.run(connect_here())) == {(1, 5, 5, 3, 20_000)}


@pytest.mark.parametrize(("status", "lines"), [(None, 1), (503, 0)])
def test_an_address_where_nobody_is_yet_is_told_once_and_a_worker_that_loads_never(monkeypatch, caplog, status, lines):
    monkeypatch.setattr(service.client, "LAST_BACKOFF_SECONDS", 0.001)
    monkeypatch.setattr(service.client, "FIRST_BACKOFF_SECONDS", 0.001)
    caplog.set_level("INFO", "service.client")
    tries = []

    async def ask():
        async with Listener("127.0.0.1", [status or 503]) as listener:
            if status is None:
                listener.server.close()
            client = WorkerClient(f"127.0.0.1:{listener.port}", 7, nothing, connections=1, submit_seconds=1.0)
            follow = client._follow

            async def counted():
                tries.append(None)
                await follow()

            monkeypatch.setattr(client, "_follow", counted)
            running = asyncio.create_task(client.run())
            async with asyncio.timeout(10):
                while len(tries) < 5:  # noqa: ASYNC110 (said by other tasks)
                    await asyncio.sleep(0.001)
            running.cancel()
            client.close()
            return client.absence

    assert asyncio.run(ask())
    assert len(caplog.messages) == lines


@pytest.mark.parametrize(
    ("secret", "status", "fault"),
    [
        ("s" * 32, 401, "it does not take this gateway's secret"),
        ("", 401, "it wants a secret"),
        ("", 404, "no worker for gateways is there: /model answered 404"),
    ],
)
def test_a_worker_that_lets_nobody_in_is_asked_again_and_complained_about_once(
    monkeypatch, caplog, secret, status, fault
):
    monkeypatch.setattr(service.client, "LAST_BACKOFF_SECONDS", 0.001)
    monkeypatch.setattr(service.client, "FIRST_BACKOFF_SECONDS", 0.001)

    async def ask():
        async with Listener("127.0.0.1", [status]) as listener:
            address = f"127.0.0.1:{listener.port}"
            client = WorkerClient(address, 7, nothing, connections=1, submit_seconds=1.0, secret=secret)
            running = asyncio.create_task(client.run())
            async with asyncio.timeout(10):
                while len(listener.heads) < 5:  # noqa: ASYNC110 (said by other tasks)
                    await asyncio.sleep(0.001)
            running.cancel()
            client.close()
            return client.fault

    assert asyncio.run(ask()) == fault
    assert caplog.text.count(fault) == 1
