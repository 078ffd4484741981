"""`headgate worker`: a model for gateways that run elsewhere. This process is the front; the engine process is its child."""

from __future__ import annotations

from collections.abc import Sequence

from headgate.secret_file import secret_of
from headgate.serve import model_faults
from headgate.settings import Settings, is_loopback
from headgate.start import address_of, configure, end_on_sigterm, listen, refuse, say, worker_config


def main(arguments: Sequence[str]) -> int:
    end_on_sigterm()
    settings, faults = configure("worker", arguments)
    faults += listening_faults(settings) + model_faults(settings)
    secret = secret_of(settings, faults)
    if faults:
        return refuse(faults)
    try:
        listener = listen(settings.listen, "--listen")
    except OSError as error:
        return refuse([str(error.strerror)])
    from service.exchange import notice_silence
    from worker.app import run
    from worker.guard import guard_with

    notice_silence(listener)  # a gateway whose machine vanishes shall not keep its requests here
    say(f"worker: listening on {address_of(listener)}, {'with' if secret else 'without'} a secret")
    return run(worker_config(settings), [listener], guard_with(secret))


def listening_faults(settings: Settings) -> list[str]:
    if settings.secret_file or is_loopback(settings.listen.host):
        return []
    return [
        f"--listen {settings.listen}: beyond this machine only gateways may come that know a secret; "
        "name its file with --secret-file"
    ]
