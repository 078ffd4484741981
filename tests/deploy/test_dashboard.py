"""The dashboard "Promise and wall": fresh, well laid out, and asking only for what we count."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.grafana.promise_and_wall import SOURCE, TARGET, render
from service.metrics import Metrics
from worker.metrics import WorkerCollector

ROOT = Path(__file__).parents[2]
PROVISIONING = ROOT / "deploy" / "grafana" / "provisioning"
NAME = re.compile(r"[a-z_]+:headgate_\w+:\w+|\bheadgate_\w+")
SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
Panel = dict[str, Any]


def load_yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text("utf-8"))


def rules(name: str) -> list[dict[str, Any]]:
    groups = load_yaml(ROOT / "deploy" / "prometheus" / "rules" / name)["groups"]
    return [rule for group in groups for rule in group["rules"]]


def counted() -> set[str]:
    """Every name that a worker or a gateway exposes."""
    families = [*WorkerCollector("m", "w").collect(), *Metrics("1").collect()]
    return {family.name + suffix for family in families for suffix in SUFFIXES[family.type]}


def recorded() -> set[str]:
    return {rule["record"] for rule in rules("recording.yml")}


@pytest.fixture(scope="module")
def board() -> dict[str, Any]:
    return json.loads(TARGET.read_text("utf-8"))


@pytest.fixture
def panels(board: dict[str, Any]) -> list[Panel]:
    return [panel for panel in board["panels"] if panel["type"] != "row"]


def expressions(panels: list[Panel]) -> Iterator[str]:
    return (target["expr"] for panel in panels for target in panel["targets"])


def test_the_committed_dashboard_is_what_the_code_makes() -> None:
    assert TARGET.read_text("utf-8") == render(), "run: python deploy/grafana/promise_and_wall.py"


def test_the_schema_is_the_classic_one(board: dict[str, Any]) -> None:
    assert board["schemaVersion"] == 42
    assert board["uid"] == "promise-and-wall"


def test_every_panel_has_an_id_of_its_own(board: dict[str, Any]) -> None:
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)


def test_no_panel_leaves_the_grid_or_covers_another(board: dict[str, Any]) -> None:
    cells = [
        {(x, y) for x in range(grid["x"], grid["x"] + grid["w"]) for y in range(grid["y"], grid["y"] + grid["h"])}
        for grid in (panel["gridPos"] for panel in board["panels"])
    ]
    assert all(0 <= x < 24 and y >= 0 for cell in cells for x, y in cell)
    assert not any(one & other for one, other in combinations(cells, 2))
    covered = set().union(*cells)
    assert len(covered) == 24 * (1 + max(y for _, y in covered)), "there is a hole"


def test_every_panel_explains_itself(panels: list[Panel]) -> None:
    for panel in panels:
        defaults = panel["fieldConfig"]["defaults"]
        assert len(panel["description"]) > 60 and panel["description"].endswith("."), panel["title"]
        assert defaults["unit"], panel["title"]
        assert defaults["thresholds"]["steps"][0]["value"] is None, panel["title"]
        assert panel["datasource"] == {"type": SOURCE.type_val, "uid": SOURCE.uid}


def test_queries_of_a_panel_have_names_of_their_own_and_legends(panels: list[Panel]) -> None:
    for panel in panels:
        refs = [target["refId"] for target in panel["targets"]]
        assert refs and len(set(refs)) == len(refs), panel["title"]
        assert all(target["legendFormat"] and target["range"] for target in panel["targets"]), panel["title"]


def test_every_name_in_a_query_is_counted_or_recorded(panels: list[Panel]) -> None:
    known = counted() | recorded()
    asked = {name for expression in expressions(panels) for name in NAME.findall(expression)}
    assert asked <= known, asked - known


def test_every_name_in_a_rule_is_counted_or_recorded() -> None:
    known = counted() | recorded()
    asked = {
        name for file in ("recording.yml", "alerts.yml") for rule in rules(file) for name in NAME.findall(rule["expr"])
    }
    assert asked <= known, asked - known


def test_every_recorded_name_is_shown_or_warned_of(panels: list[Panel]) -> None:
    used = " ".join(
        [*expressions(panels), *(rule["expr"] for file in ("recording.yml", "alerts.yml") for rule in rules(file))]
    )
    unused = {name for name in recorded() if name not in NAME.findall(used)}
    assert unused <= {"fleet:headgate_stps:rate1m"}, "a rule that nobody reads"


def test_variables_are_those_that_queries_use_and_may_stand_for_several(
    board: dict[str, Any], panels: list[Panel]
) -> None:
    variables = board["templating"]["list"]
    assert all(variable["multi"] and variable["includeAll"] for variable in variables)
    used = {name for expression in expressions(panels) for name in re.findall(r"\$(\w+)", expression)}
    assert {variable["name"] for variable in variables} == used - {"__rate_interval", "__range"}
    matchers = [part for expression in expressions(panels) for part in re.findall(r'\w+(=~?)"\$\w+"', expression)]
    assert matchers and set(matchers) == {"=~"}, "a variable with several values needs =~"


def test_a_cause_and_a_tier_have_one_colour_everywhere(panels: list[Panel]) -> None:
    colours: dict[str, set[str]] = {}
    for panel in panels:
        for override in panel["fieldConfig"].get("overrides", []):
            for one in override["properties"]:
                if one["id"] == "color":
                    colours.setdefault(override["matcher"]["options"], set()).add(one["value"]["fixedColor"])
    for word in ("priority", "default", "flex", "weights", "kv", "compute", "host"):
        assert len(colours[f"/^{word}( |$)/"]) == 1, word


def test_floors_are_drawn_dashed_beside_the_speeds(panels: list[Panel]) -> None:
    (panel,) = (panel for panel in panels if panel["title"] == "UTPS by tier against floors")
    (floor,) = (target for target in panel["targets"] if "floor" in target["expr"])
    styles = {
        one["id"]: one["value"]
        for override in panel["fieldConfig"]["overrides"]
        if override["matcher"] == {"id": "byFrameRefID", "options": floor["refId"]}
        for one in override["properties"]
    }
    assert styles["custom.lineStyle"]["fill"] == "dash"


def test_provisioning_names_the_source_of_the_panels_and_folders_that_compose_mounts() -> None:
    (source,) = load_yaml(PROVISIONING / "datasources" / "prometheus.yml")["datasources"]
    assert source["uid"] == SOURCE.uid and source["type"] == SOURCE.type_val
    (provider,) = load_yaml(PROVISIONING / "dashboards" / "headgate.yml")["providers"]
    services = load_yaml(ROOT / "docker-compose.yml")["services"]
    mounts = dict(volume.split(":")[1::-1] for volume in services["grafana"]["volumes"])
    assert (ROOT / mounts[provider["options"]["path"]]) == TARGET.parent
    assert (ROOT / mounts["/etc/grafana/provisioning"]) == PROVISIONING
    host, port = source["url"].removeprefix("http://").split(":")
    assert host in services and port == "9090"


def test_prometheus_scrapes_services_that_compose_starts() -> None:
    services = load_yaml(ROOT / "docker-compose.yml")["services"]
    scraped = load_yaml(ROOT / "deploy" / "prometheus" / "prometheus.yml")["scrape_configs"]
    targets = [target for job in scraped for config in job["static_configs"] for target in config["targets"]]
    assert targets and all(target.split(":")[0] in services for target in targets)
