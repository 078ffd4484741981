"""The keys of a data folder, and the log of what was done to them."""

from __future__ import annotations

import fcntl
import json
import os
import pwd
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from service.keys import Key, digest_of, rotated
from service.store import FILE, KEYS, PEPPER, SqliteObjects, StoreError, make_secret, read_secret, sentence

AUDIT_LOG = "audit.log"
SECRETS = ("digest", "previous_digest")  # nobody is shown these


class NoSuchKey(Exception):
    """One sentence."""


class KeyBook:
    """Keys as they are made and changed, each time with a line in the log. Raises StoreError, and NoSuchKey."""

    def __init__(self, folder: Path, now: float) -> None:
        self.folder = folder
        self.now = now

    def keys(self) -> list[Key]:
        """All of them, the oldest first."""
        with closing(SqliteObjects(self.folder)) as objects:
            _, rows = objects.changed_since(KEYS, 0)
        return sorted((self._decode(id, text) for id, text in rows), key=lambda key: key.created_at)

    def create(self, key: Key, whole: str) -> None:
        """`key` has no digest yet."""
        with self._alone() as log:
            others = {other.id for other in self.keys()}  # which a new pepper would make useless
            if key.id in others:  # once in billions
                raise StoreError(f"{key.id}: there is a key with this id. Try again")
            with log.line("create", key, {name: value for name, value in public(key).items() if value}):
                pepper = self._pepper() if others else make_secret(self.folder / PEPPER)
                self._put(replace(key, digest=digest_of(whole, pepper)))

    def revoke(self, id: str) -> bool:
        """False when it was revoked before."""
        self._find(id)  # before a log is made for nothing
        with self._alone() as log:
            key = self._find(id)
            if key.revoked_at is None:
                with log.line("revoke", key, {}):
                    self._put(replace(key, revoked_at=self.now))
            return key.revoked_at is None

    def rotate(self, id: str, whole: str, grace_seconds: float) -> Key:
        """`whole`: the key with its new secret."""
        self._find(id)
        with self._alone() as log:
            key = self._find(id)
            if not key.is_valid(self.now):
                raise NoSuchKey(f"{id}: this key is {state(key, self.now)}; make a new one (headgate keys create)")
            new = rotated(key, digest_of(whole, self._pepper()), grace_seconds, self.now)
            with log.line("rotate", key, {"old_secret_until": iso(new.previous_until)}):
                self._put(new)
            return new

    @contextmanager
    def _alone(self) -> Iterator[AuditLog]:
        """While nobody else changes keys, who may have read what is about to be replaced."""
        file = self.folder / AUDIT_LOG
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(file, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600)
        except OSError as error:
            raise StoreError(f"{file}: {sentence(error)}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield AuditLog(file, descriptor, self.now)
        finally:
            os.close(descriptor)

    def _put(self, key: Key) -> None:
        with closing(SqliteObjects(self.folder)) as objects:
            objects.put(KEYS, key.id, key.encode())

    def _find(self, id: str) -> Key:
        with closing(SqliteObjects(self.folder)) as objects:
            text = objects.get(KEYS, id)
        if text is None:
            raise NoSuchKey(f"{id}: there is no such key in {self.folder} (headgate keys list)")
        return self._decode(id, text)

    def _decode(self, id: str, text: str) -> Key:
        try:
            return Key.decode(text)
        except (ValueError, TypeError, AttributeError) as error:
            raise StoreError(f"{self.folder / FILE}: the entry of key {id} is damaged") from error

    def _pepper(self) -> bytes:
        file = self.folder / PEPPER
        pepper = read_secret(file)
        if pepper is None:
            raise StoreError(f"{file}: is gone, without which no key is recognised. Put it back beside {FILE}")
        return pepper


class AuditLog:
    """One line of JSON per change: when, what, whose key, by which user of the system."""

    def __init__(self, file: Path, descriptor: int, now: float) -> None:
        self._file = file
        self._descriptor = descriptor
        self._now = now

    @contextmanager
    def line(self, action: str, key: Key, what: dict[str, Any]) -> Iterator[None]:
        """Around a change. The line comes first, so that none goes without; one that fails has a second line."""
        self._write(action, key, what)
        try:
            yield
        except StoreError:
            with suppress(StoreError):
                self._write(f"{action} failed", key, {})
            raise

    def _write(self, action: str, key: Key, what: dict[str, Any]) -> None:
        head = {"at": iso(self._now), "action": action, "id": key.id, "tenant": key.tenant, "user": user()}
        text = json.dumps(head | what).encode() + b"\n"
        size = os.fstat(self._descriptor).st_size
        try:
            if os.write(self._descriptor, text) < len(text):
                os.ftruncate(self._descriptor, size)  # half a line is none
                raise StoreError(f"{self._file}: the disk is full; nothing was changed")
            os.fsync(self._descriptor)
        except OSError as error:
            raise StoreError(f"{self._file}: {sentence(error)}") from error


def user() -> str:
    """As the system knows it, whatever the environment says."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # a container's
        return str(os.getuid())


# --- keys as people see them ------------------------------------------------------------------------------------------


def public(key: Key) -> dict[str, Any]:
    """All of it that may be shown."""
    shown = {name: value for name, value in asdict(key).items() if name not in SECRETS}
    limits = shown.pop("limits")
    for name in ("created_at", "expires_at", "revoked_at"):
        shown[name] = iso(shown[name]) if shown[name] is not None else None
    old_secret_until = shown.pop("previous_until")
    return {**shown, **limits, "old_secret_until": iso(old_secret_until) if old_secret_until else None}


def state(key: Key, now: float) -> str:
    if key.revoked_at is not None:
        return "revoked"
    return "valid" if key.is_valid(now) else "expired"


def iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
