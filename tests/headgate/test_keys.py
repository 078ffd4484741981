"""`headgate keys` as people meet it: what it prints where, what it keeps, and what it refuses."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from headgate import keys
from headgate.key_book import AUDIT_LOG, AuditLog, KeyBook, NoSuchKey
from headgate.keys import ALIASES, NUMBERS, run
from headgate.settings import default_data_folder
from service.auth import Keyring
from service.errors import ApiError
from service.keys import Key, Limits, mint
from service.store import FILE, KEYS, PEPPER, SqliteObjects

NOW = 1_800_000_000.0  # 2027-01-15 08:00 UTC
A_KEY = re.compile(r"hg-([0-9a-f]{12})-[A-Za-z0-9_-]{43}\n")


class Command:
    """The command on a folder that is not there yet."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self.now = NOW
        self._capsys = capsys

    def __call__(self, *arguments: str, status: int = 0) -> tuple[str, str]:
        """(standard output, standard error)."""
        self._capsys.readouterr()
        try:
            ended = run(arguments, {"HEADGATE_DATA": str(self.folder)}, self.now)
        except SystemExit as exit:
            ended = int(exit.code or 0)
        out, err = self._capsys.readouterr()
        assert ended == status, err
        return out, err

    def create(self, *arguments: str) -> str:
        """The whole key."""
        return self("create", "--tenant", "acme", *arguments)[0].strip()

    def list(self) -> list[dict[str, Any]]:
        return list(json.loads(self("list", "--json")[0]))

    def audit(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / AUDIT_LOG).read_text().splitlines()]

    def identify(self, whole: str, now: float | None = None) -> Key:
        """As a gateway does. Raises ApiError."""
        keyring = Keyring.open(str(self.folder))
        try:
            return keyring.identify([(b"api-key", whole.encode())], "192.0.2.1", self.now if now is None else now)
        finally:
            keyring._objects.close()


@pytest.fixture
def command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(tmp_path / "data", capsys)


def id_of(whole: str) -> str:
    return whole.split("-")[1]


# --- create -----------------------------------------------------------------------------------------------------------


def test_a_new_key_stands_alone_on_standard_output(command: Command) -> None:
    out, err = command("create", "--tenant", "acme")
    match = A_KEY.fullmatch(out)
    assert match and out.strip() not in err
    assert err == (
        f"headgate keys: made key {match[1]} of tenant acme in {command.folder}; "
        "this is the only time that it is shown:\n"
    )


def test_a_new_key_opens_the_gateway_with_all_that_was_said(command: Command) -> None:
    options = {
        "--name": "nightly jobs",
        "--expires": "30d",
        "--models": "a, b,a",
        "--tiers": "fast,flex,batch",
        "--default-tier": "flex",
        "--requests-per-minute": "60",
        "--tokens-per-minute": "7000",
        "--concurrent-requests": "4",
        "--max-context": "4096",
        "--max-output": "512",
    }
    whole = command.create("--admin", *(part for pair in options.items() for part in pair))
    key = command.identify(whole)
    expected = Key(
        id=id_of(whole),
        tenant="acme",
        digest=key.digest,
        created_at=NOW,
        name="nightly jobs",
        admin=True,
        expires_at=NOW + 30 * 86400,
        models=("a", "b"),
        tiers=("priority", "flex", "batch"),
        default_tier="flex",
        max_context_tokens=4096,
        max_output_tokens=512,
        limits=Limits(60, 7000, 4),
    )
    assert key == expected


def test_without_options_a_key_may_everything_but_administer(command: Command) -> None:
    key = command.identify(command.create())
    assert key.limits == Limits() and not key.admin and key.expires_at is None
    assert key.models == key.tiers == () and key.default_tier == "default"


def test_a_key_that_may_not_use_the_default_tier_uses_its_first_one(command: Command) -> None:
    assert command.identify(command.create("--tiers", "flex,batch")).default_tier == "flex"
    assert command.identify(command.create("--tiers", "flex,auto")).default_tier == "default"


def test_create_can_answer_in_json(command: Command) -> None:
    out, _ = command("create", "--tenant", "acme", "--max-output", "5", "--json")
    shown = json.loads(out)
    assert command.identify(shown["key"]).id == shown["id"]
    assert shown["max_output_tokens"] == 5 and "digest" not in out


@pytest.mark.parametrize(
    ("expires", "at"),
    [
        ("90s", NOW + 90),
        ("30m", NOW + 1800),
        ("12h", NOW + 43200),
        ("2w", NOW + 14 * 86400),
        ("2027-02-01", 1_801_440_000.0),
        ("2027-02-01T12:00", 1_801_440_000.0 + 43200),
        ("2027-02-01T12:00+01:00", 1_801_440_000.0 + 39600),
    ],
)
def test_an_expiry_is_a_time_from_now_or_a_date(command: Command, expires: str, at: float) -> None:
    assert command.identify(command.create("--expires", expires)).expires_at == at


def test_all_faults_are_told_at_once_and_nothing_is_made(command: Command) -> None:
    numbers = [part for name in NUMBERS for part in (f"--{name.replace('_', '-')}", "0")]
    texts = ["--tenant", "a b", "--name", "", "--expires", "2026-01-01", "--models", "a,,b", "--tiers", "gold"]
    out, err = command("create", *numbers, *texts, "--default-tier", "x", "--colour", status=2)
    tiers = "must be one of priority, default, flex, batch, not"
    assert out == "" and set(err.splitlines()) == {
        "headgate keys: this cannot be done:",
        "  --colour: there is no such option",
        *(f"  --{n.replace('_', '-')}: must be a whole number from 1 to 1000000000000, not '0'" for n in NUMBERS),
        f"  --tiers: {tiers} 'gold'",
        f"  --default-tier: {tiers} 'x'",
        "  --tenant: must have letters, digits, '.', '_' and '-', at most 64, and begin with a letter or a digit, not 'a b'",
        "  --name: must be up to 200 visible characters, not ''",
        "  --expires: must lie in the future, not '2026-01-01'",
        "  --models: must be up to 200 visible characters, not 'a,,b'",
    }
    assert not command.folder.exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["create"], "--tenant: say whose key it is"),
        (["create", "--tenant", "a", "b"], "b: options begin with --"),
        (["create", "--tenant", "a", "--expires", "soon"], "--expires: must be a time such as 30d or a date"),
        (["create", "--tenant", "a", "--expires", "9999999999w"], "at most a hundred years"),
        (["create", "--tenant", "a", "--expires", "0d"], "must lie in the future"),
        (["create", "--tenant", "a", "--name", "two\nlines"], "visible characters"),
        (["create", "--tenant", "a", "--tiers", "flex", "--default-tier", "fast"], "must be one of --tiers flex, not 'priority'"),
        (["list", "--config", "/nowhere.toml"], "/nowhere.toml: cannot be read"),
        (["rotate", "x", "--grace", "long"], "--grace: must be a time such as 90s"),
        (["revoke"], "the following arguments are required: ID"),
        ([], "the following arguments are required: VERB"),
        (["forget"], "invalid choice: 'forget'"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_a_sentence_and_status_2(command: Command, arguments: list[str], says: str) -> None:
    out, err = command(*arguments, status=2)
    assert says in err and out == ""
    assert not command.folder.exists()


def test_the_tiers_are_those_of_the_api() -> None:
    from service.schema import AUTO, TIERS

    assert set(TIERS) | {"batch"} == set(ALIASES) | set(keys.TIERS)
    for name, tier in ALIASES.items():
        assert TIERS[name] in (tier, AUTO)


# --- list -------------------------------------------------------------------------------------------------------------


def test_a_list_is_a_table_without_secrets(command: Command) -> None:
    first = command.create("--expires", "1h", "--requests-per-minute", "60", "--tiers", "flex", "--name", "jobs")
    command.now += 60
    second = command.create("--admin", "--models", "a,b", "--max-context", "10")
    command("revoke", id_of(second))
    command.now += 3600
    out, _ = command("list")
    assert [re.split("  +", line) for line in out.splitlines()] == [
        ["ID", "TENANT", "NAME", "CREATED", "EXPIRES", "STATE", "LIMITS"],
        [
            id_of(first), "acme", "jobs", "2027-01-15 08:00 UTC", "2027-01-15 09:00 UTC", "expired",
            "60 requests/min; tiers flex; usually flex",
        ],
        [
            id_of(second), "acme", "-", "2027-01-15 08:01 UTC", "never", "revoked", "admin; context 10; models a,b",
        ],
    ]  # fmt: skip


def test_a_list_in_json_has_everything_but_digests(command: Command) -> None:
    whole = command.create("--tokens-per-minute", "5")
    (shown,) = command.list()
    assert shown["id"] == id_of(whole) and shown["state"] == "valid" and shown["tokens_per_minute"] == 5
    assert shown["created_at"] == "2027-01-15T08:00:00Z" and shown["old_secret_until"] is None
    assert not [name for name in shown if "digest" in name]


def test_a_list_of_nothing_says_so_and_makes_nothing(command: Command) -> None:
    assert command("list") == ("", f"headgate keys: there are no keys in {command.folder}\n")
    assert command.list() == []
    assert not command.folder.exists()


# --- revoke and rotate ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("said", [id_of, str])
def test_a_revoked_key_does_not_come_in(command: Command, said: Callable[[str], str]) -> None:
    whole = command.create()
    assert command("revoke", said(whole)) == ("", f"headgate keys: key {id_of(whole)} is revoked\n")
    with pytest.raises(ApiError, match="was revoked"):
        command.identify(whole)


def test_revoking_twice_changes_nothing(command: Command) -> None:
    id = id_of(command.create())
    command("revoke", id)
    before = command.list()
    command.now += 60
    assert command("revoke", id)[1] == f"headgate keys: key {id} was revoked before\n"
    assert command.list() == before and len(command.audit()) == 2


def test_a_rotated_key_has_a_new_secret_and_the_old_one_for_a_while(command: Command) -> None:
    old = command.create("--max-output", "5")
    out, err = command("rotate", id_of(old), "--grace", "1h")
    assert A_KEY.fullmatch(out) and "the old one is good until 2027-01-15 09:00 UTC" in err
    new = out.strip()
    assert command.identify(new) == command.identify(old, NOW + 3599)
    assert command.identify(new, NOW + 3600).max_output_tokens == 5
    with pytest.raises(ApiError, match="not valid here"):
        command.identify(old, NOW + 3600)


def test_the_grace_is_a_day_unless_said_otherwise_and_can_be_none(command: Command) -> None:
    old = command.create()
    new = command("rotate", id_of(old))[0].strip()
    assert command.identify(old, NOW + 86399)
    _, err = command("rotate", id_of(old), "--grace", "0")
    assert "the old one is good no longer" in err
    for ended in (old, new):
        with pytest.raises(ApiError):
            command.identify(ended)


@pytest.mark.parametrize("verb", ["revoke", "rotate"])
def test_there_must_be_such_a_key(command: Command, verb: str) -> None:
    out, err = command(verb, "5f0c2d1e9a7b", status=2)
    assert (out, err) == (
        "",
        f"headgate keys: 5f0c2d1e9a7b: there is no such key in {command.folder} (headgate keys list)\n",
    )
    assert not command.folder.exists()


def test_a_secret_that_is_not_known_is_not_repeated(command: Command) -> None:
    _, err = command("revoke", "hg-5f0c2d1e9a7b-Zx9w", status=2)
    assert "Zx9w" not in err and "5f0c2d1e9a7b: there is no such key" in err


def test_a_key_that_ended_is_not_rotated(command: Command) -> None:
    revoked, expired = id_of(command.create()), id_of(command.create("--expires", "1h"))
    command("revoke", revoked)
    command.now += 3600
    assert f"{revoked}: this key is revoked; make a new one" in command("rotate", revoked, status=2)[1]
    assert f"{expired}: this key is expired; make a new one" in command("rotate", expired, status=2)[1]


def test_what_somebody_else_changed_meanwhile_is_not_undone(command: Command) -> None:
    id = id_of(command.create())

    class Overtaken(KeyBook):
        def _alone(self) -> AbstractContextManager[AuditLog]:
            KeyBook(self.folder, NOW).revoke(id)
            return super()._alone()

    with pytest.raises(NoSuchKey, match="this key is revoked"):
        Overtaken(command.folder, NOW).rotate(id, mint(id)[1], 0.0)
    assert Overtaken(command.folder, NOW).revoke(id) is False


def test_processes_that_make_the_first_keys_at_once_lose_none(command: Command) -> None:
    whole = [sys.executable, "-m", "headgate", "keys", "create", "--tenant", "acme", "--data", str(command.folder)]
    making = [subprocess.Popen(whole, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) for _ in range(4)]
    made = [process.communicate(timeout=60)[0].strip() for process in making]
    assert {command.identify(key, time.time()).id for key in made} == {key["id"] for key in command.list()}
    assert len(set(made)) == len(command.audit()) == 4


# --- what is kept -----------------------------------------------------------------------------------------------------


def test_no_file_holds_a_key_or_a_hash_that_anybody_could_try_out(command: Command) -> None:
    whole = command.create()
    new = command("rotate", id_of(whole))[0].strip()
    kept = b"".join(file.read_bytes() for file in command.folder.iterdir())
    for text in (whole, new):
        assert text.encode() not in kept and text.split("-", 2)[2].encode() not in kept
        for bare in (text, text.split("-", 2)[2]):
            assert hashlib.sha256(bare.encode()).hexdigest().encode() not in kept
            assert hashlib.sha256(bare.encode()).digest() not in kept


def test_all_that_is_kept_is_for_its_owner_only(command: Command) -> None:
    command.create()
    assert stat.S_IMODE(command.folder.stat().st_mode) == 0o700
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in command.folder.iterdir()}
    assert modes == {FILE: 0o600, PEPPER: 0o600, AUDIT_LOG: 0o600}


def test_every_change_has_a_line_in_the_log_and_no_line_a_secret(command: Command) -> None:
    whole = command.create("--name", "jobs", "--requests-per-minute", "60", "--expires", "30d")
    new = command("rotate", id_of(whole), "--grace", "1h")[0].strip()
    command.now += 1
    command("revoke", id_of(whole))
    created, rotated, revoked = command.audit()
    who = {"id": id_of(whole), "tenant": "acme", "user": created["user"]}
    assert created == who | {
        "at": "2027-01-15T08:00:00Z", "action": "create", "name": "jobs", "requests_per_minute": 60,
        "created_at": "2027-01-15T08:00:00Z", "expires_at": "2027-02-14T08:00:00Z", "default_tier": "default",
    }  # fmt: skip
    assert rotated == who | {
        "at": "2027-01-15T08:00:00Z", "action": "rotate", "old_secret_until": "2027-01-15T09:00:00Z",
    }  # fmt: skip
    assert revoked == who | {"at": "2027-01-15T08:00:01Z", "action": "revoke"}
    text = (command.folder / AUDIT_LOG).read_text()
    assert whole.split("-", 2)[2] not in text and new.split("-", 2)[2] not in text and "digest" not in text


def test_the_user_in_the_log_is_the_systems_whatever_the_environment_says(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOGNAME", "somebody")
    monkeypatch.setenv("USER", "somebody")
    command.create()
    assert command.audit()[0]["user"] != "somebody"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_change_that_cannot_be_logged_is_not_made(command: Command) -> None:
    whole = command.create()
    log = command.folder / AUDIT_LOG
    log.unlink()
    log.symlink_to("/dev/full")
    for arguments in (["create", "--tenant", "acme"], ["revoke", id_of(whole)], ["rotate", id_of(whole)]):
        out, err = command(*arguments, status=1)
        assert (out, err) == ("", f"headgate keys: {log}: the disk is full; nothing was changed\n")
    assert [key["state"] for key in command.list()] == ["valid"] and command.identify(whole)


def test_a_change_that_failed_after_its_line_has_a_second_line(command: Command) -> None:
    id = id_of(command.create())
    (command.folder / PEPPER).unlink()
    out, err = command("create", "--tenant", "acme", status=1)
    assert out == "" and f"{command.folder / PEPPER}: is gone" in err and "Put it back" in err
    assert [line["action"] for line in command.audit()] == ["create", "create", "create failed"]
    assert command.audit()[1]["id"] == command.audit()[2]["id"]
    command("rotate", id, status=1)
    assert len(command.list()) == 1


def test_a_damaged_store_is_a_sentence_and_status_1(command: Command) -> None:
    command.create()
    (command.folder / FILE).write_bytes(b"no database " * 100)
    for arguments in (["list"], ["create", "--tenant", "acme"], ["revoke", "x"]):
        out, err = command(*arguments, status=1)
        assert out == "" and err.startswith(f"headgate keys: {command.folder / FILE}: is damaged")


def test_a_damaged_entry_is_named(command: Command) -> None:
    objects = SqliteObjects(command.folder)
    objects.put(KEYS, "5f0c2d1e9a7b", "{")
    objects.close()
    assert command("list", status=1)[1].endswith("the entry of key 5f0c2d1e9a7b is damaged\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_key_that_could_not_be_shown_is_said_to_be_lost(command: Command) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "headgate", "keys", "create", "--tenant", "a", "--data", str(command.folder)],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    (key,) = command.list()
    assert done.returncode != 0 and f"nobody has it: revoke {key['id']}" in done.stderr


# --- where, and how fast ----------------------------------------------------------------------------------------------


def test_the_folder_is_the_one_that_serve_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "headgate.toml"
    config.write_text(f'data = "{tmp_path / "of-file"}"\nmodel = "wall"\n[tenants.acme]\nrequests_per_minute = 5\n')
    home = {"HOME": str(tmp_path / "home")}
    for arguments, environ, folder in (
        (["--data", str(tmp_path / "flag")], {"HEADGATE_DATA": "/nowhere"}, tmp_path / "flag"),
        (["--config", str(config)], {}, tmp_path / "of-file"),
        ([], {"HEADGATE_CONFIG": str(config), "HEADGATE_PORT": "9000"}, tmp_path / "of-file"),
        ([], {"XDG_DATA_HOME": str(tmp_path / "xdg")}, tmp_path / "xdg" / "headgate"),
        ([], {}, tmp_path / "home/.local/share/headgate"),
    ):
        assert run(["create", "--tenant", "acme", *arguments], home | environ, NOW) == 0
        assert (folder / FILE).is_file()
    capsys.readouterr()


def test_the_default_folder_follows_the_convention() -> None:
    assert default_data_folder({"XDG_DATA_HOME": "/x", "HOME": "/h"}) == "/x/headgate"
    assert default_data_folder({"XDG_DATA_HOME": "relative", "HOME": "/h"}) == "/h/.local/share/headgate"
    assert default_data_folder({"HOME": "/h"}) == "/h/.local/share/headgate"


def test_it_starts_without_torch_and_web_frameworks() -> None:
    heavy = ("torch", "fastapi", "starlette", "uvicorn", "numpy", "pydantic", "orjson", "httpx")
    script = f"import headgate.keys, sys; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("arguments", [["--help"], ["create", "--help"], ["rotate", "--help"]])
def test_help_explains_itself(command: Command, arguments: list[str]) -> None:
    out, _ = command(*arguments)
    assert "usage: headgate keys" in out
    assert ("--tokens-per-minute N" in out) == (arguments[0] == "create")


def test_it_is_a_verb_of_the_command(command: Command) -> None:
    def headgate(*arguments: str) -> str:
        environ = {**os.environ, "HEADGATE_DATA": str(command.folder)}
        whole = [sys.executable, "-m", "headgate", *arguments]
        return subprocess.run(whole, capture_output=True, text=True, timeout=60, env=environ, check=True).stdout

    whole = headgate("keys", "create", "--tenant", "acme").strip()
    assert id_of(whole) in headgate("keys", "list") and "\n  keys " in headgate("--help")
