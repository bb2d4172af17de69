"""API keys: names are unique among those in use, revoking is final and may be repeated."""

from __future__ import annotations

from typing import Any

import apsw
import pytest
from msgspec.structs import replace

from asapd.core.errors import Refusal
from asapd.core.row_digest import row_digest
from asapd.store import audit, keys
from asapd.store.units.exchange import AnyUnit, Envelope
from asapd.store.units.house import ApiKey, CreateKey, RevokeKey
from asapd.store.writer import Writer

NOW_US = 1_795_169_203_000_000
KEY = ApiKey("key_1", "ci", "ingest", ["urn:asap:agent:a", "x.*"], "tenant", True, b"\x00digest", NOW_US)


class Store:
    def __init__(self, connection: apsw.Connection) -> None:
        self.connection = connection
        self.writer = Writer(connection)

    def submit(self, unit: AnyUnit) -> Any:
        return self.writer.run([Envelope(1, unit, True)])[0].result

    def create(self, **changes: Any) -> Any:
        return self.submit(CreateKey(replace(KEY, **changes), "uid:0", NOW_US))

    def revoke(self, name: str, now_us: int = NOW_US) -> Any:
        return self.submit(RevokeKey(name, "uid:0", now_us))


@pytest.fixture
def store(connection: apsw.Connection) -> Store:
    return Store(connection)


def test_a_key_is_kept_as_it_was_made(store: Store) -> None:
    assert store.create() == KEY
    assert keys.list_keys(store.connection) == [KEY]


def test_a_name_in_use_is_refused_and_free_after_revoking(store: Store) -> None:
    store.create()
    refusal = store.create(id="key_2")
    assert isinstance(refusal, Refusal)
    assert refusal.code == "key_name_taken"
    store.revoke("key_1")
    assert store.create(id="key_2") == replace(KEY, id="key_2")


def test_revoking_twice_answers_the_first_time(store: Store) -> None:
    store.create()
    revoked = replace(KEY, revoked_us=NOW_US + 1)
    assert store.revoke("key_1", NOW_US + 1) == revoked
    assert store.revoke("ci", NOW_US + 2) == revoked
    assert keys.list_keys(store.connection) == [revoked]
    entries = audit.list_entries(store.connection, audit.AuditFilter(), 9, 0, descending=False)
    assert [entry["event_type"] for entry in entries] == ["key.created", "key.revoked"]


def test_a_name_means_the_key_in_use_before_a_revoked_one(store: Store) -> None:
    store.create()
    store.revoke("ci")
    store.create(id="key_2")
    assert store.revoke("ci").id == "key_2"


def test_an_unknown_key_is_refused(store: Store) -> None:
    refusal = store.revoke("none")
    assert isinstance(refusal, Refusal)
    assert refusal.code == "key_not_found"


def test_no_secret_and_no_digest_reaches_the_log(store: Store) -> None:
    store.create()
    entry = audit.get_entry(store.connection, "1")
    assert entry is not None
    assert entry["details"].keys() == {"agents", "id", "name", "role", "row_digest", "tenant"}
    assert entry["details"]["row_digest"] == row_digest((KEY.digest, 1))
    assert KEY.digest.hex() not in str(entry)
