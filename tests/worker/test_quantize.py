"""Checkpoints of fewer bits: what is written is what is read, and what was measured."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_maker import tensors_of, tokenizer_values, values_of, write_gguf
from safetensors.torch import load_file
from tokenizers import Tokenizer

from scheduler.batch import Entry, Kind, StepPlan
from scheduler.messages import Request
from worker.files import SHIPPED, read_config
from worker.native import quantize as quantize_module
from worker.native.checkpoint import Checkpoint
from worker.native.config import DecoderConfig
from worker.native.forms import open_checkpoint
from worker.native.groups import Groups
from worker.native.loader import floats, load_weights
from worker.native.perplexity import column_importance, perplexity, rows_of
from worker.native.quantize import AsIfQuantized, Recipe, Work, packed, write_quantized
from worker.native.quantizing import Row, new_folder, quantize
from worker.native.runner import NativeEngine
from worker.tokenizer import read_tokenizer

DEMO = SHIPPED / "headgate-demo"
CONFIG = DecoderConfig.from_dict(read_config(DEMO))
CPU = torch.device("cpu")
TEXT = (DEMO / "README.md").read_text("utf-8")
RECIPES = [Recipe("int8"), Recipe("int4"), Recipe("int4", 128), Recipe("fp8"), Recipe("int8", 128, torch.float16)]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Two that wait for each other on a busy machine take twenty times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def work() -> Iterator[Work]:
    with open_checkpoint(DEMO, CONFIG) as checkpoint:
        yield Work(checkpoint, CONFIG)


def tokens() -> list[int]:
    return list(Tokenizer.from_str(read_tokenizer(DEMO).tokenizer_json).encode(TEXT).ids)


def absmax(weight: torch.Tensor, group: int) -> torch.Tensor:
    grouped = weight.float().unflatten(1, (-1, group))
    step = grouped.abs().amax(-1, keepdim=True) / 7
    return ((grouped / step).round().clamp(-8, 7) * step).flatten(1)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: f"{recipe.name}-{recipe.group}")
def test_what_is_written_is_what_was_measured(recipe: Recipe, work: Work, tmp_path: Path) -> None:
    write_quantized(work, recipe, read_config(DEMO), tmp_path, lambda done, total: None)
    with open_checkpoint(tmp_path, CONFIG) as written, AsIfQuantized(work, recipe) as measured:
        assert written.shapes == measured.shapes
        for name in written.shapes:
            assert torch.equal(floats(written.read(name)), floats(measured.read(name))), name
            if work.is_quantized(name, recipe):
                assert written.stored_bytes(name) == recipe.stored_bytes(written.shapes[name]) + 16 * (
                    recipe.name != "fp8"
                )
                assert isinstance(written.read(name), Groups) == (recipe.name != "fp8")


def test_four_bits_are_nearer_than_those_of_the_largest_number(work: Work) -> None:
    weight = floats(work.checkpoint.read("model.layers.1.mlp.up_proj.weight")).float()
    for group in (32, 128):
        searched = (Recipe("int4", group).floats(weight) - weight).square().sum()
        assert searched < 0.75 * (absmax(weight, group) - weight).square().sum()


def test_importance_moves_the_error_to_where_it_matters_less(work: Work) -> None:
    weight = floats(work.checkpoint.read("model.layers.1.mlp.up_proj.weight")).float()
    importance = torch.ones(weight.shape[1])
    importance[::8] = 100.0
    told, plain = (Recipe("int4").floats(weight, each) for each in (importance, None))
    assert ((told - weight).square() * importance).sum() < 0.9 * ((plain - weight).square() * importance).sum()


def test_numbers_are_packed_lowest_bits_first_and_the_last_word_is_filled_up() -> None:
    assert packed(torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8, 9]]), 4).tolist() == [[0x87654321 - (1 << 32), 9]]
    assert packed(torch.tensor([[255, 1]]), 8).tolist() == [[0x1FF]]


def test_other_readers_find_what_they_expect(work: Work, tmp_path: Path) -> None:
    """Names, types and shapes of compressed-tensors' pack-quantized and naive-quantized forms."""
    expected: dict[str, dict[str, Any]] = {
        "int4": {"weight_packed": (torch.int32, [256, 80]), "weight_scale": (torch.bfloat16, [256, 20]),
                 "weight_zero_point": (torch.int32, [32, 20]), "weight_shape": (torch.int64, [2])},
        "int8": {"weight_packed": (torch.int32, [256, 160]), "weight_scale": (torch.bfloat16, [256, 20]),
                 "weight_shape": (torch.int64, [2])},
        "fp8": {"weight": (torch.float8_e4m3fn, [256, 640]), "weight_scale": (torch.bfloat16, [256, 1])},
    }  # fmt: skip
    for name, parts in expected.items():
        folder = tmp_path / name
        folder.mkdir()
        write_quantized(work, Recipe(name), read_config(DEMO), folder, lambda done, total: None)
        tensors, prefix = load_file(folder / "model.safetensors"), "model.layers.0.mlp.down_proj."
        found = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        assert {key: (value.dtype, list(value.shape)) for key, value in found.items()} == parts
        described = json.loads((folder / "config.json").read_text())["quantization_config"]
        assert described["quant_method"] == "compressed-tensors" and described["ignore"] == []
        assert described["format"] == ("naive-quantized" if name == "fp8" else "pack-quantized")
        weights = described["config_groups"]["group_0"]["weights"]
        assert (weights["num_bits"], weights["type"]) == (
            4 if name == "int4" else 8,
            "float" if name == "fp8" else "int",
        )


def test_a_large_checkpoint_is_cut_into_files_with_an_index(
    work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize_module, "SHARD_BYTES", 2 << 20)
    write_quantized(work, Recipe("int8"), read_config(DEMO), tmp_path, lambda done, total: None)
    assert len(list(tmp_path.glob("model-*-of-00003.safetensors"))) == 3
    with open_checkpoint(tmp_path, CONFIG) as checkpoint:
        load_weights(checkpoint, CONFIG, CPU, torch.float32)


def test_perplexity_is_that_of_the_engine() -> None:
    rows = rows_of(tokens()[:90], 40)
    assert [len(row) for row in rows] == [40, 40, 10]
    engine = NativeEngine.load(DEMO, "cpu", "float32", 1 << 20, threads=1)
    nats, counted = 0.0, 0
    for id, row in enumerate(rows):
        request = Request(id=id, gateway=0, prompt=row, max_tokens=1, logprobs=0, prompt_logprobs=True)
        entry = Entry(request.key, Kind.PREFILL, 0, len(row), delivers=True, is_told=True)
        told = engine.run(StepPlan((entry,), start=(request,))).logprobs[request.key]
        nats -= sum(each[0][1] for each in told[: len(row) - 1])
        counted += len(row) - 1
    with Checkpoint(DEMO) as checkpoint:
        weights = load_weights(checkpoint, CONFIG, CPU, torch.float32)
    assert perplexity(CONFIG, weights, rows) == pytest.approx(math.exp(nats / counted), rel=1e-5)


def test_importance_is_the_mean_square_of_what_a_matrix_is_multiplied_with() -> None:
    with Checkpoint(DEMO) as checkpoint:
        weights = load_weights(checkpoint, CONFIG, CPU, torch.float32)
    row = tokens()[:20]
    found = column_importance(CONFIG, weights, [row])
    assert len(found) == 7 * CONFIG.layers
    x = weights.embedding[row]
    normed = torch.nn.functional.rms_norm(x, x.shape[-1:], weights.layers[0].attention_norm, CONFIG.eps)
    torch.testing.assert_close(found["model.layers.0.self_attn.k_proj"], normed.square().mean(0))


# --- from a model to a folder -----------------------------------------------------------------------------------------


def make(model: Path, folder: Path, kind: str, text: str | None = None) -> list[Row]:
    with new_folder(folder) as unfinished:
        return list(quantize(model, unfinished, kind, 32, text, lambda line: None))


def test_a_folder_comes_out_that_is_served_like_the_model(tmp_path: Path) -> None:
    rows = make(DEMO, tmp_path / "out", "4")
    assert [row.name for row in rows] == ["original", "int8", "int4", "fp8"]
    assert [row.is_written for row in rows] == [False, False, True, False]
    original, eight, four, fp8 = (row.perplexity for row in rows)
    assert abs(eight / original - 1) < 0.01 and abs(fp8 / original - 1) < 0.02 and 0 < abs(four / original - 1) < 0.05
    assert rows[0].bits == 16 and rows[2].bits == 4 + 16 / 32 + 4 / 32
    assert read_tokenizer(tmp_path / "out") == read_tokenizer(DEMO)
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]
    again = make(tmp_path / "out", tmp_path / "again", "8")  # from four bits to eight
    assert again[0].perplexity == pytest.approx(four) and again[1].perplexity == pytest.approx(four, rel=0.01)


def test_a_text_of_the_user_tells_what_matters_and_is_measured(tmp_path: Path) -> None:
    rows = make(DEMO, tmp_path / "out", "4", TEXT)
    plain = make(DEMO, tmp_path / "plain", "4")
    assert rows[0].perplexity != plain[0].perplexity  # the second half of the same text
    both = [load_file(tmp_path / name / "model.safetensors") for name in ("out", "plain")]
    assert not all(torch.equal(both[0][name], both[1][name]) for name in both[0] if name.endswith("packed"))


def test_a_gguf_file_becomes_a_folder(tmp_path: Path) -> None:
    config, tokenizer = read_config(DEMO), json.loads((DEMO / "tokenizer.json").read_text())
    weights = {name: tensor.float().numpy() for name, tensor in load_file(DEMO / "model.safetensors").items()}
    values = values_of(config) | tokenizer_values(
        tokenizer, "llama-bpe", bos_token_id=0, eos_token_id=2, add_bos_token=False
    )
    path = write_gguf(tmp_path / "m.gguf", values | {"tokenizer.chat_template": "{{ x }}"}, tensors_of(config, weights))
    rows = make(path, tmp_path / "out", "8")
    assert rows[1].perplexity == pytest.approx(rows[0].perplexity, rel=0.01)
    own, right = read_tokenizer(tmp_path / "out"), read_tokenizer(path)
    assert own == right and own.chat_template == "{{ x }}" and own.eos_ids == (2, 0)
    assert read_config(tmp_path / "out")["model_type"] == "llama"


def test_nothing_is_overwritten_and_nothing_is_left_of_what_failed(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="there is there already; nothing is overwritten"):
        make(DEMO, tmp_path / "there", "8")
    with pytest.raises(ValueError, match="there is no folder"):
        make(DEMO, tmp_path / "no" / "out", "8")
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "out") as folder:
        (folder / "half").write_text("")
        raise KeyboardInterrupt
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there"]


def test_a_text_of_a_single_token_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="less than two tokens"):
        make(DEMO, tmp_path / "out", "8", "a")
    assert not list(tmp_path.iterdir())
