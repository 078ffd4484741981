"""`headgate serve`: checks the settings, binds the sockets, and supervises a gateway and a worker."""

from __future__ import annotations

import socket
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from headgate.settings import Address, Settings
from headgate.start import configure, listen, openness, refuse
from headgate.supervisor import Sockets, Supervisor


def main(arguments: Sequence[str]) -> int:
    settings, faults = configure("serve", arguments)
    wants_keys, faults_of_openness = openness(settings)
    faults += faults_of_openness + model_faults(settings)
    if faults:
        return refuse(faults)
    with tempfile.TemporaryDirectory(prefix="headgate-", ignore_cleanup_errors=True) as folder:
        try:
            sockets = bind(settings, Path(folder))
        except OSError as error:
            print(f"headgate: {error.strerror}", file=sys.stderr)
            return 2
        return Supervisor(settings, sockets, Path(folder), wants_keys).run()


def model_faults(settings: Settings) -> list[str]:
    """Whether model and hardware can be found, as far as that is known without loading or downloading anything."""
    from worker.files import ModelNotFound, find_config, find_local_model
    from worker.simulated import find_device, find_shape

    needed: list[tuple[Callable[[str], object], str]] = [(find_local_model, settings.model)]
    if settings.engine == "simulated":
        needed = [(find_device, settings.hardware), (find_shape, settings.model)]
    elif settings.random_weights:
        needed = [(find_config, settings.random_weights)]
    faults = []
    for find, name in needed:
        try:
            find(name)
        except (ValueError, ModelNotFound) as error:
            faults.append(str(error))
    return faults


def bind(settings: Settings, folder: Path) -> Sockets:
    """The four listening sockets, which outlive every child. OSError with a sentence when one is not to be had."""
    api = listen(Address(settings.host, settings.port), "--port")
    gateway_metrics = listen(settings.gateway_metrics, "--gateway-metrics")
    metrics = listen(Address("127.0.0.1", settings.metrics_port), "--metrics-port")
    worker = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        worker.bind(str(folder / "worker"))
    except OSError as error:  # "AF_UNIX path too long" comes without a number
        raise OSError(error.errno, f"cannot make a socket in {folder} ({error}); choose a shorter TMPDIR") from error
    worker.listen(4096)
    return Sockets(api, gateway_metrics, metrics, worker)
