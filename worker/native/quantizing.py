"""A model in, a checkpoint of fewer bits out, and the perplexity of every recipe beside that of the original."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from worker.config import WorkerConfig
from worker.files import DEMO, SERVED_FROM, SHIPPED, read_config
from worker.gguf import is_gguf
from worker.native.checkpoint import Checkpoint
from worker.native.config import DecoderConfig
from worker.native.forms import open_checkpoint
from worker.native.loader import DTYPES, load_weights, tensor_shapes
from worker.native.memory import MemoryPlan, enough_memory, plan_memory
from worker.native.perplexity import ROW_TOKENS, column_importance, perplexity, rows_of
from worker.native.progress import LoadingBar
from worker.native.quantize import AsIfQuantized, Recipe, Work, write_quantized
from worker.tokenizer import TokenizerFiles, read_tokenizer

RECIPES = {"8": "int8", "4": "int4", "fp8": "fp8"}  # as the command calls them
EMBEDDING = "model.embed_tokens.weight"
MOST_TOKENS = 8192  # of a text; a 1B model takes 40 s for them on two cores
DEFAULT_TEXT = SHIPPED / DEMO / "README.md"
BESIDE_WEIGHTS = [name for name in SERVED_FROM if name != "config.json" and "safetensors" not in name]


@dataclass(frozen=True, slots=True)
class Row:
    """Of the table. `bits`: per weight of the quantized matrices, scales included."""

    name: str
    bits: float
    bytes: int  # of all tensors
    perplexity: float
    is_written: bool


@torch.inference_mode()
def quantize(
    model: Path, folder: Path, kind: str, group: int, text: str | None, say: Callable[[str], None]
) -> Iterator[Row]:
    """Writes the checkpoint into `folder`, then yields the rows of the table, the original first.

    A `text` of the user's serves twice: its first half tells which columns matter, its second is measured.
    """
    config, files = read_config(model), read_tokenizer(model)
    decoder = DecoderConfig.from_dict(config)
    with open_checkpoint(model, decoder) as checkpoint, enough_memory(str(model)):
        stored = checkpoint.dtype(EMBEDDING)
        plan = plan_memory(
            decoder, stored, str(model), WorkerConfig(context_tokens=min(ROW_TOKENS, decoder.max_positions))
        )
        recipes = [Recipe(name, group, DTYPES[stored]) for name in RECIPES.values()]
        work, rows = _prepare(Work(checkpoint, decoder), plan, files, text, say)
        chosen = next(recipe for recipe in recipes if recipe.name == RECIPES[kind])
        with LoadingBar(what=f"writing {chosen.name}") as progress:
            write_quantized(work, chosen, _plain(config), folder, progress)
        write_tokenizer(model, files, folder)
        yield _row("original", checkpoint, None, work, plan, rows)
        for recipe in recipes:
            if recipe is not chosen:
                yield _row(recipe.name, AsIfQuantized(work, recipe), recipe, work, plan, rows)
                continue
            with open_checkpoint(folder, decoder) as written:
                yield _row(recipe.name, written, recipe, work, plan, rows, is_written=True)


def _prepare(
    work: Work, plan: MemoryPlan, files: TokenizerFiles, text: str | None, say: Callable[[str], None]
) -> tuple[Work, list[list[int]]]:
    """The rows to measure with, and the work with what the other rows told of its columns."""
    content = DEFAULT_TEXT.read_text("utf-8") if text is None else text
    ids = Tokenizer.from_str(files.tokenizer_json).encode(content, add_special_tokens=False).ids
    if len(ids) > MOST_TOKENS:
        say(f"of the text's {len(ids):,} tokens the first {MOST_TOKENS:,} are used")
    rows = rows_of(
        [id for id in ids[:MOST_TOKENS] if id < work.config.vocab], min(ROW_TOKENS, work.config.max_positions)
    )
    if not rows:
        raise ValueError("the text has less than two tokens: too few to measure with")
    if text is None or len(rows) < 2:
        return work, rows
    half = len(rows) // 2
    weights = _load(work.checkpoint, work.config, plan)
    return Work(work.checkpoint, work.config, column_importance(work.config, weights, rows[:half])), rows[half:]


def _load(checkpoint: Checkpoint, decoder: DecoderConfig, plan: MemoryPlan) -> Any:
    with LoadingBar() as progress:
        return load_weights(checkpoint, decoder, torch.device(plan.device), DTYPES[plan.dtype], progress=progress)


def _row(
    name: str,
    checkpoint: Checkpoint,
    recipe: Recipe | None,
    work: Work,
    plan: MemoryPlan,
    rows: Sequence[Sequence[int]],
    is_written: bool = False,
) -> Row:
    measured = perplexity(work.config, _load(checkpoint, work.config, plan), rows)
    sizes = {tensor: _bytes(work, recipe, tensor) for tensor in tensor_shapes(work.config)}
    matrices = [tensor for tensor in sizes if tensor.endswith("_proj.weight")]
    numbers = sum(work.checkpoint.shapes[tensor][0] * work.checkpoint.shapes[tensor][1] for tensor in matrices)
    bits = 8 * sum(sizes[tensor] for tensor in matrices) / numbers
    return Row(name, bits, sum(sizes.values()), measured, is_written)


def _bytes(work: Work, recipe: Recipe | None, tensor: str) -> int:
    stored = work.checkpoint.stored_bytes(tensor)
    if recipe is None:
        return stored
    shape = work.checkpoint.shapes[tensor]
    if work.is_quantized(tensor, recipe):
        return recipe.stored_bytes(shape)
    return Tensor.numel(torch.empty(shape, device="meta")) * DTYPES[work.checkpoint.dtype(tensor)].itemsize


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """Without what is said of how the original's weights are stored."""
    return {name: value for name, value in config.items() if name not in ("compression_config", "dtype")}


# --- files ------------------------------------------------------------------------------------------------------------


def write_tokenizer(model: Path, files: TokenizerFiles, folder: Path) -> None:
    """Everything beside the weights that a model is served from."""
    if not is_gguf(model):
        for name in BESIDE_WEIGHTS:
            if (model / name).is_file():
                shutil.copyfile(model / name, folder / name)
        return
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **files.special_tokens}
    if files.chat_template is not None:
        settings["chat_template"] = files.chat_template
    generation = {"eos_token_id": list(files.eos_ids), "temperature": files.temperature, "top_p": files.top_p}
    generation |= {"top_k": files.top_k, "min_p": files.min_p, "repetition_penalty": files.repetition_penalty}
    (folder / "tokenizer.json").write_text(files.tokenizer_json, "utf-8")
    for name, content in {"tokenizer_config.json": settings, "generation_config.json": generation}.items():
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")


@contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """A folder that gets its name when all of it is there; when something fails, nothing is left.

    Raises ValueError where something has that name already.
    """
    if final.exists() or final.is_symlink():
        raise ValueError(f"{final} is there already; nothing is overwritten")
    if not final.parent.is_dir():
        raise ValueError(f"there is no folder {final.parent} to make {final.name} in")
    folder = final.parent / f".{final.name}.{os.getpid()}"
    folder.mkdir()
    try:
        yield folder
        folder.rename(final)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
