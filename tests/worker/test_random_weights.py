"""Weights made up for a config: of the right shapes, sane, the same at every start, and served by the real engine."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from scheduler.batch import Entry, Kind, StepPlan
from scheduler.messages import Request, Sampling
from scheduler.model import SHAPES
from worker.files import find_model, read_config
from worker.native.config import DecoderConfig
from worker.native.forms import open_checkpoint
from worker.native.loader import load_weights, tensor_shapes
from worker.native.random_weights import STD, RandomCheckpoint
from worker.native.runner import NativeEngine

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 4200,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}
CPU = torch.device("cpu")


def decoder(**changes: Any) -> DecoderConfig:
    return DecoderConfig.from_dict({**CONFIG, **changes})


def test_every_tensor_of_the_config_is_there_and_sane() -> None:
    config = decoder(attention_bias=True, tie_word_embeddings=False)
    with RandomCheckpoint(config) as checkpoint:
        assert checkpoint.shapes == tensor_shapes(config)
        for name, shape in checkpoint.shapes.items():
            tensor = checkpoint.read(name).float()
            assert tuple(tensor.shape) == shape
            if name.endswith("norm.weight"):
                assert torch.equal(tensor, torch.ones(shape))
            else:
                assert abs(float(tensor.std()) / STD - 1) < 0.4 and abs(float(tensor.mean())) < STD / 2


def test_tensors_differ_from_each_other_and_not_from_start_to_start() -> None:
    first, second = RandomCheckpoint(decoder()), RandomCheckpoint(decoder())
    q, k = (f"model.layers.0.self_attn.{name}_proj.weight" for name in "qk")
    assert torch.equal(first.read(q), second.read(q))
    assert not torch.equal(first.read(q)[:32], first.read(k))
    assert not torch.equal(first.read(q), first.read(q.replace("layers.0", "layers.1")))


@pytest.mark.parametrize("name", ["wall", "llama-3.2-1b"])
def test_rows_of_the_largest_matrix_are_all_different(name: str) -> None:
    """They overlap in the pool, but none begins where another does, and none looks like another."""
    checkpoint = RandomCheckpoint(DecoderConfig.from_dict(read_config(find_model(name))))
    embedding = checkpoint.read("model.embed_tokens.weight")
    assert embedding.shape == checkpoint.shapes["model.embed_tokens.weight"]
    rows = embedding[torch.arange(0, len(embedding), 997)].float()
    likeness = rows @ rows.T / (rows.norm(dim=1) ** 2)
    likeness.fill_diagonal_(0)
    assert float(likeness.abs().max()) < 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_they_load_as_a_checkpoint_does(dtype: torch.dtype) -> None:
    config = decoder()
    with torch.inference_mode(), RandomCheckpoint(config) as checkpoint:
        weights = load_weights(checkpoint, config, CPU, dtype)
    assert all(tensor.dtype == dtype and bool(tensor.isfinite().all()) for tensor in weights.tensors())
    assert sum(tensor.numel() for tensor in weights.tensors()) == sum(map(math.prod, tensor_shapes(config).values()))


def test_the_engine_runs_on_a_config_alone(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    engines = [NativeEngine.load(path, "cpu", "float32", 1 << 22, 1) for _ in range(2)]
    drawn = []
    for engine in engines:
        request = Request(id=1, gateway=1, prompt=[5, 6, 7], max_tokens=1, sampling=Sampling(temperature=0.0))
        result = engine.run(StepPlan((Entry(request.key, Kind.PREFILL, 0, 3, True),), start=(request,)))
        drawn.append(result.tokens[request.key][0])
    assert drawn[0] == drawn[1] < 4200


def test_a_folder_without_weights_is_not_filled_with_random_ones(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(ValueError, match=r"model.safetensors"):
        open_checkpoint(tmp_path, decoder())


@pytest.mark.parametrize(("name", "shape"), [("wall", "smollm2-135m"), ("llama-3.2-1b", "llama-3.2-1b")])
def test_the_models_that_ship_have_the_geometry_they_are_named_for(name: str, shape: str) -> None:
    config = read_config(find_model(name))
    assert DecoderConfig.from_dict(config).model_shape(shape, "bfloat16") == SHAPES[shape]
    parameters = sum(map(math.prod, tensor_shapes(DecoderConfig.from_dict(config)).values()))
    assert parameters == {"wall": 134_515_008, "llama-3.2-1b": 1_235_814_400}[name]


def test_llama_3_2_scales_its_rope_as_the_public_model_does() -> None:
    rope = DecoderConfig.from_dict(read_config(find_model("llama-3.2-1b"))).rope
    assert (rope.kind, rope.theta, rope.factor, rope.original_max_positions) == ("llama3", 500000.0, 32.0, 8192)
