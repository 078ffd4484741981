"""The processes that `headgate serve` starts: `headgate child gateway|worker LAUNCH`."""

from __future__ import annotations

import json
import signal
import socket
from collections.abc import Sequence
from importlib.metadata import version

from headgate.lifeline import watch
from headgate.start import show_the_log
from headgate.supervisor import Launch


def main(arguments: Sequence[str]) -> int:
    role, launch = arguments
    return {"gateway": gateway, "worker": worker}[role](Launch(**json.loads(launch)))


def gateway(launch: Launch) -> int:
    watch(launch.lifeline_fd, launch.folder)
    show_the_log("gateway")
    from service.config import GatewayConfig
    from service.server import run

    config = GatewayConfig(**{"version": version("headgate"), **json.loads(launch.config)})
    api, *metrics = (socket.socket(fileno=fd) for fd in launch.socket_fds)
    run(config, api, metrics=metrics[0] if metrics else None)
    return 0


def worker(launch: Launch) -> int:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    watch(launch.lifeline_fd, launch.folder)
    from worker.app import run
    from worker.config import WorkerConfig

    return run(WorkerConfig.decode(launch.config), [socket.socket(fileno=fd) for fd in launch.socket_fds])
