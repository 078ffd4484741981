"""The form that a checkpoint is in, and who reads it."""

from __future__ import annotations

from pathlib import Path

from worker.files import has_random_weights, read_config
from worker.gguf import is_gguf
from worker.native.checkpoint import Checkpoint
from worker.native.config import DecoderConfig
from worker.native.gguf import GgufCheckpoint
from worker.native.quantization import read_quantization
from worker.native.quantized import QuantizedCheckpoint
from worker.native.random_weights import RandomCheckpoint


def open_checkpoint(model: Path, config: DecoderConfig) -> Checkpoint:
    """The weights of a model's folder or GGUF file; random ones where `model` is only a config's file."""
    if is_gguf(model):
        return GgufCheckpoint(model, config)
    if has_random_weights(model):
        return RandomCheckpoint(config)
    quantization = read_quantization(read_config(model))
    return QuantizedCheckpoint(model, quantization, config) if quantization else Checkpoint(model)
