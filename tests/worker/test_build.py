"""What a worker says of itself before anything is loaded, and models that are of no use."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_maker import tensors_of, tokenizer_values, values_of, write_gguf
from safetensors.torch import load_file, save_file

from scheduler.model import DTYPE_BYTES
from worker.build import StartFailed, build, own_name
from worker.config import WorkerConfig
from worker.files import DEMO, find_config, find_model, read_config
from worker.native import machine, memory
from worker.native.build import load


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "tiny-llama"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "other.json").write_text("{}")
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("headgate-demo", "headgate-demo"),
        ("wall", "wall"),
        (".", "tiny-llama"),
        ("../tiny-llama", "tiny-llama"),
        ("~/tiny-llama", "tiny-llama"),
    ],
)
def test_a_model_is_called_as_its_folder(folder: Path, name: str, expected: str) -> None:
    assert own_name(WorkerConfig(model=name), find_model(name)) == expected


def test_a_hub_model_is_called_by_its_whole_name(folder: Path) -> None:
    assert own_name(WorkerConfig(model="acme/tiny"), folder / "snapshots" / "abc") == "acme/tiny"


@pytest.mark.parametrize(
    ("name", "expected"),
    [("wall", "wall"), (".", "tiny-llama"), ("config.json", "tiny-llama"), ("other.json", "other")],
)
def test_random_weights_are_called_as_the_config_or_its_folder(folder: Path, name: str, expected: str) -> None:
    assert own_name(WorkerConfig(random_weights=name), find_config(name)) == expected


def test_what_stops_a_start_is_one_line(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(StartFailed, match=r"tokenizer\.json is not a tokenizer") as raised:
        build(WorkerConfig(model="."))
    assert "\n" not in str(raised.value)


# --- a start in this process ------------------------------------------------------------------------------------------


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever a worker's process does to itself is undone."""
    environ, threads = dict(os.environ), torch.get_num_threads()
    monkeypatch.setattr(memory, "choose_node", lambda needed, threads: (None, ""))
    yield
    torch.set_num_threads(threads)
    os.environ.clear()
    os.environ.update(environ)


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    return Path(shutil.copytree(find_model(DEMO), tmp_path / "copy"))


def change_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("told", [None, "bfloat16", ["float32"]])
def test_the_tensors_say_their_format_and_not_the_config(
    settled: None, demo: Path, stored: torch.dtype, told: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "can_pack", lambda device, dtype: True)
    monkeypatch.setattr(memory, "cpu_caches", lambda threads: {"L2": 1})
    for limit in ("PROBE_SECONDS", "GLANCE_SECONDS"):
        monkeypatch.setattr(machine, limit, 0.001)
    change_json(demo / "config.json", dtype=told, torch_dtype=told)
    path = demo / "model.safetensors"
    save_file({name: tensor.to(stored) for name, tensor in load_file(path).items()}, path)
    native = load(demo, "demo", WorkerConfig(threads=1, kv_cache_bytes=1 << 22, device="cpu"))
    assert native.engine.dtype == ("float32" if stored == torch.float32 else memory.PACKED_DTYPE)
    assert native.shape.weight_bytes_each == DTYPE_BYTES[native.engine.dtype]


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    """The demo model in float32."""
    folder = find_model(DEMO)
    weights = {name: tensor.float().numpy() for name, tensor in load_file(folder / "model.safetensors").items()}
    config, tokenizer = read_config(folder), json.loads((folder / "tokenizer.json").read_text())
    values = values_of(config) | tokenizer_values(tokenizer, "llama-bpe", eos_token_id=2, add_bos_token=False)
    return write_gguf(tmp_path / "Demo-F32.gguf", values, tensors_of(config, weights))


def test_a_gguf_file_is_the_model_it_was_made_from(
    settled: None, gguf_file: Path, demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for limit in ("PROBE_SECONDS", "GLANCE_SECONDS"):
        monkeypatch.setattr(machine, limit, 0.001)
    wanted = WorkerConfig(threads=1, kv_cache_bytes=1 << 22, device="cpu", dtype="float32")
    native, right = (load(model, "demo", wanted) for model in (find_model(str(gguf_file)), demo))
    assert native.stored_form == "38 x F32; 15.2 MB in the file" and right.stored_form == ""
    assert native.shape == right.shape
    assert all(map(torch.equal, native.engine.weights, right.engine.weights))
    assert own_name(WorkerConfig(model=str(gguf_file)), gguf_file) == "Demo-F32"


def test_a_gguf_file_that_is_of_no_use_is_refused_in_one_line(settled: None, gguf_file: Path) -> None:
    whole = gguf_file.read_bytes()
    gguf_file.write_bytes(whole[:-100])
    assert str(gguf_file) in refusal(r"blk\.3\.\S+ would end|output_norm.weight: it would end", model=str(gguf_file))
    gguf_file.write_bytes(whole.replace(b"tokenizer.ggml.pre", b"tokenizer.ggml.was"))
    assert str(gguf_file) in refusal(r"names no tokenizer\.ggml\.pre", model=str(gguf_file))


def lose_a_shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    shard = "model-00001-of-00002.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": shard}}))


def forget_the_end(folder: Path) -> None:
    change_json(folder / "config.json", eos_token_id=None)
    change_json(folder / "generation_config.json", eos_token_id=None)
    change_json(folder / "tokenizer_config.json", eos_token=None)


def lose_the_embedding(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.embed_tokens.weight"]
    save_file(tensors, path)


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a shard that is missing": (lose_a_shard, r"lacks model-00001-of-00002\.safetensors, which \S+index\.json names"),
    "a tensor that is missing": (lose_the_embedding, r"has no tensor model\.embed_tokens\.weight"),
    "a config that lies": (
        lambda folder: change_json(folder / "config.json", intermediate_size=648),
        r"gate_proj\.weight",
    ),
    "an architecture nobody knows": (
        lambda folder: change_json(folder / "config.json", architectures=["MambaForCausalLM"]),
        r"MambaForCausalLM; known: LlamaForCausalLM",
    ),
    "a config that is no JSON": (lambda folder: (folder / "config.json").write_text("{"), r"config\.json is not JSON"),
    "a tokenizer that is none": (
        lambda folder: (folder / "tokenizer.json").write_text("{}"),
        r"tokenizer\.json is not a tokenizer",
    ),
    "a tokenizer without an end": (forget_the_end, r"names no token that ends a text"),
    "sampling that means nothing": (
        lambda folder: change_json(folder / "generation_config.json", top_p=-1),
        r"generation_config\.json: top_p must be more than 0",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_model_that_is_of_no_use_is_refused_in_one_line(settled: None, fault: str, demo: Path) -> None:
    break_it, sentence = BROKEN[fault]
    break_it(demo)
    assert str(demo) in refusal(model=str(demo), threads=1, kv_cache_bytes=1 << 22, wanted=sentence)


def refusal(wanted: str, **config: Any) -> str:
    with pytest.raises(StartFailed) as raised:
        build(WorkerConfig(**config))
    line = str(raised.value)
    assert "\n" not in line and re.search(wanted, line), line
    return line


def test_memory_that_runs_out_while_loading_ends_the_start_with_a_sentence(
    settled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the plan was made from memory that is not there."""
    monkeypatch.setattr(memory, "free_memory_bytes", lambda: 1 << 62)
    refusal(r"memory ran out while headgate-demo was being loaded", threads=1, kv_cache_bytes=1 << 60)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"context_tokens": 8}, r"headgate-demo cannot be served with a context of 8 tokens"),
        ({"kv_cache_bytes": 1000}, r"--kv-cache 1000 holds 0 tokens of headgate-demo: 128 are the least"),
        ({"device": "cuda:99"}, r"--device cuda:99: torch sees"),
    ],
)
def test_what_cannot_be_served_from_is_refused(settled: None, config: dict[str, Any], sentence: str) -> None:
    refusal(sentence, threads=1, **config)


def test_the_least_context_is_served(settled: None) -> None:
    built = build(WorkerConfig(context_tokens=9, threads=1))
    assert built.info.context_tokens == 9
