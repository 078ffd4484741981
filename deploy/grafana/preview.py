"""Draws rows of a dashboard as an SVG picture, with data from Prometheus: a way to look at a change without Grafana.

    python deploy/grafana/preview.py http://127.0.0.1:9090 wall.svg --model simulated-h100 --rows Wall,Processes

Layout, units, colours, stacking, axes, thresholds and legends are read from the dashboard's JSON; the rest is plain.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

BOARD = Path(__file__).parent / "dashboards" / "promise-and-wall.json"
COLUMN, LINE, GAP = 66, 34, 8  # pixels of the grid
LEFT, TOP, BOTTOM = 74, 34, 58  # inside a panel: axis, title, legend
PALETTE = ("#73BF69", "#F2CC0C", "#8AB8FF", "#FF780A", "#F2495C", "#5794F2", "#B877D9", "#37B6A6")
INK, PALE, LINES = "#CCCCDC", "#8E96A3", "#2C3235"
POINTS = 150

Panel = dict[str, Any]


class Series(NamedTuple):
    name: str
    ref: str
    points: list[tuple[float, float]]
    look: dict[str, Any]  # what Grafana calls custom options, and the colour

    @property
    def last(self) -> float:
        return next((y for _, y in reversed(self.points) if math.isfinite(y)), math.nan)


class Span(NamedTuple):
    """A range of values on an axis, linear or logarithmic, and where it lies in pixels."""

    least: float
    most: float
    log: float
    start: float
    length: float

    def at(self, value: float) -> float:
        low, high, value = (self.scaled(one) for one in (self.least, self.most, value))
        return self.start + (value - low) / ((high - low) or 1) * self.length

    def scaled(self, value: float) -> float:
        return math.log(max(value, 1e-12), self.log) if self.log else value


# --- data -------------------------------------------------------------------------------------------------------------


class Source:
    def __init__(self, url: str, model: str, end: float, seconds: float) -> None:
        self._url = url
        self.start, self.end = end - seconds, end
        values = {"__rate_interval": "20s", "__range": f"{int(seconds)}s", "model": model, "tier": ".*", "worker": ".*"}
        self.variables = values

    def filled(self, text: str) -> str:
        return re.sub(r"\$(\w+)", lambda found: self.variables[found[1]], text)

    def series(self, panel: Panel) -> list[Series]:
        found = []
        for target in panel["targets"]:
            for row in self._ask(target["expr"]):
                name = re.sub(
                    r"{{(\w+)}}", lambda label, row=row: row["metric"].get(label[1], ""), target["legendFormat"]
                )
                points = [(float(x), float(y)) for x, y in row["values"]]
                found.append(Series(name, target["refId"], points, look(panel, name, target["refId"], len(found))))
        return found

    def _ask(self, expression: str) -> list[dict[str, Any]]:
        step = max(1, round((self.end - self.start) / POINTS))
        asked = {"query": self.filled(expression), "start": self.start, "end": self.end, "step": step}
        url = f"{self._url}/api/v1/query_range?{urllib.parse.urlencode(asked)}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            rows: list[dict[str, Any]] = json.load(answer)["data"]["result"]
        return sorted(rows, key=lambda row: sorted(row["metric"].items()))


def look(panel: Panel, name: str, ref: str, number: int) -> dict[str, Any]:
    """The panel's options with those overrides that match, as Grafana merges them."""
    found = {"colour": PALETTE[number % len(PALETTE)], **panel["fieldConfig"]["defaults"].get("custom", {})}
    for override in panel["fieldConfig"].get("overrides", []):
        matcher = override["matcher"]
        by_name = matcher["id"] == "byRegexp" and re.search(matcher["options"].strip("/"), name)
        if by_name or (matcher["id"] == "byFrameRefID" and matcher["options"] == ref):
            for one in override["properties"]:
                is_colour = one["id"] == "color"
                key = "colour" if is_colour else one["id"].removeprefix("custom.")
                found[key] = one["value"]["fixedColor"] if is_colour else one["value"]
    return found


# --- values -----------------------------------------------------------------------------------------------------------


def shown(value: float, unit: str, decimals: int | None = None) -> str:
    """A value as Grafana writes it, nearly."""
    if not math.isfinite(value):
        return "–"
    if unit == "percentunit":
        return f"{value * 100:.0f} %" if value > 10 else f"{value * 100:.3g} %"
    if unit == "s":
        return next(
            (f"{value * by:.3g} {name}" for least, by, name in TIMES if value >= least), f"{value * 1e6:.3g} µs"
        )
    if unit in ("Bps", "flops"):
        return scaled(value) + {"Bps": "B/s", "flops": "FLOP/s"}[unit]
    if unit == "reqps":
        return f"{value:.3g} req/s"
    number = f"{value:.0f}" if abs(value) >= 100 or decimals == 0 else f"{value:.3g}"
    return f"{number} {unit.removeprefix('suffix:')}" if unit.startswith("suffix:") else number


TIMES = ((100, 1 / 60, "min"), (1, 1, "s"), (1e-3, 1e3, "ms"))


def scaled(value: float) -> str:
    power = min(5, max(0, int(math.log10(abs(value)) // 3))) if abs(value) >= 1 else 0
    return f"{value / 1000**power:.3g} {'kMGTP'[power - 1] if power else ''}"


def ticks(span: Span) -> list[float]:
    if span.log:
        powers = range(math.floor(span.scaled(span.least)), math.ceil(span.scaled(span.most)) + 1)
        every = max(1, len(powers) // 5)
        return [
            span.log**power for power in powers if power % every == 0 and span.least <= span.log**power <= span.most
        ]
    rough = (span.most - span.least) / 4 or 1
    ten = 10 ** math.floor(math.log10(rough))
    step = min((by * ten for by in (1, 2, 2.5, 5, 10)), key=lambda one: abs(one - rough))
    return [step * number for number in range(math.ceil(span.least / step), math.floor(span.most / step + 1e-9) + 1)]


# --- drawing ----------------------------------------------------------------------------------------------------------


def text(x: float, y: float, words: str, size: int = 12, fill: str = INK, more: str = "") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" font-size="{size}" fill="{fill}" {more}>{escape(words)}</text>'


def frame(panel: Panel, x: float, y: float, width: float, height: float, title: str) -> str:
    box = f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="2" fill="#181B1F" stroke="{LINES}"/>'
    return box + text(x + 10, y + 20, title, 13, INK, 'font-weight="600"')


def stat(panel: Panel, found: list[Series], x: float, y: float, width: float, height: float) -> str:
    defaults, drawn = panel["fieldConfig"]["defaults"], ""
    for number, series in enumerate(found):
        part = width / len(found)
        value = series.last
        steps = [step for step in defaults["thresholds"]["steps"] if step["value"] is None or value >= step["value"]]
        middle = x + part * (number + 0.5)
        words = shown(value, defaults.get("unit", "short"), defaults.get("decimals"))
        centred = 'text-anchor="middle" font-weight="600"'
        drawn += text(middle, y + height * 0.66, words, 26 if len(words) < 11 else 20, steps[-1]["color"], centred)
        if len(found) > 1:
            drawn += text(middle, y + height * 0.88, series.name, 11, PALE, 'text-anchor="middle"')
    return drawn or text(
        x + width / 2, y + height * 0.66, defaults.get("noValue", "–"), 26, PALE, 'text-anchor="middle"'
    )


def is_stacked(series: Series) -> bool:
    return bool(series.look.get("stacking", {}).get("mode", "none") != "none")


def with_bases(found: list[Series]) -> Iterator[tuple[Series, dict[float, float]]]:
    """Each with what it stands on: nothing, or those before it."""
    height: dict[float, float] = {}
    for series in found:
        if not is_stacked(series):
            yield series, {}
            continue
        yield series, dict(height)
        for x, y in series.points:
            height[x] = height.get(x, 0.0) + (y if math.isfinite(y) else 0.0)


def vertical(panel: Panel, found: list[Series], start: float, length: float) -> Span:
    defaults = panel["fieldConfig"]["defaults"]
    scale = defaults["custom"].get("scaleDistribution", {})
    log = scale.get("log", 0) if scale.get("type") == "log" else 0
    tops = [y + base.get(x, 0.0) for one, base in with_bases(found) for x, y in one.points if math.isfinite(y)]
    tops = [y for y in tops if y > 0 or not log] or [1.0]
    least, most = defaults.get("min", min(tops)), defaults.get("max", max(tops))
    if log:
        least, most = log ** math.floor(math.log(least, log) + 1e-9), log ** math.ceil(math.log(most, log) - 1e-9)
    elif "max" not in defaults:
        most += (most - least) * 0.05
    return Span(least, most if most > least else least + 1, log, start + length, -length)


class Dot(NamedTuple):
    """A point in pixels, and what it stands on."""

    x: float
    top: float
    foot: float


def pieces(series: Series, base: dict[float, float], across: Span, up: Span) -> list[list[Dot]]:
    """The line, broken where samples are missing for longer than the panel lets pass."""
    found: list[list[Dot]] = []
    longest, before = series.look.get("insertNulls", math.inf) / 1000, -math.inf
    for x, y in series.points:
        if math.isfinite(y) and (y > 0 or not up.log):
            if x - before > longest:
                found.append([])
            foot = base.get(x, 0.0)
            found[-1].append(
                Dot(across.at(x), up.at(max(up.least, min(y + foot, up.most))), up.at(max(foot, up.least)))
            )
            before = x
    return found


def curve(series: Series, dots: list[Dot], bar_width: float) -> str:
    """Bars, or a line and what lies below it."""
    colour, chosen = series.look["colour"], series.look
    opacity, wide = chosen.get("fillOpacity", 0) / 100, chosen.get("lineWidth", 1)
    if chosen.get("drawStyle") == "bars":
        bars = (
            f"M{d.x:.1f} {d.foot:.1f}V{d.top:.1f}h{bar_width:.1f}V{d.foot:.1f}z" for d in dots if d.foot - d.top > 0.3
        )
        return f'<path d="{"".join(bars)}" fill="{colour}" fill-opacity="{opacity}"/>'
    line = "L".join(f"{dot.x:.1f} {dot.top:.1f}" for dot in dots)
    feet = "L".join(f"{dot.x:.1f} {dot.foot:.1f}" for dot in reversed(dots))
    dash = 'stroke-dasharray="8 6"' if "lineStyle" in chosen else ""
    area = f'<path d="M{line}L{feet}z" fill="{colour}" fill-opacity="{opacity}"/>' if opacity else ""
    return area + (f'<path d="M{line}" fill="none" stroke="{colour}" stroke-width="{wide}" {dash}/>' if wide else "")


def legend(found: list[Series], unit: str, x: float, y: float, width: float) -> str:
    drawn, at, line = "", 0.0, 0
    for series in found:
        if series.look.get("hideFrom", {}).get("legend"):
            continue
        words = f"{series.name}  {shown(series.last, unit)}"
        needed = 24 + 6.1 * len(words)
        if at and at + needed > width:
            at, line = 0.0, line + 1
        dash = 'stroke-dasharray="4 3"' if "lineStyle" in series.look else ""
        mark = f'<path d="M{x + at:.0f} {y + line * 15 - 4:.0f}h14" stroke="{series.look["colour"]}" stroke-width="3" {dash}/>'
        drawn += mark + text(x + at + 18, y + line * 15, words, 11, PALE)
        at += needed
    return drawn


def chart(panel: Panel, found: list[Series], source: Source, x: float, y: float, width: float, height: float) -> str:
    defaults = panel["fieldConfig"]["defaults"]
    unit, foot = defaults.get("unit", "short"), height - TOP - BOTTOM - 22
    across = Span(source.start, source.end, 0, x + LEFT, width - LEFT - 12)
    up = vertical(panel, found, y + TOP, foot)
    drawn = ""
    for value in ticks(up):
        drawn += f'<path d="M{x + LEFT} {up.at(value):.1f}h{across.length}" stroke="{LINES}"/>'
        drawn += text(x + LEFT - 6, up.at(value) + 4, shown(value, unit), 10, PALE, 'text-anchor="end"')
    for part in (0, 0.25, 0.5, 0.75, 1):
        minutes = (source.end - source.start) * (1 - part) / 60
        place = across.start + across.length * part
        drawn += text(
            place, y + TOP + foot + 15, f"−{minutes:.3g} min" if minutes else "now", 10, PALE, 'text-anchor="middle"'
        )
    for series, base in with_bases(found):
        parts = pieces(series, base, across, up)
        drawn += "".join(curve(series, dots, across.length / POINTS * 0.9) for dots in parts)
    if defaults["custom"].get("thresholdsStyle", {}).get("mode", "off") != "off":
        for step in defaults["thresholds"]["steps"][1:]:
            if up.least <= step["value"] <= up.most:
                line = f"M{x + LEFT} {up.at(step['value']):.1f}h{across.length}"
                drawn += f'<path d="{line}" stroke="{step["color"]}" stroke-width="1" stroke-dasharray="10 10"/>'
    if not found:
        drawn += text(x + width / 2, y + height / 2, "No data", 14, PALE, 'text-anchor="middle"')
    return drawn + legend(found, unit, x + 12, y + height - BOTTOM + 14, width - 20)


def draw(board: dict[str, Any], source: Source, rows: list[str]) -> str:
    drawn, lowest, shift, is_wanted = "", 0.0, 0.0, False
    for panel in board["panels"]:
        grid = panel["gridPos"]
        if panel["type"] == "row":
            is_wanted = any(panel["title"].startswith(row) for row in rows)
            shift = lowest - grid["y"] * LINE
        if not is_wanted:
            continue
        x, y = grid["x"] * COLUMN + GAP, grid["y"] * LINE + shift + GAP
        width, height = grid["w"] * COLUMN - GAP, grid["h"] * LINE - GAP
        lowest = max(lowest, y + height)
        title = source.filled(panel["title"])
        if panel["type"] == "row":
            drawn += text(x, y + 20, f"⌄  {title}", 15, INK, 'font-weight="600"')
            continue
        found = source.series(panel)
        drawn += frame(panel, x, y, width, height, title)
        drawn += (
            stat(panel, found, x, y, width, height)
            if panel["type"] == "stat"
            else chart(panel, found, source, x, y, width, height)
        )
    size = f'width="{24 * COLUMN + GAP}" height="{lowest + GAP:.0f}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {24 * COLUMN + GAP} {lowest + GAP:.0f}" '
    return f'{head}font-family="Inter,Helvetica,Arial,sans-serif"><rect width="100%" height="100%" fill="#111217"/>{drawn}</svg>\n'


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("prometheus", help="its URL")
    options.add_argument("picture", type=Path, help="the SVG file to write")
    options.add_argument("--model", default=".*", help="the model to draw")
    options.add_argument("--rows", default="Now,Promise,Wall,Processes", help="titles of rows begin with one of these")
    options.add_argument("--minutes", type=float, default=15.0)
    chosen = options.parse_args()
    source = Source(chosen.prometheus, chosen.model, time.time(), chosen.minutes * 60)
    board = json.loads(BOARD.read_text("utf-8"))
    chosen.picture.write_text(draw(board, source, chosen.rows.split(",")), "utf-8")


if __name__ == "__main__":
    main()
