"""Who asks: keys in headers, what the keyring learns from the store, and how those who guess are slowed."""

from __future__ import annotations

import asyncio
import logging
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from service import auth, keys
from service.auth import FAILURES, MAX_ADDRESSES, Attempts, Keyring, block_of
from service.errors import ApiError
from service.keys import OPEN, Key, digest_of, mint, rotated
from service.store import FILE, KEYS, PEPPER, MemoryObjects, Objects, SqliteObjects, StoreError, make_secret

PEPPERED = b"a secret of this installation"
HERE = "192.0.2.1"
NOW = 1_800_000_000.0

Change = Callable[..., Key]


class Installation:
    """A store with keys in it, and a keyring that reads them."""

    def __init__(self, objects: Objects) -> None:
        self.objects = objects
        self.now = NOW
        self.keyring = Keyring(
            objects, lambda: PEPPERED if objects.changed_since(KEYS, 0)[0] else None, lambda: self.now
        )

    def make(self, **fields: object) -> tuple[Key, str]:
        """A key, in store and keyring."""
        id, whole = mint()
        key = Key(**{"id": id, "tenant": "acme", "digest": digest_of(whole, PEPPERED), "created_at": NOW, **fields})
        self.put(key)
        return key, whole

    def put(self, key: Key) -> None:
        self.objects.put(KEYS, key.id, key.encode())
        self.keyring.reload()

    def identify(self, presented: str, address: str = HERE) -> Key:
        return self.keyring.identify(bearer(presented), address, self.now)

    def refusal(self, presented: str, address: str = HERE) -> ApiError:
        with pytest.raises(ApiError) as caught:
            self.identify(presented, address)
        return caught.value


def bearer(presented: str) -> list[tuple[bytes, bytes]]:
    return [(b"host", b"localhost"), (b"authorization", b"Bearer " + presented.encode())]


@pytest.fixture
def house() -> Installation:
    return Installation(MemoryObjects())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def on_disk(folder: Path) -> Iterator[SqliteObjects]:
    with closing(SqliteObjects(folder)) as objects:
        yield objects


def stored(objects: SqliteObjects, **fields: object) -> tuple[Key, str]:
    """As `headgate keys create` leaves it."""
    id, whole = mint()
    digest = digest_of(whole, make_secret(objects.file.parent / PEPPER))
    key = Key(**{"id": id, "tenant": "acme", "digest": digest, "created_at": NOW, **fields})
    objects.put(KEYS, id, key.encode())
    return key, whole


# --- who comes in -----------------------------------------------------------------------------------------------------


def test_without_a_folder_it_is_open_for_ever() -> None:
    keyring = Keyring.open("")
    assert keyring.is_open and keyring.reload() == frozenset()
    assert keyring.identify([], HERE, NOW) is OPEN and keyring.identify(bearer("hg-x-y"), HERE, NOW) is OPEN
    assert keyring.current("") is OPEN and keyring.current("somebody") is None


def test_while_no_key_was_made_it_is_open_and_leaves_nothing_behind(folder: Path) -> None:
    assert Keyring.open(str(folder)).is_open
    assert not folder.exists()


def test_a_key_comes_in_by_either_header(house: Installation) -> None:
    key, whole = house.make()
    value = whole.encode()
    for headers in (
        [(b"authorization", b"Bearer " + value)],
        [(b"authorization", b"bearer  " + value + b" ")],
        [(b"api-key", value)],
        [(b"api-key", value), (b"authorization", b"Bearer " + value)],
        [(b"api-key", value), (b"authorization", b"Basic dXNlcjpwYXNz")],  # a proxy's own
    ):
        assert house.keyring.identify(headers, HERE, NOW) == key


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [(b"authorization", b"")],
        [(b"authorization", b"Bearer")],
        [(b"authorization", b"Bearer ")],
        [(b"authorization", b"Basic dXNlcjpwYXNz")],
        [(b"api-key", b" ")],
    ],
)
def test_without_a_key_it_is_said_how_to_send_one(house: Installation, headers: list[tuple[bytes, bytes]]) -> None:
    house.make()
    with pytest.raises(ApiError) as caught:
        house.keyring.identify(headers, HERE, NOW)
    error = caught.value
    assert (error.status, error.code, error.type) == (401, "invalid_api_key", "invalid_request_error")
    assert "wants an API key" in error.message and "Authorization: Bearer YOUR_KEY" in error.message
    assert ("www-authenticate", "Bearer") in error.headers


def test_two_different_keys_are_one_too_many(house: Installation) -> None:
    _, one = house.make()
    _, other = house.make()
    with pytest.raises(ApiError, match="two different API keys") as caught:
        house.keyring.identify([(b"api-key", one.encode()), *bearer(other)], HERE, NOW)
    assert caught.value.status == 401


def test_wrong_and_unknown_keys_are_told_the_same_and_nothing_of_them_is_repeated(house: Installation) -> None:
    key, whole = house.make()
    secret = whole.rpartition("-")[2]
    wrong = [
        f"{keys.PREFIX}-{key.id}-{'x' * 43}",
        f"{keys.PREFIX}-000000000000-{secret}",
        whole[:-1],
        whole + "x",
        secret,
    ]
    says = [house.refusal(presented) for presented in wrong]
    assert {(error.status, error.code, error.message) for error in says} == {
        (401, "invalid_api_key", "This API key is not valid here. " + auth.HOW)
    }
    assert key.id not in says[0].message


@pytest.mark.parametrize(
    "value",
    [
        b"\xff\xfe\x00",
        "schlüssel".encode(),
        b"hg-" + b"x" * 100_000,
        b"-" * 500,
        b"hg--",
        b"hg-a-",
        b"\xc3\x28",
        b"hg-\x00-\x00",
    ],
)
def test_any_bytes_in_a_header_are_a_wrong_key(house: Installation, value: bytes) -> None:
    house.make()
    for headers in ([(b"api-key", value)], [(b"authorization", b"Bearer " + value)]):
        with pytest.raises(ApiError, match="not valid here") as caught:
            house.keyring.identify(headers, HERE, NOW)
        assert caught.value.status == 401


def test_a_revoked_key_is_told_so_only_if_its_secret_was_right(house: Installation) -> None:
    key, whole = house.make(revoked_at=NOW - 1)
    error = house.refusal(whole)
    assert (error.status, error.code) == (401, "invalid_api_key")
    assert error.message == f"The API key {key.id} was revoked. Please ask the operator for a new one."
    assert "revoked" not in house.refusal(f"{keys.PREFIX}-{key.id}-wrong").message


def test_a_key_is_good_until_the_moment_it_expires(house: Installation) -> None:
    key, whole = house.make(expires_at=NOW + 60)
    house.now = NOW + 59.999
    assert house.identify(whole) == key and house.keyring.current(key.id) == key
    house.now = NOW + 60
    error = house.refusal(whole)
    assert (error.status, error.code) == (401, "invalid_api_key")
    assert (
        error.message == f"The API key {key.id} expired on 2027-01-15 08:01 UTC. Please ask the operator for a new one."
    )
    assert "expired" not in house.refusal(f"{keys.PREFIX}-{key.id}-wrong").message
    assert house.keyring.current(key.id) is None


def test_after_a_rotation_the_old_secret_is_good_for_its_grace(house: Installation) -> None:
    key, old = house.make()
    _, new = mint(key.id)
    house.put(rotated(key, digest_of(new, PEPPERED), 3600, NOW))
    assert house.identify(new).id == house.identify(old).id == key.id
    house.now = NOW + 3600
    assert house.identify(new).id == key.id
    assert house.refusal(old).message.startswith("This API key is not valid here.")


def test_once_there_was_a_key_it_is_never_open_again(house: Installation) -> None:
    key, whole = house.make()
    assert not house.keyring.is_open and house.keyring.current("") is None
    house.put(replace(key, revoked_at=NOW))
    assert not house.keyring.is_open
    assert house.refusal(whole).status == 401


# --- time tells nothing -----------------------------------------------------------------------------------------------


def test_known_and_unknown_ids_are_compared_alike_and_in_constant_time(
    house: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, whole = house.make()
    compared: list[int] = []
    real = keys.hmac.compare_digest

    def counted(one: str, other: str) -> bool:
        compared.append(len(other))
        return real(one, other)

    monkeypatch.setattr(keys.hmac, "compare_digest", counted)
    for presented in (whole, f"{keys.PREFIX}-{key.id}-wrong", f"{keys.PREFIX}-unknown-wrong", "no key at all"):
        compared.clear()
        with suppress(ApiError):
            house.identify(presented)
        assert compared == [64, 64]


def test_unknown_ids_take_about_as_long_as_known_ones(house: Installation) -> None:
    key, _ = house.make()

    def seconds(presented: str) -> float:
        started = time.perf_counter()
        for _ in range(20):
            keys.is_it(presented, house.keyring.current(keys.id_of(presented)), PEPPERED, NOW)
        return time.perf_counter() - started

    known, unknown = f"{keys.PREFIX}-{key.id}-{'x' * 43}", f"{keys.PREFIX}-{'0' * 12}-{'x' * 43}"
    pairs = [(seconds(known), seconds(unknown)) for _ in range(300)]
    ratio = statistics.median(one for one, _ in pairs) / statistics.median(other for _, other in pairs)
    assert 0.5 < ratio < 2


# --- who guesses ------------------------------------------------------------------------------------------------------


def fail(house: Installation, times: int, address: str = HERE) -> None:
    for _ in range(times):
        assert house.refusal("hg-guess-guess", address).status == 401


def test_who_guesses_too_often_has_to_wait_exactly_as_long_as_it_is_told(house: Installation) -> None:
    house.make()
    house.now = 1000.0
    fail(house, FAILURES)
    error = house.refusal("hg-guess-guess")
    assert (error.status, error.code, error.type) == (429, "rate_limit_exceeded", "rate_limit_exceeded")
    assert error.headers == (("retry-after", "3"), ("retry-after-ms", "3000"))
    assert error.message == "Too many wrong API keys came from your address. Please retry after 3 s."
    house.now += 2.999
    assert house.refusal("hg-guess-guess").status == 429
    house.now += 0.001
    fail(house, 1)
    assert house.refusal("hg-guess-guess").status == 429
    house.now += 60
    fail(house, FAILURES)


def test_a_right_guess_does_not_count_while_its_address_has_to_wait(house: Installation) -> None:
    _, whole = house.make()
    fail(house, FAILURES)
    assert house.refusal(whole).status == 429
    assert house.identify(whole, "192.0.2.2").tenant == "acme"


def test_keys_that_were_good_from_there_before_go_on_at_full_speed(house: Installation) -> None:
    key, whole = house.make()
    house.identify(whole)
    fail(house, FAILURES)
    for _ in range(100):
        assert house.identify(whole) == key
    assert house.refusal(f"{keys.PREFIX}-{key.id}-guess").status == 429  # its id alone opens nothing


def test_a_known_key_that_was_revoked_meanwhile_does_not_come_in(house: Installation) -> None:
    key, whole = house.make()
    house.identify(whole)
    fail(house, FAILURES)
    house.put(replace(key, revoked_at=NOW))
    assert house.refusal(whole).status == 401


def test_who_sends_no_key_or_an_expired_one_has_not_guessed(house: Installation) -> None:
    _, expired = house.make(expires_at=NOW)
    for _ in range(FAILURES + 5):
        assert house.refusal("").status == house.refusal(expired).status == 401
    fail(house, 1)


def test_a_clock_that_is_put_back_locks_nobody_out(house: Installation) -> None:
    _, whole = house.make()
    fail(house, FAILURES)
    house.now -= 86400
    assert house.refusal(whole).headers[0] == ("retry-after", "3")
    house.now += 3
    assert house.identify(whole).tenant == "acme"


def test_the_addresses_of_one_network_of_64_bits_are_one_guesser(house: Installation) -> None:
    house.make()
    for number in range(FAILURES):
        fail(house, 1, f"2001:db8:1:2::{number:x}")
    assert house.refusal("hg-guess-guess", "2001:db8:1:2:ffff::1").status == 429
    assert house.refusal("hg-guess-guess", "2001:db8:1:3::1").status == 401


@pytest.mark.parametrize(
    ("address", "block"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:db8::1", "2001:db8::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("", ""),
        ("a socket", "a socket"),
    ],
)
def test_an_address_stands_for_whom_it_belongs_to(address: str, block: str) -> None:
    assert block_of(address) == block


def test_what_is_remembered_of_guessers_is_bounded() -> None:
    attempts = Attempts()
    for _ in range(FAILURES):
        attempts.failed("192.0.2.1", NOW)
    for number in range(MAX_ADDRESSES - 1):
        attempts.failed(f"10.0.{number >> 8}.{number & 255}", NOW)
    with pytest.raises(ApiError):
        attempts.check("192.0.2.1", "digest", NOW)
    attempts.failed("192.0.2.2", NOW)
    attempts.check("192.0.2.1", "digest", NOW)  # forgotten
    assert len(attempts._owes_until) == MAX_ADDRESSES


def test_floods_of_guesses_do_not_push_out_who_is_known() -> None:
    attempts = Attempts()
    attempts.succeeded(HERE, "digest")
    for number in range(MAX_ADDRESSES):
        attempts.failed(f"10.0.{number >> 8}.{number & 255}", NOW)
    for _ in range(FAILURES):
        attempts.failed(HERE, NOW)
    attempts.check(HERE, "digest", NOW)


# --- what is new ------------------------------------------------------------------------------------------------------


def test_reload_names_the_keys_that_changed_or_ended(house: Installation) -> None:
    revoked, _ = house.make()
    limited, _ = house.make()
    house.make()
    house.objects.put(KEYS, revoked.id, replace(revoked, revoked_at=NOW).encode())
    house.objects.put(KEYS, limited.id, replace(limited, max_output_tokens=5).encode())
    assert house.keyring.reload() == {revoked.id, limited.id}
    assert house.keyring.reload() == frozenset()
    assert house.keyring.current(revoked.id) is None
    now = house.keyring.current(limited.id)
    assert now is not None and now.max_output_tokens == 5


def test_reload_names_a_key_that_expires_once(house: Installation) -> None:
    key, _ = house.make(expires_at=NOW + 60)
    house.make(expires_at=NOW + 600)
    assert house.keyring.reload() == frozenset()
    house.now = NOW + 60
    assert house.keyring.reload() == {key.id}
    assert house.keyring.reload() == frozenset()


def test_a_key_that_expires_again_after_the_clock_was_put_back_is_named_again(house: Installation) -> None:
    key, whole = house.make(expires_at=NOW + 60)
    for _ in range(2):
        house.now = NOW
        assert house.keyring.reload() == frozenset()
        assert house.identify(whole) == key
        house.now = NOW + 61
        assert house.keyring.reload() == {key.id}


def test_a_damaged_entry_is_not_valid_and_holds_up_nobody(
    house: Installation, caplog: pytest.LogCaptureFixture
) -> None:
    damaged, whole = house.make()
    house.objects.put(KEYS, damaged.id, "{")
    sound, _ = house.make()
    assert house.keyring.current(damaged.id) is None and house.keyring.current(sound.id) == sound
    assert house.refusal(whole).status == 401
    assert f"key {damaged.id}: its entry in the store is damaged" in caplog.text


def test_every_change_is_logged_without_a_secret(house: Installation, caplog: pytest.LogCaptureFixture) -> None:
    house.keyring.reload()
    with caplog.at_level(logging.INFO, "service.auth"):
        key, whole = house.make(expires_at=NOW + 60)
        _, new = mint(key.id)
        house.put(rotated(key, digest_of(new, PEPPERED), 0, NOW))
        house.put(replace(key, digest=digest_of(new, PEPPERED), admin=True))
        house.now = NOW + 60
        house.keyring.reload()
        house.put(replace(key, digest=digest_of(new, PEPPERED), revoked_at=NOW))
    actions = ["made", "rotated", "changed", "expired", "revoked"]
    assert caplog.messages == [f"key {key.id} of tenant acme: {action}" for action in actions]
    assert whole not in caplog.text and key.digest not in caplog.text


def test_a_change_among_ten_thousand_keys_costs_little(on_disk: SqliteObjects) -> None:
    key, whole = stored(on_disk)
    file = on_disk._connection
    assert file is not None
    file.execute("BEGIN")
    for number in range(10_000):
        other = replace(key, id=f"{number:012x}", digest=f"{number:064x}", expires_at=NOW + number)
        file.execute("INSERT INTO objects VALUES (?, ?, ?, ?)", (KEYS, other.id, other.encode(), number + 2))
    file.execute("COMMIT")
    keyring = Keyring.open(str(on_disk.file.parent))
    assert keyring.identify(bearer(whole), HERE, NOW) == key
    seconds = []
    for _ in range(20):
        key = replace(key, max_output_tokens=(key.max_output_tokens or 0) + 1)
        on_disk.put(KEYS, key.id, key.encode())
        started = time.perf_counter()
        assert key.id in keyring.reload()
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 0.002  # reading all of them takes a hundred times as long
    keyring._objects.close()


# --- the store, over time ---------------------------------------------------------------------------------------------


def test_a_folder_whose_store_vanished_lets_nobody_in(folder: Path, on_disk: SqliteObjects) -> None:
    _, whole = stored(on_disk)
    on_disk.close()
    on_disk.file.unlink()
    keyring = Keyring.open(str(folder))
    assert not keyring.is_open
    with pytest.raises(ApiError, match="not valid here"):
        keyring.identify(bearer(whole), HERE, NOW)


def test_keys_without_the_pepper_are_a_sentence(folder: Path, on_disk: SqliteObjects) -> None:
    stored(on_disk)
    (folder / PEPPER).unlink()
    with pytest.raises(StoreError, match=f"the file {PEPPER} is gone, .* Put it back beside {FILE}"):
        Keyring.open(str(folder))


def test_keys_stay_while_the_store_is_away(folder: Path, on_disk: SqliteObjects, tmp_path: Path) -> None:
    key, whole = stored(on_disk)
    keyring = Keyring.open(str(folder))
    folder.rename(tmp_path / "away")
    with pytest.raises(StoreError, match="is gone"):
        keyring.reload()
    assert keyring.identify(bearer(whole), HERE, NOW) == key
    (tmp_path / "away").rename(folder)
    on_disk.put(KEYS, key.id, replace(key, revoked_at=NOW).encode())
    assert keyring.reload() == {key.id}
    keyring._objects.close()


def test_a_restored_store_is_read_anew(folder: Path, on_disk: SqliteObjects, tmp_path: Path) -> None:
    before, _ = stored(on_disk)
    backup = on_disk.file.read_bytes()
    after, _ = stored(on_disk)
    keyring = Keyring.open(str(folder))
    assert keyring.current(after.id) == after
    (tmp_path / "restored").write_bytes(backup)
    (tmp_path / "restored").rename(on_disk.file)
    assert keyring.reload() == {after.id}
    assert keyring.current(before.id) == before and keyring.current(after.id) is None
    assert not keyring.is_open
    keyring._objects.close()


def test_a_restored_store_that_is_damaged_at_first_is_read_anew_later(
    folder: Path, on_disk: SqliteObjects, tmp_path: Path
) -> None:
    stored(on_disk)
    with closing(SqliteObjects(tmp_path)) as other:  # of which there are more changes than were known
        for number in range(5):
            other.put(KEYS, "a", Key("a", "acme", f"{number:064x}", NOW).encode())
    after, _ = stored(on_disk)
    keyring = Keyring.open(str(folder))
    (tmp_path / "damaged").write_bytes(b"no database " * 100)
    (tmp_path / "damaged").rename(on_disk.file)
    with pytest.raises(StoreError, match="is damaged"):
        keyring.reload()
    assert keyring.current(after.id) is not None
    (tmp_path / FILE).rename(on_disk.file)
    keyring.reload()
    assert keyring.current(after.id) is None and keyring.current("") is None
    keyring._objects.close()


def test_a_key_expires_although_the_store_is_away() -> None:
    objects = AwayForAWhile()
    house = Installation(objects)
    house.make(expires_at=NOW + 60)
    house.now, objects.failures_left = NOW + 60, 1
    before = house.keyring._version
    with pytest.raises(StoreError):
        house.keyring.reload()
    assert house.keyring._version > before


def test_an_older_copy_in_the_same_place_is_read_anew() -> None:
    objects = MemoryObjects()
    house = Installation(objects)
    gone, _ = house.make()
    kept, _ = house.make()
    objects.__init__()  # type: ignore[misc]  # as after a restart of what keeps it
    objects.put(KEYS, kept.id, kept.encode())
    assert house.keyring.reload() == {gone.id}
    assert house.keyring.current(kept.id) == kept


# --- watching ---------------------------------------------------------------------------------------------------------


async def noticed(keyring: Keyring, do: Callable[[], object]) -> None:
    """Does it while the keyring watches, and returns when that has called."""
    called = asyncio.Event()
    watching = asyncio.create_task(keyring.watch(called.set))
    do()
    try:
        await asyncio.wait_for(called.wait(), 20)
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "POLL_SECONDS", 0.001)


def test_it_is_looked_often_enough_to_notice_within_a_second() -> None:
    assert auth.POLL_SECONDS <= 0.5


@pytest.mark.usefixtures("at_once")
def test_the_first_key_closes_a_server_that_runs(folder: Path, on_disk: SqliteObjects) -> None:
    keyring = Keyring.open(str(folder))
    assert keyring.is_open
    made = []
    asyncio.run(noticed(keyring, lambda: made.append(stored(on_disk))))
    ((key, whole),) = made
    keyring.reload()
    assert not keyring.is_open and keyring.identify(bearer(whole), HERE, NOW) == key
    keyring._objects.close()


@pytest.mark.usefixtures("at_once")
def test_a_revocation_by_another_process_is_noticed(folder: Path, on_disk: SqliteObjects) -> None:
    key, _ = stored(on_disk)
    keyring = Keyring.open(str(folder))
    revoked = replace(key, revoked_at=NOW).encode()
    asyncio.run(noticed(keyring, lambda: on_disk.put(KEYS, key.id, revoked)))
    assert keyring.current(key.id) is None


@pytest.mark.usefixtures("at_once")
def test_a_key_that_expires_is_noticed(house: Installation) -> None:
    key, _ = house.make(expires_at=NOW + 60)
    asyncio.run(noticed(house.keyring, lambda: setattr(house, "now", NOW + 60)))
    assert house.keyring.current(key.id) is None


@pytest.mark.usefixtures("at_once")
def test_a_listener_that_fails_does_not_end_the_watch(house: Installation, caplog: pytest.LogCaptureFixture) -> None:
    key, _ = house.make()
    called: list[str] = []

    async def two_changes() -> None:
        happened = asyncio.Event()

        def listener() -> None:
            called.append("")
            happened.set()
            raise ValueError("a bug")

        watching = asyncio.create_task(house.keyring.watch(listener))
        for number in (1, 2):
            house.objects.put(KEYS, key.id, replace(key, max_output_tokens=number).encode())
            await asyncio.wait_for(happened.wait(), 20)
            happened.clear()
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)

    asyncio.run(two_changes())
    assert len(called) == 2 and "could not be passed on" in caplog.text


class AwayForAWhile(MemoryObjects):
    """A store that cannot be read a few times."""

    failures_left = 0

    def changed_since(self, kind: str, change: int) -> tuple[int, list[tuple[str, str]]]:
        if self.failures_left:
            self.failures_left -= 1
            raise StoreError("the disk is tired")
        return super().changed_since(kind, change)


@pytest.mark.usefixtures("at_once")
def test_a_store_that_is_away_for_a_while_is_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    objects = AwayForAWhile()
    house = Installation(objects)
    key, whole = house.make()

    def break_and_revoke() -> None:
        objects.put(KEYS, key.id, replace(key, revoked_at=NOW).encode())
        objects.failures_left = 5

    with caplog.at_level(logging.INFO, "service.auth"):
        asyncio.run(noticed(house.keyring, break_and_revoke))
    assert caplog.messages == [
        "keys: the disk is tired; until then the keys stay as they are",
        f"key {key.id} of tenant acme: revoked",
        "keys: the store can be read again",
    ]
    assert house.refusal(whole).status == 401


class Stuck(MemoryObjects):
    """A store that does not answer until it is let."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.let = threading.Event(), threading.Event()

    def changed_since(self, kind: str, change: int) -> tuple[int, list[tuple[str, str]]]:
        self.asked.set()
        self.let.wait(20)
        return super().changed_since(kind, change)


@pytest.mark.usefixtures("at_once")
def test_a_store_that_does_not_answer_holds_up_nothing_else() -> None:
    objects = Stuck()
    keyring = Keyring(objects, lambda: PEPPERED)

    async def go_on_beside_it() -> None:
        watching = asyncio.create_task(keyring.watch(lambda: None))
        assert await asyncio.to_thread(objects.asked.wait, 20)
        assert keyring.identify([], HERE, NOW) is OPEN
        watching.cancel()  # nor the end
        await asyncio.gather(watching, return_exceptions=True)

    asyncio.run(go_on_beside_it())
    assert not objects.let.is_set()
    objects.let.set()
