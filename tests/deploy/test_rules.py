"""Prometheus' own tool has the last word on configuration and rules."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

FOLDER = Path(__file__).parents[2] / "deploy" / "prometheus"


@pytest.fixture(scope="module")
def promtool() -> str:
    path = shutil.which("promtool")
    if path is None:
        absent = "promtool is not installed (Debian: apt-get install prometheus)"
        if "promtool" in os.environ.get("REQUIRED_PROGRAMS", "").split():
            pytest.fail(absent)
        pytest.skip(absent)
    return path


def run(*command: str) -> None:
    result = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout + result.stderr


def rules(name: str) -> list[dict[str, Any]]:
    groups = yaml.safe_load((FOLDER / "rules" / name).read_text("utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def cases(name: str) -> list[dict[str, Any]]:
    return yaml.safe_load((FOLDER / "rules" / "tests" / name).read_text("utf-8"))["tests"]


def test_the_configuration_is_valid(promtool: str) -> None:
    run(promtool, "check", "config", "prometheus.yml")


@pytest.mark.parametrize("name", ["recording.yml", "alerts.yml"])
def test_rules_do_what_their_tests_say(promtool: str, name: str) -> None:
    run(promtool, "test", "rules", f"rules/tests/{name}")


def test_every_recording_rule_has_a_test() -> None:
    tested = " ".join(one["expr"] for case in cases("recording.yml") for one in case["promql_expr_test"])
    untested = {rule["record"] for rule in rules("recording.yml")} - set(re.findall(r"\w+:headgate_\w+:\w+", tested))
    assert not untested


def test_every_alert_has_a_case_that_fires_and_one_that_does_not() -> None:
    alerts = {rule["alert"] for rule in rules("alerts.yml")}
    fired = {
        one["alertname"]: (case, alert["exp_labels"])
        for case in cases("alerts.yml")
        for one in case["alert_rule_test"]
        for alert in one["exp_alerts"]
    }
    assert fired.keys() == alerts
    for name, (case, labels) in fired.items():
        series = " ".join(row["series"] for row in case["input_series"])
        assert "bad" in " ".join(labels.values()) and "good" in series, name


def test_every_alert_says_how_bad_it_is_and_what_to_do() -> None:
    for rule in rules("alerts.yml"):
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert len(rule["annotations"]["summary"]) < 130
        assert len(rule["annotations"]["description"]) > 100, rule["alert"]
