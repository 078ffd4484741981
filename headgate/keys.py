"""`headgate keys`: makes, lists, revokes and rotates API keys."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from headgate.key_book import KeyBook, NoSuchKey, iso, public, state
from headgate.settings import DESCRIPTIONS, EXAMPLES, ConfigurationError, Fault, data_folder, read_settings
from scheduler.tiers import default_tiers
from service.keys import NAME, NO_DIGEST, Key, Limits, id_of, mint
from service.store import StoreError

TIERS = {tier.name: tier.name for tier in default_tiers(1.0)}
ALIASES = {"auto": "default", "scale": "default", "fast": "priority"}  # OpenAI's other names
SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
MOST_SECONDS = 100 * 366 * 86400
MOST = 10**12  # of anything that is counted here


class Faulty(Exception):
    """What was said cannot be done; a sentence per fault."""

    def __init__(self, faults: Sequence[str]) -> None:
        super().__init__("; ".join(faults))
        self.faults = faults


def main(arguments: Sequence[str]) -> int:
    return run(arguments, os.environ, time.time())


def run(arguments: Sequence[str], environ: Mapping[str, str], now: float) -> int:
    """The exit status: 2 for what was said wrongly, 1 for what could not be done."""
    given, unknown = parser().parse_known_args(arguments)
    faults = [f"{argument}: there is no such option" for argument in unknown if argument.startswith("-")]
    if unknown and not faults:
        faults.append(f"{unknown[0]}: options begin with --")
    try:
        given.do(given, KeyBook(folder_of(given, environ, faults), now), faults)
    except Faulty as error:
        tell("this cannot be done:", *(f"  {fault}" for fault in error.faults))
        return 2
    except NoSuchKey as error:
        tell(str(error))
        return 2
    except (StoreError, OSError) as error:  # a full disk, a closed pipe
        tell(str(error))
        return 1
    return 0


def folder_of(given: argparse.Namespace, environ: Mapping[str, str], faults: list[str]) -> Path:
    """The same folder that `headgate serve` takes when it is told the same."""
    options = [f"--{name}={value}" for name in ("data", "config") if (value := getattr(given, name)) is not None]
    try:
        folder = data_folder(read_settings("keys", options, environ), environ)
    except ConfigurationError as error:
        faults += error.faults
        return Path()
    if not folder:
        faults.append("--data: say where keys are to be kept, for this user has no home folder")
    return Path(folder)


# --- the verbs --------------------------------------------------------------------------------------------------------


def create(given: argparse.Namespace, book: KeyBook, faults: list[str]) -> None:
    id, whole = mint()
    key = described(given, id, book.now, faults)
    stop_at(faults)
    book.create(key, whole)
    tell(f"made key {id} of tenant {key.tenant} in {book.folder}; this is the only time that it is shown:")
    show(key, whole, given.json)


def list_keys(given: argparse.Namespace, book: KeyBook, faults: list[str]) -> None:
    stop_at(faults)
    keys = book.keys()
    if given.json:
        print(json.dumps([public(key) | {"state": state(key, book.now)} for key in keys], indent=2))
    elif keys:
        print_table(("ID", "TENANT", "NAME", "CREATED", "EXPIRES", "STATE", "LIMITS"), [row(k, book.now) for k in keys])
    else:
        tell(f"there are no keys in {book.folder}")


def revoke(given: argparse.Namespace, book: KeyBook, faults: list[str]) -> None:
    stop_at(faults)
    id = id_of(given.id) or given.id  # the whole key says it as well
    was_valid = book.revoke(id)
    tell(f"key {id} {'is revoked' if was_valid else 'was revoked before'}")


def rotate(given: argparse.Namespace, book: KeyBook, faults: list[str]) -> None:
    grace_seconds = checked(given, "grace", duration, faults)
    stop_at(faults)
    id, whole = mint(id_of(given.id) or given.id)
    key = book.rotate(id, whole, grace_seconds)
    until = f"until {minute(key.previous_until)}" if grace_seconds else "no longer"
    tell(
        f"key {key.id} has a new secret, the old one is good {until}; this is the only time that the new one is shown:"
    )
    show(key, whole, given.json)


def stop_at(faults: Sequence[str]) -> None:
    if faults:
        raise Faulty(faults)


# --- what was said ----------------------------------------------------------------------------------------------------


def described(given: argparse.Namespace, id: str, now: float, faults: list[str]) -> Key:
    """The key that is to be made, but for its digest."""
    number = {name: checked(given, name, whole_number, faults) for name in NUMBERS}
    tiers: tuple[str, ...] = checked(given, "tiers", listed(tier), faults) or ()
    default_tier: str | None = checked(given, "default_tier", tier, faults)
    if default_tier and tiers and default_tier not in tiers:
        faults.append(f"--default-tier: must be one of --tiers {','.join(tiers)}, not {default_tier!r}")
    if given.tenant is None:
        faults.append("--tenant: say whose key it is")
    return Key(
        id=id,
        tenant=checked(given, "tenant", tenant, faults) or "",
        digest=NO_DIGEST,
        created_at=now,
        name=checked(given, "name", note, faults) or "",
        admin=given.admin,
        expires_at=checked(given, "expires", lambda text: moment(text, now), faults),
        models=checked(given, "models", listed(note), faults) or (),
        tiers=tiers,
        default_tier=default_tier or ("default" if "default" in (tiers or TIERS) else tiers[0]),
        max_context_tokens=number["max_context"],
        max_output_tokens=number["max_output"],
        limits=Limits(number["requests_per_minute"], number["tokens_per_minute"], number["concurrent_requests"]),
    )


def checked(given: argparse.Namespace, name: str, parse: Callable[[str], Any], faults: list[str]) -> Any:
    """The value of an option; None where it was not given, or cannot be used."""
    text = getattr(given, name)
    if text is None:
        return None
    try:
        return parse(text)
    except Fault as fault:
        faults.append(f"--{name.replace('_', '-')}: {fault}, not {text!r}")
        return None


def tenant(text: str) -> str:
    if not NAME.fullmatch(text):
        raise Fault("must have letters, digits, '.', '_' and '-', at most 64, and begin with a letter or a digit")
    return text


def note(text: str) -> str:
    if not text.isprintable() or not 0 < len(text) <= 200:
        raise Fault("must be up to 200 visible characters")
    return text


def tier(text: str) -> str:
    if (name := (TIERS | ALIASES).get(text)) is None:
        raise Fault(f"must be one of {', '.join(TIERS)}")
    return name


def listed(parse: Callable[[str], str]) -> Callable[[str], tuple[str, ...]]:
    """Several, with commas between; each once."""
    return lambda text: tuple(dict.fromkeys(parse(part.strip()) for part in text.split(",")))


def whole_number(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,13}", text) or not 1 <= int(text) <= MOST:
        raise Fault(f"must be a whole number from 1 to {MOST}")
    return int(text)


def duration(text: str) -> float:
    match = re.fullmatch(r"([0-9]{1,10})([smhdw])", text)
    seconds = int(match[1]) * SECONDS[match[2]] if match else 0 if text == "0" else None
    if seconds is None or seconds > MOST_SECONDS:
        raise Fault("must be a time such as 90s, 30m, 24h, 30d or 2w, at most a hundred years")
    return float(seconds)


def moment(text: str, now: float) -> float:
    """A time from now, or a date; it counts from midnight, UTC."""
    if re.fullmatch(r"[0-9]+[a-z]?", text):
        expires_at = now + duration(text)
    else:
        try:
            date = datetime.fromisoformat(text)
        except ValueError as error:
            raise Fault("must be a time such as 30d or a date such as 2027-01-31") from error
        expires_at = (date if date.tzinfo is not None else date.replace(tzinfo=UTC)).timestamp()
    if expires_at <= now:
        raise Fault("must lie in the future")
    return expires_at


# --- what is shown ----------------------------------------------------------------------------------------------------


def tell(*lines: str) -> None:
    """Words go where they do not get into KEY=$(headgate keys create …)."""
    print("headgate keys: " + "\n".join(lines), file=sys.stderr)


def show(key: Key, whole: str, as_json: bool) -> None:
    """The key itself, this once."""
    try:
        print(json.dumps({"key": whole} | public(key), indent=2) if as_json else whole, flush=True)
    except OSError as error:
        raise OSError(f"the key could not be shown ({error.strerror}), and nobody has it: revoke {key.id}") from error


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for cells in (head, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())


def row(key: Key, now: float) -> tuple[str, ...]:
    expires = minute(key.expires_at) if key.expires_at is not None else "never"
    return (key.id, key.tenant, key.name or "-", minute(key.created_at), expires, state(key, now), limits_of(key))


def limits_of(key: Key) -> str:
    numbers = (
        (key.limits.requests_per_minute, "{} requests/min"),
        (key.limits.tokens_per_minute, "{} tokens/min"),
        (key.limits.concurrent_requests, "{} at once"),
        (key.max_context_tokens, "context {}"),
        (key.max_output_tokens, "output {}"),
    )
    words = ["admin"] if key.admin else []
    words += [text.format(number) for number, text in numbers if number is not None]
    words += [f"models {','.join(key.models)}"] if key.models else []
    words += [f"tiers {','.join(key.tiers)}"] if key.tiers else []
    words += [f"usually {key.default_tier}"] if key.default_tier != "default" else []
    return "; ".join(words) or "-"


def minute(seconds: float) -> str:
    return iso(seconds)[:16].replace("T", " ") + " UTC"


# --- options ----------------------------------------------------------------------------------------------------------

NUMBERS = {
    "requests_per_minute": "Requests that may begin in a minute.",
    "tokens_per_minute": "Tokens of prompts and answers together.",
    "concurrent_requests": "Requests under way at once.",
    "max_context": "Tokens of a prompt and its answer together.",
    "max_output": "Tokens of an answer.",
}
TEXTS = {
    "tenant": ("NAME", "Whose key it is. Tenants share fairly, and show up in metrics by this name."),
    "name": ("NOTE", "A note for yourself."),
    "expires": ("WHEN", "How long it is good (30d, 12h), or the day on which it no longer is (2027-01-31, UTC)."),
    "models": ("A,B", "The models it may use; all, if not given."),
    "tiers": ("A,B", f"The service tiers it may use, of {', '.join(TIERS)}; all, if not given."),
    "default_tier": ("NAME", "The tier of requests that ask for none."),
}


def parser() -> argparse.ArgumentParser:
    whole = argparse.ArgumentParser(
        prog="headgate keys",
        description=DESCRIPTIONS["keys"],
        epilog=EXAMPLES["keys"],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    verbs = whole.add_subparsers(metavar="VERB", required=True)
    add_create(add_verb(verbs, "create", create, "make a key; it is printed alone on standard output"))
    add_json(add_verb(verbs, "list", list_keys, "show all keys, never their secrets"))
    add_id(add_verb(verbs, "revoke", revoke, "end a key, and what it has under way"))
    changed = add_verb(verbs, "rotate", rotate, "give a key a new secret; it is printed alone on standard output")
    changed.add_argument("--grace", metavar="TIME", default="24h", help="How long the old one is good. Default: 24h.")
    add_id(changed)
    add_json(changed)
    return whole


def add_verb(verbs: Any, name: str, do: Callable[..., None], text: str) -> argparse.ArgumentParser:
    verb: argparse.ArgumentParser = verbs.add_parser(name, help=text, description=text, allow_abbrev=False)
    verb.set_defaults(do=do)
    verb.add_argument("--data", metavar="FOLDER", help="The data folder, as for headgate serve (HEADGATE_DATA).")
    verb.add_argument("--config", metavar="FILE", help="A TOML file that may name it, as for headgate serve.")
    return verb


def add_create(verb: argparse.ArgumentParser) -> None:
    for name, (metavar, text) in TEXTS.items():
        verb.add_argument(f"--{name.replace('_', '-')}", metavar=metavar, help=text)
    for name, text in NUMBERS.items():
        verb.add_argument(f"--{name.replace('_', '-')}", metavar="N", help=text)
    verb.add_argument("--admin", action="store_true", help="It may use the admin routes and read /metrics, too.")
    add_json(verb)


def add_id(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("id", metavar="ID", help="As headgate keys list shows it.")


def add_json(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--json", action="store_true", help="Print JSON.")
