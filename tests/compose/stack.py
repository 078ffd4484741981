"""The composed services while they are tested: a project, ports and images of their own, so that no one else's are touched."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
BUILD_SECONDS = 1800
COMMAND_SECONDS = 180
TAG = "compose-test"
# a user's own settings of docker-compose.yml are not those of the test, but for what machines behind mirrors need
FOREIGN = ("HEADGATE_", "SIMULATED_", "PROMETHEUS_", "GRAFANA_", "COMPOSE_", "HF_TOKEN")
PASSED_ON = frozenset({"PROMETHEUS_IMAGE", "GRAFANA_IMAGE"})


class CannotTest(Exception):
    """Something that the test needs is not on this machine; the text says what."""


class Failed(Exception):
    """The services do not do what they shall."""


def run(*command: str, seconds: float, env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Runs in a process group of its own, of which nothing is left after `seconds` or an interrupt."""
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=dict(env),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            out, err = process.communicate(timeout=seconds)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if isinstance(error, subprocess.TimeoutExpired):
                raise Failed(f"took more than {seconds:.0f} s: {' '.join(command)}") from None
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


class Stack:
    """docker compose for one test."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self.project = f"headgate-test-{os.getpid()}"
        self.api_port, self.prometheus_port, self.grafana_port = free_ports(3)
        self.services = ["gateway", "worker", "simulated", "prometheus"]
        kept = {n: v for n, v in environ.items() if n in PASSED_ON or not n.startswith(FOREIGN)}
        self.env = kept | {
            "HEADGATE_PORT": str(self.api_port),
            "PROMETHEUS_PORT": str(self.prometheus_port),
            "GRAFANA_PORT": str(self.grafana_port),
            "HEADGATE_GATEWAY_IMAGE": f"headgate-gateway:{TAG}",
            "HEADGATE_WORKER_IMAGE": f"headgate-worker:{TAG}",
        }

    def docker(
        self, *arguments: str, seconds: float = COMMAND_SECONDS, check: bool = True, **env: str
    ) -> subprocess.CompletedProcess[str]:
        done = run("docker", *arguments, seconds=seconds, env=self.env | env)
        if check and done.returncode:
            raise Failed(
                f"docker {' '.join(arguments)} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}"
            )
        return done

    def compose(
        self, *arguments: str, seconds: float = COMMAND_SECONDS, check: bool = True, **env: str
    ) -> subprocess.CompletedProcess[str]:
        own = (
            "compose",
            "--ansi",
            "never",
            "--project-name",
            self.project,
            "--env-file",
            os.devnull,
            "--file",
            "docker-compose.yml",
        )
        return self.docker(*own, *arguments, seconds=seconds, check=check, **env)

    def up(self, *services: str, **env: str) -> None:
        """Starts the named services, or all that this machine can have, and waits until they are healthy."""
        self.compose("up", "--detach", "--wait", "--wait-timeout", "150", *(services or self.services), **env)

    def inspect(self, service: str) -> dict[str, Any]:
        container = self.compose("ps", "--all", "--quiet", service).stdout.split()
        if len(container) != 1:
            raise Failed(f"{service} has {len(container)} containers")
        found: dict[str, Any] = json.loads(self.docker("inspect", container[0]).stdout)[0]
        return found

    def inside(self, service: str, *command: str, check: bool = True) -> str:
        """What a command in a running container prints."""
        done = self.compose("exec", "--no-TTY", service, *command, check=check)
        return done.stdout + ("" if check else done.stderr)

    def logs(self, *arguments: str) -> str:
        """Without the sequence that compose writes before every line, terminal or not."""
        return self.compose("logs", *arguments).stdout.replace("\x1b[2K", "")

    def remove(self) -> None:
        """Containers, networks, volumes and the images made for the test; what builds left in the cache stays."""
        self.compose("down", "--volumes", "--remove-orphans", "--timeout", "20", check=False)
        names = [f"headgate-{name}:{TAG}" for name in ("gateway", "worker", "wheels", "prometheus")]
        self.docker("image", "rm", "--force", *names, check=False)


def free_ports(count: int) -> list[int]:
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


def require_docker(env: Mapping[str, str]) -> None:
    for command, missing in (
        (("docker", "--version"), "no docker client"),
        (("docker", "compose", "version"), "docker has no compose plugin"),
        (("docker", "info"), "no docker engine answers"),
    ):
        try:
            done = run(*command, seconds=30, env=env)
        except FileNotFoundError:
            raise CannotTest(missing) from None
        if done.returncode:
            raise CannotTest(f"{missing}: {done.stderr.strip() or done.stdout.strip()}")


def build(stack: Stack) -> None:
    """The images, from this working tree, and stand-ins for what cannot be pulled."""
    if folder := stack.env.get("WHEELS"):
        wheels = f"headgate-wheels:{TAG}"
        stack.docker("build", "--tag", wheels, "--file", "deploy/wheels.Dockerfile", folder, seconds=BUILD_SECONDS)
        stack.env["WHEELS_IMAGE"] = wheels
    stack.compose("--progress", "plain", "build", seconds=BUILD_SECONDS)
    wanted = json.loads(stack.compose("config", "--format", "json").stdout)["services"]
    if not is_to_be_had(stack, wanted["prometheus"]["image"]):
        stack.env["PROMETHEUS_IMAGE"] = f"headgate-prometheus:{TAG}"
        print(f"     {wanted['prometheus']['image']} cannot be pulled: Debian's Prometheus stands in", flush=True)
        arguments = ["--tag", stack.env["PROMETHEUS_IMAGE"], "--file", "tests/compose/prometheus.Dockerfile"]
        if image := stack.env.get("DEBIAN_IMAGE"):
            arguments += ["--build-arg", f"DEBIAN_IMAGE={image}"]
        stack.docker("build", *arguments, "tests/compose", seconds=BUILD_SECONDS)
    if is_to_be_had(stack, wanted["grafana"]["image"]):
        stack.services.append("grafana")
    else:
        print(f"     {wanted['grafana']['image']} cannot be pulled: Grafana is left out", flush=True)


def is_to_be_had(stack: Stack, image: str) -> bool:
    if stack.docker("image", "inspect", image, check=False).returncode == 0:
        return True
    try:
        return stack.docker("pull", "--quiet", image, seconds=300, check=False).returncode == 0
    except Failed:
        return False
