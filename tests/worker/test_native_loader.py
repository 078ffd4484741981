"""Configs and checkpoints: what is read, and what is said about one that does not fit."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from worker.native.checkpoint import INDEX, Checkpoint
from worker.native.config import DecoderConfig, Rope
from worker.native.loader import load_weights, tensor_shapes
from worker.native.progress import LoadingBar

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
CPU = torch.device("cpu")


def random_tensors(config: dict[str, Any], dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    shapes = tensor_shapes(DecoderConfig.from_dict(config))
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def load(path: Path, config: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    with Checkpoint(path) as checkpoint:
        return load_weights(checkpoint, DecoderConfig.from_dict(config), CPU, dtype)


def test_old_and_new_forms_of_rope_are_the_same() -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    old = DecoderConfig.from_dict({**CONFIG, "rope_theta": 5e5, "rope_scaling": scaling})
    new = DecoderConfig.from_dict({**CONFIG, "rope_parameters": {**scaling, "rope_theta": 5e5}})
    assert old.rope == new.rope == Rope(5e5, "llama3", 8.0, 16, 1.0, 4.0)
    assert DecoderConfig.from_dict(CONFIG).rope == Rope()


def test_qwen3_differs_by_its_table_entry() -> None:
    config = DecoderConfig.from_dict({**CONFIG, "architectures": ["Qwen3ForCausalLM"], "mlp_bias": True})
    assert config.qk_norm and config.head_dim == 128 and not config.mlp_bias


def test_what_reads_the_same_input_becomes_one_matrix(tmp_path: Path) -> None:
    tensors = random_tensors(CONFIG)
    save_file(tensors, tmp_path / "model.safetensors")
    weights = load(tmp_path, CONFIG)
    parts = [tensors[f"model.layers.1.self_attn.{name}_proj.weight"] for name in "qkv"]
    assert torch.equal(weights.layers[1].qkv.weight, torch.cat(parts))
    parts = [tensors[f"model.layers.1.mlp.{name}_proj.weight"] for name in ("gate", "up")]
    assert torch.equal(weights.layers[1].gate_up.weight, torch.cat(parts))
    assert torch.equal(weights.head.weight, tensors["lm_head.weight"])
    assert sum(t.numel() for t in weights.tensors()) == sum(t.numel() for t in tensors.values())


def save_shards(path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """In two files; returns what the index says."""
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, path / file)
    weight_map = {name: file for file, part in shards.items() for name in part}
    (path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


def test_sharded_checkpoint_is_the_same_as_a_whole_one(tmp_path: Path) -> None:
    tensors = random_tensors(CONFIG)
    save_shards(tmp_path, tensors)
    weights = load(tmp_path, CONFIG)
    assert torch.equal(weights.embedding, tensors["model.embed_tokens.weight"])
    assert torch.equal(weights.layers[0].down.weight, tensors["model.layers.0.mlp.down_proj.weight"])


def test_bfloat16_checkpoint_is_exact_in_float32(tmp_path: Path) -> None:
    tensors = random_tensors(CONFIG, torch.bfloat16)
    save_file(tensors, tmp_path / "model.safetensors")
    weights = load(tmp_path, CONFIG)
    assert weights.norm.dtype == torch.float32
    assert torch.equal(weights.layers[0].o.weight, tensors["model.layers.0.self_attn.o_proj.weight"].float())
    with Checkpoint(tmp_path) as checkpoint:
        assert checkpoint.dtype("model.norm.weight") == "bfloat16"


def test_everything_wrong_with_a_checkpoint_is_in_one_error(tmp_path: Path) -> None:
    tensors = random_tensors(CONFIG)
    del tensors["model.layers.1.mlp.down_proj.weight"]
    tensors["model.norm.weight"] = torch.ones(7)
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(16)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as error:
        load(tmp_path, CONFIG)
    assert "missing: model.layers.1.mlp.down_proj.weight" in str(error.value)
    assert "unexpected: model.layers.0.self_attn.q_proj.bias in model.safetensors" in str(error.value)
    assert "of another shape: model.norm.weight in model.safetensors [7] instead of [16]" in str(error.value)


def test_a_second_copy_of_a_tied_head_and_stored_frequencies_do_no_harm(tmp_path: Path) -> None:
    tied = {**CONFIG, "tie_word_embeddings": True}
    tensors = random_tensors(CONFIG)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    weights = load(tmp_path, tied)
    assert weights.head.weight is weights.embedding
    assert torch.equal(weights.embedding, tensors["model.embed_tokens.weight"])


def test_a_checkpoint_without_its_head_is_told_so(tmp_path: Path) -> None:
    tensors = random_tensors({**CONFIG, "tie_word_embeddings": True})
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing: lm_head\.weight"):
        load(tmp_path, CONFIG)


def test_a_head_that_is_not_the_embedding_is_not_tied(tmp_path: Path) -> None:
    save_file(random_tensors(CONFIG), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"tie_word_embeddings, but lm_head\.weight in model\.safetensors differs"):
        load(tmp_path, {**CONFIG, "tie_word_embeddings": True})


@pytest.mark.parametrize(
    ("lie", "told"),
    [
        ({"hidden_size": 32}, r"embed_tokens\.weight in model\.safetensors \[40, 16\] instead of \[40, 32\]"),
        ({"vocab_size": 41}, r"\[40, 16\] instead of \[41, 16\]"),
        ({"num_hidden_layers": 3}, r"missing: model\.layers\.2\..* and 5 more"),
        ({"num_hidden_layers": 1}, r"unexpected: model\.layers\.1\..* in model\.safetensors.* and 5 more"),
        ({"num_key_value_heads": 4}, r"k_proj\.weight in model\.safetensors \[8, 16\] instead of \[16, 16\]"),
        ({"attention_bias": True}, r"missing: .*\.bias"),
        ({"architectures": ["Qwen3ForCausalLM"], "head_dim": 4}, r"missing: .*k_norm\.weight"),
    ],
)
def test_a_config_that_lies_about_its_tensors_is_told_by_name(lie: dict[str, Any], told: str, tmp_path: Path) -> None:
    save_file(random_tensors(CONFIG), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=told):
        load(tmp_path, {**CONFIG, **lie})


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize("stored", [torch.int64, torch.float64, torch.float8_e4m3fn])
def test_numbers_of_another_kind_are_refused_with_tensor_and_file(stored: torch.dtype, tmp_path: Path) -> None:
    save_file(random_tensors(CONFIG) | {NORM: torch.ones(16).to(stored)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"{NORM} in model\.safetensors is stored as [IF]\d.*F32, BF16, F16"):
        load(tmp_path, CONFIG)


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", [NORM, "model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_number_that_is_none_is_found_with_tensor_and_file(
    number: float, name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    tensors = random_tensors(CONFIG, torch.bfloat16)
    tensors[name].view(-1)[-3] = number
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"{name} in model\.safetensors has NaN or infinite values"):
        load(tmp_path, CONFIG, dtype)


def test_large_numbers_are_no_fault_but_what_float16_cannot_hold_is(tmp_path: Path) -> None:
    tensors = random_tensors(CONFIG) | {NORM: torch.full((16,), 3e38)}
    save_file(tensors, tmp_path / "model.safetensors")
    assert load(tmp_path, CONFIG).layers[1].attention_norm.eq(3e38).all()
    with pytest.raises(ValueError, match=rf"{NORM} .* \(read as float16\)"):
        load(tmp_path, CONFIG, torch.float16)


def write_index(path: Path, weight_map: Any) -> None:
    (path / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def cut(path: Path, bytes_left: int) -> None:
    path.write_bytes(path.read_bytes()[:bytes_left])


def replace_by_pickle(path: Path) -> None:
    for file in path.glob("*.safetensors*"):
        file.unlink()
    (path / "pytorch_model.bin").touch()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1000\n"


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (
            lambda path: (path / "b.safetensors").unlink(),
            r"lacks b\.safetensors, which model\.safetensors\.index\.json",
        ),
        (lambda path: cut(path / "b.safetensors", -100), r"b\.safetensors is truncated: model\.\S+ would end at byte"),
        (lambda path: cut(path / "b.safetensors", 50), r"b\.safetensors is not a safetensors file"),
        (lambda path: (path / "b.safetensors").write_bytes(b""), r"b\.safetensors is not a safetensors file"),
        (lambda path: (path / "b.safetensors").write_bytes(b"no" * 999), r"b\.safetensors is not a safetensors file"),
        (lambda path: (path / "b.safetensors").write_bytes(LFS), r"b\.safetensors is a pointer of Git LFS"),
        (lambda path: (path / INDEX).write_text("{"), r"index\.json is not JSON"),
        (lambda path: (path / INDEX).write_bytes(b"\xff"), r"index\.json is not JSON"),
        (lambda path: (path / INDEX).write_text("[]"), r"index\.json has no weight_map"),
        (lambda path: write_index(path, 3), r"index\.json has no weight_map"),
        (lambda path: write_index(path, {"x": 3}), r"says that x is in 3, which is no name of a file"),
        (lambda path: write_index(path, {"x": "../a.safetensors"}), r"which is no name of a file"),
        (lambda path: write_index(path, {"x": "a.safetensors"}), r"a\.safetensors has no x, which .*index\.json says"),
        (lambda path: (path / INDEX).unlink(), r"has neither model\.safetensors nor model\.safetensors\.index\.json"),
        (replace_by_pickle, r"holds pytorch_model\.bin, but no model\.safetensors: weights are read from safetensors"),
    ],
)
def test_a_damaged_checkpoint_is_told_with_its_file(damage: Callable[[Path], None], told: str, tmp_path: Path) -> None:
    save_shards(tmp_path, random_tensors(CONFIG))
    damage(tmp_path)
    with pytest.raises(ValueError, match=told):
        load(tmp_path, CONFIG)


def test_the_dtype_of_a_tensor_that_is_not_there_is_asked_in_vain(tmp_path: Path) -> None:
    save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors")
    with Checkpoint(tmp_path) as checkpoint, pytest.raises(ValueError, match=r"has no tensor model\.norm\.weight"):
        checkpoint.dtype("model.norm.weight")


def test_progress_counts_every_stored_byte_up_to_all(tmp_path: Path) -> None:
    tensors = random_tensors(CONFIG, torch.bfloat16) | {NORM: torch.ones(16)}
    save_file(tensors, tmp_path / "model.safetensors")
    calls: list[tuple[int, int]] = []
    with Checkpoint(tmp_path) as checkpoint:
        config = DecoderConfig.from_dict(CONFIG)
        load_weights(checkpoint, config, CPU, torch.float32, progress=lambda *call: calls.append(call))
    total = sum(tensor.nbytes for tensor in tensors.values())
    assert calls[-1] == (total, total)
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def show_progress(stream: io.StringIO, seconds_each: float) -> str:
    """What ten calls write."""
    seconds = iter(float(i) * seconds_each for i in range(20))
    with LoadingBar(stream, lambda: next(seconds)) as progress:
        for i in range(1, 11):
            progress(i * 10**9, 10**10)
    return stream.getvalue()


def test_a_terminal_shows_one_line_that_moves_at_most_ten_times_a_second() -> None:
    shown = show_progress(Screen(), 0.06)
    assert shown.count("\r") == 5 and shown.count("\n") == 1 and shown.endswith("\n")
    assert "[########################] 100 % of 10.00 GB, 16.67 GB/s" in shown


def test_lines_go_where_the_other_stages_are_told_and_leave_stderr_to_what_went_wrong(
    capsys: pytest.CaptureFixture[str],
) -> None:
    seconds = iter((0.0, 6.0))
    with LoadingBar(clock=lambda: next(seconds)) as progress:
        progress(6 * 10**9, 10**10)
    assert capsys.readouterr() == ("headgate: loading weights:  60 % of 10.00 GB, 1.00 GB/s\n", "")


def test_a_log_gets_a_line_every_five_seconds_and_none_for_a_quick_start() -> None:
    assert show_progress(io.StringIO(), 0.4) == ""
    lines = show_progress(io.StringIO(), 1.5).splitlines()
    assert lines == [f"headgate: loading weights:  {share} % of 10.00 GB, 0.67 GB/s" for share in (40, 80)]
