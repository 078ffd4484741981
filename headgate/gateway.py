"""A gateway as a child of the supervisor."""

from __future__ import annotations

import json
import socket
from collections.abc import Sequence
from importlib.metadata import version

from headgate.lifeline import watch
from headgate.supervisor import Launch


def main(arguments: Sequence[str]) -> int:
    launch = Launch(**json.loads(arguments[0]))
    watch(launch.lifeline_fd, launch.folder)
    from service.config import GatewayConfig
    from service.server import run

    config = GatewayConfig(version=version("headgate"), **json.loads(launch.config))
    run(config, socket.socket(fileno=launch.socket_fds[0]))
    return 0
