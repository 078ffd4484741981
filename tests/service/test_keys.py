"""Keys as values: made, stored, recognised, rotated."""

from __future__ import annotations

import json
import re

import pytest

from service.keys import (
    NO_DIGEST,
    OPEN,
    FaultyTenants,
    Key,
    Limits,
    digest_of,
    id_of,
    is_it,
    mint,
    read_tenants,
    rotated,
)

PEPPER = b"a secret of this installation"
KEY = Key(
    id="5f0c2d1e9a7b",
    tenant="acme",
    digest="1" * 64,
    created_at=1.5,
    name="a note",
    admin=True,
    expires_at=7.0,
    models=("a", "b"),
    tiers=("flex",),
    default_tier="flex",
    max_context_tokens=5,
    max_output_tokens=6,
    limits=Limits(1, 2, 3),
)


def test_a_key_shows_its_id_and_has_a_secret_of_256_bits() -> None:
    id, whole = mint()
    assert re.fullmatch(rf"hg-{id}-[A-Za-z0-9_-]{{43}}", whole)
    assert id_of(whole) == id and re.fullmatch("[0-9a-f]{12}", id)


def test_no_two_keys_are_alike() -> None:
    made = [mint() for _ in range(10_000)]
    assert len({id for id, _ in made}) == len({whole.split("-", 2)[2] for _, whole in made}) == 10_000


def test_a_new_secret_has_the_old_id() -> None:
    id, whole = mint()
    again, other = mint(id)
    assert again == id and other != whole and id_of(other) == id


@pytest.mark.parametrize("text", ["", "hg", "hg-", "hg-a", "hg-a-", "sk-a-b", "Bearer", "-a-b", "🌊"])
def test_what_is_no_key_has_no_id(text: str) -> None:
    assert id_of(text) == ""


def test_a_stored_key_comes_back_as_it_was() -> None:
    assert Key.decode(KEY.encode()) == KEY


def test_a_key_stored_by_an_older_or_newer_version_can_be_read() -> None:
    data = json.loads(KEY.encode())
    del data["max_output_tokens"], data["limits"]["concurrent_requests"]
    key = Key.decode(json.dumps(data | {"colour": "blue"}))
    assert key.max_output_tokens is None and key.limits == Limits(1, 2)


def test_a_limit_that_is_not_known_here_makes_a_key_unreadable_rather_than_unlimited() -> None:
    data = json.loads(KEY.encode())
    data["limits"]["euros_per_day"] = 1
    with pytest.raises(TypeError, match="euros_per_day"):
        Key.decode(json.dumps(data))


def test_digests_are_not_shown_by_accident() -> None:
    assert KEY.digest not in f"{KEY} {KEY!r}"


def test_the_digest_depends_on_the_installation() -> None:
    _, whole = mint()
    assert digest_of(whole, PEPPER) != digest_of(whole, b"another") != whole
    assert re.fullmatch("[0-9a-f]{64}", digest_of(whole, PEPPER))


def test_only_the_whole_key_is_it() -> None:
    id, whole = mint()
    key = Key(id, "acme", digest_of(whole, PEPPER), 0.0)
    assert is_it(whole, key, PEPPER, 0.0)
    for other in ("", whole[:-1], whole + "x", whole.upper(), mint(id)[1]):
        assert not is_it(other, key, PEPPER, 0.0)
    assert not is_it(whole, key, b"another", 0.0)
    assert not is_it(whole, None, PEPPER, 0.0)


def test_the_old_secret_is_good_until_its_grace_ends_and_only_the_last_one() -> None:
    (id, first), secrets = mint(), []
    key = Key(id, "acme", digest_of(first, PEPPER), 0.0)
    for _ in range(2):
        secrets.append(mint(id)[1])
        key = rotated(key, digest_of(secrets[-1], PEPPER), 10.0, now=100.0)
    assert is_it(secrets[1], key, PEPPER, 1e9)
    assert is_it(secrets[0], key, PEPPER, 109.9) and not is_it(secrets[0], key, PEPPER, 110.0)
    assert not is_it(first, key, PEPPER, 100.0)


def test_a_rotation_without_grace_ends_the_old_secret_at_once() -> None:
    id, whole = mint()
    key = rotated(Key(id, "acme", digest_of(whole, PEPPER), 0.0), "2" * 64, 0.0, now=100.0)
    assert not is_it(whole, key, PEPPER, 100.0)


def test_a_key_that_was_never_rotated_has_no_old_secret() -> None:
    assert KEY.previous_digest == NO_DIGEST and KEY.previous_until == 0.0


def test_a_key_is_valid_until_it_expires_or_is_revoked() -> None:
    assert KEY.is_valid(6.999) and not KEY.is_valid(7.0)
    assert not Key("a", "acme", "", 0.0, revoked_at=5.0).is_valid(0.0)
    assert Key("a", "acme", "", 0.0).is_valid(1e12)


def test_nothing_listed_means_everything() -> None:
    assert KEY.may_use_model("a") and not KEY.may_use_model("c")
    assert KEY.may_use_tier("flex") and not KEY.may_use_tier("default")
    assert OPEN.may_use_model("c") and OPEN.may_use_tier("priority") and OPEN.admin


def test_the_limits_of_tenants_are_read() -> None:
    table = {"acme": {"requests_per_minute": 60}, "initech": {"tokens_per_minute": 7, "concurrent_requests": 2}}
    assert read_tenants(table) == {"acme": Limits(60), "initech": Limits(None, 7, 2)}


def test_all_faults_of_tenants_are_told_at_once() -> None:
    table = {"a b": {}, "acme": {"requests_per_minute": 0, "euros": 1, "tokens_per_minute": True}, "b": 5}
    with pytest.raises(FaultyTenants) as caught:
        read_tenants(table)
    assert caught.value.faults == [
        "tenants.a b: a tenant's name has letters, digits, '.', '_' and '-', at most 64",
        "tenants.acme.euros: there is no such limit",
        "tenants.acme.requests_per_minute: must be a whole number from 1, not 0",
        "tenants.acme.tokens_per_minute: must be a whole number from 1, not True",
        "tenants.b: must be a table with requests_per_minute, tokens_per_minute, concurrent_requests",
    ]
    with pytest.raises(FaultyTenants, match="must be tables"):
        read_tenants([])
