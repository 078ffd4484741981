"""The keys of a data folder, and the log of what was done to them."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import pwd
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
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

        self._objects = SqliteObjects(folder)

    def keys(self) -> tuple[list[Key], list[str]]:
        """All of them, the oldest first; and the ids of those that cannot be read."""
        keys, damaged = [], []
        for id, text in self._objects.changed_since(KEYS, 0)[1]:
            try:
                keys.append(Key.decode(text))
            except ValueError:
                damaged.append(id)
        return sorted(keys, key=lambda key: key.created_at), damaged

    def create(self, key: Key, whole: str) -> None:
        """`key` has no digest yet."""
        with self._alone() as log:
            others = {id for id, _ in self._objects.changed_since(KEYS, 0)[1]}  # which a new pepper would make useless
            if key.id in others:  # once in billions
                raise StoreError(f"{key.id}: there is a key with this id. Try again")
            shown = {name: value for name, value in public(key).items() if value}
            with log.line("create", key, shown), self._pepper_for(others) as pepper:
                self._put(replace(key, digest=digest_of(whole, pepper)))

    def revoke(self, id: str) -> tuple[bool, StoreError | None]:
        """Whether it was good until now, and why the log has no line of it: who stole a key is not kept in by a full disk."""
        self._find(id)  # before a log is made for nothing
        with self._alone() as log:
            key, unlogged = self._find(id), None
            if key.revoked_at is None:
                self._put(replace(key, revoked_at=self.now))
                try:
                    log.write("revoke", key, {})
                except StoreError as error:
                    unlogged = error
            return key.revoked_at is None, unlogged

    def rotate(self, id: str, whole: str, grace_seconds: float) -> tuple[Key, Key]:
        """The key before and after. `whole`: the key with its new secret."""
        self._find(id)
        with self._alone() as log:
            key = self._find(id)
            if not key.is_valid(self.now):
                raise NoSuchKey(f"{id}: this key is {state(key, self.now)}; make a new one (headgate keys create)")
            new = rotated(key, digest_of(whole, self._pepper()), grace_seconds, self.now)
            with log.line("rotate", key, {"old_secret_until": iso(new.previous_until)}):
                self._put(new)
            return key, new

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
        self._objects.put(KEYS, key.id, key.encode())

    def _find(self, id: str) -> Key:
        text = self._objects.get(KEYS, id)
        if text is None:
            raise NoSuchKey(f"{id}: there is no such key in {self.folder} (headgate keys list)")
        try:
            return Key.decode(text)
        except ValueError as error:
            raise StoreError(f"{self.folder / FILE}: the entry of key {id} is damaged, so it is not valid") from error

    @contextmanager
    def _pepper_for(self, others: Collection[str]) -> Iterator[bytes]:
        """A new one for the first key; it goes again if that is not made: where there is a pepper, keys are wanted."""
        is_new = not others and make_secret(self.folder / PEPPER)
        try:
            yield self._pepper()
        except BaseException:
            if is_new:
                (self.folder / PEPPER).unlink()
            raise

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
        self.write(action, key, what)
        try:
            yield
        except StoreError:
            with suppress(StoreError):
                self.write(f"{action} failed", key, {})
            raise

    def write(self, action: str, key: Key, what: dict[str, Any]) -> None:
        head = {"at": iso(self._now), "action": action, "id": key.id, "tenant": key.tenant, "user": user()}
        text = json.dumps(head | what).encode() + b"\n"
        size = os.fstat(self._descriptor).st_size
        try:
            if os.write(self._descriptor, text) < len(text):
                os.ftruncate(self._descriptor, size)  # half a line is none
                raise OSError(errno.ENOSPC, "")
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
