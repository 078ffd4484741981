"""GGUF files: what is read out of them, and what is said about those that are wrong."""

from __future__ import annotations

import json
import random
import struct
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_maker import Tensor, floats, gguf_bytes, own_name, tensors_of, values_of, write_gguf
from safetensors.torch import save_file

from worker.files import ModelNotFound, find_local_model, has_random_weights, read_config
from worker.gguf import KINDS, is_gguf, read_gguf
from worker.native.build import _decoder
from worker.native.checkpoint import Checkpoint
from worker.native.config import DecoderConfig
from worker.native.decoder import rope_frequencies
from worker.native.forms import open_checkpoint
from worker.native.gguf import KERNEL_BITS, PLAIN, GgufCheckpoint, unpack
from worker.native.groups import Groups
from worker.native.loader import load_weights, tensor_shapes

CPU = torch.device("cpu")
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "rms_norm_eps": 2**-16,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}


def random_weights(config: dict[str, Any]) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    shapes = tensor_shapes(DecoderConfig.from_dict(config))
    return {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def a_file(folder: Path, kind: str = "llama", config: dict[str, Any] = CONFIG, **metadata: Any) -> Path:
    """A whole model; metadata with dots for underscores of two."""
    values = values_of(config, kind) | {f"{kind}.{key.replace('__', '.')}": value for key, value in metadata.items()}
    is_turned = kind in ("llama", "smollm3")
    return write_gguf(folder / "m.gguf", values, tensors_of(config, random_weights(config), is_turned))


def decoder_of(path: Path) -> DecoderConfig:
    return _decoder(path, read_config(path))


# --- types ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("type", KINDS)
def test_every_type_is_read_as_the_reference_reads_it(type: int) -> None:
    gguf = pytest.importorskip("gguf", reason="the reference reader is not installed")
    kind = KINDS[type]
    rows = np.random.default_rng(type).integers(0, 256, (16, kind.block_bytes * 4), np.uint8)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType(type))
        found = unpack(kind, rows)
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(type)] == (kind.block, kind.block_bytes)
    found = found.floats() if isinstance(found, Groups) else found.float()
    assert np.array_equal(found.numpy(), expected, equal_nan=True)


def test_types_of_groups_of_32_are_groups_of_the_kernel_that_is_said_for_them() -> None:
    for kind in KINDS.values():
        if kind.name in PLAIN:
            continue
        found = unpack(kind, np.ones((2, kind.block_bytes), np.uint8))
        assert isinstance(found, Groups) != (kind.name in ("Q2_K", "Q3_K", "Q6_K"))
        if isinstance(found, Groups):
            assert found.bits == KERNEL_BITS[kind.name] and int(found.values.max()) < 1 << found.bits


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"])
def test_some_rows_are_the_rows_of_all(name: str, tmp_path: Path) -> None:
    """Of a matrix whose rows lie in another order, too."""
    rows, columns = tensor_shapes(DecoderConfig.from_dict(CONFIG))[name]
    q8_0 = np.random.default_rng(0).integers(0, 60, (rows, columns // 32 * 34), np.uint8)
    tensors = tensors_of(CONFIG, random_weights(CONFIG)) | {own_name(name): Tensor(8, (columns, rows), q8_0.tobytes())}
    path = write_gguf(tmp_path / "m.gguf", values_of(CONFIG), tensors)
    with open_checkpoint(path, decoder_of(path)) as checkpoint:
        whole = checkpoint.read(name)
        assert isinstance(whole, Groups) and whole.is_centred and whole.shape == (rows, columns)
        part = checkpoint.read(name, slice(5, 19))
        assert isinstance(part, Groups) and torch.equal(part.floats(), whole.floats()[5:19])
        assert checkpoint.kernel_bits(name) == 8 and checkpoint.dtype(name) == "bfloat16"
        assert checkpoint.stored_bytes(name) == q8_0.nbytes


# --- models -----------------------------------------------------------------------------------------------------------

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 20.0}
FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {}, {"rope__dimension_count": 8}),
    "tied": ("llama", {"tie_word_embeddings": True}, {}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}, {}),
    "mistral": (
        "llama",
        {"architectures": ["MistralForCausalLM"], "sliding_window": 16},
        {"attention__sliding_window": 16},
    ),
    "qwen2": ("qwen2", {"architectures": ["Qwen2ForCausalLM"]}, {}),
    "qwen3": ("qwen3", {"architectures": ["Qwen3ForCausalLM"], "head_dim": 16}, {}),
    "smollm3": ("smollm3", {"architectures": ["SmolLM3ForCausalLM"], "tie_word_embeddings": True}, {}),
    "linear": (
        "llama",
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"rope__scaling__type": "linear", "rope__scaling__factor": 2.0},
    ),
    "old linear": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, {"rope__scale_linear": 2.0}),
    "yarn": (
        "qwen2",
        {"architectures": ["Qwen2ForCausalLM"], "rope_scaling": YARN},
        {
            "rope__scaling__type": "yarn",
            "rope__scaling__factor": 4.0,
            "rope__scaling__original_context_length": 16,
            "rope__scaling__yarn_beta_fast": 20.0,
        },
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_is_the_same_model_as_its_checkpoint(family: str, tmp_path: Path) -> None:
    kind, changes, metadata = FAMILIES[family]
    config = {**CONFIG, **changes}
    save_file({name: torch.from_numpy(a) for name, a in random_weights(config).items()}, tmp_path / "model.safetensors")
    path = a_file(tmp_path, kind, config, **metadata)
    own, expected = decoder_of(path), DecoderConfig.from_dict(config)
    assert own == expected
    with open_checkpoint(path, own) as file, Checkpoint(tmp_path) as checkpoint:
        weights = load_weights(file, own, CPU, torch.float32)
        for found, right in zip(
            weights.tensors(), load_weights(checkpoint, expected, CPU, torch.float32).tensors(), strict=True
        ):
            assert torch.equal(found, right)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(("original", "kind"), [(8192, "llama3"), (2048, "divided")])
def test_llama3_frequencies_come_out_of_their_tensor(original: int, kind: str, tmp_path: Path) -> None:
    config = {**CONFIG, "head_dim": 64, "rope_scaling": LLAMA3 | {"original_max_position_embeddings": original}}
    right = rope_frequencies(DecoderConfig.from_dict(config).rope, 64)
    plain = rope_frequencies(DecoderConfig.from_dict({**config, "rope_scaling": None}).rope, 64)
    tensors = tensors_of(config, random_weights(config)) | {"rope_freqs.weight": floats((plain / right).numpy())}
    path = write_gguf(tmp_path / "m.gguf", values_of(config), tensors)
    rope = decoder_of(path).rope
    assert rope.kind == kind
    torch.testing.assert_close(rope_frequencies(rope, 64), right, rtol=1e-6, atol=0)
    with open_checkpoint(path, decoder_of(path)) as checkpoint:
        load_weights(checkpoint, decoder_of(path), CPU, torch.float32)


def test_what_a_file_holds_is_told(tmp_path: Path) -> None:
    path = a_file(tmp_path)
    with open_checkpoint(path, decoder_of(path)) as checkpoint:
        assert checkpoint.describe() == "21 x F32; 0.1 MB in the file"


def test_version_2_is_read_as_well(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", values_of(CONFIG), tensors_of(CONFIG, random_weights(CONFIG)), version=2)
    assert decoder_of(path).vocab == 40


def test_a_file_is_found_by_its_name_or_its_first_bytes(tmp_path: Path) -> None:
    path = a_file(tmp_path)
    other = path.rename(tmp_path / "model")
    assert find_local_model(str(other)) == other and is_gguf(other) and not has_random_weights(other)
    with pytest.raises(ModelNotFound, match="is neither a folder nor a GGUF file"):
        find_local_model(__file__)


def test_a_folder_that_holds_only_a_gguf_file_names_it(tmp_path: Path) -> None:
    a_file(tmp_path)
    with pytest.raises(ModelNotFound, match=r"has no config\.json, but m\.gguf: name that file itself"):
        find_local_model(str(tmp_path))


# --- wrong files ------------------------------------------------------------------------------------------------------

DOWN = "blk.1.ffn_down.weight"
Change = Callable[[dict[str, Any], dict[str, Tensor]], object]


def without(key: str) -> Change:
    return lambda values, tensors: (values.pop(key, None), tensors.pop(key, None))


def with_value(key: str, value: Any) -> Change:
    return lambda values, tensors: values.update({key: value})


def with_tensor(name: str, tensor: Tensor) -> Change:
    return lambda values, tensors: tensors.update({name: tensor})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (without("general.architecture"), "names no general.architecture"),
        (with_value("general.architecture", "mamba"), "unknown general.architecture mamba; known: llama, qwen2"),
        (with_value("general.architecture", 7), "general.architecture is of the wrong type: a text is needed"),
        (without("llama.block_count"), "names no llama.block_count"),
        (with_value("llama.block_count", "two"), "llama.block_count is of the wrong type"),
        (with_value("llama.block_count", -1), "llama.block_count is -1"),
        (with_value("llama.attention.head_count", [4, 4]), "llama.attention.head_count is of the wrong type"),
        (with_value("llama.attention.head_count", 0), "is no multiple of 0 heads"),
        (with_value("llama.attention.head_count_kv", 3), "heads must be a multiple of KV heads"),
        (with_value("llama.rope.dimension_count", 4), "llama.rope.dimension_count is 4, but a head has 8"),
        (with_value("llama.rope.scaling.type", "longrope"), "llama.rope.scaling.type longrope is not supported"),
        (with_value("llama.rope.scaling.attn_factor", 1.5), "llama.rope.scaling.attn_factor is 1.5"),
        (with_value("llama.expert_count", 8), "llama.expert_count is 8, which is not supported"),
        (with_value("split.count", 3), "it is one of 3 parts; join them first"),
        (with_value("general.alignment", 24), "general.alignment: 24 is no power of two"),
        (with_value("general.alignment", True), "general.alignment: True is no power of two"),
        (with_tensor("rope_freqs.weight", floats([1.0, 2.0])), "2 divisors of RoPE's frequencies, but 4 are needed"),
        (with_tensor("rope_freqs.weight", floats([0.0] * 4)), "rope_freqs.weight holds numbers that are not above 0"),
        (without("token_embd.weight"), "has no tensor token_embd.weight"),
        (without(DOWN), f"do not fit its metadata: missing: {DOWN}"),
        (with_tensor("blk.2.attn_q.weight", floats([[1.0]])), "unexpected: blk.2.attn_q.weight"),
        (with_tensor("nonsense", floats([1.0])), "unexpected: nonsense"),
        (
            with_tensor(DOWN, floats(np.zeros((3, 5)))),
            rf"of another shape: {DOWN} \(F32\) \[3, 5\] instead of \[32, 64\]",
        ),
        (with_tensor(DOWN, floats(np.full((32, 64), np.nan))), rf"{DOWN} \(F32\) has NaN or infinite values"),
        (with_tensor(DOWN, Tensor(16, (64, 32), bytes(9999))), f"{DOWN}: its type is IQ2_XXS; what can be read is F32"),
        (with_tensor(DOWN, Tensor(4711, (64, 32), bytes(9))), f"{DOWN}: its type is 4711"),
        (
            with_tensor(DOWN, Tensor(12, (64, 32), bytes(9))),
            f"{DOWN}: rows of 64 numbers are not made of Q4_K blocks of 256",
        ),
        (with_tensor(DOWN, Tensor(0, (0, 32), b"")), f"{DOWN}: rows of 0 numbers"),
        (with_tensor(DOWN, Tensor(0, (1,) * 5, bytes(4))), f"{DOWN}: it has 5 dimensions"),
        (with_tensor(DOWN, Tensor(0, (1 << 62, 1 << 62), bytes(4))), rf"{DOWN}: it would end at byte \d+ .* truncated"),
    ],
)
def test_what_is_wrong_is_one_sentence_that_names_file_and_key_or_tensor(
    change: Change, sentence: str, tmp_path: Path
) -> None:
    values, tensors = values_of(CONFIG), tensors_of(CONFIG, random_weights(CONFIG))
    change(values, tensors)
    path = write_gguf(tmp_path / "m.gguf", values, tensors)
    with pytest.raises(ValueError, match=sentence) as raised:
        load_all(path)
    assert str(raised.value).startswith(str(path)) and "\n" not in str(raised.value)


def load_all(path: Path) -> None:
    decoder = decoder_of(path)
    with open_checkpoint(path, decoder) as checkpoint:
        load_weights(checkpoint, decoder, CPU, torch.float32)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "does not begin with GGUF"),
        (b"GGML" + bytes(40), "does not begin with GGUF"),
        (b"GGUF", "4 bytes at byte 4 are more than the file has"),
        (b"GGUF" + struct.pack("<I", 1), r"its version is 1; those that can be read are \(2, 3\)"),
        (b"GGUF" + struct.pack(">I", 3), "it is big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0), "a tensor: 8 bytes at byte 24 are more than the file has"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60), "a key: 8 bytes at byte 24 are more than the file has"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 50), "a key: 1125899906842624 bytes at byte 32"),
        (gguf_bytes({"a": 1}, {}).replace(b"a\4\0\0\0", b"a\5\5\0\0"), "a: its value is of the unknown type 1285"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 9, 1), "k: an array of the type 9 is not read"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 8, 1 << 40), "k: an array of 1099511627776 entries"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 0, 1 << 20), "k: 1048576 bytes at byte 49 are more"),
        (b"GGUF" + struct.pack("<IQQQ1s", 3, 0, 1, 1, b"\xff"), "a key: a text at byte 32 is not in UTF-8"),
        (
            b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + 2 * (struct.pack("<Q1sIB", 1, b"k", 0, 0)),
            "k: the key is there twice",
        ),
    ],
)
def test_a_wrong_head_is_one_sentence(content: bytes, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=sentence) as raised:
        read_gguf(path)
    assert str(raised.value).startswith(str(path))


def test_a_file_that_was_cut_off_anywhere_names_what_is_missing(tmp_path: Path) -> None:
    whole = gguf_bytes(values_of(CONFIG), tensors_of(CONFIG, random_weights(CONFIG)))
    for kept in random.Random(0).sample(range(len(whole)), 200):
        path = tmp_path / f"{kept}.gguf"
        path.write_bytes(whole[:kept])
        with pytest.raises(ValueError, match=r"truncated|does not begin with GGUF"):
            read_gguf(path)


def test_a_damaged_file_is_read_or_refused_with_a_sentence_and_little_memory(tmp_path: Path) -> None:
    whole = gguf_bytes(values_of(CONFIG), tensors_of(CONFIG, random_weights(CONFIG)))
    chance, refused = random.Random(1), 0
    tracemalloc.start()
    for attempt in range(400):
        content = bytearray(whole)
        for _ in range(chance.randint(1, 4)):  # most of them in the head
            content[chance.randrange(2500 if attempt % 4 else len(whole))] = chance.choice(
                (0, 1, 127, 255, chance.randrange(256))
            )
        path = tmp_path / f"{attempt}.gguf"
        path.write_bytes(content)
        try:
            load_all(path)
        except ValueError as error:
            refused += 1
            assert str(path) in str(error) and len(str(error)) < 1000
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert refused > 50 and peak_bytes < 20e6


def test_reading_gives_no_warning_of_memory_that_cannot_be_written(tmp_path: Path) -> None:
    path = a_file(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with GgufCheckpoint(path, decoder_of(path)) as checkpoint:
            assert checkpoint.read("model.norm.weight").shape == (32,)
    assert json.dumps(read_config(path))  # it is a config.json in every respect
