"""What the verbs that serve do alike before they serve: settings, or all faults in one message; listening sockets; log lines."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from headgate.settings import Address, ConfigurationError, Settings, data_folder, exposure_faults, read_settings

if TYPE_CHECKING:
    from worker.config import WorkerConfig


def configure(verb: str, arguments: Sequence[str]) -> tuple[Settings, list[str]]:
    """The settings, and what is wrong with them."""
    try:
        return read_settings(verb, arguments, os.environ), []
    except ConfigurationError as error:
        return error.settings, error.faults


def refuse(faults: Sequence[str]) -> int:
    """Tells them all; the exit status."""
    print("headgate: the configuration cannot be used:", *(f"  {fault}" for fault in faults), sep="\n", file=sys.stderr)
    return 2


def openness(settings: Settings) -> tuple[bool, list[str]]:
    """Whether keys are wanted, and what is wrong with being reached at such an address then."""
    from service.store import StoreError, has_keys

    folder = data_folder(settings, os.environ)
    try:
        wants_keys = folder != "" and has_keys(folder)
    except StoreError as error:
        return True, [str(error)]
    return wants_keys, exposure_faults(settings, wants_keys)


def gateway_config(settings: Settings, workers: Sequence[str]) -> dict[str, object]:
    """The fields of a GatewayConfig that are no secret."""
    return {
        "workers": workers,
        "data": data_folder(settings, os.environ),
        "config_file": settings.config,
        "is_exposed": settings.insecure,
        "drain_seconds": settings.drain_seconds,
    }


def worker_config(settings: Settings) -> WorkerConfig:
    from worker.config import WorkerConfig

    return WorkerConfig(
        model=settings.model,
        random_weights=settings.random_weights,
        served_name=settings.served_name,
        engine=settings.engine,
        hardware=settings.hardware,
        device=settings.device,
        dtype=settings.dtype,
        threads=settings.threads,
        kv_cache_bytes=settings.kv_cache,
        context_tokens=settings.context,
        max_sequences=settings.max_sequences,
        max_waiting=settings.max_waiting,
    )


def listen(address: Address, option: str) -> socket.socket:
    """OSError with a sentence when the address is not to be had."""
    host, port = address
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        wrong = "--host" if option == "--port" and isinstance(error, socket.gaierror) else option
        sentence = f"cannot listen on {address} ({error.strerror}); choose another {wrong}"
        raise OSError(error.errno, sentence) from error
    listener.listen(4096)
    return listener


def address_of(listener: socket.socket) -> Address:
    """Where it listens in fact."""
    host, port = listener.getsockname()[:2]
    return Address(host, port)


def say(line: str) -> None:
    with suppress(OSError):  # nobody reads it any more
        print(f"headgate: {line}", flush=True)


def end_on_sigterm() -> None:
    """Until the server listens to signals itself. As the first process of a container it would not be ended otherwise."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))


def show_the_log(name: str) -> None:
    """What the gateway has to say goes to stderr, as the supervisor's lines do."""
    logging.basicConfig(format=f"headgate: {name}: %(message)s", stream=sys.stderr)
    logging.getLogger("service").setLevel(logging.INFO)
