"""The metadata of a GGUF file in the words of a Hugging Face `config.json`, which the rest of the engine reads."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import Any

from worker.gguf import Entry, GgufFile

# As the files call it: what it is here.
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",  # Mistral and SmolLM2, too
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
}
EMBEDDING, HEAD, ROPE_FACTORS = "token_embd.weight", "output.weight", "rope_freqs.weight"
MOST_ROPE_FACTORS = 1024
LLAMA3_CONTEXT, LLAMA3_FREQUENCIES = 8192, (1.0, 4.0)  # of all released models
SMOLLM3_ROPE_INTERVAL = 4  # which llama.cpp takes for granted
# Settings that no file of these architectures needs, with the value at which they change nothing.
NEUTRAL = {
    "expert_count": 0,
    "attention.clamp_kqv": 0.0,
    "attention.scale": 0.0,
    "attn_logit_softcapping": 0.0,
    "final_logit_softcapping": 0.0,
    "logit_scale": 0.0,
    "embedding_scale": 0.0,
    "residual_scale": 0.0,
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0,
    "rope.scaling.yarn_log_multiplier": 0.0,
}


def config_of(file: GgufFile) -> dict[str, Any]:
    """Raises ValueError, naming the file and the key, for what is not there or what this engine cannot run."""
    kind = file.text("general.architecture")
    if kind is None:
        raise ValueError(f"{file.path} names no general.architecture")
    if kind not in ARCHITECTURES:
        raise ValueError(f"{file.path}: unknown general.architecture {kind[:40]}; known: {', '.join(ARCHITECTURES)}")
    for key, neutral in NEUTRAL.items():
        if (found := file.number(f"{kind}.{key}")) not in (None, neutral):
            raise ValueError(f"{file.path}: {kind}.{key} is {found:g}, which is not supported for this architecture")
    return _sizes(file, kind) | _layers(file, kind) | _biases(file) | {"rope_parameters": _rope(file, kind)}


def _sizes(file: GgufFile, kind: str) -> dict[str, Any]:
    hidden, heads = (_count(file, f"{kind}.{key}") for key in ("embedding_length", "attention.head_count"))
    head_dim = _head_dim(file, kind, hidden, heads)
    return {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "hidden_act": "silu",
        "vocab_size": _tensor(file, EMBEDDING).shape[0],
        "hidden_size": hidden,
        "num_hidden_layers": _count(file, f"{kind}.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": file.count(f"{kind}.attention.head_count_kv") or heads,
        "head_dim": head_dim,
        "intermediate_size": _count(file, f"{kind}.feed_forward_length"),
        "max_position_embeddings": _count(file, f"{kind}.context_length"),
        "rms_norm_eps": _number(file, f"{kind}.attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": HEAD not in file.tensors,
    }


def _head_dim(file: GgufFile, kind: str, hidden: int, heads: int) -> int:
    """The same for keys and values, and all of it rotated."""
    if not heads or (hidden % heads and file.count(f"{kind}.attention.key_length") is None):
        raise ValueError(f"{file.path}: {kind}.embedding_length {hidden} is no multiple of {heads} heads")
    head_dim = file.count(f"{kind}.attention.key_length") or hidden // heads
    for key in ("attention.value_length", "rope.dimension_count"):
        if (found := file.count(f"{kind}.{key}")) not in (None, head_dim):
            raise ValueError(f"{file.path}: {kind}.{key} is {found}, but a head has {head_dim}: that is not supported")
    return head_dim


def _layers(file: GgufFile, kind: str) -> dict[str, Any]:
    """Which layers have rotary positions, and which a window."""
    window, context = file.count(f"{kind}.attention.sliding_window"), file.count(f"{kind}.context_length") or 0
    if window and window < context:
        if kind != "llama":
            raise ValueError(f"{file.path}: {kind}.attention.sliding_window is {window}, which is not supported")
        return {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": window}
    return {"no_rope_layer_interval": SMOLLM3_ROPE_INTERVAL} if kind == "smollm3" else {}


def _biases(file: GgufFile) -> dict[str, Any]:
    """A file says by its tensors whether there are any."""
    return {"attention_bias": "blk.0.attn_q.bias" in file.tensors, "mlp_bias": "blk.0.ffn_gate.bias" in file.tensors}


# --- positions --------------------------------------------------------------------------------------------------------


def _rope(file: GgufFile, kind: str) -> dict[str, Any]:
    theta = {"rope_theta": file.number(f"{kind}.rope.freq_base") or 10000.0}
    scaling = file.text(f"{kind}.rope.scaling.type") or "none"
    factor = file.number(f"{kind}.rope.scaling.factor") or file.number(f"{kind}.rope.scale_linear") or 1.0
    if ROPE_FACTORS in file.tensors:
        if scaling != "none":
            raise ValueError(f"{file.path}: both {ROPE_FACTORS} and {kind}.rope.scaling.type {scaling[:40]} are given")
        divisors = _rope_factors(file)
        return theta | (_as_llama3(divisors, theta["rope_theta"]) or {"rope_type": "divided", "divisors": divisors})
    if scaling == "none" and factor == 1.0:
        return theta | {"rope_type": "default"}
    if scaling in ("linear", "none"):
        return theta | {"rope_type": "linear", "factor": factor}
    if scaling != "yarn":
        raise ValueError(f"{file.path}: {kind}.rope.scaling.type {scaling[:40]} is not supported")
    return theta | {"rope_type": "yarn", "factor": factor, **_yarn(file, f"{kind}.rope.scaling")}


def _yarn(file: GgufFile, prefix: str) -> dict[str, Any]:
    named: dict[str, Callable[[str], Any]] = {
        "original_max_position_embeddings": lambda _: file.count(f"{prefix}.original_context_length"),
        "beta_fast": lambda name: file.number(f"{prefix}.yarn_{name}"),
        "beta_slow": lambda name: file.number(f"{prefix}.yarn_{name}"),
    }
    return {name: value for name, read in named.items() if (value := read(name)) is not None}


def _rope_factors(file: GgufFile) -> list[float]:
    """By what each frequency is divided: how Llama 3 stretches its context."""
    entry = file.tensors[ROPE_FACTORS]
    if entry.kind.name != "F32" or math.prod(entry.shape) > MOST_ROPE_FACTORS:
        raise ValueError(f"{file.path}: {ROPE_FACTORS} is {entry.kind.name} {list(entry.shape)}; F32 is needed")
    with file.path.open("rb") as opened:
        opened.seek(entry.start)
        found = list(struct.unpack(f"<{math.prod(entry.shape)}f", opened.read(entry.bytes)))
    if not all(0 < divisor < math.inf for divisor in found):
        raise ValueError(f"{file.path}: {ROPE_FACTORS} holds numbers that are not above 0")
    return found


def _as_llama3(divisors: list[float], theta: float) -> dict[str, Any]:
    """In the words of a config.json, which others read as well, where the usual settings give these very numbers."""
    factor = max(divisors)
    for i, divisor in enumerate(divisors):
        turns = LLAMA3_CONTEXT * theta ** (-i / len(divisors)) / (2 * math.pi)  # over the context of the training
        keep = min(1.0, max(0.0, (turns - LLAMA3_FREQUENCIES[0]) / (LLAMA3_FREQUENCIES[1] - LLAMA3_FREQUENCIES[0])))
        if not math.isclose(1 / divisor, keep + (1 - keep) / factor, rel_tol=1e-4):
            return {}
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": LLAMA3_FREQUENCIES[0],
        "high_freq_factor": LLAMA3_FREQUENCIES[1],
        "original_max_position_embeddings": LLAMA3_CONTEXT,
    }


# --- fields -----------------------------------------------------------------------------------------------------------


def _count(file: GgufFile, key: str) -> int:
    found = file.count(key)
    if found is None:
        raise ValueError(f"{file.path} names no {key}")
    return found


def _number(file: GgufFile, key: str) -> float:
    found = file.number(key)
    if found is None:
        raise ValueError(f"{file.path} names no {key}")
    return found


def _tensor(file: GgufFile, name: str) -> Entry:
    found = file.tensors.get(name)
    if found is None:
        raise ValueError(f"{file.path} has no tensor {name}")
    return found
