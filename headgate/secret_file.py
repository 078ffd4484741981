"""The secret that gateways and workers on TCP share, in a file. Whoever comes first makes it up."""

from __future__ import annotations

import os
import re
import secrets
from pathlib import Path

from headgate.settings import Settings

SECRET = re.compile(r"[\x21-\x7e]{32,512}")  # it is sent in a header
FORBIDDEN = 0o027  # its group may read it, as in a volume that containers share; nobody else, and nobody may change it


class SecretFault(Exception):
    """The file cannot be used; one sentence."""


def secret_of(settings: Settings, faults: list[str]) -> str:
    """Empty where there is no file, or where it is of no use: then there is one fault more."""
    if not settings.secret_file:
        return ""
    try:
        return read_secret(settings.secret_file)
    except SecretFault as fault:
        faults.append(f"--secret-file {settings.secret_file}: {fault}")
        return ""


def read_secret(path: str) -> str:
    """Raises SecretFault. The text of the file is in no message."""
    file = Path(path)
    try:
        if not file.exists():
            make_secret(file)
        mode, text = file.stat().st_mode, file.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise SecretFault(f"can neither be read nor made: {getattr(error, 'strerror', 'not text')}") from error
    if mode & FORBIDDEN:
        raise SecretFault(f"others than its owner may read or change it (mode {mode & 0o777:o}); chmod 600 it")
    if not SECRET.fullmatch(text):
        raise SecretFault(
            "must hold 32 to 512 visible characters and nothing else; remove it, and a new one is made up"
        )
    return text


def make_secret(file: Path) -> None:
    """Whole or not at all; without effect when somebody else was quicker."""
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = file.with_name(f"{file.name}.{secrets.token_hex(8)}")
    descriptor = os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    try:
        with open(descriptor, "w", encoding="ascii") as writing:
            writing.write(secrets.token_hex(32) + "\n")
        os.link(draft, file)
    except FileExistsError:
        pass
    finally:
        draft.unlink()
