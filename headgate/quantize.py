"""`headgate quantize MODEL OUT --bits 8|4|fp8`: a checkpoint of fewer bits, and a table of what that costs."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

DESCRIPTION = """Makes a checkpoint of fewer bits from a model, in the form of compressed-tensors, which other engines
read as well, and compares the perplexities of the original and of all three kinds. With a text of yours, its first half
also tells which columns of a matrix matter most, and its second half is measured."""


def main(arguments: Sequence[str]) -> int:
    options = parser().parse_args(arguments)
    from worker.files import ModelNotFound

    try:
        run(options)
    except (ModelNotFound, ValueError, OSError) as error:
        print(f"headgate: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("headgate: interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser("headgate quantize", description=DESCRIPTION)
    result.add_argument(
        "model", metavar="MODEL", help="as of `headgate serve`: a name, a folder, a GGUF file, a hub model"
    )
    result.add_argument("out", metavar="OUT", type=Path, help="the folder to make; nothing is overwritten")
    result.add_argument("--bits", choices=("8", "4", "fp8"), required=True, help="of a weight of a linear layer")
    result.add_argument(
        "--group", type=int, choices=(32, 128), default=32, help="weights that share a scale (8 and 4 bits; default 32)"
    )
    result.add_argument("--text", type=Path, metavar="FILE", help="to measure with; by default the demo model's card")
    return result


def run(options: argparse.Namespace) -> None:
    from worker.files import find_model, has_random_weights
    from worker.native.topology import wait_passively

    wait_passively(os.environ)  # before torch, which takes more than a second to import
    from worker.native.quantizing import new_folder, quantize

    model = find_model(options.model, say)
    if has_random_weights(model):
        raise ValueError(f"{options.model} has random weights: there is nothing to quantize")
    text = None if options.text is None else read_text(options.text)
    with new_folder(options.out) as folder:
        original = 0.0
        for row in quantize(model, folder, options.bits, options.group, text, say):
            if not original:
                original = row.perplexity
                print(f"{'weights':<10}{'bits':>7}{'size':>12}{'perplexity':>13}{'change':>10}")
            change = f"{100 * (row.perplexity / original - 1):+.2f} %" if row.name != "original" else ""
            size, mark = f"{row.bytes / 1e6:,.1f} MB", "  written" if row.is_written else ""
            print(f"{row.name:<10}{row.bits:7.2f}{size:>12}{row.perplexity:13.3f}{change:>10}{mark}", flush=True)
    say(f"{options.out} is ready: headgate serve --model {options.out}")


def read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text in UTF-8: {error}") from error


def say(line: str) -> None:
    print(f"headgate: {line}", flush=True)
