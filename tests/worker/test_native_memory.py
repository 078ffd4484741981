"""What fits is known, and told with the arithmetic, before anything is allocated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from worker.config import WorkerConfig
from worker.files import find_model, read_config
from worker.native import memory
from worker.native.config import DecoderConfig
from worker.native.memory import MemoryPlan, free_memory_bytes, plan_memory

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
    """A machine with as much free memory as a test says."""
    machine = {"bytes": 0}
    monkeypatch.setattr(memory, "free_memory_bytes", lambda: machine["bytes"])
    return machine


def plan(config: dict[str, Any], device: str = "cpu", **wanted: Any) -> MemoryPlan:
    return plan_memory(
        config, DecoderConfig.from_dict(config), "bfloat16", "llama", WorkerConfig(device=device, **wanted)
    )


def cache_of(config: dict[str, Any], **wanted: Any) -> int:
    return plan(config, **wanted).kv_cache_bytes


def test_what_does_not_fit_is_told_with_the_arithmetic(free: dict[str, int]) -> None:
    free["bytes"] = int(12.3e9)
    with pytest.raises(ValueError) as raised:
        cache_of(LLAMA_8B, dtype="float32")
    assert str(raised.value) == (
        "llama needs 32.1 GB for its weights in float32 (8.03 B parameters x 4 bytes) and 0.5 GB for a KV cache of "
        "2,048 tokens, but 12.3 GB are free; choose a smaller model, or --dtype bfloat16"
    )


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({"kv_cache_bytes": 30 << 30}, ("32.2 GB for a KV cache of --kv-cache", "less --kv-cache")),
        ({"context_tokens": 131072}, ("34.4 GB for a KV cache of --context 131,072", "less --context")),
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
    free["bytes"] = weights + (4 << 30)
    assert cache_of(config, dtype="float32") == 1 << 30
    assert cache_of(config, dtype="float32", kv_cache_bytes=12345678) == 12345678


def test_where_memory_is_short_the_cache_still_holds_a_useful_context(free: dict[str, int]) -> None:
    config = read_config(find_model("wall"))
    least = 2048 * 30 * 2 * 3 * 64 * 4
    free["bytes"] = 134_515_008 * 4 + least + 4096
    assert cache_of(config, dtype="float32") == least
    free["bytes"] = 134_515_008 * 4 + least - 4096
    with pytest.raises(ValueError, match=r"needs 0\.5 GB for its weights"):
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


def test_on_a_gpu_the_cache_takes_most_of_what_the_weights_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(memory.torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(memory.torch.cuda, "mem_get_info", lambda device: (int(24e9), int(25e9)))
    parameters = 8_030_261_248
    assert plan(LLAMA_8B, "auto") == MemoryPlan(int(memory.CUDA_SHARE * (24e9 - 2 * parameters)), False)
    with pytest.raises(ValueError, match=r"needs 32\.1 GB for its weights in float32 .* but 24\.0 GB are free"):
        plan(LLAMA_8B, "cuda:0", dtype="float32")


def test_a_second_copy_of_the_weights_is_made_where_it_and_the_cache_fit_well(
    free: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "can_pack", lambda device, dtype: dtype == memory.torch.bfloat16)
    config, weights, cache = read_config(find_model("wall")), 134_515_008 * 2, 1 << 26
    for copies, packs in ((1, False), (2, True)):
        free["bytes"] = copies * weights + 2 * cache
        assert plan(config, dtype="bfloat16", kv_cache_bytes=cache) == MemoryPlan(cache, packs)
    assert not plan(config, dtype="float32", kv_cache_bytes=1 << 20).packs
    free["bytes"] = 2 * weights + (4 << 30)
    assert plan(config, dtype="bfloat16") == MemoryPlan(1 << 30, True)


def test_free_memory_is_what_the_control_group_leaves(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 16000 kB\nMemAvailable: 8000 kB\n")
    assert free_memory_bytes(meminfo, tmp_path) == 8000 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory_bytes(meminfo, tmp_path) == 8000 * 1024
    (tmp_path / "memory.max").write_text("5000000\n")
    (tmp_path / "memory.current").write_text("3000000\n")
    (tmp_path / "memory.stat").write_text("anon 1\nfile 1000000\n")
    assert free_memory_bytes(meminfo, tmp_path) == 3000000
