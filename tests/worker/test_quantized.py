"""Checkpoints of GPTQ, AWQ, compressed-tensors and fp8: packed here by hand, read by the engine, compared number by number."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from scheduler.batch import Entry, Kind, StepPlan
from scheduler.messages import Request
from worker.native.config import DecoderConfig
from worker.native.cpu.build import NoLibrary, load_library
from worker.native.cpu.pack import Kernels
from worker.native.cpu.program import AS_STORED, bytes_as_stored, load_packed
from worker.native.forms import open_checkpoint
from worker.native.groups import Groups
from worker.native.loader import floats, load_weights, tensor_shapes
from worker.native.runner import NativeEngine

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 48,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
CPU = torch.device("cpu")
Q = "model.layers.0.self_attn.q_proj"
Packer = Callable[[str, Tensor], tuple[dict[str, Tensor], Tensor]]  # of a module: its parts, and what they stand for


def words(numbers: Tensor, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """[rows, numbers] to int32 [rows, words], one number after another."""
    each = 32 // bits
    rows = []
    for row in numbers.tolist():
        packed = []
        for at in range(0, len(row), each):
            run = row[at : at + each]
            word = sum(int(number) << bits * (order or range(each))[i] for i, number in enumerate(run))
            packed.append(word - (1 << 32) if word >= 1 << 31 else word)
        rows.append(packed)
    return torch.tensor(rows, dtype=torch.int32)


def integers(module: str, rows: int, columns: int, bits: int, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random numbers [rows, columns], scales and zero points [rows, groups], the same for every run."""
    chance = torch.Generator().manual_seed(sum(module.encode()))
    numbers = torch.randint(0, 1 << bits, (rows, columns), generator=chance)
    scale = (torch.rand(rows, groups, generator=chance) * 0.02 + 0.001).half()
    return numbers, scale, torch.randint(0, 1 << bits, (rows, groups), generator=chance)


def dequantized(numbers: Tensor, scale: Tensor, zero: Tensor, index: Tensor) -> Tensor:
    return scale.float()[:, index] * (numbers - zero[:, index]).float()


def gptq(bits: int, group: int, shift: int = 1, acts: bool = False) -> Packer:
    def pack(module: str, like: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        rows, columns = like.shape
        size = group if group > 0 else columns
        numbers, scale, zero = integers(module, rows, columns, bits, columns // size)
        index = torch.arange(columns) // size
        if acts:
            index = index[torch.randperm(columns, generator=torch.Generator().manual_seed(3))]
        parts = {
            "qweight": words(numbers, bits).t(),
            "qzeros": words((zero.t() - shift) % (1 << bits), bits),
            "scales": scale.t(),
            "g_idx": index.int(),
        }
        return parts, dequantized(numbers, scale, zero, index)

    return pack


def awq(group: int) -> Packer:
    order = (0, 4, 1, 5, 2, 6, 3, 7)

    def pack(module: str, like: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        rows, columns = like.shape
        numbers, scale, zero = integers(module, rows, columns, 4, columns // group)
        parts = {"qweight": words(numbers.t(), 4, order), "qzeros": words(zero.t(), 4, order), "scales": scale.t()}
        return parts, dequantized(numbers, scale, zero, torch.arange(columns) // group)

    return pack


def compressed(bits: int, group: int, is_packed: bool = True, symmetric: bool = True, acts: bool = False) -> Packer:
    def pack(module: str, like: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        rows, columns = like.shape
        size, centre = group or columns, 1 << (bits - 1)
        numbers, scale, zero = integers(module, rows, columns, bits, columns // size)
        if symmetric:
            zero = torch.full_like(zero, centre)
        index = torch.arange(columns) // size
        parts = {"weight_scale": scale}
        if acts:
            index = index[torch.randperm(columns, generator=torch.Generator().manual_seed(3))]
            parts["weight_g_idx"] = index.int()
        if is_packed:
            parts |= {"weight_packed": words(numbers, bits), "weight_shape": torch.tensor([rows, columns])}
        else:
            parts |= {"weight": (numbers - centre).to(torch.int8)}
        if not symmetric:
            packed = words(zero.t(), bits).t() if is_packed else (zero - centre).to(torch.int8)
            parts["weight_zero_point"] = packed
        return parts, dequantized(numbers, scale, zero, index)

    return pack


def float8(name: str, down: int = 0, across: int = 0) -> Packer:
    """A scale for so many rows and columns; 0: for all of them."""

    def pack(module: str, like: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        rows, columns = like.shape
        numbers = (like * 100).to(torch.float8_e4m3fn)
        shape = -(-rows // (down or rows)), -(-columns // (across or columns))
        scale = torch.linspace(0.001, 0.004, shape[0] * shape[1]).bfloat16().view(shape)
        row, column = torch.arange(rows) // (down or rows), torch.arange(columns) // (across or columns)
        spread = scale.float()[row][:, column]
        stored = scale if down else scale.view(1)
        return {"weight": numbers, name: stored, "input_scale": torch.ones(1)}, numbers.float() * spread

    return pack


def scheme(form: str, **weights: Any) -> dict[str, Any]:
    """Of compressed-tensors."""
    weights = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True, **weights}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": {"num_bits": 8, "dynamic": True}}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
PACKED_4 = scheme("pack-quantized", num_bits=4, strategy="group", group_size=32)
FORMS: dict[str, tuple[dict[str, Any], Packer]] = {
    "gptq 4": (GPTQ, gptq(4, 32)),
    "gptq 4, groups of 64": ({**GPTQ, "group_size": 64}, gptq(4, 64)),
    "gptq 4, whole rows": ({**GPTQ, "group_size": -1}, gptq(4, -1)),
    "gptq 4, groups of 16": ({**GPTQ, "group_size": 16}, gptq(4, 16)),
    "gptq 8": ({**GPTQ, "bits": 8}, gptq(8, 32)),
    "gptq v2": ({**GPTQ, "checkpoint_format": "gptq_v2"}, gptq(4, 32, shift=0)),
    "gptq, columns in another order": ({**GPTQ, "desc_act": True}, gptq(4, 32, acts=True)),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}, awq(32)),
    "awq, groups of 64": ({"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "version": "GEMM"}, awq(64)),
    "int8, a scale per row": (scheme("int-quantized"), compressed(8, 0, is_packed=False)),
    "int8 in groups": (scheme("int-quantized", strategy="group", group_size=32), compressed(8, 32, is_packed=False)),
    "int8 with zero points": (scheme("int-quantized", symmetric=False), compressed(8, 0, False, symmetric=False)),
    "int8 packed": (scheme("pack-quantized", strategy="group", group_size=32), compressed(8, 32)),
    "int4 packed": (PACKED_4, compressed(4, 32)),
    "int4 with zero points": (
        scheme("pack-quantized", num_bits=4, strategy="group", group_size=64, symmetric=False),
        compressed(4, 64, symmetric=False),
    ),
    "int4, columns in another order": (
        scheme("pack-quantized", num_bits=4, strategy="group", group_size=32, actorder="group"),
        compressed(4, 32, acts=True),
    ),
    "float8, a scale per row": (scheme("float-quantized", type="float"), float8("weight_scale", down=1)),
    "float8, one scale": (scheme("naive-quantized", type="float", strategy="tensor"), float8("weight_scale")),
    "fp8": ({"quant_method": "fp8", "activation_scheme": "static"}, float8("weight_scale")),
    "fp8 in blocks": (
        {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [32, 48]},
        float8("weight_scale_inv", 32, 48),
    ),
}  # fmt: skip


def random_weights() -> dict[str, Tensor]:
    chance = torch.Generator().manual_seed(0)
    shapes = tensor_shapes(DecoderConfig.from_dict(CONFIG))
    return {name: torch.randn(shape, generator=chance) * 0.05 for name, shape in shapes.items()}


def save(folder: Path, quantization: dict[str, Any], packer: Packer) -> dict[str, Tensor]:
    """A quantized checkpoint in `folder`; returns the plain one that it stands for."""
    stored, plain = {}, random_weights()
    for name, weight in random_weights().items():
        if name.endswith("_proj.weight"):
            parts, plain[name] = packer(name.removesuffix(".weight"), weight)
            stored |= {f"{name.removesuffix('weight')}{part}": tensor.contiguous() for part, tensor in parts.items()}
        else:
            stored[name] = weight
    folder.mkdir(exist_ok=True)
    save_file(stored, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**CONFIG, "quantization_config": quantization}))
    return plain


def save_plain(folder: Path, tensors: dict[str, Tensor]) -> Path:
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def logprobs(folder: Path) -> list[Any]:
    """Of a prompt's tokens and the next one, in float32."""
    engine = NativeEngine.load(folder, "cpu", "float32", 1 << 20, threads=1)
    request = Request(id=1, gateway=0, prompt=[5, 17, 3, 40, 8], max_tokens=2, logprobs=3, prompt_logprobs=True)
    entry = Entry(request.key, Kind.PREFILL, 0, 5, delivers=True, is_told=True)
    return engine.run(StepPlan((entry,), start=(request,))).logprobs[request.key]


@pytest.mark.parametrize("form", FORMS)
def test_a_quantized_checkpoint_is_the_plain_one_that_it_stands_for(form: str, tmp_path: Path) -> None:
    plain = save(tmp_path / "packed", *FORMS[form])
    with open_checkpoint(tmp_path / "packed", DecoderConfig.from_dict(CONFIG)) as checkpoint:
        assert checkpoint.shapes == {name: tuple(tensor.shape) for name, tensor in plain.items()}
        for name, right in plain.items():
            found = checkpoint.read(name)
            assert torch.equal(found.floats() if isinstance(found, Groups) else found, right), name
            part = checkpoint.read(name, slice(3, 29))
            assert torch.equal(part.floats() if isinstance(part, Groups) else part, right[3:29]), name
    assert logprobs(tmp_path / "packed") == logprobs(save_plain(tmp_path / "plain", plain))


@pytest.mark.parametrize(
    ("form", "bits", "is_exact"),
    [("gptq 4", 4, True), ("awq, groups of 64", 4, True), ("gptq 8", 8, True), ("int8, a scale per row", 8, True),
     ("gptq 4, groups of 16", 4, False), ("gptq, columns in another order", 4, False), ("fp8", 8, False)],
)  # fmt: skip
def test_groups_come_out_where_the_file_has_groups_like_ours(
    form: str, bits: int, is_exact: bool, tmp_path: Path
) -> None:
    save(tmp_path, *FORMS[form])
    with open_checkpoint(tmp_path, DecoderConfig.from_dict(CONFIG)) as checkpoint:
        found = checkpoint.read(f"{Q}.weight")
        assert checkpoint.kernel_bits(f"{Q}.weight") == bits and checkpoint.kernel_bits("model.norm.weight") == 16
        assert isinstance(found, Groups) == is_exact
        if isinstance(found, Groups):
            assert found.bits == bits


@pytest.mark.parametrize("form", FORMS)
def test_packed_as_they_are_stored_weights_are_nearly_what_the_file_says(form: str, tmp_path: Path) -> None:
    try:
        kernels = Kernels(load_library(), 2)
    except NoLibrary as error:
        pytest.skip(str(error))
    save(tmp_path, *FORMS[form])
    config = DecoderConfig.from_dict(CONFIG)
    with open_checkpoint(tmp_path, config) as checkpoint:
        weights = load_packed(checkpoint, config, AS_STORED, kernels)
        assert weights.embedding.format == "bfloat16"
        for index, layer in enumerate(weights.layers):
            name = f"model.layers.{index}.mlp.down_proj.weight"
            stored, found = checkpoint.read(name), kernels.unpack(layer.down.matrix)
            right = floats(stored)
            is_exact = isinstance(stored, Groups) and (
                stored.is_centred or (stored.bits == 4 and "zero points" not in form)
            )
            assert layer.down.matrix.format == {8: "int8", 4: "int4"}[checkpoint.kernel_bits(name)]
            step = 2**-10 if is_exact else 1 / 220 if layer.down.matrix.format == "int8" else 1 / 8
            assert (found - right).abs().max() <= step * right.abs().max()
        assert bytes_as_stored(checkpoint, config) == sum(tensor.nbytes for tensor in weights.tensors())


def test_offsets_are_there_where_numbers_have_a_centre_of_their_own(tmp_path: Path) -> None:
    for form, expected in (("int4 packed", False), ("int4 with zero points", True), ("gptq 4", True)):
        save(tmp_path / form, *FORMS[form])
        with open_checkpoint(tmp_path / form, DecoderConfig.from_dict(CONFIG)) as checkpoint:
            found = checkpoint.read(f"{Q}.weight")
            assert checkpoint.kernel_offsets(f"{Q}.weight") == expected
            assert isinstance(found, Groups) and found.is_centred != expected


def test_what_the_files_hold_is_told(tmp_path: Path) -> None:
    save(tmp_path, *FORMS["gptq 4"])
    with open_checkpoint(tmp_path, DecoderConfig.from_dict(CONFIG)) as checkpoint:
        assert checkpoint.describe() == "14 matrices in int4, groups of 32 (gptq); 0.1 MB in the files"


def test_a_module_of_its_own_may_have_a_scheme_of_its_own(tmp_path: Path) -> None:
    """down_proj in 8 bits, everything else in 4."""
    eight = {"num_bits": 8, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
    groups = {**PACKED_4["config_groups"], "group_1": {"targets": ["re:.*down_proj"], "weights": eight}}
    four, more = compressed(4, 32), compressed(8, 32)
    plain = save(
        tmp_path,
        {**PACKED_4, "config_groups": groups},
        lambda module, like: (more if module.endswith("down_proj") else four)(module, like),
    )
    config = DecoderConfig.from_dict(CONFIG)
    with open_checkpoint(tmp_path, config) as checkpoint:
        weights = load_weights(checkpoint, config, CPU, torch.float32)
    assert torch.equal(weights.layers[1].down.weight, plain["model.layers.1.mlp.down_proj.weight"])
    assert torch.equal(weights.layers[1].o.weight, plain["model.layers.1.self_attn.o_proj.weight"])


def test_a_bias_of_zeros_that_no_config_asks_for_is_passed_over_and_another_is_not(tmp_path: Path) -> None:
    config = DecoderConfig.from_dict(CONFIG)
    changed("gptq 4", with_part("bias", torch.zeros(64)), tmp_path)
    with open_checkpoint(tmp_path, config) as checkpoint:
        load_weights(checkpoint, config, CPU, torch.float32)
    changed("gptq 4", with_part("bias", torch.ones(64)), tmp_path)
    with open_checkpoint(tmp_path, config) as checkpoint, pytest.raises(ValueError, match=f"unexpected: {Q}.bias"):
        load_weights(checkpoint, config, CPU, torch.float32)


# --- what does not fit ------------------------------------------------------------------------------------------------


def changed(form: str, change: Callable[[dict[str, Tensor]], object], folder: Path) -> Path:
    """A checkpoint of this form whose tensors were changed afterwards."""
    from safetensors.torch import load_file

    save(folder, *FORMS[form])
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def without(part: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.pop(f"{Q}.{part}")


def with_part(part: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({f"{Q}.{part}": tensor})


@pytest.mark.parametrize(
    ("form", "change", "sentence"),
    [
        ("gptq 4", without("qzeros"), f"{Q}.qzeros is missing"),
        ("gptq 4", without("qweight"), f"{Q}.qweight is missing"),
        ("gptq 4", without("scales"), f"unexpected: {Q}.g_idx"),
        ("gptq 4", with_part("scales", torch.ones(4, 64)), r"scales in model.safetensors: its shape is \[4, 64\] instead of \[2, 64\]"),
        ("gptq 4", with_part("scales", torch.ones(2, 64, dtype=torch.int32)), "it is stored as I32 instead of F32 or F16"),
        ("gptq 4", with_part("qweight", torch.ones(8, 64)), "qweight in model.safetensors: it is stored as F32"),
        ("gptq 4", with_part("qweight", torch.ones(7, 64, dtype=torch.int32)), "56 columns are not made of groups of 32"),
        ("gptq 4", with_part("qweight", torch.ones(64, dtype=torch.int32)), "which is no matrix"),
        ("gptq 4", with_part("g_idx", torch.full((64,), 2, dtype=torch.int32)), "g_idx in .*: it names groups from 2 to 2"),
        ("gptq 4", with_part("g_idx", torch.zeros(3, dtype=torch.int32)), r"g_idx .* \[3\] instead of \[64\]"),
        ("awq", with_part("qzeros", torch.ones(2, 7, dtype=torch.int32)), r"qzeros .* \[2, 7\] instead of \[2, 8\]"),
        ("awq", with_part("qweight", torch.ones(64, 4, dtype=torch.int32)), r"scales .* \[2, 64\] instead of \[2, 32\]"),
        ("int4 packed", without("weight_scale"), f"unexpected: {Q}.weight_packed"),
        ("int4 packed", with_part("weight_shape", torch.tensor([64, 99])), r"weight_shape .* it says \[64, 99\]"),
        ("int4 packed", with_part("weight_scale", torch.ones(64, 3)), r"weight_scale .* \[64, 3\] instead of \[64, 2\]"),
        ("int8, a scale per row", with_part("weight", torch.ones(64, 64)), "weight in .* stored as F32 instead of I8"),
        ("int8, a scale per row", without("weight"), f"{Q}.weight is missing"),
        ("fp8 in blocks", with_part("weight_scale_inv", torch.ones(3, 3)), r"\[3, 3\], which does not fit a matrix \[64, 64\]"),
        ("fp8", with_part("weight_scale", torch.tensor([torch.nan])), "has NaN or infinite values"),
        ("float8, one scale", with_part("weight_scale", torch.ones(5)), r"\[5\], which does not fit"),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit_are_one_sentence_with_file_and_tensor(
    form: str, change: Callable[[dict[str, Tensor]], object], sentence: str, tmp_path: Path
) -> None:
    folder, config = changed(form, change, tmp_path), DecoderConfig.from_dict(CONFIG)
    with pytest.raises(ValueError, match=sentence) as raised, open_checkpoint(folder, config) as checkpoint:
        load_weights(checkpoint, config, CPU, torch.float32)
    assert str(raised.value).startswith(str(folder))


def test_a_wrong_group_size_is_told(tmp_path: Path) -> None:
    save(tmp_path, *FORMS["gptq 4"])
    values = {**CONFIG, "quantization_config": {**GPTQ, "group_size": 128}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"mlp\.down_proj\.scales .* \[4, 64\] instead of \[1, 64\]"):
        open_checkpoint(tmp_path, DecoderConfig.from_dict(values))


def wrong_configs() -> Iterator[tuple[Any, str]]:
    yield (
        {"quant_method": "bitsandbytes"},
        "quant_method 'bitsandbytes' is not read; known: gptq, awq, compressed-tensors",
    )
    yield [4], "quantization_config is not an object"
    yield {**GPTQ, "bits": 3}, "weights of 3 bits are not read; known: 4, 8"
    yield {**GPTQ, "group_size": 0}, "group_size is 0"
    yield {**GPTQ, "group_size": None}, "group_size is None"
    yield {**GPTQ, "checkpoint_format": "marlin"}, "checkpoint_format 'marlin' is not read"
    yield {**GPTQ, "dynamic": {"-:.*": {}}}, "dynamic: settings of single modules are not read"
    yield {**GPTQ, "pack_dtype": "int8"}, "pack_dtype 'int8' is not read"
    yield {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemv"}, "version 'gemv' of AWQ is not read"
    yield {"quant_method": "fp8", "fmt": "e5m2"}, "fmt 'e5m2' is not read"
    yield {"quant_method": "fp8", "weight_block_size": [0, 1]}, "weight_block_size is"
    yield {"quant_method": "compressed-tensors", "format": "pack-quantized"}, "has no config_groups"
    yield scheme("nvfp4-pack-quantized"), "format 'nvfp4-pack-quantized' is not read"
    yield scheme("pack-quantized", num_bits=3), "weights of 3 bits are not read"
    yield scheme("int-quantized", strategy="block"), "strategy 'block' is not read"
    yield scheme("pack-quantized", type="float"), "float weights are not read from the format pack-quantized"
    yield {**PACKED_4, "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config is set"
    yield (
        {**PACKED_4, "config_groups": {"group_0": {"targets": ["re:("], "weights": {}}}},
        "targets is not a list of names",
    )
    yield {**PACKED_4, "config_groups": {"group_0": {}}}, "group_0 has no weights"


@pytest.mark.parametrize(("quantization", "sentence"), list(wrong_configs()))
def test_a_quantization_that_is_not_read_is_refused_by_name(quantization: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as raised:
        DecoderConfig.from_dict({**CONFIG, "quantization_config": quantization})
    assert str(raised.value).startswith("config.json: quantization_config")
