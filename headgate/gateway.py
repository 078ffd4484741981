"""`headgate gateway`: the API in front of workers on TCP, in this one process."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from headgate.secret_file import secret_of
from headgate.settings import Address, Settings, is_loopback
from headgate.start import (
    address_of,
    configure,
    end_on_sigterm,
    gateway_config,
    listen,
    openness,
    refuse,
    say,
    show_the_log,
)


def main(arguments: Sequence[str]) -> int:
    end_on_sigterm()
    settings, faults = configure("gateway", arguments)
    faults += worker_faults(settings)
    faults += openness(settings)[1]
    secret = secret_of(settings, faults)
    if faults:
        return refuse(faults)
    try:
        api = listen(Address(settings.host, settings.port), "--port")
        metrics = listen(settings.gateway_metrics, "--gateway-metrics")
    except OSError as error:
        return refuse([str(error.strerror)])
    from service.config import GatewayConfig
    from service.server import run

    show_the_log("gateway")
    workers = tuple(map(str, settings.workers))
    say(
        f"gateway: http://{address_of(api)}/v1 in front of {', '.join(workers)} (metrics: http://{address_of(metrics)}/metrics)"
    )
    fields: dict[str, Any] = gateway_config(settings, workers)
    run(GatewayConfig(secret=secret, version=version("headgate"), **fields), api, metrics=metrics)
    return 0


def worker_faults(settings: Settings) -> list[str]:
    if not settings.workers:
        return ["--workers: say where they are, as HOST:PORT,HOST:PORT; each is a 'headgate worker --listen HOST:PORT'"]
    far = [str(worker) for worker in settings.workers if not is_loopback(worker.host)]
    if far and not settings.secret_file:
        return [
            f"--workers {','.join(far)}: beyond this machine a worker wants a secret; name its file with --secret-file"
        ]
    return []
