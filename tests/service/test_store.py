"""The object store: one set of rules for both twins, and what only a file can go through."""

from __future__ import annotations

import os
import sqlite3
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from service import store
from service.store import (
    FILE,
    KEYS,
    PEPPER,
    MemoryObjects,
    Objects,
    SqliteObjects,
    StoreError,
    StoreReplaced,
    has_keys,
    make_secret,
    read_secret,
)


@pytest.fixture(params=["memory", "sqlite"])
def objects(request: pytest.FixtureRequest, tmp_path: Path) -> Objects:
    return MemoryObjects() if request.param == "memory" else SqliteObjects(tmp_path / "data")


@pytest.fixture
def on_disk(tmp_path: Path) -> SqliteObjects:
    return SqliteObjects(tmp_path / "data")


# --- both twins -------------------------------------------------------------------------------------------------------


def test_what_was_put_is_there_and_the_last_one_counts(objects: Objects) -> None:
    assert objects.get("key", "a") is None
    objects.put("key", "a", "1")
    objects.put("key", "a", "2")
    objects.put("batch", "a", "another kind")
    assert objects.get("key", "a") == "2" and objects.get("batch", "a") == "another kind"


def test_text_comes_back_as_it_went(objects: Objects) -> None:
    text = 'ä "quoted" \u2028 \x00 🌊'
    objects.put("key", text, text)
    assert objects.get("key", text) == text


def test_an_empty_store_has_no_changes(objects: Objects) -> None:
    assert objects.changed_since("key", 0) == (0, [])


def test_changes_come_in_the_order_of_the_writes_and_each_object_once(objects: Objects) -> None:
    for id, text in (("b", "1"), ("a", "2"), ("b", "3")):
        objects.put("key", id, text)
    assert objects.changed_since("key", 0)[1] == [("a", "2"), ("b", "3")]


def test_only_what_is_newer_is_read_again(objects: Objects) -> None:
    objects.put("key", "a", "1")
    newest, _ = objects.changed_since("key", 0)
    assert objects.changed_since("key", newest) == (newest, [])
    objects.put("key", "b", "2")
    objects.put("batch", "c", "3")
    later, rows = objects.changed_since("key", newest)
    assert later > newest and rows == [("b", "2")]


def test_what_no_longer_follows_from_what_was_read_is_to_be_read_anew(objects: Objects) -> None:
    objects.put("key", "a", "1")
    first, _ = objects.changed_since("key", 0)
    objects.put("key", "a", "2")
    with pytest.raises(StoreReplaced):
        objects.changed_since("key", first)
    second, _ = objects.changed_since("key", 0)
    assert objects.changed_since("key", second) == (second, [])


# --- the file ---------------------------------------------------------------------------------------------------------


def test_reading_leaves_nothing_behind(on_disk: SqliteObjects) -> None:
    assert on_disk.get("key", "a") is None
    assert on_disk.changed_since("key", 0) == (0, [])
    assert not has_keys(str(on_disk.file.parent))
    assert not on_disk.file.parent.exists()


def test_folder_and_file_are_for_their_owner_only(on_disk: SqliteObjects) -> None:
    on_disk.put("key", "a", "1")
    assert stat.S_IMODE(on_disk.file.parent.stat().st_mode) == 0o700
    files = list(on_disk.file.parent.iterdir())
    assert {file.name for file in files} == {FILE, f"{FILE}-journal"}
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}


def test_another_instance_sees_what_was_written(on_disk: SqliteObjects) -> None:
    other = SqliteObjects(on_disk.file.parent)
    assert other.changed_since("key", 0) == (0, [])
    on_disk.put("key", "a", "1")
    first, rows = other.changed_since("key", 0)
    assert rows == [("a", "1")]
    other.put("key", "b", "2")
    assert on_disk.changed_since("key", first)[1] == [("b", "2")]


WRITER = """
import sys
from service.store import SqliteObjects
objects = SqliteObjects(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
for number in range(100):
    objects.put("key", f"{sys.argv[2]}{number}", "text")
"""


def test_two_processes_that_make_the_file_and_write_at_once_lose_nothing(on_disk: SqliteObjects) -> None:
    def writer(name: str) -> subprocess.Popen[str]:
        arguments = [sys.executable, "-c", WRITER, str(on_disk.file.parent), name]
        return subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    writers = [writer("a"), writer("b")]
    for process in writers:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in writers:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in writers:
        process.communicate(timeout=60)
        assert process.returncode == 0
    _, rows = on_disk.changed_since("key", 0)
    assert len(rows) == len({id for id, _ in rows}) == 200


# --- what can be wrong with it ----------------------------------------------------------------------------------------


def sentence_of(do: Callable[[], object]) -> str:
    with pytest.raises(StoreError) as caught:
        do()
    return str(caught.value)


def test_a_file_that_is_none_of_ours_is_not_read(on_disk: SqliteObjects) -> None:
    on_disk.file.parent.mkdir()
    on_disk.file.write_bytes(b"this is no database, however one looks at it " * 100)
    says = sentence_of(lambda: on_disk.get("key", "a"))
    assert says.startswith(f"{on_disk.file}: is damaged") and "Put a copy" in says


def test_a_file_that_was_cut_to_nothing_is_damaged_and_not_empty(on_disk: SqliteObjects) -> None:
    on_disk.put("key", "a", "1")
    on_disk.file.write_bytes(b"")
    assert "is damaged" in sentence_of(lambda: on_disk.changed_since("key", 0))
    assert "is damaged" in sentence_of(lambda: on_disk.put("key", "a", "1"))


def test_a_file_with_holes_is_damaged(on_disk: SqliteObjects) -> None:
    for number in range(200):
        on_disk.put("key", str(number), "text" * 50)
    with on_disk.file.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * (on_disk.file.stat().st_size - 4096))
    assert "is damaged" in sentence_of(lambda: on_disk.changed_since("key", 0))


def test_a_file_of_a_newer_version_is_left_alone(on_disk: SqliteObjects) -> None:
    on_disk.put("key", "a", "1")
    with closing(sqlite3.connect(on_disk.file)) as file:
        file.execute("PRAGMA user_version = 2")
    says = sentence_of(lambda: on_disk.put("key", "a", "2"))
    assert says == f"{on_disk.file}: was written by a newer version (layout 2, not 1). Update this one"


def test_a_full_disk_changes_nothing(on_disk: SqliteObjects, monkeypatch: pytest.MonkeyPatch) -> None:
    def small(file: Path, layout: int = store.LAYOUT) -> sqlite3.Connection:
        connection = connect(file, layout)
        connection.execute("PRAGMA max_page_count = 1")  # SQLite then says what it says of a full disk
        return connection

    on_disk.put("key", "a", "1")
    connect = store.connect
    monkeypatch.setattr(store, "connect", small)
    says = sentence_of(lambda: on_disk.put("key", "a", "text" * 100_000))
    assert says == f"{on_disk.file}: the disk is full"
    assert on_disk.get("key", "a") == "1"


def test_the_journal_keeps_its_room_for_a_disk_that_is_full(on_disk: SqliteObjects) -> None:
    on_disk.put("key", "a", "1")
    on_disk.put("key", "a", "2")
    journal = on_disk.file.with_name(f"{FILE}-journal")
    room = journal.stat().st_size
    on_disk.put("key", "a", "3")
    assert journal.stat().st_size == room > 4096


def test_a_file_that_cannot_be_opened_is_a_sentence(on_disk: SqliteObjects) -> None:
    on_disk.file.mkdir(parents=True)
    says = sentence_of(lambda: on_disk.get("key", "a"))
    assert says.startswith(f"{on_disk.file}: unable to open")


def test_a_folder_that_is_a_file_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("")
    objects = SqliteObjects(tmp_path / "data")
    assert sentence_of(lambda: objects.put("key", "a", "1")).endswith(("Not a directory", "File exists"))


READER = """
import os, sys
from service.store import SqliteObjects, StoreError
objects, empty = SqliteObjects(sys.argv[1]), SqliteObjects(sys.argv[2])
if os.getuid() == 0:
    os.setuid(65534)  # nothing is read-only to root
print(objects.get("key", "a"), objects.changed_since("key", 0)[1])
for one in (objects, empty):
    try:
        one.put("key", "a", "2")
    except StoreError as error:
        print(error)
"""


def test_who_may_only_read_can_read() -> None:
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as empty:
        objects = SqliteObjects(folder)
        objects.put("key", "a", "1")
        for file in objects.file.parent.iterdir():
            file.chmod(0o444)
        for path in (folder, empty):
            os.chmod(path, 0o555)
        command = [sys.executable, "-c", READER, folder, empty]
        says = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=60, check=True).stdout.splitlines()
    assert says == [
        "1 [('a', '1')]",
        f"{objects.file}: it may be read here, but not written",
        f"{Path(empty) / FILE}: Permission denied",
    ]


def test_a_file_that_somebody_holds_is_a_sentence(on_disk: SqliteObjects, monkeypatch: pytest.MonkeyPatch) -> None:
    on_disk.put("key", "a", "1")
    monkeypatch.setattr(store, "BUSY_SECONDS", 0.01)
    with closing(sqlite3.connect(on_disk.file, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        assert "another process has held it" in sentence_of(lambda: on_disk.put("key", "a", "2"))
        assert on_disk.get("key", "a") == "1"  # who only reads is not kept waiting


def test_a_file_that_vanished_is_no_empty_store(on_disk: SqliteObjects, tmp_path: Path) -> None:
    on_disk.put("key", "a", "1")
    newest, _ = on_disk.changed_since("key", 0)
    on_disk.file.rename(tmp_path / "elsewhere")
    for _ in range(2):
        assert "is gone" in sentence_of(lambda: on_disk.changed_since("key", newest))
    (tmp_path / "elsewhere").rename(on_disk.file)
    assert on_disk.changed_since("key", newest) == (newest, [])


@pytest.mark.parametrize("in_place", [True, False])
def test_whoever_remembers_another_history_is_told_so(on_disk: SqliteObjects, tmp_path: Path, in_place: bool) -> None:
    on_disk.put("key", "a", "1")
    backup = on_disk.file.read_bytes()
    on_disk.put("key", "b", "of a future that is not")
    newest, _ = on_disk.changed_since("key", 0)
    if in_place:  # as cp does it
        on_disk.file.write_bytes(backup)
    else:
        (tmp_path / "backup").write_bytes(backup)
        (tmp_path / "backup").rename(on_disk.file)
    for id in "cdef":  # as many changes as before, and more
        with pytest.raises(StoreReplaced):
            on_disk.changed_since("key", newest)
        on_disk.put("key", id, "2")


def test_a_copy_of_the_file_alone_is_a_backup(on_disk: SqliteObjects, tmp_path: Path) -> None:
    on_disk.put("key", "a", "1")
    (tmp_path / FILE).write_bytes(on_disk.file.read_bytes())
    assert SqliteObjects(tmp_path).get("key", "a") == "1"


def test_a_new_file_takes_nothing_over_from_one_that_was_removed(on_disk: SqliteObjects) -> None:
    on_disk.put("key", "a", "1")
    on_disk.put("key", "b", "1" * 10_000)
    with closing(sqlite3.connect(on_disk.file, isolation_level=None)) as dying:
        dying.execute("PRAGMA cache_size = 1")
        dying.execute("BEGIN EXCLUSIVE")
        dying.execute("UPDATE objects SET text = ?", ("2" * 100_000,))
        journal = on_disk.file.with_name(f"{FILE}-journal").read_bytes()
        dying.execute("ROLLBACK")
    on_disk.file.with_name(f"{FILE}-journal").write_bytes(journal)  # as a power cut leaves it
    on_disk.file.unlink()
    on_disk.put("key", "c", "3")
    assert on_disk.changed_since("key", 0)[1] == [("c", "3")]


def test_one_text_that_is_none_holds_up_no_other(on_disk: SqliteObjects) -> None:
    on_disk.put("key", "a", "1")
    on_disk.put("key", "b", "2")
    with closing(sqlite3.connect(on_disk.file, isolation_level=None)) as file:
        file.execute("UPDATE objects SET text = CAST(x'ff31' AS TEXT) WHERE id = 'a'")
    assert on_disk.changed_since("key", 0)[1] == [("a", "\ufffd1"), ("b", "2")]


# --- secrets ----------------------------------------------------------------------------------------------------------


def test_a_secret_is_made_once_for_its_owner_only(tmp_path: Path) -> None:
    file = tmp_path / "data" / PEPPER
    assert read_secret(file) is None and not file.parent.exists()
    assert make_secret(file)
    secret = read_secret(file)
    assert secret is not None and len(secret) == 32
    assert not make_secret(file) and read_secret(file) == secret
    assert stat.S_IMODE(file.stat().st_mode) == 0o600 and stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert [other.name for other in file.parent.iterdir()] == [PEPPER]


def test_what_has_a_name_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, synced, fsync = tmp_path / PEPPER, [], os.fsync

    def remembered(descriptor: int) -> None:
        status = os.fstat(descriptor)
        synced.append((status.st_ino, status.st_size, file.exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", remembered)
    make_secret(file)
    (inode, size, had_name), (folder, _, has_name) = synced
    assert (inode, size, had_name) == (file.stat().st_ino, 65, False)
    assert (folder, has_name) == (tmp_path.stat().st_ino, True)


@pytest.mark.parametrize("text", ["", "abc", "ä" * 64, "zz" * 32, "ab" * 31])
def test_a_damaged_secret_is_a_sentence_that_does_not_tell_it(tmp_path: Path, text: str) -> None:
    file = tmp_path / PEPPER
    file.write_text(text)
    says = sentence_of(lambda: read_secret(file))
    assert says == f"{file}: is damaged: 64 hexadecimal digits were in it. Put a copy of it in its place"


def test_keys_are_wanted_once_there_is_a_key_or_the_secret_for_one(tmp_path: Path) -> None:
    assert not has_keys("") and not has_keys(str(tmp_path))
    objects = SqliteObjects(tmp_path)
    objects.put("batch", "a", "no key")
    assert not has_keys(str(tmp_path))
    objects.put(KEYS, "a", "a key")
    assert has_keys(str(tmp_path))
    make_secret(tmp_path / "other" / PEPPER)
    assert has_keys(str(tmp_path / "other"))
