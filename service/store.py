"""What must outlast a process: small texts by kind and id, in one SQLite file, with a twin in memory; and secrets in files.

Every write gets a number that only grows, so that any process can ask what is new since it last looked.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import sqlite3
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Protocol, TypeVar

FILE = "headgate.db"
PEPPER = "pepper"  # the file with the secret under which keys are hashed; where it is, keys are wanted
KEYS = "key"  # their kind
LAYOUT = 1  # of the file's tables; a newer one is not touched
BUSY_SECONDS = 5.0  # how long another process may hold the file

CREATE = f"""
PRAGMA journal_mode = WAL;
BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS objects (
    kind TEXT NOT NULL, id TEXT NOT NULL, text TEXT NOT NULL, change INTEGER NOT NULL,
    PRIMARY KEY (kind, id), UNIQUE (kind, change)
);
PRAGMA user_version = {LAYOUT};
COMMIT;
"""
# One statement takes the lock before it reads: two processes cannot get the same number.
PUT = """
INSERT INTO objects VALUES (:kind, :id, :text, (SELECT coalesce(max(change), 0) + 1 FROM objects WHERE kind = :kind))
ON CONFLICT (kind, id) DO UPDATE SET text = excluded.text, change = excluded.change
"""
GET = "SELECT text FROM objects WHERE kind = ? AND id = ?"
NEWEST = "SELECT coalesce(max(change), 0) FROM objects WHERE kind = ?"
CHANGED = "SELECT id, text FROM objects WHERE kind = ? AND change > ? AND change <= ? ORDER BY change"

Result = TypeVar("Result")


class StoreError(Exception):
    """The store cannot be used; one sentence that names the file."""


class StoreReplaced(StoreError):
    """Another file lies where the store was: whoever remembers anything has to read it all again."""


class Objects(Protocol):
    """Small texts by kind and id. All methods block, and raise StoreError."""

    def put(self, kind: str, id: str, text: str) -> None: ...

    def get(self, kind: str, id: str) -> str | None: ...

    def changed_since(self, kind: str, change: int) -> tuple[int, list[tuple[str, str]]]:
        """The number of the newest change, and (id, text) of what was written after `change`, in that order."""
        ...

    def close(self) -> None:
        """Lets go of what it holds; the next call takes it up again."""
        ...


class MemoryObjects:
    """Lasts as long as the process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._texts: dict[str, dict[str, tuple[int, str]]] = defaultdict(
            dict
        )  # by kind and id, with the change's number
        self._newest: dict[str, int] = defaultdict(int)

    def put(self, kind: str, id: str, text: str) -> None:
        with self._lock:
            self._newest[kind] += 1
            self._texts[kind][id] = (self._newest[kind], text)

    def get(self, kind: str, id: str) -> str | None:
        with self._lock:
            found = self._texts[kind].get(id)
        return found[1] if found is not None else None

    def changed_since(self, kind: str, change: int) -> tuple[int, list[tuple[str, str]]]:
        with self._lock:
            new = sorted((at, id, text) for id, (at, text) in self._texts[kind].items() if at > change)
            return self._newest[kind], [(id, text) for _, id, text in new]

    def close(self) -> None:
        pass


class SqliteObjects:
    """Objects in `headgate.db` in a folder, for several processes at once. Folder and file are made by the first write."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.file = Path(folder).absolute() / FILE
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._opened: tuple[int, int] | None = None  # the file that was last open

    def put(self, kind: str, id: str, text: str) -> None:
        def write(file: sqlite3.Connection) -> None:
            file.execute(PUT, {"kind": kind, "id": id, "text": text})
            with suppress(
                sqlite3.Error
            ):  # it is written; this only empties the journal, so that a copy of the file is one
                file.execute("PRAGMA wal_checkpoint(TRUNCATE)")

        self._in_file(write, None, makes_it=True)

    def get(self, kind: str, id: str) -> str | None:
        def row(file: sqlite3.Connection) -> str | None:
            found = file.execute(GET, (kind, id)).fetchone()
            return found[0] if found is not None else None

        return self._in_file(row, None)

    def changed_since(self, kind: str, change: int) -> tuple[int, list[tuple[str, str]]]:
        def rows(file: sqlite3.Connection) -> tuple[int, list[tuple[str, str]]]:
            (newest,) = file.execute(NEWEST, (kind,)).fetchone()
            new = file.execute(CHANGED, (kind, change, newest)).fetchall() if newest > change else []
            return newest, new

        nothing: tuple[int, list[tuple[str, str]]] = (0, [])
        return self._in_file(rows, nothing)

    def close(self) -> None:
        with self._lock:
            self._let_go()

    def _let_go(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _in_file(self, do: Callable[[sqlite3.Connection], Result], empty: Result, *, makes_it: bool = False) -> Result:
        """What `do` returns; `empty` where there is no file yet."""
        with self._lock:
            try:
                connection = self._open(makes_it)
                return do(connection) if connection is not None else empty
            except (sqlite3.Error, OSError) as error:
                self._let_go()
                raise StoreError(f"{self.file}: {sentence(error)}") from error

    def _open(self, makes_it: bool) -> sqlite3.Connection | None:
        found = identity(self.file)
        if self._opened is not None and found != self._opened:
            self._let_go()
            if found is None:
                raise StoreError(f"{self.file}: is gone. Put it back; what was read from it stays in force")
            self._opened = None
            raise StoreReplaced(f"{self.file}: is another file than before")
        if found is None and makes_it:
            make_file(self.file)
        if self._connection is None and (found is not None or makes_it):
            self._connection = connect(self.file)
            self._opened = identity(self.file)
        return self._connection


def connect(file: Path, layout: int = LAYOUT) -> sqlite3.Connection:
    """Opens a file that is there and has this layout."""
    connection = sqlite3.connect(
        f"{file.as_uri()}?mode=rw", BUSY_SECONDS, isolation_level=None, check_same_thread=False, uri=True
    )
    try:
        (found,) = connection.execute("PRAGMA user_version").fetchone()
        if found > layout:
            raise StoreError(f"{file}: was written by a newer version (layout {found}, not {layout}). Update this one")
        if found < layout:
            raise StoreError(f"{file}: is damaged (nothing of ours is in it). Put a copy of it in its place")
    except BaseException:
        connection.close()
        raise
    return connection


def make_file(file: Path) -> None:
    """An empty store, where there is none."""
    with drafted(file) as draft:
        if draft is None:
            return
        with closing(connect(draft, layout=0)) as connection:
            connection.executescript(CREATE)
        for rest in ("-wal", "-shm"):  # of a file that was removed while it was open; SQLite would mix it in
            file.with_name(file.name + rest).unlink(missing_ok=True)


@contextmanager
def drafted(file: Path) -> Iterator[Path | None]:
    """An empty file that becomes `file` in the end, whole or not at all; None where that is there already.

    Only its owner can read it, and enter the folder if that is new. One process at a time.
    """
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with alone_in(file.parent):
        if file.exists():
            yield None
            return
        draft = file.with_name(f"{file.name}.{secrets.token_hex(8)}")
        os.close(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        try:
            yield draft
            draft.rename(file)
        finally:
            draft.unlink(missing_ok=True)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Waits for other processes that are in here."""
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def identity(file: Path) -> tuple[int, int] | None:
    try:
        status = file.stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def sentence(error: sqlite3.Error | OSError) -> str:
    """What went wrong, for people."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # without the details
    if code == sqlite3.SQLITE_FULL or getattr(error, "errno", None) == errno.ENOSPC:
        return "the disk is full; nothing was changed"
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return f"is damaged ({error}). Put a copy of it in its place"
    if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM):
        return f"this user may not read and write it, and the folder around it ({error})"
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return f"another process has held it for {BUSY_SECONDS:.0f} s. Try again"
    return getattr(error, "strerror", None) or str(error)


# --- secrets ----------------------------------------------------------------------------------------------------------


def read_secret(file: Path) -> bytes | None:
    """None where there is none. Raises StoreError."""
    try:
        secret = bytes.fromhex(file.read_text("ascii").strip())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StoreError(f"{file}: {sentence(error)}") from error
    except ValueError:
        secret = b""
    if len(secret) < 32:
        raise StoreError(f"{file}: is damaged: 64 hexadecimal digits were in it. Put a copy of it in its place")
    return secret


def make_secret(file: Path) -> bytes:
    """The secret in `file`; a fresh one of 256 bits where there was none. Whoever comes first decides. Raises StoreError."""
    try:
        with drafted(file) as draft:
            if draft is not None:
                draft.write_text(secrets.token_hex(32) + "\n")
    except OSError as error:
        raise StoreError(f"{file}: {sentence(error)}") from error
    secret = read_secret(file)
    assert secret is not None
    return secret


def has_keys(folder: str) -> bool:
    """Whether keys are wanted: one was made, be it revoked since. Raises StoreError."""
    if not folder:
        return False
    if read_secret(Path(folder) / PEPPER) is not None:
        return True
    with closing(SqliteObjects(folder)) as objects:
        newest, _ = objects.changed_since(KEYS, 0)
    return newest > 0
