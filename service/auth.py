"""Who asks: the key in a request's headers, looked up in memory; and what slows those who guess."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

from service.errors import ApiError
from service.keys import OPEN, Key, digest_of, id_of, is_it
from service.store import (
    FILE,
    KEYS,
    PEPPER,
    MemoryObjects,
    Objects,
    SqliteObjects,
    StoreError,
    StoreReplaced,
    read_secret,
)

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.5
FAILURES = 20  # that an address may have at once …
SECONDS_PER_FAILURE = 3.0  # … and how long until it may have one more
MAX_ADDRESSES = 4096  # whose failures are remembered
MAX_KNOWN = 65536  # pairs of an address and a key that was good from there
MAX_KEY_BYTES = 512

Name = TypeVar("Name")
Value = TypeVar("Value")

HOW = "Please send one as 'Authorization: Bearer YOUR_KEY'; the operator makes them with 'headgate keys create'."


class Keyring:
    """All keys, as they are now. Only `identify` and `current` may be called in the event loop."""

    def __init__(
        self, objects: Objects, pepper: Callable[[], bytes | None], clock: Callable[[], float] = time.time
    ) -> None:
        """`pepper` gives the secret under which keys are hashed, once there is one."""
        self._objects = objects
        self._read_pepper = pepper
        self._clock = clock
        self._lock = threading.Lock()  # of who reloads
        self._pepper = b""
        self._keys: dict[str, Key] = {}
        self._expiring: dict[str, float] = {}
        self._expired: frozenset[str] = frozenset()
        self._looked_at = self._next_expiry = math.inf
        self._change = 0  # the newest that is known
        self._is_loaded = False
        self._reads_anew = False  # all of it, for the store may be another one
        self._version = 0  # grows with all that can matter to others
        self._attempts = Attempts()
        self.is_open = True

    @classmethod
    def open(cls, folder: str) -> Keyring:
        """With the keys of this folder; '' has none, ever. Raises StoreError."""
        if not folder:
            return cls(MemoryObjects(), lambda: None)
        keyring = cls(SqliteObjects(folder), lambda: read_secret(Path(folder) / PEPPER))
        keyring.reload()
        return keyring

    # --- who asks

    def identify(self, headers: Iterable[tuple[bytes, bytes]], address: str, now: float) -> Key:
        """The key that the headers show. `now` is the wall clock's. Raises ApiError."""
        if self.is_open:
            return OPEN
        presented = presented_in(headers)
        digest = digest_of(presented, self._pepper)
        self._attempts.check(address, digest, now)
        key = self._keys.get(id_of(presented))
        if not is_it(presented, key, self._pepper, now):
            self._attempts.failed(address, now)
            raise unauthorized("This API key is not valid here. " + HOW)
        assert key is not None
        if not key.is_valid(now):
            raise no_longer_valid(key)
        self._attempts.succeeded(address, digest)
        return key

    def current(self, id: str) -> Key | None:
        """The key as it is now; None when it is revoked, expired or gone, and for OPEN once keys are wanted."""
        if not id:
            return OPEN if self.is_open else None
        key = self._keys.get(id)
        return key if key is not None and key.is_valid(self._clock()) else None

    def __len__(self) -> int:
        """Keys that are good now."""
        return sum(self.current(id) is not None for id in self._keys)

    # --- what changes

    def reload(self) -> frozenset[str]:
        """Reads what is new. The ids of keys that have changed or are no longer valid. Blocks; raises StoreError."""
        with self._lock:
            try:
                changed = self._read()
            except StoreReplaced:
                self._reads_anew = True
                changed = self._read()
            finally:  # keys end although the store is away
                expired = self._newly_expired()
                self._version += bool(expired)
            self._is_loaded = True
        return changed | expired

    async def watch(self, on_change: Callable[[], None]) -> None:
        """Calls `on_change` whenever keys were made, changed, revoked or expired, by whomever. Runs until it is cancelled."""
        loop = asyncio.get_running_loop()
        thread = ThreadPoolExecutor(1, thread_name_prefix="keys")  # of its own: it never waits for anybody else's work
        version, trouble = self._version, ""
        try:
            while True:
                await asyncio.sleep(POLL_SECONDS)
                trouble = await loop.run_in_executor(thread, self._look, trouble)
                if version != self._version:
                    version = self._version
                    self._call(on_change)
        finally:
            thread.submit(self._objects.close)
            thread.shutdown(wait=False)

    @staticmethod
    def _call(on_change: Callable[[], None]) -> None:
        """Whatever goes wrong there, whoever comes next has to be seen with the keys as they are then."""
        try:
            on_change()
        except Exception:
            logger.exception("keys: what changed could not be passed on; it holds for requests that come from now on")

    def _look(self, trouble: str) -> str:
        """A store that cannot be read leaves the keys as they are, and is told of once. The sentence; '' when all is well."""
        try:
            self.reload()
        except StoreError as error:
            if str(error) != trouble:
                logger.error("keys: %s; until then the keys stay as they are", error)
            return str(error)
        if trouble:
            logger.info("keys: the store can be read again")
        return ""

    def _read(self) -> frozenset[str]:
        anew = self._reads_anew
        newest, rows = self._objects.changed_since(KEYS, 0 if anew else self._change)
        if newest < self._change and not anew:  # an older copy of the store
            self._reads_anew = True
            return self._read()
        self._want_keys(bool(rows), anew)
        found = decoded(rows)
        gone = (self._keys.keys() if anew else {id for id, _ in rows} & self._keys.keys()) - found.keys()
        changed = {id for id in found.keys() & self._keys.keys() if found[id] != self._keys[id]}
        if self._is_loaded:
            self._log(found, gone)
        if rows or anew:
            self._take(found, gone)
        self._change, self._reads_anew = newest, False
        return frozenset(changed | gone)

    def _want_keys(self, some: bool, anew: bool) -> None:
        """A pepper without keys means that there were some: better nobody comes in than anybody."""
        pepper = (b"" if anew else self._pepper) or self._read_pepper() or b""
        if self.is_open and (some or pepper):
            self.is_open = False
            self._version += 1
        if some and not pepper:
            raise StoreError(
                f"the file {PEPPER} is gone, without which no key is recognised. Put it back beside {FILE}"
            )
        self._pepper = pepper

    def _take(self, found: dict[str, Key], gone: set[str]) -> None:
        keys = self._keys | found  # a new one: in the event loop somebody may go through the old one
        for id in gone:
            del keys[id]
        self._keys = keys
        for id in gone | found.keys():
            self._expiring.pop(id, None)
        for id, key in found.items():
            if key.expires_at is not None and key.revoked_at is None:
                self._expiring[id] = key.expires_at
                self._next_expiry = min(self._next_expiry, key.expires_at)
        self._version += 1

    def _newly_expired(self) -> frozenset[str]:
        now = self._clock()
        looked_at, self._looked_at = self._looked_at, now
        if looked_at <= now < self._next_expiry:
            return frozenset()
        self._next_expiry = min((at for at in self._expiring.values() if at > now), default=math.inf)
        expired = frozenset([id for id, expires_at in self._expiring.items() if expires_at <= now])
        newly, self._expired = expired - self._expired, expired
        for id in newly if self._is_loaded else ():
            logger.info("key %s of tenant %s: expired", id, self._keys[id].tenant)
        return newly

    def _log(self, found: dict[str, Key], gone: set[str]) -> None:
        for id, key in found.items():
            logger.info("key %s of tenant %s: %s", id, key.tenant, what_happened(self._keys.get(id), key))
        for id in gone:
            logger.info("key %s of tenant %s: gone from the store", id, self._keys[id].tenant)


def decoded(rows: Iterable[tuple[str, str]]) -> dict[str, Key]:
    """The keys of these rows. One that cannot be read is not valid, and keeps nobody else's from being so."""
    keys = {}
    for id, text in rows:
        try:
            keys[id] = Key.decode(text)
        except (ValueError, TypeError, AttributeError):
            logger.error("key %s: its entry in the store is damaged, so it is not valid", id)
    return keys


def what_happened(before: Key | None, now: Key) -> str:
    if now.revoked_at is not None and (before is None or before.revoked_at is None):
        return "revoked"
    if before is None:
        return "made"
    return "rotated" if now.digest != before.digest else "changed"


# --- what a request shows ---------------------------------------------------------------------------------------------


def presented_in(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """The key that these headers show, cut where no key goes on. Raises ApiError where there is not exactly one."""
    shown = set()
    for name, value in headers:
        if name == b"api-key":
            shown.add(value.strip())
        elif name == b"authorization":
            scheme, _, credentials = value.partition(b" ")
            shown.add(credentials.strip() if scheme.lower() == b"bearer" else b"")
    shown.discard(b"")
    if not shown:
        raise unauthorized("This server wants an API key. " + HOW)
    if len(shown) > 1:
        raise unauthorized("This request shows two different API keys. " + HOW)
    return shown.pop()[:MAX_KEY_BYTES].decode("latin-1")  # any bytes are letters of it


def unauthorized(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key", headers=(("www-authenticate", "Bearer"),))


def no_longer_valid(key: Key) -> ApiError:
    """For who has shown its secret."""
    if key.revoked_at is not None:
        return unauthorized(f"The API key {key.id} was revoked. Please ask the operator for a new one.")
    assert key.expires_at is not None
    when = datetime.fromtimestamp(key.expires_at, UTC).strftime("%Y-%m-%d %H:%M UTC")
    return unauthorized(f"The API key {key.id} expired on {when}. Please ask the operator for a new one.")


# --- who guesses ------------------------------------------------------------------------------------------------------


class Attempts:
    """Wrong keys by address. Who had too many has to wait, but for keys that were good from there before."""

    def __init__(self) -> None:
        self._owes_until: OrderedDict[str, float] = OrderedDict()  # a failure pushes it back, time passes it by
        self._known: OrderedDict[tuple[str, str], None] = OrderedDict()  # address and digest

    def check(self, address: str, digest: str, now: float) -> None:
        """Raises ApiError 429 for a key that must not even be looked at."""
        block = block_of(address)
        wait_seconds = self._owed_seconds(block, now) - (FAILURES - 1) * SECONDS_PER_FAILURE
        if wait_seconds > 0 and (block, digest) not in self._known:
            raise too_many(wait_seconds)

    def failed(self, address: str, now: float) -> None:
        block = block_of(address)
        owed_seconds = self._owed_seconds(block, now) + SECONDS_PER_FAILURE
        remember(self._owes_until, block, now + min(owed_seconds, FAILURES * SECONDS_PER_FAILURE), MAX_ADDRESSES)

    def succeeded(self, address: str, digest: str) -> None:
        remember(self._known, (block_of(address), digest), None, MAX_KNOWN)

    def _owed_seconds(self, block: str, now: float) -> float:
        owed_seconds = self._owes_until.get(block, now) - now
        most = FAILURES * SECONDS_PER_FAILURE
        if owed_seconds > most:  # the clock was put back
            self._owes_until[block] = now + most
        return min(max(0.0, owed_seconds), most)


def remember(memory: OrderedDict[Name, Value], name: Name, value: Value, most: int) -> None:
    """The least recently remembered is forgotten."""
    memory[name] = value
    memory.move_to_end(name)
    if len(memory) > most:
        memory.popitem(last=False)


def too_many(wait_seconds: float) -> ApiError:
    return ApiError(
        429,
        f"Too many wrong API keys came from your address. Please retry after {wait_seconds:.3g} s.",
        type="rate_limit_exceeded",
        code="rate_limit_exceeded",
        retry_after_seconds=wait_seconds,
    )


@lru_cache(MAX_ADDRESSES)
def block_of(address: str) -> str:
    """Who one customer's addresses belong to: an IPv4 address, an IPv6 network of 64 bits."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(ip, ipaddress.IPv4Address):
        return str(ip)
    if ip.ipv4_mapped is not None:
        return str(ip.ipv4_mapped)
    return str(ipaddress.IPv6Network((ip, 64), strict=False))
