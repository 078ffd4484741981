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
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Protocol

FILE = "headgate.db"
PEPPER = "pepper"  # the file with the secret under which keys are hashed; where it is, keys are wanted
KEYS = "key"  # their kind
LAYOUT = 1  # of the file's tables; a newer one is not touched
BUSY_SECONDS = 5.0  # how long another process may hold the file

CREATE = f"""
BEGIN IMMEDIATE;
CREATE TABLE objects (
    kind TEXT NOT NULL, id TEXT NOT NULL, text TEXT NOT NULL, change INTEGER NOT NULL,
    PRIMARY KEY (kind, id), UNIQUE (kind, change)
);
PRAGMA user_version = {LAYOUT};
COMMIT;
"""
# One statement takes the lock before it reads: two processes cannot get the same number.
PUT = """
INSERT INTO objects
VALUES (:kind, :id, :text, (SELECT coalesce(max(change), 0) + :step FROM objects WHERE kind = :kind))
ON CONFLICT (kind, id) DO UPDATE SET text = excluded.text, change = excluded.change
"""
GET = "SELECT text FROM objects WHERE kind = ? AND id = ?"
CHANGED = "SELECT change, id, text FROM objects WHERE kind = ? AND change >= ? ORDER BY change"

Changes = tuple[int, list[tuple[str, str]]]


class StoreError(Exception):
    """The store cannot be used; one sentence that names the file."""


class StoreReplaced(StoreError):
    """What is there does not follow from what was read before: whoever remembers anything has to read it all again."""


class Objects(Protocol):
    """Small texts by kind and id. All methods block, and raise StoreError."""

    def put(self, kind: str, id: str, text: str) -> None: ...

    def get(self, kind: str, id: str) -> str | None: ...

    def changed_since(self, kind: str, change: int) -> Changes:
        """The number of the newest change, and (id, text) of what was written after `change`, in that order.

        Raises StoreReplaced when `change` is not there any more: after one to the same object, or in a copy that was put back.
        """
        ...


class MemoryObjects:
    """Lasts as long as the process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # by kind and id, with the change's number
        self._texts: dict[str, dict[str, tuple[int, str]]] = defaultdict(dict)

    def put(self, kind: str, id: str, text: str) -> None:
        with self._lock:
            texts = self._texts[kind]
            texts[id] = (max((at for at, _ in texts.values()), default=0) + a_step(), text)

    def get(self, kind: str, id: str) -> str | None:
        with self._lock:
            found = self._texts[kind].get(id)
        return found[1] if found is not None else None

    def changed_since(self, kind: str, change: int) -> Changes:
        with self._lock:
            return follow(
                change, sorted((at, id, text) for id, (at, text) in self._texts[kind].items() if at >= change)
            )


class SqliteObjects:
    """Objects in `headgate.db` in a folder, for several processes at once. Folder and file are made by the first write.

    The file is opened for every call (0.1 ms), so that it is always the one that lies there.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.file = Path(folder).absolute() / FILE

    def put(self, kind: str, id: str, text: str) -> None:
        with self._open(makes_it=True) as file:
            # a journal that stays keeps its room: on a full disk, too, a key can be revoked
            file.execute("PRAGMA journal_mode = PERSIST")
            file.execute(PUT, {"kind": kind, "id": id, "text": text, "step": a_step()})

    def get(self, kind: str, id: str) -> str | None:
        with self._open() as file:
            found = file.execute(GET, (kind, id)).fetchone()
        return found[0] if found is not None else None

    def changed_since(self, kind: str, change: int) -> Changes:
        with self._open() as file:
            if change and not self.file.exists():
                raise StoreError(f"{self.file}: is gone. Put it back; what was read from it stays in force")
            return follow(change, file.execute(CHANGED, (kind, change)).fetchall())

    @contextmanager
    def _open(self, makes_it: bool = False) -> Iterator[sqlite3.Connection]:
        """The file; an empty one in memory where there is none yet."""
        try:
            if makes_it:
                make_file(self.file)
            with closing(connect(self.file) if self.file.exists() else empty()) as connection:
                yield connection
        except (sqlite3.Error, OSError) as error:
            raise StoreError(f"{self.file}: {sentence(error)}") from error


def a_step() -> int:
    """From one number of a change to the next. In two stores that went different ways, no two numbers are alike."""
    return 1 + secrets.randbelow(1 << 32)


def follow(change: int, rows: list[tuple[int, str, str]]) -> Changes:
    """What follows on `change`, from the rows that begin with it."""
    if change and (not rows or rows[0][0] != change):
        raise StoreReplaced(f"change {change} is not there any more")
    return (rows[-1][0] if rows else 0), [(id, text) for at, id, text in rows if at > change]


def connect(file: Path, layout: int = LAYOUT) -> sqlite3.Connection:
    """Opens a file that is there and has this layout."""
    connection = sqlite3.connect(f"{file.as_uri()}?mode=rw", BUSY_SECONDS, isolation_level=None, uri=True)
    connection.text_factory = lambda text: text.decode(
        "utf-8", "replace"
    )  # one damaged object keeps nobody from others
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


def empty() -> sqlite3.Connection:
    connection = sqlite3.connect(":memory:", isolation_level=None)
    connection.executescript(CREATE)
    return connection


def make_file(file: Path) -> None:
    """An empty store, where there is none."""
    if file.exists():
        return
    with drafted(file) as draft:
        if draft is not None:
            with closing(connect(draft, layout=0)) as connection:
                connection.executescript(CREATE)
            file.with_name(f"{file.name}-journal").unlink(missing_ok=True)  # of a file that was removed


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
            sync(draft)  # a name that lasts longer than what it names would be a damaged file after a power cut
            draft.rename(file)
            sync(file.parent)
        finally:
            draft.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Until it is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Waits for other processes that are in here."""
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def sentence(error: sqlite3.Error | OSError) -> str:
    """What went wrong, for people."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # without the details
    if code == sqlite3.SQLITE_FULL or getattr(error, "errno", None) == errno.ENOSPC:
        return "the disk is full"
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return f"is damaged ({error}). Put a copy of it in its place"
    if code == sqlite3.SQLITE_READONLY:
        return "it may be read here, but not written"
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


def make_secret(file: Path) -> bool:
    """Puts a fresh secret of 256 bits there, and says so; False where there is one. Raises StoreError."""
    try:
        if file.exists():
            return False
        with drafted(file) as draft:
            if draft is not None:
                draft.write_text(secrets.token_hex(32) + "\n")
            return draft is not None
    except OSError as error:
        raise StoreError(f"{file}: {sentence(error)}") from error


def has_keys(folder: str) -> bool:
    """Whether keys are wanted: one was made, be it revoked since. Raises StoreError."""
    if not folder:
        return False
    newest, _ = SqliteObjects(folder).changed_since(KEYS, 0)
    return newest > 0 or read_secret(Path(folder) / PEPPER) is not None
