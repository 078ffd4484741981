"""Figures with targets: how they are added up over rounds, printed and kept."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured quantity. A target is the most it may be, or the least where `at_least` says so."""

    name: str
    unit: str
    value: float
    low: float  # of the rounds
    high: float
    target: float | None = None
    at_least: bool = False

    @property
    def verdict(self) -> str:
        if self.target is None:
            return ""
        met = self.value >= self.target if self.at_least else self.value <= self.target
        return "met" if met else "missed"


def over_rounds(
    name: str, unit: str, rounds: Sequence[float], target: float | None = None, at_least: bool = False
) -> Figure:
    """The median round, and the extremes as its spread."""
    return Figure(name, unit, statistics.median(rounds), min(rounds), max(rounds), target, at_least)


def single(name: str, unit: str, value: float, target: float | None = None) -> Figure:
    return Figure(name, unit, value, value, value, target)


def print_table(title: str, figures: Sequence[Figure]) -> None:
    width = max(len(figure.name) for figure in figures)
    print(f"\n{title}")
    print(f"  {'':<{width}} {'median':>9} {'least':>9} {'most':>9} {'target':>9}")
    for figure in figures:
        target = "" if figure.target is None else f"{figure.target:.4g}"
        numbers = " ".join(f"{value:>9.4g}" for value in (figure.value, figure.low, figure.high))
        print(f"  {figure.name:<{width}} {numbers} {target:>9} {figure.unit:<7} {figure.verdict}".rstrip())


def save(benchmark: str, figures: Sequence[Figure], **more: Any) -> Path:
    """Writes results/BENCHMARK.json: the figures, and all that is needed to judge and repeat them."""
    result = {
        "benchmark": benchmark,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "command": shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]]),
        "hardware": hardware(),
        "figures": [asdict(figure) | {"verdict": figure.verdict} for figure in figures],
        **more,
    }
    path = RESULTS / f"{benchmark}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def hardware() -> dict[str, Any]:
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "load_average": round(os.getloadavg()[0], 2),  # what else the machine was doing, and we
    }


def _cpu() -> str:
    path = Path("/proc/cpuinfo")
    if path.is_file():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    """The commit, and whether something that is not in it was measured."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    changed = git("status", "--porcelain", "--", ":/scheduler", ":/service", ":/worker", ":/headgate")
    return git("rev-parse", "--short", "HEAD") + (" with changes" if changed else "")
