"""The worker's front as a child of the supervisor."""

from __future__ import annotations

import json
import socket
from collections.abc import Sequence

from headgate.lifeline import watch
from headgate.supervisor import Launch


def main(arguments: Sequence[str]) -> int:
    launch = Launch(**json.loads(arguments[0]))
    watch(launch.lifeline_fd, launch.folder)
    from worker.app import run
    from worker.config import WorkerConfig

    return run(WorkerConfig.decode(launch.config), [socket.socket(fileno=fd) for fd in launch.socket_fds])
