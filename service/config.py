"""What a gateway process is told at its start."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    """Read once, passed down, never changed. Everything below the socket has a measured or reasoned default."""

    workers: tuple[str, ...]  # a Unix socket's path, or HOST:PORT
    secret: str = ""  # which workers on TCP want to be told
    version: str = "0"
    data: str = ""  # the folder of keys; without one there are none, and never will be
    wants_keys: bool = (
        False  # there were some at the start: whatever becomes of the folder, nobody comes in without one
    )
    config_file: str = ""  # whose tenants are read, now and when they may have changed
    is_exposed: bool = False  # without keys, too, other machines may use the API
    body_limit_bytes: int = 8 << 20
    bodies_limit_bytes: int = (
        512 << 20
    )  # all bodies held at once, from their first byte until the worker has the prompt
    max_open_requests: int = 16384
    max_choices: int = 128  # answers that one call may ask for: prompts x n
    drain_seconds: float = 30.0
    ping_seconds: float = 15.0
    body_seconds: float = 30.0  # how long the next piece of a body may take
    submit_seconds: float = 30.0  # how long the worker may take to decide
    reader_backlog_bytes: int = 256 << 10  # what a slow reader may leave unread, beyond the socket's own buffers
    reader_seconds: float = 60.0  # how long a reader may take nothing at all
    worker_connections: int = 64
