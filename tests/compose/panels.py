"""Whether the panels of a Grafana dashboard show something: every query is asked of a live Prometheus, and must find samples."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

Ask = Callable[..., Any]  # ask(path, **parameters) -> the answer's data; raises ValueError with what Prometheus says

WINDOW_SECONDS, STEP_SECONDS = 60, 5
INTERVALS = {
    "__rate_interval": "20s",
    "__interval": "5s",
    "__interval_ms": "5000",
    "__range": "1m",
    "__range_s": "60",
    "__range_ms": "60000",
}
LABEL_VALUES = re.compile(r"label_values\((?:(?P<metric>.+),)?\s*(?P<label>\w+)\s*\)")


class Query(NamedTuple):
    panel: str
    expression: str


def queries(dashboard: dict[str, Any]) -> Iterator[Query]:
    """Those of all panels, also of panels in rows that are folded."""
    for panel in all_panels(dashboard.get("panels") or []):
        for target in panel.get("targets") or []:
            if target.get("expr"):
                yield Query(panel.get("title") or f"panel {panel.get('id')}", target["expr"])


def all_panels(panels: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for panel in panels:
        if panel.get("type") == "row":
            yield from all_panels(panel.get("panels") or [])
        else:
            yield panel


def variables(dashboard: dict[str, Any], ask: Ask) -> dict[str, str]:
    """What each variable of the dashboard stands for when it is opened: everything where it may, else the first value."""
    values = dict(INTERVALS)
    for variable in (dashboard.get("templating") or {}).get("list") or []:
        if variable.get("type") in ("query", "custom", "interval", "constant", "textbox"):
            values[variable["name"]] = value_of(variable, ask)
    return values


def value_of(variable: dict[str, Any], ask: Ask) -> str:
    asked = variable.get("query") or ""
    asked = asked.get("query", "") if isinstance(asked, dict) else asked
    wanted = LABEL_VALUES.fullmatch(asked.strip())
    if variable.get("type") != "query" or not wanted:
        return ".*" if variable.get("includeAll") else asked.split(",")[0].strip()
    found = ask(f"label/{wanted['label']}/values", **({"match[]": wanted["metric"]} if wanted["metric"] else {}))
    if not found:
        raise ValueError(f"variable {variable['name']}: {asked} has no values")
    return ".*" if variable.get("includeAll") or variable.get("multi") else str(found[0])


def filled(expression: str, values: dict[str, str]) -> str:
    """The expression without variables: `$name`, `${name}`, `${name:regex}`, `[[name]]`."""
    for name in sorted(values, key=len, reverse=True):
        spelled = rf"\$\{{{name}(:\w+)?\}}|\${name}\b|\[\[{name}\]\]"
        expression = re.sub(spelled, lambda _, name=name: values[name], expression)
    return expression


def finite_samples(matrix: list[dict[str, Any]]) -> int:
    return sum(math.isfinite(float(value)) for series in matrix for _, value in series.get("values", []))


def empty_queries(dashboard: dict[str, Any], ask: Ask, now: float) -> list[str]:
    """A sentence for every query that fails or finds nothing in the last minute."""
    try:
        values = variables(dashboard, ask)
    except ValueError as error:
        return [str(error)]
    faults = []
    for panel, expression in queries(dashboard):
        asked = filled(expression, values)
        try:
            span = {"start": now - WINDOW_SECONDS, "end": now, "step": STEP_SECONDS}
            found = finite_samples(ask("query_range", query=asked, **span)["result"])
        except ValueError as error:
            faults.append(f"{panel}: {error} in {asked}")
            continue
        if not found:
            faults.append(f"{panel}: nothing for {asked}")
    return faults
