"""Who may come in: whoever has a key for it, or, while there are no keys, whoever is on this machine and no web page."""

from __future__ import annotations

import functools
import ipaddress
import time
from collections.abc import Iterable

from starlette.types import Scope

from service.auth import Keyring
from service.config import GatewayConfig
from service.errors import not_allowed
from service.keys import Key

API = "/v1/"
ADMIN = "/v1/headgate/"
METRICS = "/metrics"

Headers = Iterable[tuple[bytes, bytes]]


class Access:
    """Looks at a request's head only: nobody unknown makes the server read a body."""

    def __init__(self, config: GatewayConfig, keyring: Keyring) -> None:
        self._is_exposed = config.is_exposed
        self._keyring = keyring

    def caller(self, scope: Scope) -> Key:
        """Raises ApiError when it may not come in."""
        headers: Headers = scope["headers"]
        if self._keyring.is_open:
            self._check_page(headers)
        key = self._keyring.identify(headers, address_of(scope), time.time())
        if not key.admin and is_for_admins(scope["path"]):
            raise not_allowed("This needs an admin's key (headgate keys create --admin).", "admin_key_required")
        return key

    def may_stay(self, key: Key) -> bool:
        """Whether who came in with it would come in now. A new secret of a key changes nothing for them."""
        return self._keyring.current(key.id) is not None

    def _check_page(self, headers: Headers) -> None:
        """A page of another site may name this machine as its own host (DNS rebinding), or send what needs no preflight.

        Browsers always tell the host, and the origin of what could change anything.
        """
        host = b""
        for name, value in headers:
            if name == b"host":
                host = value
                if not (self._is_exposed or is_this_machine(value)):
                    raise not_allowed(
                        "While there are no keys, this API is for this machine only: please call it localhost or "
                        "127.0.0.1, or make a key (headgate keys create).",
                        "host_not_allowed",
                    )
        for name, value in headers:
            if name == b"origin" and not is_own_page(value, host):
                raise not_allowed(
                    "While there are no keys, web pages may not use this API. With a key (headgate keys create) they may.",
                    "origin_not_allowed",
                )


def is_guarded(path: str) -> bool:
    """All that generates, tells or changes something. Probes and the API's description are open."""
    return path.startswith(API) or path == METRICS


def is_for_admins(path: str) -> bool:
    return path.startswith(ADMIN) or path == METRICS


def is_own_page(origin: bytes, host: bytes) -> bool:
    """The API's own docs, or a page from this machine."""
    place = origin.partition(b"://")[2]  # empty for "null", a page that hides where it is from
    return place == host != b"" or is_this_machine(place)


@functools.lru_cache(maxsize=256)
def is_this_machine(host: bytes) -> bool:
    """A Host header's value, with or without a port."""
    name = host.decode("latin-1").lower()
    if not name.endswith("]"):
        before, colon, port = name.rpartition(":")
        name = before if colon and port.isdecimal() else name
    if name.startswith("[") and name.endswith("]"):
        name = name[1:-1]
    elif ":" in name:
        return False
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"


def address_of(scope: Scope) -> str:
    client = scope["client"]
    return client[0] if client is not None else ""
