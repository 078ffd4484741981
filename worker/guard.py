"""Who may use a worker. A Unix socket's file says that itself; over TCP a gateway proves that it knows the secret.

Without a secret a worker listens on loopback only (`headgate worker` sees to that), and takes `host: worker` as proof, which
programs can say and web pages cannot.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterable
from dataclasses import dataclass

Refusal = tuple[int, bytes]  # status, sentence


@dataclass(frozen=True, slots=True)
class Guard:
    """Judges everything but metrics and probes, which are open."""

    proof: tuple[bytes, bytes] | None  # the header that gateways send; None: over TCP nothing more is served

    def refusal(self, server: tuple[str, int | None] | None, headers: Iterable[tuple[bytes, bytes]]) -> Refusal | None:
        """None for whoever may come in. `server`: where the connection arrived; a Unix socket has no port."""
        if server is None or server[1] is None:
            return None
        if self.proof is None:
            return 404, b"only /metrics, /healthz and /readyz are served here"
        name, value = self.proof
        presented = next((value for other, value in headers if other == name), b"")
        return None if hmac.compare_digest(presented, value) else (401, b"gateways prove themselves with the secret")


METRICS_ONLY = Guard(None)


def guard_with(secret: str) -> Guard:
    """For a worker whose gateways come over TCP; an empty secret is none."""
    return Guard((b"authorization", f"Bearer {secret}".encode()) if secret else (b"host", b"worker"))
