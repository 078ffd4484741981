"""`make compose-test`: docker-compose.yml, built, started, used, damaged and removed. docs/containers.md says what it needs.

Ends with 0 when everything is as it shall be, 1 when something is not, 2 when this machine cannot run it.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from tests.compose import checks
from tests.compose.load import Load
from tests.compose.stack import CannotTest, Failed, Stack, build, require_docker

LOG_LINES = "40"


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    stack = Stack(os.environ)
    try:
        require_docker(stack.env)
    except (CannotTest, Failed) as error:
        print(f"compose-test: {error}. It was NOT run.", file=sys.stderr)
        return 2
    try:
        test(stack)
    except Failed as error:
        print(f"FAIL {error}\n\nThe services' last lines:", flush=True)
        print(stack.logs("--tail", LOG_LINES), flush=True)
        return 1
    finally:
        step("removed, with volumes", stack.remove)
    return 0


def test(stack: Stack) -> None:
    print("     building (torch is large; some minutes the first time)", flush=True)
    step("images are built", build, stack)
    started_at = time.monotonic()
    step("docker compose up --wait", stack.up)
    step("both models answer through the openai SDK", checks.both_models_answer, stack)
    took = time.monotonic() - started_at
    if took > checks.FIRST_TOKEN_SECONDS:
        raise Failed(f"the first tokens took {took:.0f} s from docker compose up")
    step("the worker computes with the C step", checks.worker_uses_the_c_step, stack)
    step("containers are locked down", checks.containers_are_locked_down, stack)
    step("the gateway's image is small and has no torch", checks.gateway_image_is_lean, stack)
    step("no secret in an image or in what docker tells", checks.secrets_stay_in_their_volume, stack)
    with Load(stack.api_port):
        step("Prometheus reaches every target", checks.targets_are_up, stack)
        step("rules are loaded and evaluate", checks.rules_are_loaded, stack)
        step("every query of every dashboard finds samples", checks.dashboards_show_something, stack)
    if "grafana" in stack.services:
        step("Grafana shows the dashboards without a log-in", checks.grafana_shows_dashboards, stack)
    step("a worker that is killed is missed, and comes back", checks.killed_worker_comes_back, stack)
    step("a gateway that is stopped lets answers end", checks.stopped_gateway_lets_answers_end, stack)
    step("published wider without keys it does not start", checks.wider_without_keys_is_refused, stack)
    step("with a key it is published, and wants it", checks.wider_with_a_key_is_served, stack)


def step(name: str, do: Callable[..., Any], *arguments: object) -> None:
    begun_at = time.monotonic()
    told = do(*arguments)
    print(f"ok   {name}{f': {told}' if told else ''} ({time.monotonic() - begun_at:.1f} s)", flush=True)


sys.exit(main())
