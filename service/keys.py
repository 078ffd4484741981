"""API keys: what a key may do, how one is made, stored and recognised.

A key reads `hg-ID-SECRET`. The id is public: lists and logs show it. The secret has 256 random bits and is shown once; what is
kept is its HMAC-SHA256 under a secret of this installation, so that a stolen list of keys cannot even be tried out.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

PREFIX = "hg"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")  # of a tenant: it becomes a label of metrics
ANYBODY = "anonymous"  # the tenant of who comes while there are no keys
NO_DIGEST = "0" * 64


@dataclass(frozen=True, slots=True)
class Limits:
    """What a key or a tenant may use at most; None is no limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None  # prompts and answers together
    concurrent_requests: int | None = None


LIMIT_NAMES = tuple(f.name for f in fields(Limits))


@dataclass(frozen=True, slots=True)
class Key:
    """One key. Times are Unix seconds; an empty tuple allows everything."""

    id: str
    tenant: str
    digest: str = field(repr=False)  # of the whole key, hexadecimal
    created_at: float
    name: str = ""  # the operator's note
    admin: bool = False
    expires_at: float | None = None
    revoked_at: float | None = None
    previous_digest: str = field(default=NO_DIGEST, repr=False)  # of the secret before a rotation …
    previous_until: float = 0.0  # … and how long it is still good
    models: tuple[str, ...] = ()
    tiers: tuple[str, ...] = ()
    default_tier: str = "default"
    max_context_tokens: int | None = None
    max_output_tokens: int | None = None
    limits: Limits = field(default_factory=Limits)

    def encode(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, text: str) -> Key:
        data = json.loads(text)
        values = {f.name: data[f.name] for f in fields(cls) if f.name in data}
        values |= {name: tuple(values[name]) for name in ("models", "tiers") if name in values}
        return cls(**{**values, "limits": Limits(**values.get("limits", {}))})

    def is_valid(self, now: float) -> bool:
        """Neither revoked nor expired."""
        return self.revoked_at is None and (self.expires_at is None or now < self.expires_at)

    def may_use_model(self, model: str) -> bool:
        return not self.models or model in self.models

    def may_use_tier(self, tier: str) -> bool:
        return not self.tiers or tier in self.tiers


OPEN = Key(id="", tenant=ANYBODY, digest=NO_DIGEST, created_at=0.0, admin=True)
"""Who comes while there are no keys: anybody on this machine, with all rights."""


def mint(id: str | None = None) -> tuple[str, str]:
    """(id, the whole key), for a new key or for a new secret of an old one."""
    id = id or secrets.token_hex(6)
    return id, f"{PREFIX}-{id}-{secrets.token_urlsafe(32)}"


def id_of(key: str) -> str:
    """The public part of what somebody presents; empty where it does not look like a key."""
    prefix, _, rest = key.partition("-")
    id, _, secret = rest.partition("-")
    return id if prefix == PREFIX and secret else ""


def digest_of(key: str, pepper: bytes) -> str:
    """`pepper`: the secret of this installation."""
    return hmac.digest(pepper, key.encode(), hashlib.sha256).hex()


def is_it(presented: str, key: Key | None, pepper: bytes, now: float) -> bool:
    """Whether `presented` is this key, current or, within its grace, the one before. Takes as long for no key at all."""
    digest = digest_of(presented, pepper)
    current, previous = (key.digest, key.previous_digest) if key is not None else (NO_DIGEST, NO_DIGEST)
    is_current = hmac.compare_digest(digest, current)
    is_previous = hmac.compare_digest(digest, previous)
    return key is not None and (is_current or (is_previous and now < key.previous_until))


def rotated(key: Key, digest: str, grace_seconds: float, now: float) -> Key:
    """The same key with a new secret; the old one is good for a while."""
    return replace(key, digest=digest, previous_digest=key.digest, previous_until=now + grace_seconds)


# --- tenants ----------------------------------------------------------------------------------------------------------


class FaultyTenants(ValueError):
    """The table of tenants cannot be used; a sentence per fault."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__("; ".join(faults))
        self.faults = faults


def read_tenants(table: object) -> dict[str, Limits]:
    """The limits by tenant from `[tenants.NAME]` of a configuration file. Raises FaultyTenants."""
    if not isinstance(table, Mapping):
        raise FaultyTenants(["tenants: must be tables, such as [tenants.acme]"])
    faults: list[str] = []
    tenants = {name: _limits_of(name, values, faults) for name, values in table.items()}
    if faults:
        raise FaultyTenants(faults)
    return tenants


def _limits_of(name: str, values: Any, faults: list[str]) -> Limits:
    if not NAME.fullmatch(name):
        faults.append(f"tenants.{name}: a tenant's name has letters, digits, '.', '_' and '-', at most 64")
    if not isinstance(values, Mapping):
        faults.append(f"tenants.{name}: must be a table with {', '.join(LIMIT_NAMES)}")
        return Limits()
    faults += [f"tenants.{name}.{key}: there is no such limit" for key in values if key not in LIMIT_NAMES]
    known = {key: value for key, value in values.items() if key in LIMIT_NAMES}
    wrong = [key for key, value in known.items() if type(value) is not int or value < 1]
    faults += [f"tenants.{name}.{key}: must be a whole number from 1, not {known[key]!r}" for key in wrong]
    return Limits(**{key: value for key, value in known.items() if key not in wrong})
