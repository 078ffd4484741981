"""`python -m benchmarks [NAME …]`: runs the named benchmarks, or the usual ones, and says which targets were missed."""

from __future__ import annotations

import sys
from importlib import import_module

USUAL = ("gateway", "prediction")
NAMES = (*USUAL, "engine", "prefix")


def main(names: list[str]) -> int:
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        print(f"there is no benchmark {', '.join(unknown)}; there are: {', '.join(NAMES)}", file=sys.stderr)
        return 2
    figures = [figure for name in names or USUAL for figure in import_module(f"benchmarks.{name}").main()]
    judged = [figure for figure in figures if figure.verdict]
    missed = [figure.name for figure in judged if figure.verdict == "missed"]
    print(f"\n{len(judged) - len(missed)} of {len(judged)} targets met" + "".join(f"\n  missed: {n}" for n in missed))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
