"""A gateway process: uvicorn on an inherited socket, with a drain that answers to the end."""

from __future__ import annotations

import asyncio
import functools
import importlib.util
import resource
import signal
import socket
from collections.abc import Callable
from types import FrameType
from typing import cast

import uvicorn

from service.app import create_app
from service.config import GatewayConfig
from service.door import Door
from service.wire import OpenProtocol

BACKLOG = 4096
SEND_BUFFER_BYTES = 128 << 10  # unset, the kernel keeps megabytes for a reader that has stalled, and nobody notices
KEEP_ALIVE_SECONDS = 75  # longer than clients keep theirs, so that the client closes first
LAST_WORDS_SECONDS = 5  # for errors that end requests at the end of a drain to be written


class Server(uvicorn.Server):
    """On a signal: turn newcomers away, let those inside finish, then end who is left, then stop listening."""

    def __init__(self, config: uvicorn.Config, door: Door, drain_seconds: float) -> None:
        super().__init__(config)
        self._door = door
        self._drain_seconds = drain_seconds

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Unlike uvicorn's, it does not raise the signal again at the end: a drained process has ended well."""
        if self.should_exit and sig == signal.SIGINT:
            self.force_exit = True
        self.should_exit = True

    async def main_loop(self) -> None:
        await super().main_loop()
        self._door.close()
        loop = asyncio.get_running_loop()
        ends_at = loop.time() + self._drain_seconds
        while not self._door.empty and not self.force_exit and loop.time() < ends_at:  # noqa: ASYNC110 (signal handlers only set flags)
            await asyncio.sleep(0.05)
        self._door.end_all()


def create_server(config: GatewayConfig, sock: socket.socket, metrics: socket.socket | None = None) -> Server:
    """`metrics`: a second socket, where nothing else is answered."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)  # accepted sockets inherit it
    door = create_app(config)
    metrics_at = metrics.getsockname()[:2] if metrics is not None else None
    protocol = cast(type[asyncio.Protocol], functools.partial(OpenProtocol, metrics_at=metrics_at))
    settings = uvicorn.Config(
        door,
        loop="uvloop" if importlib.util.find_spec("uvloop") else "asyncio",
        http=protocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=LAST_WORDS_SECONDS,
    )
    return Server(settings, door, config.drain_seconds)


def run(
    config: GatewayConfig,
    sock: socket.socket,
    on_end: Callable[[], None] | None = None,
    *,
    metrics: socket.socket | None = None,
) -> None:
    """Serves until SIGTERM or SIGINT, drains, and returns. `on_end` is called last, however it ends."""
    allow_many_files()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # it asks for a reload, and ends nobody who is not yet listening
    try:
        create_server(config, sock, metrics).run(sockets=[sock] if metrics is None else [sock, metrics])
    finally:
        if on_end is not None:
            on_end()


def allow_many_files() -> None:
    """A connection is a file; the usual soft limit of 1024 is not meant for servers."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
