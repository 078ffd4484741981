"""The prefix cache: who hits what, what is charged, what goes first, and that nobody else notices."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b

import pytest
from gate_world import SMALL, World, make_request

from scheduler.gate import Limits
from scheduler.hardware import CATALOGUE
from scheduler.ledger import Ledger
from scheduler.messages import Accept, Finish, Reason, Refuse, Request, TokenEvent, Wait
from scheduler.prefix import Node, Prefix, PrefixIndex, Sharing, pinned_bytes, prefix_of

BLOCK = 16
BLOCK_BYTES = SMALL.kv_bytes(BLOCK)


def a_world(capacity_tokens: int = 8000, sharing: Sharing = Sharing.TENANT, **values: object) -> World:
    return World(CATALOGUE["laptop-cpu"], SMALL, capacity_tokens, Limits(4096), sharing=sharing, **values)


def first_event(world: World, request: Request) -> TokenEvent:
    """Lets a request run to its end, alone."""
    world.arrive(request)
    events = []
    while world.gate.has_work:
        outcome = world.step()
        events += outcome.events if outcome else []
    return next(event for event in events if event.key == request.key)


def computed_tokens(world: World) -> int:
    plans = [step for step in world.trace if hasattr(step, "entries")]
    return sum(entry.query_tokens for plan in plans for entry in plan.entries)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens were taken up to be hashed, each time."""
    taken: list[int] = []
    find = Prefix._tokens

    def tokens(prefix: Prefix, *blocks: int) -> Sequence[int]:
        taken.append(len(found := find(prefix, *blocks)))
        return found

    monkeypatch.setattr(Prefix, "_tokens", tokens)
    return taken


# --- hits -------------------------------------------------------------------------------------------------------------


def test_a_prompt_that_begins_like_an_earlier_one_computes_the_rest_only() -> None:
    world = a_world()
    assert first_event(world, make_request(1, 2100, 4, shared=2000)).cached_tokens == 0
    before = computed_tokens(world)
    assert first_event(world, make_request(2, 2100, 4, shared=2000)).cached_tokens == 2000
    assert computed_tokens(world) - before == 100 + 3
    assert (world.gate.prefixes.hit_tokens, world.gate.prefixes.query_tokens) == (2000, 4200)
    world.check_nothing_is_left()


@pytest.mark.parametrize(("prompt", "cached"), [(15, 0), (16, 0), (17, 16), (32, 16), (33, 32)])
def test_only_full_blocks_are_hit_and_the_last_token_is_always_computed(prompt: int, cached: int) -> None:
    world = a_world()
    first_event(world, make_request(1, prompt, 1, shared=prompt))
    assert first_event(world, make_request(2, prompt, 1, shared=prompt)).cached_tokens == cached


def test_an_answer_is_hit_by_the_prompt_that_goes_on_from_it() -> None:
    world = a_world()
    first = make_request(1, 40, 60)
    first_event(world, first)
    said = [*first.prompt, *world.stories[first.key].output]
    event = first_event(world, Request(2, 1, [*said, 1, 2, 3], 4))
    assert event.cached_tokens == (len(said) - 1) // BLOCK * BLOCK, "its last token was drawn, but not computed"


def test_another_tenant_hits_nothing_unless_everybody_shares() -> None:
    world = a_world()
    for tenant in ("a", "b"):
        assert first_event(world, make_request(1, 500, 2, tenant=tenant, shared=500)).cached_tokens == 0
    assert first_event(world, make_request(1, 500, 2, tenant="b", shared=500)).cached_tokens == 496
    world = a_world(sharing=Sharing.EVERYBODY)
    cached = [
        first_event(world, make_request(1, 500, 2, tenant=tenant, shared=500)).cached_tokens for tenant in ("a", "b")
    ]
    assert cached == [0, 496]


def test_where_nobody_shares_nothing_is_kept() -> None:
    world = a_world(sharing=Sharing.NOBODY)
    for number in (1, 2):
        assert first_event(world, make_request(number, 500, 2, shared=500)).cached_tokens == 0
    assert not len(world.gate.prefixes) and not world.gate.ledger.used_bytes


def test_who_wants_to_know_of_its_prompt_has_it_computed() -> None:
    world = a_world()
    first_event(world, make_request(1, 500, 2, shared=500))
    told = Request(2, 1, make_request(1, 500, shared=500).prompt, 2, logprobs=0, prompt_logprobs=True)
    assert first_event(world, told).cached_tokens == 0
    assert first_event(world, make_request(3, 500, 2, shared=500)).cached_tokens == 496, "its blocks do no harm"


def test_the_same_prompt_many_times_at_once_is_computed_once() -> None:
    world = a_world(20_000)
    for number in range(32):
        world.arrive(make_request(number, 1000, 1, shared=1000))
    world.run()
    assert computed_tokens(world) == 1000 + 31 * (1000 - 992)
    world.check_nothing_is_left()


def test_who_waits_for_the_blocks_of_one_that_leaves_computes_them() -> None:
    world = a_world()
    first, second = make_request(1, 3000, 2, shared=3000), make_request(2, 3000, 2, shared=3000)
    world.arrive(first)
    world.arrive(second)
    world.step()
    assert 0 < world.gate.running[first.key].computed < 3000 and world.gate.running[second.key].computed == 0
    world.cancel(first.key)
    world.run()
    assert world.stories[second.key].ends == [Finish.LENGTH]
    world.check_nothing_is_left()


def test_leaving_in_the_middle_of_a_prompt_keeps_what_is_computed() -> None:
    world = a_world()
    first = make_request(1, 3000, 2, shared=3000)
    world.arrive(first)
    world.step(during=lambda: None)
    computed = world.gate.running[first.key].computed
    world.step(during=lambda: world.cancel(first.key) and None)
    assert 0 < computed < 3000
    assert first_event(world, make_request(2, 3000, 2, shared=3000)).cached_tokens == computed // BLOCK * BLOCK
    world.check_nothing_is_left()


def test_leaving_before_the_engine_has_heard_of_a_hit_leaves_no_trace() -> None:
    world = a_world()
    first_event(world, make_request(1, 500, 2, shared=500))
    second = make_request(2, 500, 2, shared=500)
    world.arrive(second)
    world.cancel(second.key)
    world.run()
    world.check_nothing_is_left()


def test_what_is_cached_makes_the_prediction_shorter() -> None:
    world = a_world()
    new = world.arrive(make_request(1, 2100, 2, shared=2000))
    world.run()
    known = world.arrive(make_request(2, 2100, 2, shared=2000))
    assert isinstance(new, Accept) and isinstance(known, Accept)
    assert known.predicted_ttft_seconds < 0.2 * new.predicted_ttft_seconds


def test_a_tenant_is_charged_for_what_is_computed() -> None:
    world = a_world()
    world.arrive(make_request(1, 2100, 1, tenant="a", shared=2000))
    world.run()
    first = world.gate.account.take_charged()["a"]
    world.arrive(make_request(2, 2100, 1, tenant="a", shared=2000))
    world.run()
    assert world.gate.account.take_charged()["a"] < 0.2 * first


def test_a_full_queue_refuses_without_hashing_the_prompt(hashed: list[int]) -> None:
    world = World(CATALOGUE["laptop-cpu"], SMALL, 1600, Limits(4096, sequences=1, waiting=1), sharing=Sharing.TENANT)
    first_event(world, make_request(1, 1000, 2, shared=1000))
    for number in (2, 3):
        world.arrive(make_request(number, 100, 4, tenant="other"))
    hashed.clear()
    decision = world.arrive(make_request(4, 1000, 2, shared=1000))
    assert isinstance(decision, Refuse) and decision.reason is Reason.QUEUE_FULL
    assert not hashed
    world.run()


def test_an_arriving_prompt_is_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    world = a_world()
    first_event(world, make_request(1, 1000, 2, shared=1000))
    looked_up: list[int] = []
    find = PrefixIndex.hits

    def hits(index: PrefixIndex, prefix: Prefix) -> list[Node]:
        looked_up.append(prefix.request.id)
        return find(index, prefix)

    monkeypatch.setattr(PrefixIndex, "hits", hits)
    assert isinstance(world.arrive(make_request(2, 1000, 2, shared=1000)), Accept)
    assert looked_up == [2]
    world.run()


# --- what is charged --------------------------------------------------------------------------------------------------


def test_a_block_is_charged_once_whoever_ends_first() -> None:
    world = a_world()
    slow, fast = make_request(1, 480, 200, shared=480), make_request(2, 480, 20, shared=480)
    whole, shared = SMALL.kv_bytes(688), SMALL.kv_bytes(464)
    world.arrive(slow)
    while not world.gate.running[slow.key].generated:
        world.step()
    world.arrive(fast)
    ledger = world.gate.ledger
    assert ledger.reserved_bytes == whole + SMALL.kv_bytes(512) - shared
    world.cancel(slow.key)
    assert ledger.pinned_bytes == shared, "nobody pays for them, and they are in use"
    assert ledger.reserved_bytes == SMALL.kv_bytes(512)
    world.run()
    assert ledger.reserved_bytes == 0
    world.check_nothing_is_left()


def test_pinned_blocks_are_expected_to_come_free_with_who_uses_them() -> None:
    """The same users predict the same wait, whether their prompt was cached or they pay for all of it."""
    waits = []
    for sharing in (Sharing.NOBODY, Sharing.TENANT):
        world = a_world(2000, sharing)
        world.gate.history.record(make_request(0), 200)
        if sharing is Sharing.TENANT:
            first_event(world, make_request(1, 1500, 1, tenant="a", shared=1500))
        world.arrive(make_request(2, 1500, 200, tenant="a", shared=1500))
        while not world.gate.running[make_request(2).key].generated:
            world.step()
        assert bool(world.gate.ledger.pinned_bytes) == (sharing is Sharing.TENANT)
        decision = world.arrive(make_request(3, 1200, 100, tenant="b"))
        assert isinstance(decision, Wait) and decision.reason is Reason.KV_FOOTPRINT
        waits.append(decision.predicted_wait_seconds)
        world.run()
        world.check_nothing_is_left()
    assert waits[1] == pytest.approx(waits[0], rel=0.05)


def test_a_pinned_block_is_told_to_the_first_that_uses_it_and_to_nobody_else() -> None:
    index = an_index()
    published(index, 1, 2, 3, 4, 5, 6)
    users = [index.prefix(Request(n, 0, prompt, 1)) for n, prompt in enumerate([(1, 2, 9), (1, 2, 3, 4, 9), (8, 8, 9)])]
    for user in users:
        index.hold(user, index.hits(user))
        index.publish(user, len(user.request.prompt))
    assert pinned_bytes(users) == [1.0, 1.0, 0.0], "what the last has published is its own"
    assert pinned_bytes(reversed(users)) == [0.0, 2.0, 0.0]


def test_hits_let_in_what_would_not_fit_otherwise() -> None:
    for sharing, fits in ((Sharing.NOBODY, 1), (Sharing.TENANT, 4)):
        world = a_world(1600, sharing)
        world.arrive(make_request(1, 1010, 100, shared=1000))
        while not world.gate.running[make_request(1).key].generated:
            world.step()
        for number in range(2, 10):
            world.arrive(make_request(number, 1010, 100, shared=1000))
        assert len(world.gate.running) == fits
        world.run()
        world.check_nothing_is_left()


def test_idle_blocks_count_as_free_and_go_when_they_are_needed() -> None:
    world = a_world(1600)
    first_event(world, make_request(1, 1000, 4, shared=1000))
    assert world.gate.prefixes.idle_bytes == SMALL.kv_bytes(992) and world.gate.ledger.reserved_bytes == 0
    assert isinstance(world.arrive(make_request(2, 1500, 20)), Accept)
    world.run()
    assert world.gate.prefixes.evicted_blocks > 0
    world.check_nothing_is_left()


def test_a_reservation_that_is_not_used_evicts_nothing() -> None:
    world = a_world(1600)
    first_event(world, make_request(1, 700, 4, shared=700))
    first_event(world, make_request(2, 16, 1500, stop_ids=frozenset(range(50))))
    assert first_event(world, make_request(3, 700, 4, shared=700)).cached_tokens == 688


def test_who_was_preempted_finds_its_own_blocks() -> None:
    world = a_world(640)
    for _ in range(40):
        world.gate.history.record(make_request(0), 4)
    for number in (1, 2):
        world.arrive(make_request(number, 200, 230, shared=0))
    world.run()
    assert world.gate.preemptions and world.gate.prefixes.hit_tokens >= 192
    assert {ended.finish for ended in world.ended} == {Finish.LENGTH}
    world.check_nothing_is_left()


def test_an_engine_that_failed_is_trusted_with_no_block() -> None:
    world = a_world()
    first_event(world, make_request(1, 500, 2, shared=500))
    world.arrive(make_request(2, 500, 2, shared=500))
    world.take(world.gate.fail_running())
    assert first_event(world, make_request(3, 500, 2, shared=500)).cached_tokens == 0
    world.check_nothing_is_left()


# --- the index --------------------------------------------------------------------------------------------------------


def an_index() -> PrefixIndex:
    return PrefixIndex(Sharing.TENANT, 2, lambda block: 1.0, Ledger(100.0))


def published(index: PrefixIndex, *tokens: int) -> list[int]:
    """The numbers of the blocks that a request has published, who is gone then."""
    prefix = index.prefix(Request(0, 0, tokens, 1))
    index.hold(prefix, index.hits(prefix))
    before = len(prefix.nodes)
    numbers = [number for _, number in index.publish(prefix, len(tokens))]
    assert len(prefix.nodes) == before + len(numbers)
    index.release(prefix)
    return numbers


def evicted(index: PrefixIndex) -> list[int]:
    order = []
    while (node := index.evict()) is not None:
        order.append(node.number)
    return order


def test_a_digest_stands_on_the_one_before_it_however_many_are_made_at_once(hashed: list[int]) -> None:
    prompt = [*range(2, 90)]
    prefix = prefix_of(Request(0, 0, prompt, 1, tenant="a"), 2, Sharing.TENANT)
    digest = prefix.digest(0)
    assert digest == digest_of(digest_of(b"a") + array("I", [2, 3]).tobytes())
    assert len(hashed) == 1 and hashed[0] < len(prompt), "a prompt that hits nothing is not hashed to its end"
    prefix.generated += [7, 8, 9]
    for block in range(1, 45):
        tokens = [*prompt, *prefix.generated][2 * block : 2 * block + 2]
        digest = digest_of(digest + array("I", tokens).tobytes())
        assert prefix.digest(block) == digest
    assert len(hashed) == 3, "many blocks at once"


def digest_of(data: bytes) -> bytes:
    return blake2b(data, digest_size=16).digest()


def test_least_recently_used_goes_first_and_a_block_before_its_parent() -> None:
    index = an_index()
    assert published(index, 1, 2, 3, 4, 5, 6) == [1, 2, 3]
    assert published(index, 7, 7, 8, 8) == [4, 5]
    assert published(index, 1, 2, 9, 9) == [6], "which uses the first block again"
    assert evicted(index) == [3, 2, 5, 4, 6, 1]
    assert index.idle_bytes == 0 and not len(index)


def test_what_is_used_is_never_evicted() -> None:
    index = an_index()
    published(index, 1, 2, 3, 4, 5, 6)
    user = index.prefix(Request(1, 0, (1, 2, 3, 4, 9), 1))
    index.hold(user, index.hits(user))
    assert evicted(index) == [3]
    index.release(user)
    assert evicted(index) == [2, 1]


def test_who_computes_what_is_published_already_keeps_it_to_itself() -> None:
    index = an_index()
    slow = index.prefix(Request(1, 0, (1, 2, 3, 4, 5, 6), 1))
    fast = index.prefix(Request(2, 0, (1, 2, 3, 4), 1))
    assert index.publish(slow, 2) == [(0, 1)]
    assert index.publish(fast, 4) == [] and fast.is_alone
    assert index.publish(slow, 6) == [(1, 2), (2, 3)]


def test_the_same_tokens_behind_others_are_another_block() -> None:
    index = an_index()
    published(index, 1, 2, 5, 6)
    assert index.hits(index.prefix(Request(1, 0, (5, 6, 5, 6, 7), 1))) == []
    assert len(index.hits(index.prefix(Request(1, 0, (1, 2, 3, 4, 5), 1)))) == 1
