"""The object store: one set of rules for both twins, and what only a file can go through."""

from __future__ import annotations

import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
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
def objects(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Objects]:
    made: Objects = MemoryObjects() if request.param == "memory" else SqliteObjects(tmp_path / "data")
    with closing(made):
        yield made


@pytest.fixture
def on_disk(tmp_path: Path) -> Iterator[SqliteObjects]:
    with closing(SqliteObjects(tmp_path / "data")) as made:
        yield made


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


def test_after_closing_it_can_be_used_again(objects: Objects) -> None:
    objects.put("key", "a", "1")
    objects.close()
    assert objects.get("key", "a") == "1"


# --- the file ---------------------------------------------------------------------------------------------------------


def test_reading_leaves_nothing_behind(on_disk: SqliteObjects) -> None:
    assert on_disk.get("key", "a") is None
    assert on_disk.changed_since("key", 7) == (0, [])
    assert not has_keys(str(on_disk.file.parent))
    assert not on_disk.file.parent.exists()


def test_folder_and_file_are_for_their_owner_only(on_disk: SqliteObjects) -> None:
    on_disk.put("key", "a", "1")
    assert stat.S_IMODE(on_disk.file.parent.stat().st_mode) == 0o700
    files = list(on_disk.file.parent.iterdir())
    assert {file.name for file in files} >= {FILE, f"{FILE}-wal"}
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}


def test_another_instance_sees_what_was_written(on_disk: SqliteObjects) -> None:
    with closing(SqliteObjects(on_disk.file.parent)) as other:
        assert other.changed_since("key", 0) == (0, [])
        on_disk.put("key", "a", "1")
        assert other.changed_since("key", 0) == (1, [("a", "1")])
        other.put("key", "b", "2")
    assert on_disk.changed_since("key", 1) == (2, [("b", "2")])


WRITER = """
import sys
from service.store import SqliteObjects
objects = SqliteObjects(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
for number in range(100):
    objects.put("key", f"{sys.argv[2]}{number}", "text")
objects.close()
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
    newest, rows = on_disk.changed_since("key", 0)
    assert newest == 200 and len({id for id, _ in rows}) == 200


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
    on_disk.close()
    on_disk.file.write_bytes(b"")
    assert "is damaged" in sentence_of(lambda: on_disk.changed_since("key", 0))
    assert "is damaged" in sentence_of(lambda: on_disk.put("key", "a", "1"))


def test_a_file_with_holes_is_damaged(on_disk: SqliteObjects) -> None:
    for number in range(200):
        on_disk.put("key", str(number), "text" * 50)
    on_disk.close()
    with on_disk.file.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * (on_disk.file.stat().st_size - 4096))
    assert "is damaged" in sentence_of(lambda: on_disk.changed_since("key", 0))


def test_a_file_of_a_newer_version_is_left_alone(on_disk: SqliteObjects) -> None:
    on_disk.put("key", "a", "1")
    on_disk.close()
    with closing(sqlite3.connect(on_disk.file)) as file:
        file.execute("PRAGMA user_version = 2")
    says = sentence_of(lambda: on_disk.put("key", "a", "2"))
    assert says == f"{on_disk.file}: was written by a newer version (layout 2, not 1). Update this one"


def test_a_full_disk_changes_nothing(on_disk: SqliteObjects) -> None:
    on_disk.put("key", "a", "1")
    assert on_disk._connection is not None
    on_disk._connection.execute("PRAGMA max_page_count = 1")  # SQLite then says what it says of a full disk
    says = sentence_of(lambda: on_disk.put("key", "a", "text" * 100_000))
    assert says == f"{on_disk.file}: the disk is full; nothing was changed"
    assert on_disk.get("key", "a") == "1"


def test_a_file_that_cannot_be_opened_is_a_sentence(on_disk: SqliteObjects) -> None:
    on_disk.file.mkdir(parents=True)
    says = sentence_of(lambda: on_disk.get("key", "a"))
    assert says.startswith(f"{on_disk.file}: this user may not read and write it")


def test_a_folder_that_is_a_file_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("")
    with closing(SqliteObjects(tmp_path / "data")) as objects:
        assert sentence_of(lambda: objects.put("key", "a", "1")).endswith(("Not a directory", "File exists"))


@pytest.mark.skipif("os.getuid() == 0", reason="nothing is read-only to root")
def test_a_read_only_folder_is_a_sentence(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with closing(SqliteObjects(tmp_path)) as objects:
        assert "ermission denied" in sentence_of(lambda: objects.put("key", "a", "1"))
    tmp_path.chmod(0o700)


def test_a_file_that_somebody_holds_is_a_sentence(on_disk: SqliteObjects, monkeypatch: pytest.MonkeyPatch) -> None:
    on_disk.put("key", "a", "1")
    on_disk.close()
    monkeypatch.setattr(store, "BUSY_SECONDS", 0.01)
    with closing(sqlite3.connect(on_disk.file, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        assert "another process has held it" in sentence_of(lambda: on_disk.put("key", "a", "2"))
        assert on_disk.get("key", "a") == "1"  # who only reads is not kept waiting


def test_a_file_that_vanished_is_no_empty_store(on_disk: SqliteObjects, tmp_path: Path) -> None:
    on_disk.put("key", "a", "1")
    on_disk.file.rename(tmp_path / "elsewhere")
    for _ in range(2):
        assert "is gone" in sentence_of(lambda: on_disk.changed_since("key", 0))
    assert "is gone" in sentence_of(lambda: on_disk.put("key", "a", "2"))
    (tmp_path / "elsewhere").rename(on_disk.file)
    assert on_disk.get("key", "a") == "1"


def test_whoever_remembers_the_old_file_is_told_of_another_one(on_disk: SqliteObjects, tmp_path: Path) -> None:
    on_disk.put("key", "a", "1")
    with closing(SqliteObjects(tmp_path)) as other:
        other.put("key", "a", "from elsewhere")
    (tmp_path / FILE).rename(on_disk.file)
    with pytest.raises(StoreReplaced):
        on_disk.changed_since("key", 0)
    assert on_disk.get("key", "a") == "from elsewhere"


def test_a_copy_of_the_file_alone_is_a_backup(on_disk: SqliteObjects, tmp_path: Path) -> None:
    on_disk.put("key", "a", "1")
    (tmp_path / FILE).write_bytes(on_disk.file.read_bytes())  # while it is open
    with closing(SqliteObjects(tmp_path)) as copy:
        assert copy.get("key", "a") == "1"


def test_a_new_file_takes_nothing_over_from_one_that_was_removed_while_open(on_disk: SqliteObjects) -> None:
    on_disk.put("key", "a", "1")
    on_disk.file.unlink()  # its journal stays
    with closing(SqliteObjects(on_disk.file.parent)) as other:
        other.put("key", "b", "2")
        assert other.changed_since("key", 0) == (1, [("b", "2")])


# --- secrets ----------------------------------------------------------------------------------------------------------


def test_a_secret_is_made_once_for_its_owner_only(tmp_path: Path) -> None:
    file = tmp_path / "data" / PEPPER
    assert read_secret(file) is None and not file.parent.exists()
    secret = make_secret(file)
    assert len(secret) == 32 and make_secret(file) == secret == read_secret(file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600 and stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert [other.name for other in file.parent.iterdir()] == [PEPPER]


@pytest.mark.parametrize("text", ["", "abc", "ä" * 64, "zz" * 32, "ab" * 31])
def test_a_damaged_secret_is_a_sentence_that_does_not_tell_it(tmp_path: Path, text: str) -> None:
    file = tmp_path / PEPPER
    file.write_text(text)
    says = sentence_of(lambda: read_secret(file))
    assert says == f"{file}: is damaged: 64 hexadecimal digits were in it. Put a copy of it in its place"


def test_keys_are_wanted_once_there_is_a_key_or_the_secret_for_one(tmp_path: Path) -> None:
    assert not has_keys("") and not has_keys(str(tmp_path))
    with closing(SqliteObjects(tmp_path)) as objects:
        objects.put("batch", "a", "no key")
        assert not has_keys(str(tmp_path))
        objects.put(KEYS, "a", "a key")
    assert has_keys(str(tmp_path))
    make_secret(tmp_path / "other" / PEPPER)
    assert has_keys(str(tmp_path / "other"))
