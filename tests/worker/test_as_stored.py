"""Weights of few bits in the C step: they are what the file says, and take no more memory than that."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_maker import own_name, random_blocks, tensors_of, values_of, write_gguf
from safetensors.torch import save_file

from worker.config import WorkerConfig
from worker.native.config import DecoderConfig
from worker.native.cpu.build import NoLibrary, load_library
from worker.native.cpu.pack import Kernels
from worker.native.cpu.program import AS_STORED, PackedWeights, bytes_as_stored, load_packed
from worker.native.forms import open_checkpoint
from worker.native.groups import Groups
from worker.native.loader import floats, stored_bytes, tensor_shapes
from worker.native.memory import plan_memory

SMALL: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 300,
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 768,
    "max_position_embeddings": 256,
    "rms_norm_eps": 2**-16,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
LARGE = SMALL | {"vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8}
TypeOf = Callable[[str], str]


def mixed(name: str) -> str:
    """As files that are called Q4_K_M."""
    is_wide = "down_proj" in name or "v_proj" in name or "lm_head" in name
    return "Q6_K" if is_wide and ".1." not in name else "Q4_K"


def alike(type: str) -> TypeOf:
    return lambda name: type


def a_file(path: Path, config: dict[str, Any], type_of: TypeOf) -> Path:
    """A model whose matrices have random numbers of these types."""
    shapes = tensor_shapes(DecoderConfig.from_dict(config))
    vectors = {name: np.ones(shape, np.float32) for name, shape in shapes.items() if len(shape) == 1}
    matrices = {
        own_name(name): random_blocks(type_of(name), *shape, seed)
        for seed, (name, shape) in enumerate(shapes.items())
        if len(shape) == 2
    }
    return write_gguf(path, values_of(config), tensors_of(config, vectors) | matrices)


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    try:
        return Kernels(load_library(), 2)
    except NoLibrary as error:
        pytest.skip(str(error))


def matrices_of(weights: PackedWeights, kernels: Kernels) -> dict[str, torch.Tensor]:
    """By the end of a tensor's name what was packed for it, of the first layer."""
    layer, unpacked = weights.layers[0], kernels.unpack
    gate, up = unpacked(layer.gate_up.matrix).unflatten(0, (-1, 2, 16)).unbind(1)
    q, k, v = unpacked(layer.qkv.matrix).split([256, 128, 128])
    return {
        "embed_tokens": unpacked(weights.embedding),
        "lm_head": unpacked(weights.head.matrix),
        "layers.0.self_attn.q_proj": q,
        "layers.0.self_attn.k_proj": k,
        "layers.0.self_attn.v_proj": v,
        "layers.0.self_attn.o_proj": unpacked(layer.o.matrix),
        "layers.0.mlp.gate_proj": gate.flatten(0, 1),
        "layers.0.mlp.up_proj": up.flatten(0, 1),
        "layers.0.mlp.down_proj": unpacked(layer.down.matrix),
    }


def name_of(end: str) -> str:
    return f"{'' if end == 'lm_head' else 'model.'}{end}.weight"


@pytest.mark.parametrize("type", ["Q8_0", "Q4_0"])
def test_groups_like_the_kernels_are_placed_bit_for_bit(type: str, kernels: Kernels, tmp_path: Path) -> None:
    config = DecoderConfig.from_dict(SMALL)
    with open_checkpoint(a_file(tmp_path / "m.gguf", SMALL, alike(type)), config) as checkpoint:
        weights = load_packed(checkpoint, config, AS_STORED, kernels)
        assert weights.formats == [{"Q8_0": "int8", "Q4_0": "int4"}[type]]
        for end, found in matrices_of(weights, kernels).items():
            assert torch.equal(found, floats(checkpoint.read(name_of(end)))), end


def test_scales_and_offsets_lose_no_more_than_float16_does(kernels: Kernels, tmp_path: Path) -> None:
    config = DecoderConfig.from_dict(SMALL)
    with open_checkpoint(a_file(tmp_path / "m.gguf", SMALL, alike("Q4_K")), config) as checkpoint:
        weights = load_packed(checkpoint, config, AS_STORED, kernels)
        for end, found in matrices_of(weights, kernels).items():
            right = checkpoint.read(name_of(end))
            assert isinstance(right, Groups)
            most = (15 * right.scale.abs() + right.offset.abs()).repeat_interleave(32, 1) * 2**-11
            assert ((found - right.floats()).abs() <= 1.001 * most).all(), end


def test_tensors_that_are_one_matrix_get_the_widest_format_of_them(kernels: Kernels, tmp_path: Path) -> None:
    config = DecoderConfig.from_dict(SMALL)
    with open_checkpoint(a_file(tmp_path / "m.gguf", SMALL, mixed), config) as checkpoint:
        weights = load_packed(checkpoint, config, AS_STORED, kernels)
        first, second = weights.layers
        assert [each.matrix.format for each in (first.qkv, first.o, first.gate_up, first.down)] == [
            "int8", "int4", "int4", "int8",
        ]  # fmt: skip
        assert second.qkv.matrix.format == second.down.matrix.format == "int4"
        assert weights.head.matrix.format == "int8" and weights.embedding.format == "int4"
        for end, found in matrices_of(weights, kernels).items():
            right = floats(checkpoint.read(name_of(end)))
            assert (found - right).abs().max() <= 0.0045 * right.abs().max(), end  # half a step of 127, or of float16


def test_numbers_that_are_none_are_refused(kernels: Kernels, tmp_path: Path) -> None:
    config = DecoderConfig.from_dict(SMALL)
    for type in ("Q8_0", "Q4_K", "Q6_K"):
        path = a_file(tmp_path / f"{type}.gguf", SMALL, alike(type))
        content = bytearray(path.read_bytes())
        content[-2:] = np.array(np.inf, np.float16).tobytes()  # of a Q6_K its scale
        block = {"Q8_0": 34, "Q4_K": 144, "Q6_K": 2}[type]
        content[-block : 2 - block or None] = np.array(np.nan, np.float16).tobytes()
        path.write_bytes(content)
        with open_checkpoint(path, config) as checkpoint, pytest.raises(ValueError, match=r"\(Q.*has NaN or infinite"):
            load_packed(checkpoint, config, AS_STORED, kernels)


# --- memory -----------------------------------------------------------------------------------------------------------

MEASURE = """
import gc, json, sys
from pathlib import Path
from worker.files import read_config
from worker.native.build import _decoder
from worker.native.cpu.build import load_library
from worker.native.cpu.pack import Kernels
from worker.native.cpu.program import load_packed
from worker.native.forms import open_checkpoint

def resident_bytes():
    gc.collect()
    lines = dict(line.split(":") for line in open("/proc/self/smaps_rollup").read().splitlines()[1:])
    return int(lines["Pss_Anon"].split()[0]) * 1024

def measure(path, format):
    config = _decoder(path, read_config(path))
    before = resident_bytes()
    with open_checkpoint(path, config) as checkpoint:
        weights = load_packed(checkpoint, config, format, kernels)
    del checkpoint
    return sum(tensor.nbytes for tensor in weights.tensors()), resident_bytes() - before

kernels = Kernels(load_library(), 1)
asked = json.load(sys.stdin)
for path, format in asked[:1] + asked:  # the first one, once more, pays for what is needed once
    print(json.dumps(measure(Path(path), format)))
"""
SLACK_BYTES = 6 << 20  # a huge page begun, and what malloc keeps for the next tensor


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_resident_memory_is_that_of_the_packed_form(kernels: Kernels, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LARGE))
    shapes = tensor_shapes(DecoderConfig.from_dict(LARGE))
    plain = {name: torch.randn(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    save_file(plain, tmp_path / "model.safetensors")
    types: dict[str, TypeOf] = {"Q8_0": alike("Q8_0"), "Q4_0": alike("Q4_0"), "Q4_K": alike("Q4_K"), "mixed": mixed}
    files = {name: str(a_file(tmp_path / f"{name}.gguf", LARGE, type_of)) for name, type_of in types.items()}
    asked = [[str(tmp_path), format] for format in ("bfloat16", "int8", "int4")]
    asked += [[path, AS_STORED] for path in files.values()]
    done = subprocess.run(
        [sys.executable, "-P", "-c", MEASURE], input=json.dumps(asked), capture_output=True, text=True, check=True
    )
    told = [json.loads(line) for line in done.stdout.splitlines()[1:]]
    for (packed_bytes, resident_bytes), (path, format) in zip(told, asked, strict=True):
        assert resident_bytes <= 1.15 * packed_bytes + SLACK_BYTES, (path, format)
        assert resident_bytes >= 0.9 * packed_bytes, (path, format)
    packed = dict(zip(("bfloat16", "int8", "int4", *files), (packed_bytes for packed_bytes, _ in told), strict=True))
    assert packed["Q8_0"] == pytest.approx(packed["int8"]) and packed["Q4_0"] == pytest.approx(packed["int4"])
    assert packed["int4"] < packed["Q4_K"] < packed["mixed"] < packed["int8"] < packed["bfloat16"]


@pytest.mark.parametrize(
    ("type_of", "most"), [(alike("Q8_0"), 1.0), (alike("Q4_0"), 1.0), (alike("Q4_K"), 20 / 18), (mixed, 1.25)]
)
def test_packed_bytes_are_known_beforehand_and_near_the_files(
    type_of: TypeOf, most: float, kernels: Kernels, tmp_path: Path
) -> None:
    """Scale and offset of Q4_K become float16 for each group: 20 bytes instead of 18. Q6_K becomes 8.5 bits."""
    config = DecoderConfig.from_dict(LARGE)
    with open_checkpoint(a_file(tmp_path / "m.gguf", LARGE, type_of), config) as checkpoint:
        packed_bytes = bytes_as_stored(checkpoint, config)
        weights = load_packed(checkpoint, config, AS_STORED, kernels)
        assert packed_bytes <= 1.001 * most * stored_bytes(checkpoint, config)
    assert packed_bytes == sum(tensor.nbytes for tensor in weights.tensors())
    assert weights.read_bytes < packed_bytes - weights.embedding.numbers.nbytes
    plan = plan_memory(config, "bfloat16", "m", WorkerConfig(device="cpu"), True, packed_bytes)
    assert plan.dtype == AS_STORED and not plan.packs
    assert plan_memory(config, "bfloat16", "m", WorkerConfig(device="cpu"), False, packed_bytes).dtype != AS_STORED
    assert (
        plan_memory(config, "bfloat16", "m", WorkerConfig(device="cpu", dtype="int4"), True, packed_bytes).dtype
        == "int4"
    )


def test_what_takes_too_much_as_it_is_stored_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.native.memory.free_memory_bytes", lambda: 1 << 20)
    config = DecoderConfig.from_dict(LARGE)
    with pytest.raises(
        ValueError, match=r"^m needs 20\.0 MB for its weights as stored \(33\.6 M parameters x 0\.5959 bytes\)"
    ):
        plan_memory(config, "bfloat16", "m", WorkerConfig(device="cpu"), True, 20_000_000)
