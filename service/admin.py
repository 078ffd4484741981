"""What operators tell a running gateway: read keys and tenants again. Callers are known to be admins when they get here."""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from starlette.requests import Request

from service.auth import Keyring
from service.body import is_json
from service.errors import ApiError, invalid, unavailable
from service.keys import FaultyTenants, Limits, read_tenants
from service.limits import Limiter
from service.store import StoreError

logger = logging.getLogger(__name__)


class Admin:
    def __init__(self, config_file: str, keyring: Keyring, limiter: Limiter, on_change: Callable[[], None]) -> None:
        self._config_file = config_file
        self._keyring = keyring
        self._limiter = limiter
        self._on_change = on_change
        self._turn = asyncio.Lock()

    async def reload(self, request: Request) -> dict[str, Any]:
        """Reads the keys, and the tenants of the configuration file, again. Faulty ones change nothing."""
        kind = request.headers.get("content-type")
        if kind is not None and not is_json(kind):  # a form of some web page
            raise ApiError(415, "Please send no body, or one of JSON.")
        try:
            await self._read_again()
        except FaultyTenants as error:
            raise invalid(f"Nothing was changed: {error}.", code="configuration_faulty") from error
        except StoreError as error:
            raise unavailable(f"The keys cannot be read: {error}.") from error
        return {"object": "headgate.reload", "keys": len(self._keyring), "tenants": len(self._limiter.tenants)}

    async def listen(self) -> None:
        """The same on every SIGHUP, for ever; what is wrong is logged."""
        if threading.current_thread() is not threading.main_thread():
            return  # signals are for the main thread, and there is one gateway in it
        asked = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, asked.set)
        while await asked.wait():
            asked.clear()
            try:
                await self._read_again()
            except (FaultyTenants, StoreError) as error:
                logger.error("keys and tenants stay as they were: %s", error)

    async def _read_again(self) -> None:
        """Raises FaultyTenants or StoreError."""
        async with self._turn:
            tenants = await asyncio.to_thread(read_tenants_of, self._config_file)
            await asyncio.to_thread(self._keyring.reload)
            self._limiter.tenants = tenants
            self._on_change()
        logger.info("read again: %d keys, %d tenants with limits", len(self._keyring), len(tenants))


def read_tenants_of(config_file: str) -> Mapping[str, Limits]:
    """Raises FaultyTenants, also when the file cannot be read."""
    if not config_file:
        return {}
    try:
        table = tomllib.loads(Path(config_file).read_text("utf-8")).get("tenants", {})
    except (OSError, UnicodeDecodeError) as error:
        raise FaultyTenants([f"{config_file}: cannot be read: {error}"]) from error
    except tomllib.TOMLDecodeError as error:
        raise FaultyTenants([f"{config_file}: not TOML: {error}"]) from error
    return read_tenants(table)
