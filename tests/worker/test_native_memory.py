"""What fits is known, and told with the arithmetic, before anything is allocated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from worker.config import WorkerConfig
from worker.files import find_model, read_config
from worker.native import memory
from worker.native.config import DecoderConfig
from worker.native.memory import RESERVE_BYTES, MemoryPlan, enough_memory, find_device, free_memory_bytes, plan_memory
from worker.native.topology import Node

RESERVE = RESERVE_BYTES["cpu"]
LLAMA_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
}


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """A machine with as much free memory as a test says, all of it in one place."""
    machine = {"bytes": 0}
    monkeypatch.setattr(memory, "choose_node", lambda needed, threads: (None, ""))
    monkeypatch.setattr(memory, "free_memory_bytes", lambda: machine["bytes"])
    return machine


def plan(config: dict[str, Any], device: str = "cpu", stored: str = "bfloat16", **wanted: Any) -> MemoryPlan:
    return plan_memory(DecoderConfig.from_dict(config), stored, "llama", WorkerConfig(device=device, **wanted))


def cache_of(config: dict[str, Any], **wanted: Any) -> int:
    return plan(config, **wanted).kv_cache_bytes


def test_what_does_not_fit_is_told_with_the_arithmetic(free: dict[str, int]) -> None:
    free["bytes"] = int(12.3e9)
    with pytest.raises(ValueError) as raised:
        cache_of(LLAMA_8B, dtype="float32")
    assert str(raised.value) == (
        "llama needs 32.1 GB for its weights in float32 (8.03 B parameters x 4 bytes), 536.9 MB for a KV cache of "
        "2,048 tokens and 134.2 MB to compute in, but 12.3 GB are free; choose a smaller model, or --dtype bfloat16"
    )


def test_the_format_is_that_of_the_tensors_unless_it_is_asked_for(
    free: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "can_pack", lambda device, dtype: True)
    free["bytes"] = int(60e9)
    assert plan(LLAMA_8B, stored="float32").dtype == "float32"
    assert plan(LLAMA_8B, stored="bfloat16").dtype == plan(LLAMA_8B, stored="float16").dtype == "bfloat16"
    assert plan(LLAMA_8B, stored="float32", dtype="float16").dtype == "float16"
    free["bytes"] = int(20e9)
    with pytest.raises(ValueError, match=r"needs 32\.1 GB for its weights in float32"):
        plan(LLAMA_8B, stored="float32")


def test_16_bits_become_float32_on_a_cpu_where_that_fits_a_cache_or_16_bits_are_slow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(memory, "cpu_caches", lambda threads: {"L3": threads * 1000})
    for is_fast, parameters, dtype in ((True, 251, "bfloat16"), (True, 250, "float32"), (False, 251, "float32")):
        monkeypatch.setattr(memory, "can_pack", lambda device, dtype, is_fast=is_fast: is_fast)
        assert memory.auto_dtype(cpu, "bfloat16", parameters, threads=1) == dtype
    assert memory.auto_dtype(cpu, "bfloat16", 251, threads=2) == "float32"


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({"context_tokens": 8}, "cannot be served with a context of 8 tokens: 9 are the least (--context)"),
        (
            {"kv_cache_bytes": 1 << 20},
            "--kv-cache 1048576 holds 8 tokens of llama: 128 are the least (--kv-cache 16777216)",
        ),
    ],
)
def test_a_cache_in_which_no_step_could_be_timed_is_refused(free: dict[str, int], wanted: Any, words: str) -> None:
    free["bytes"] = int(50e9)
    with pytest.raises(ValueError) as raised:
        plan(LLAMA_8B, dtype="bfloat16", **wanted)
    assert words in str(raised.value)
    assert plan(LLAMA_8B, dtype="bfloat16", context_tokens=9, kv_cache_bytes=1 << 24).kv_cache_bytes == 1 << 24


def test_a_cache_of_a_memory_node_is_planned_on_that_node(
    free: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, weights = read_config(find_model("wall")), 134_515_008 * 4
    asked: list[float] = []
    node = Node(1, frozenset({0}), RESERVE + weights + (4 << 30))

    def choose_node(needed: float, threads: int) -> tuple[Node | None, str]:
        asked.append(needed)
        return node, "on NUMA node 1"

    monkeypatch.setattr(memory, "choose_node", choose_node)
    free["bytes"] = 1 << 40
    assert plan(config, dtype="float32", kv_cache_bytes=1 << 28).node == node
    assert asked == [weights + (1 << 28) + RESERVE]
    assert plan(config, dtype="float32") == MemoryPlan("cpu", "float32", 1 << 30, False, node, "on NUMA node 1")
    monkeypatch.setattr(memory, "choose_node", lambda needed, threads: (None, "on all 2 NUMA nodes"))
    on_all = plan(config, dtype="float32")
    assert on_all.node is None and on_all.place == "on all 2 NUMA nodes" and on_all.kv_cache_bytes > 1 << 30


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({"kv_cache_bytes": 30 << 30}, ("32.2 GB for a KV cache as --kv-cache asks and", "less --kv-cache")),
        ({"context_tokens": 131072}, ("34.4 GB for a KV cache as --context 131,072 asks", "less --context")),
    ],
)
def test_the_cache_that_was_asked_for_counts(free: dict[str, int], wanted: dict[str, Any], words: Any) -> None:
    free["bytes"] = int(50e9)
    assert cache_of(LLAMA_8B, dtype="float32") > 0
    with pytest.raises(ValueError) as raised:
        cache_of(LLAMA_8B, dtype="float32", **wanted)
    assert all(word in str(raised.value) for word in words)


def test_the_cache_takes_a_share_of_what_the_weights_leave(free: dict[str, int]) -> None:
    config = read_config(find_model("wall"))
    weights = 134_515_008 * 4
    free["bytes"] = RESERVE + weights + (4 << 30)
    assert cache_of(config, dtype="float32") == 1 << 30
    assert cache_of(config, dtype="float32", kv_cache_bytes=12345678) == 12345678


def test_where_memory_is_short_the_cache_still_holds_a_useful_context(free: dict[str, int]) -> None:
    config = read_config(find_model("wall"))
    least = 2048 * 30 * 2 * 3 * 64 * 4
    free["bytes"] = 134_515_008 * 4 + least + RESERVE
    assert cache_of(config, dtype="float32") == least
    free["bytes"] -= 1
    with pytest.raises(ValueError, match=r"needs 538\.1 MB for its weights"):
        cache_of(config, dtype="float32")


def test_more_than_many_full_contexts_is_of_no_use(free: dict[str, int]) -> None:
    config = read_config(find_model("headgate-demo"))
    free["bytes"] = 1 << 40
    assert cache_of(config, dtype="float32", context_tokens=512) == 64 * 512 * 4 * 2 * 4 * 32 * 4


@pytest.mark.parametrize(("seen", "words"), [(0, "no CUDA device"), (1, "1 CUDA device"), (2, "2 CUDA devices")])
def test_a_device_that_is_not_there_is_told(seen: int, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.torch.cuda, "device_count", lambda: seen)
    with pytest.raises(ValueError, match=f"--device cuda:{seen}: torch sees {words} here"):
        plan(LLAMA_8B, f"cuda:{seen}")


def test_a_device_of_another_kind_is_told() -> None:
    with pytest.raises(ValueError, match="--device tpu: known are auto, cpu, cuda and cuda:N"):
        find_device("tpu")


def test_on_a_gpu_the_cache_takes_most_of_what_the_weights_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(memory.torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(memory.torch.cuda, "mem_get_info", lambda device: (int(24e9), int(25e9)))
    parameters = 8_030_261_248
    spare = 24e9 - RESERVE_BYTES["cuda"] - 2 * parameters
    assert plan(LLAMA_8B, "auto") == MemoryPlan("cuda", "bfloat16", int(memory.CUDA_SHARE * spare), False)
    with pytest.raises(ValueError, match=r"needs 32\.1 GB for its weights in float32 .* but 24\.0 GB are free"):
        plan(LLAMA_8B, "cuda:0", dtype="float32")


def test_a_second_copy_of_the_weights_is_made_where_it_and_the_cache_fit_well(
    free: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "can_pack", lambda device, dtype: dtype == memory.torch.bfloat16)
    config, weights, cache = read_config(find_model("wall")), 134_515_008 * 2, 1 << 26
    for copies, packs in ((1, False), (2, True)):
        free["bytes"] = RESERVE + copies * weights + 2 * cache
        assert plan(config, dtype="bfloat16", kv_cache_bytes=cache) == MemoryPlan("cpu", "bfloat16", cache, packs)
    assert not plan(config, dtype="float32", kv_cache_bytes=1 << 25).packs
    free["bytes"] = RESERVE + 2 * weights + (4 << 30)
    assert plan(config, dtype="bfloat16") == MemoryPlan("cpu", "bfloat16", 1 << 30, True)


def test_free_memory_is_what_the_system_and_the_control_groups_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 16000 kB\nMemAvailable: 8000 kB\n")
    for left, free in ((float("inf"), 8000 * 1024), (9e6, 8000 * 1024), (3e6, 3000000)):
        monkeypatch.setattr(memory, "cgroup_free_bytes", lambda left=left: left)
        assert free_memory_bytes(meminfo) == free


def no_memory() -> None:
    torch.empty(1 << 60)


def no_memory_on_a_gpu() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore about it.")


def no_memory_of_python() -> None:
    raise MemoryError


@pytest.mark.parametrize("allocate", [no_memory, no_memory_on_a_gpu, no_memory_of_python])
def test_memory_that_runs_out_all_the_same_is_one_sentence(allocate: Any) -> None:
    sentence = r"memory ran out while wall was being loaded .* less --kv-cache"
    with pytest.raises(ValueError, match=sentence) as raised, enough_memory("wall"):
        allocate()
    assert "\n" not in str(raised.value)


def test_another_error_of_torch_stays_what_it_is() -> None:
    with pytest.raises(RuntimeError, match="shape"), enough_memory("wall"):
        torch.ones(2, 3).view(7)
