"""Several workers behind one gateway: what is known, what is ready, and who gets a request."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

import pytest

from scheduler.messages import Snapshot
from service.config import GatewayConfig
from service.errors import ApiError
from service.fleet import Fleet


class World:
    """A fleet whose workers say what the test says; nothing is connected but by `up`."""

    def __init__(self, info, workers=3, **settings):
        self.info = info
        self.fleet = Fleet(GatewayConfig(workers=tuple(f"gpu-{n}:9000" for n in range(workers)), **settings))
        self.clients = self.fleet._clients

    async def up(self, place, model, **fields):
        await self.fleet._learn(place, replace(self.info, model=model, **fields))
        client = self.clients[place]
        client.connected, client.snapshot, client.snapshot_at = True, Snapshot(), time.monotonic()

    def down(self, place):
        self.clients[place].connected = False

    def load(self, place, requests):
        self.clients[place]._open = dict.fromkeys(range(requests))

    def error(self, model):
        with pytest.raises(ApiError) as raised:
            self.fleet.model(model)
        return raised.value


def in_world(info, test, **settings):
    async def run():
        await test(World(info, **settings))

    asyncio.run(run())


def test_a_request_goes_to_the_worker_with_the_fewest_open_requests(worker_info):
    async def test(world):
        for place, requests in enumerate((5, 2, 3)):
            await world.up(place, "a")
            world.load(place, requests)
        assert world.fleet.model("a").client is world.clients[1]
        world.down(1)
        assert world.fleet.model("a").client is world.clients[2]
        world.load(2, 9)
        assert world.fleet.model("a").client is world.clients[0]

    in_world(worker_info, test)


def test_a_model_is_asked_only_of_workers_that_have_it(worker_info):
    async def test(world):
        await world.up(0, "a")
        await world.up(1, "b")
        world.load(1, 100)
        assert world.fleet.model("b").client is world.clients[1]
        assert world.fleet.model("b").worker.model == "b"

    in_world(worker_info, test)


def test_each_model_is_listed_once_also_while_its_worker_is_away(worker_info):
    async def test(world):
        for place, model in enumerate(("a", "b", "a")):
            await world.up(place, model)
        world.down(1)
        assert [worker.model for worker in world.fleet.models()] == ["a", "b"]
        assert world.fleet.ready_models() == ["a"]

    in_world(worker_info, test)


def test_a_model_whose_workers_are_away_is_known_and_cannot_be_had_now(worker_info):
    async def test(world):
        await world.up(0, "a")
        await world.up(1, "b")
        world.down(1)
        model = world.fleet.model("b")
        with pytest.raises(ApiError) as raised:
            await model.client.submit(None, None)
        assert raised.value.status == 503 and raised.value.retry_after_seconds

    in_world(worker_info, test)


def test_what_nobody_serves_is_404_once_anybody_has_spoken(worker_info):
    async def test(world):
        assert world.error("a").status == 503
        await world.up(2, "a")
        assert world.error("b").status == 404

    in_world(worker_info, test)


def test_a_worker_that_comes_back_with_another_model_has_the_old_one_no_more(worker_info):
    async def test(world):
        await world.up(0, "a")
        await world.up(0, "b")
        assert [worker.model for worker in world.fleet.models()] == ["b"]
        assert world.error("a").status == 404

    in_world(worker_info, test)


def test_workers_with_the_same_tokenizer_share_its_tables(worker_info):
    async def test(world):
        await asyncio.gather(world.up(0, "a"), world.up(1, "b"), world.up(2, "c", variant="v2"))
        texts = [world.fleet.model(name).text for name in "abc"]
        assert texts[0] is texts[1] and texts[2] is not texts[0]
        await world.up(0, "a", created=1)
        assert world.fleet.model("a").text is texts[0] and world.fleet.model("a").worker.created == 1

    in_world(worker_info, test)


def test_ready_means_that_one_worker_can_generate(worker_info):
    async def test(world):
        assert world.fleet.unready() is not None
        await world.up(1, "a")
        assert world.fleet.unready() is None
        assert world.fleet.ready_models() == ["a"]

    in_world(worker_info, test)


def test_unready_says_why_for_each_worker(worker_info):
    async def test(world):
        world.clients[0].fault = "it does not take this gateway's secret"
        await world.up(1, "a")
        world.clients[1].snapshot = Snapshot(stalled_seconds=42.0)
        assert world.fleet.unready() == (
            "gpu-0:9000: the worker cannot be used: it does not take this gateway's secret; "
            "gpu-1:9000: the worker's running step has not ended for 42 s; "
            "gpu-2:9000: the worker has not said yet what it serves"
        )

    in_world(worker_info, test)


def test_a_worker_named_twice_is_one(worker_info):
    async def test(world):
        assert len(Fleet(GatewayConfig(workers=("gpu-1:9000", "gpu-1:9000")))._clients) == 1

    in_world(worker_info, test)


def test_requests_of_one_gateway_have_ids_of_their_own(worker_info):
    async def test(world):
        ids = [client.next_id() for _ in range(10) for client in world.clients]
        assert len(set(ids)) == 30
        assert len({client.gateway for client in world.clients}) == 1

    in_world(worker_info, test)
