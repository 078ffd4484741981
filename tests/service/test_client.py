"""The parts of the worker's client that need no worker."""

from __future__ import annotations

import asyncio

import pytest

from scheduler.messages import Accept, Finish, Request, StepFrame, encode_decision
from service.client import WorkerClient, has_failure, merge


class Ear:
    """A receiver that remembers."""

    def __init__(self):
        self.withdrawn = False
        self.last_at = 0.0
        self.heard = []

    def take(self, ids, finish, now):
        self.last_at = now
        self.heard.append((list(ids), finish))


class Deaf(Ear):
    """A receiver with a bug."""

    def take(self, ids, finish, now):
        super().take(ids, finish, now)
        if finish < Finish.REFUSED:
            raise RuntimeError("bug")


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
