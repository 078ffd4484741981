"""The engine without weights takes exactly the time the cost model gives, and its words say what they are."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from scheduler.batch import Entry, Kind, StepPlan
from scheduler.hardware import CATALOGUE
from scheduler.messages import Request, Sampling
from scheduler.model import SHAPES
from scheduler.roofline import step_cost, step_work
from worker.build import build
from worker.config import WorkerConfig
from worker.files import DEMO, find_model
from worker.simulated import SENTENCE, SimulatedEngine, find_device, find_shape
from worker.tokenizer import read_tokenizer

DEVICE, SHAPE = CATALOGUE["h100"], SHAPES["llama-3.1-8b"]
EOS = 2
SENTENCE_IDS = list(range(10, 40))


class Clock:
    def __init__(self) -> None:
        self.now = 50.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


def an_engine(clock: Clock, seed: int = 0) -> SimulatedEngine:
    return SimulatedEngine(DEVICE, SHAPE, SENTENCE_IDS, EOS, seed, clock, clock.sleep)


def start(engine: SimulatedEngine, key: int, prompt_tokens: int = 8, seed: int = 0, ends: bool = True) -> None:
    stop_ids = frozenset({EOS}) if ends else frozenset()
    request = Request(key, 0, [5] * prompt_tokens, 10**6, sampling=Sampling(seed=seed), stop_ids=stop_ids)
    engine.run(StepPlan(start=(request,)))


def decode(engine: SimulatedEngine, key: int, position: int = 8) -> int:
    result = engine.run(StepPlan(entries=(Entry(key, Kind.DECODE, position, 1, True),)))
    (token,) = result.tokens[key]
    return token


def answer(engine: SimulatedEngine, key: int, most: int = 100_000) -> list[int]:
    """Until it ends by itself."""
    tokens: list[int] = []
    while len(tokens) < most and (not tokens or tokens[-1] != EOS):
        tokens.append(decode(engine, key))
    return tokens


def test_a_step_takes_what_the_cost_model_gives(clock: Clock) -> None:
    engine = an_engine(clock)
    start(engine, 1)
    start(engine, 2)
    entries = (Entry(1, Kind.PREFILL, 0, 512, True), Entry(2, Kind.DECODE, 4000, 1, True))
    began = clock.now
    engine.run(StepPlan(entries=entries))
    assert clock.now - began == pytest.approx(step_cost(DEVICE, SHAPE, step_work(SHAPE, entries)).seconds)


def test_the_loops_own_time_is_part_of_the_host_seconds(clock: Clock) -> None:
    engine = an_engine(clock)
    start(engine, 1)
    decode(engine, 1)
    began = clock.now
    clock.now += DEVICE.host_seconds / 2  # the loop
    decode(engine, 1)
    cost = step_cost(DEVICE, SHAPE, step_work(SHAPE, [Entry(1, Kind.DECODE, 8, 1, True)]))
    assert clock.now - began == pytest.approx(cost.seconds)


def test_a_loop_that_took_longer_starts_the_device_late(clock: Clock) -> None:
    engine = an_engine(clock)
    start(engine, 1)
    decode(engine, 1)
    clock.now += 1.0
    began = clock.now
    decode(engine, 1)
    cost = step_cost(DEVICE, SHAPE, step_work(SHAPE, [Entry(1, Kind.DECODE, 8, 1, True)]))
    assert clock.now - began == pytest.approx(cost.seconds)


def test_a_sleep_that_ends_early_is_gone_on_with(clock: Clock) -> None:
    engine = SimulatedEngine(
        DEVICE, SHAPE, SENTENCE_IDS, EOS, 0, clock, lambda seconds: clock.sleep(seconds / 2 + 1e-9)
    )
    start(engine, 1)
    began = clock.now
    decode(engine, 1)
    cost = step_cost(DEVICE, SHAPE, step_work(SHAPE, [Entry(1, Kind.DECODE, 8, 1, True)]))
    assert clock.now - began == pytest.approx(cost.seconds, abs=1e-8)


def test_starting_and_stopping_takes_no_time(clock: Clock) -> None:
    engine = an_engine(clock)
    start(engine, 1)
    engine.run(StepPlan(stop=(1,)))
    assert clock.slept == []


def test_words_are_one_sentence_over_and_over(clock: Clock) -> None:
    engine = an_engine(clock)
    start(engine, 1, ends=False)
    assert [decode(engine, 1) for _ in range(70)] == (SENTENCE_IDS * 3)[:70]


def test_the_sentence_says_that_it_is_simulated() -> None:
    assert SENTENCE.startswith("Simulated reply")
    tokenizer = Tokenizer.from_str(read_tokenizer(find_model(DEMO)).tokenizer_json)
    ids = tokenizer.encode(SENTENCE, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == SENTENCE


def test_a_prefill_piece_that_does_not_deliver_brings_no_token(clock: Clock) -> None:
    engine = an_engine(clock)
    start(engine, 1)
    result = engine.run(StepPlan(entries=(Entry(1, Kind.PREFILL, 0, 4, False),)))
    assert result.tokens == {}


def test_lengths_are_heavy_tailed(clock: Clock) -> None:
    engine = an_engine(clock)
    lengths = []
    for seed in range(600):
        start(engine, seed, seed=seed)
        lengths.append(engine._answers[seed].tokens)
    assert min(lengths) >= 2
    assert 150 <= statistics.median(lengths) <= 215
    assert statistics.mean(lengths) > 1.4 * statistics.median(lengths)
    assert max(lengths) > 1500


def test_an_answer_ends_at_its_drawn_length_with_an_end_token(clock: Clock) -> None:
    engine = an_engine(clock)
    start(engine, 1, seed=3)
    expected = engine._answers[1].tokens
    tokens = answer(engine, 1)
    assert len(tokens) == expected and tokens[-1] == EOS and EOS not in tokens[:-1]


def test_lengths_are_those_of_the_seed(clock: Clock) -> None:
    first, again, other = an_engine(clock, seed=1), an_engine(clock, seed=1), an_engine(clock, seed=2)
    for engine in (first, again, other):
        for key in range(20):
            start(engine, key, seed=key)
    lengths = [[engine._answers[key].tokens for key in range(20)] for engine in (first, again, other)]
    assert lengths[0] == lengths[1] != lengths[2]


def test_who_ignores_the_end_is_not_ended(clock: Clock) -> None:
    engine = an_engine(clock)
    start(engine, 1, ends=False)
    drawn = engine._answers[1].tokens
    assert EOS not in [decode(engine, 1) for _ in range(drawn + 5)]


def test_no_answer_ends_before_min_tokens(clock: Clock) -> None:
    engine = an_engine(clock)
    for key in range(20):
        sampling = Sampling(seed=key, min_tokens=500)
        engine.run(StepPlan(start=(Request(key, 0, [5] * 8, 10**6, sampling=sampling, stop_ids=frozenset({EOS})),)))
        assert len(answer(engine, key)) > 500


def test_who_stops_at_other_ids_hears_no_end_token(clock: Clock) -> None:
    engine = an_engine(clock)
    engine.run(StepPlan(start=(Request(1, 0, [5] * 8, 10**6, stop_ids=frozenset({7})),)))
    assert EOS not in answer(engine, 1, most=engine._answers[1].tokens + 5)


def test_a_resumed_answer_goes_on_where_it_was(clock: Clock) -> None:
    engine = an_engine(clock)
    start(engine, 1, seed=3)
    expected = answer(engine, 1)
    prompt = [5] * 8 + expected[:17]
    again = Request(1, 0, prompt, 10**6, sampling=Sampling(seed=3), stop_ids=frozenset({EOS}), resumed_tokens=17)
    engine.run(StepPlan(stop=(1,), start=(again,)))
    assert answer(engine, 1) == expected[17:]


def test_what_is_stopped_is_forgotten_and_unknown_keys_do_no_harm(clock: Clock) -> None:
    engine = an_engine(clock)
    start(engine, 1)
    engine.run(StepPlan(stop=(1, 99)))
    assert engine._answers == {}


def test_a_key_may_stop_and_start_in_one_plan(clock: Clock) -> None:
    engine = an_engine(clock)
    start(engine, 1)
    decode(engine, 1)
    again = Request(1, 0, [5] * 8, 100)
    engine.run(StepPlan(stop=(1,), start=(again,)))
    assert engine._answers[1].given == 0


def test_devices_are_found_by_name_and_by_file(tmp_path: Path) -> None:
    assert find_device("h200") is CATALOGUE["h200"]
    path = tmp_path / "card.json"
    path.write_text(
        '{"name": "card", "flops_per_second": 1e12,'
        ' "levels": [{"name": "memory", "capacity_bytes": 1e9, "bytes_per_second": 1e10}]}'
    )
    device = find_device(str(path))
    assert (device.name, device.memory.bytes_per_second, device.host_seconds) == ("card", 1e10, 0.0)


def test_what_is_not_known_is_told_with_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"hardware z80 is neither a JSON file nor one of: .*h100"):
        find_device("z80")
    with pytest.raises(ValueError, match=r"knows no model gpt-9; there are: .*llama-3.1-8b"):
        find_shape("gpt-9")


def test_the_demo_model_stands_for_the_usual_shape() -> None:
    assert find_shape(DEMO) is find_shape("LLaMA-3.1-8B") is SHAPES["llama-3.1-8b"]


def test_a_simulated_worker_is_built_from_its_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    built = build(WorkerConfig(engine="simulated", hardware="h200", context_tokens=2048, served_name=""))
    assert built.info.model == "simulated-h200" and built.info.engine == "simulated"
    assert built.info.context_tokens == 2048 and built.info.max_prompt_tokens == 2047
    assert set(built.info.tier_wait_seconds) == {"priority", "default", "flex", "batch"}
    assert built.info.eos_ids and built.info.tokenizer_json
    said = capsys.readouterr().out
    assert "simulating llama-3.1-8b" in said and "tiers: " in said and "predicted: " in said
