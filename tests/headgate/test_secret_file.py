"""The secret that gateways and workers share: made once, by whoever comes first, and kept from others."""

from __future__ import annotations

import stat
import threading
from pathlib import Path

import pytest

from headgate.secret_file import SecretFault, make_secret, read_secret, secret_of
from headgate.settings import read_settings


def test_a_missing_secret_is_made_for_its_owner_alone(tmp_path: Path) -> None:
    file = tmp_path / "new" / "secret"
    secret = read_secret(str(file))
    assert len(bytes.fromhex(secret)) == 32
    assert stat.S_IMODE(file.stat().st_mode) == 0o600 and stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert read_secret(str(file)) == secret
    assert [path.name for path in file.parent.iterdir()] == ["secret"], "no draft is left"


def test_of_many_that_come_at_once_all_know_the_same_secret(tmp_path: Path) -> None:
    start, told = threading.Barrier(16), []

    def come() -> None:
        start.wait(10)
        told.append(read_secret(str(tmp_path / "secret")))

    threads = [threading.Thread(target=come) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(told) == 16 and len(set(told)) == 1
    assert len(list(tmp_path.iterdir())) == 1


def test_who_comes_late_does_not_replace_it(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    secret = read_secret(str(file))
    make_secret(file)
    assert read_secret(str(file)) == secret


@pytest.mark.parametrize("mode", [0o604, 0o644, 0o620, 0o602, 0o666, 0o601])
def test_a_secret_that_others_can_read_or_change_is_refused(tmp_path: Path, mode: int) -> None:
    file = tmp_path / "secret"
    read_secret(str(file))
    file.chmod(mode)
    with pytest.raises(SecretFault, match=f"mode {mode:o}"):
        read_secret(str(file))


@pytest.mark.parametrize("mode", [0o400, 0o600, 0o440])
def test_a_secret_of_the_owner_or_of_its_group_will_do(tmp_path: Path, mode: int) -> None:
    file = tmp_path / "secret"
    secret = read_secret(str(file))
    file.chmod(mode)
    assert read_secret(str(file)) == secret


@pytest.mark.parametrize("text", ["", "\n", "short", "x" * 31, "two words " * 8, "grüße" * 16, "x" * 513])
def test_a_secret_that_is_none_is_a_fault_that_does_not_repeat_it(tmp_path: Path, text: str) -> None:
    file = tmp_path / "secret"
    file.write_text(text, "utf-8")
    file.chmod(0o600)
    with pytest.raises(SecretFault) as fault:
        read_secret(str(file))
    assert "32 to 512 visible characters" in str(fault.value)
    assert not text.strip() or text.strip() not in str(fault.value)


def test_a_folder_in_its_place_is_a_fault_that_names_the_option(tmp_path: Path) -> None:
    faults: list[str] = []
    settings = read_settings("worker", ["--secret-file", str(tmp_path)], {})
    assert secret_of(settings, faults) == ""
    assert len(faults) == 1 and faults[0].startswith(f"--secret-file {tmp_path}: can neither be read nor made")


def test_without_a_file_there_is_no_secret_and_no_fault() -> None:
    faults: list[str] = []
    assert secret_of(read_settings("worker", [], {}), faults) == "" and faults == []
