"""Public keys in the store: where they come from, what replaces them, and the audit entry of every change."""

from __future__ import annotations

from typing import Any

import apsw
import msgspec
import pytest
from nacl.signing import SigningKey

from asapd.core.agent_keys import verifying
from asapd.core.errors import Refusal
from asapd.store.agent_keys import claimed, keys_of
from asapd.store.agents import directory
from asapd.store.units.agents import (
    AgentRecord,
    AgentsChanged,
    ImportAgentKey,
    PutAgent,
    RecordManifest,
    RemoveAgent,
    RetireAgentKey,
    SyncAgents,
    SyncKeys,
)
from asapd.store.units.exchange import AnyUnit, Envelope
from asapd.store.units.unit import Failed
from asapd.store.visibility import EVERYTHING
from asapd.store.writer import Writer
from asapd.wire.keys import jwk_thumbprint, public_base64

A = "urn:asap:agent:a"
SELF = "urn:asap:agent:asapd"
K1, K2, K3 = (bytes(SigningKey(bytes([number]) * 32).verify_key) for number in (1, 2, 3))
OVERLAP_US = 1000


class Store:
    """A writer, each unit at a time of its own."""

    def __init__(self, connection: apsw.Connection) -> None:
        self.connection = connection
        self.writer = Writer(connection)
        self.now_us = 1_800_000_000_000_000

    def run(self, kind: Any, *arguments: Any, **named: Any) -> Any:
        self.now_us += 1
        unit: AnyUnit = kind(*arguments, **named)
        (answer,) = self.writer.run([Envelope(self.now_us, unit, urgent=False)])
        assert not isinstance(answer.result, Failed), answer
        return answer.result

    def put(self, key: bytes | None) -> Any:
        text = None if key is None else public_base64(key)
        record = AgentRecord(A, "http://127.0.0.1:1", "default", text)
        return self.run(PutAgent, record, "key:x", self.now_us + 1, OVERLAP_US)

    def configure(self, *keys: bytes | None) -> Any:
        records = [
            AgentRecord(A, "http://127.0.0.1:1", "default", None if key is None else public_base64(key)) for key in keys
        ]
        return self.run(SyncAgents, records, "asapd", self.now_us + 1, OVERLAP_US)

    def add(self, key: bytes, *, is_bound: bool = False) -> Any:
        return self.run(ImportAgentKey, A, key, "key:x", self.now_us + 1, OVERLAP_US, is_bound)

    def retire(self, key: bytes, overlap_us: int = OVERLAP_US) -> Any:
        return self.run(RetireAgentKey, A, jwk_thumbprint(key), "key:x", self.now_us + 1, overlap_us)

    def manifest(self, key: bytes | None, verification: str = "self_signed") -> None:
        text = None if key is None else public_base64(key)
        self.run(RecordManifest, A, self.now_us + 1, "d", b"{}", verification, None, None, None, text)

    def sync(self, held: bytes | None = None, identity: bytes | None = None) -> Any:
        own = None if identity is None else (SELF, identity)
        return self.run(SyncKeys, [(A, held)] if held else [], own, "asapd", self.now_us + 1, OVERLAP_US)

    def entries(self, agent: str = A) -> set[tuple[bytes, str, str]]:
        return {(key.public_key, key.source, key.state) for key in keys_of(self.connection, agent)}

    def overlap_us(self, key: bytes, source: str) -> int:
        (found,) = [one for one in keys_of(self.connection, A) if (one.public_key, one.source) == (key, source)]
        assert found.until_us is not None
        assert found.retired_us is not None
        return found.until_us - found.retired_us

    def log(self) -> list[tuple[str, str, str | None]]:
        """The audit entries of keys: event, who, and which key."""
        rows = self.connection.execute(
            "SELECT event_type, actor, details FROM audit WHERE event_type LIKE 'agent.key%' ORDER BY seq"
        ).fetchall()
        names = {jwk_thumbprint(K1): "K1", jwk_thumbprint(K2): "K2", jwk_thumbprint(K3): "K3"}
        return [
            (event.removeprefix("agent.key_"), actor, names[msgspec.json.decode(d)["kid"]]) for event, actor, d in rows
        ]


@pytest.fixture
def store(connection: apsw.Connection) -> Store:
    return Store(connection)


# --- manifests


def test_the_first_key_is_taken_and_another_is_only_claimed(store: Store) -> None:
    store.configure(None)
    store.manifest(K1)
    assert store.entries() == {(K1, "manifest", "active")}
    store.manifest(K1)
    store.manifest(K2, "key_changed")
    store.manifest(K2, "key_changed")
    assert store.entries() == {(K1, "manifest", "active"), (K2, "manifest", "claimed")}
    assert [key.public_key for key in claimed(store.connection)] == [K2]
    assert store.log() == [("added", "asapd", "K1"), ("claimed", "asapd", "K2")]


def test_the_store_takes_no_second_key_whatever_the_manifest_was_held_for(store: Store) -> None:
    store.configure(None)
    store.manifest(K1)
    store.manifest(K2, "self_signed")
    assert store.entries() == {(K1, "manifest", "active"), (K2, "manifest", "claimed")}


@pytest.mark.parametrize("verification", ["unsigned", "bad_signature"])
def test_a_manifest_without_a_sound_signature_gives_no_key(store: Store, verification: str) -> None:
    store.configure(None)
    store.manifest(K1, verification)
    store.manifest(None, "self_signed")
    assert store.entries() == set()


def test_a_claim_is_withdrawn_by_the_known_key_and_by_another_claim(store: Store) -> None:
    store.configure(None)
    for key in (K1, K2, K3, K1, K3):
        store.manifest(key)
    assert store.entries() == {
        (K1, "manifest", "active"),
        (K2, "manifest", "retired"),
        (K3, "former", "retired"),
        (K3, "manifest", "claimed"),
    }
    assert [event for event in store.log() if event[2] != "K1"] == [
        ("claimed", "asapd", "K2"),
        ("claimed", "asapd", "K3"),
        ("withdrawn", "asapd", "K2"),
        ("withdrawn", "asapd", "K3"),
        ("claimed", "asapd", "K3"),
    ]


def test_a_pinned_agent_that_signs_with_another_key_claims_it(store: Store) -> None:
    store.configure(K1)
    store.manifest(K1, "verified")
    store.manifest(K2, "wrong_key")
    assert store.entries() == {
        (K1, "configuration", "active"),
        (K1, "manifest", "active"),
        (K2, "manifest", "claimed"),
    }
    store.configure(K2)
    assert (K2, "manifest", "active") in store.entries()
    assert claimed(store.connection) == []


def test_an_agent_that_leaves_and_comes_back_has_a_first_key_again(store: Store) -> None:
    store.put(None)
    store.manifest(K1)
    store.manifest(K2)
    store.run(RemoveAgent, A, "key:x", store.now_us + 1)
    assert store.entries() == set()
    store.put(None)
    store.manifest(K2)
    assert store.entries() == {(K2, "manifest", "active")}
    assert ("retired", "key:x", "K1") in store.log()


def test_a_key_that_was_retired_does_not_come_back_with_its_agent(store: Store) -> None:
    """Whoever has a leaked key might have it taken by a new start of the agent that removes and adds it."""
    store.put(K1)
    store.put(K2)
    store.run(RemoveAgent, A, "key:x", store.now_us + 1)
    assert store.entries() == {(K1, "former", "retired")}
    assert store.put(K1).code == "invalid"
    store.put(None)
    store.manifest(K1)
    assert store.entries() == {(K1, "former", "retired"), (K1, "manifest", "claimed")}
    store.add(K1)
    assert {(K1, "import", "active"), (K1, "manifest", "active")} < store.entries()


def test_a_key_in_force_comes_back_with_its_agent(store: Store) -> None:
    store.put(K1)
    store.run(RemoveAgent, A, "key:x", store.now_us + 1)
    assert isinstance(store.put(K1), AgentsChanged)
    assert store.entries() == {(K1, "api", "active")}


# --- keys of operators


def test_an_import_takes_the_place_of_what_manifests_said(store: Store) -> None:
    store.configure(None)
    store.manifest(K1)
    store.manifest(K2)
    assert store.add(K2) == AgentsChanged(changed=[A])
    assert store.add(K2) == AgentsChanged()
    assert store.entries() == {(K1, "manifest", "retired"), (K2, "manifest", "active"), (K2, "import", "active")}
    assert store.overlap_us(K1, "manifest") == OVERLAP_US
    assert claimed(store.connection) == []
    assert store.log()[-2:] == [("added", "key:x", "K2"), ("retired", "key:x", "K1")]


def test_an_import_outlives_the_directory_and_stands_beside_others(store: Store) -> None:
    store.add(K1)
    store.add(K2)
    store.put(K3)
    store.run(RemoveAgent, A, "key:x", store.now_us + 1)
    assert store.entries() == {(K1, "import", "active"), (K2, "import", "active")}


def test_an_import_by_a_tenant_goes_with_the_agent_and_makes_it_nobody_elses(store: Store) -> None:
    store.put(K1)
    store.add(K2, is_bound=True)
    assert store.add(K2, is_bound=True) == AgentsChanged()
    assert store.entries() == {(K1, "api", "active"), (K2, "tenant", "active")}
    store.run(RemoveAgent, A, "key:x", store.now_us + 1)
    assert store.entries() == set()
    record = AgentRecord(A, "http://127.0.0.1:1", "default", None)
    assert isinstance(store.run(PutAgent, record, "key:x", store.now_us + 1, OVERLAP_US, is_bound=True), AgentsChanged)


def test_where_the_configuration_or_keys_dir_decides_nothing_is_imported_or_retired(store: Store) -> None:
    store.configure(K1)
    for outcome in (store.add(K2), store.retire(K1)):
        assert isinstance(outcome, Refusal)
        assert (outcome.code, "the configuration file pins" in outcome.detail) == ("key_fixed", True)
    store.configure()
    store.sync(held=K1)
    outcome = store.add(K2)
    assert (outcome.code, "keys_dir" in outcome.detail) == ("key_fixed", True)
    assert store.entries() == {(K1, "held", "active")}


# --- rotation


def test_a_configured_key_that_is_replaced_keeps_its_overlap_and_one_that_is_taken_away_does_not(store: Store) -> None:
    store.configure(K1)
    store.configure(K1)
    store.configure(K2)
    assert store.entries() == {(K1, "configuration", "retired"), (K2, "configuration", "active")}
    assert store.overlap_us(K1, "configuration") == OVERLAP_US
    store.configure(None)
    assert store.overlap_us(K2, "configuration") == 0
    assert store.log() == [
        ("added", "asapd", "K1"),
        ("retired", "asapd", "K1"),
        ("added", "asapd", "K2"),
        ("retired", "asapd", "K2"),
    ]


def test_the_configuration_takes_an_agent_over_with_its_keys(store: Store) -> None:
    store.put(K1)
    store.configure(K2)
    assert store.entries() == {(K1, "api", "retired"), (K2, "configuration", "active")}
    assert store.overlap_us(K1, "api") == 0


def test_a_key_of_the_api_is_replaced_with_overlap_and_retired_with_its_pin(store: Store) -> None:
    store.put(K1)
    store.put(K2)
    assert store.overlap_us(K1, "api") == OVERLAP_US
    assert store.retire(K2, 5) == AgentsChanged(changed=[A])
    (agent,) = directory(store.connection, EVERYTHING, A)
    assert agent.public_key is None
    assert store.overlap_us(K2, "api") == 5


def test_a_text_that_is_no_key_is_none(store: Store) -> None:
    record = AgentRecord(A, "http://127.0.0.1:1", "default", "nonsense")
    store.run(PutAgent, record, "key:x", store.now_us + 1)
    assert store.entries() == set()


def test_an_overlap_can_be_ended_earlier_and_not_later(store: Store) -> None:
    store.configure(K1)
    store.configure(K2)
    assert store.retire(K1, 5000) == AgentsChanged()
    assert store.overlap_us(K1, "configuration") == OVERLAP_US
    assert store.retire(K1, 0) == AgentsChanged(changed=[A])
    assert store.overlap_us(K1, "configuration") <= 3
    assert store.retire(K1, 0) == AgentsChanged()


def test_a_claim_is_dismissed_without_overlap_and_made_again_when_it_comes_back(store: Store) -> None:
    store.configure(None)
    store.manifest(K1)
    store.manifest(K2)
    store.retire(K2)
    assert store.overlap_us(K2, "manifest") == 0
    assert claimed(store.connection) == []
    store.manifest(K2)
    assert [key.public_key for key in claimed(store.connection)] == [K2]


def test_a_key_that_an_operator_retired_is_not_taken_from_a_manifest_again(store: Store) -> None:
    store.configure(None)
    store.manifest(K1)
    store.retire(K1, 0)
    store.manifest(K1)
    assert store.entries() == {(K1, "former", "retired"), (K1, "manifest", "claimed")}
    store.manifest(K2)
    assert (K2, "manifest", "claimed") in store.entries()


def test_a_retired_key_that_a_manifest_claims_does_not_come_back_by_adding_its_agent_again(store: Store) -> None:
    store.put(None)
    store.manifest(K1)
    store.retire(K1, 0)
    store.manifest(K1)
    assert store.put(K1).code == "invalid"
    store.run(RemoveAgent, A, "key:x", store.now_us + 1)
    store.put(None)
    store.manifest(K1)
    assert still_verifies(store) == set()
    assert store.put(K1).code == "invalid"
    store.add(K1)
    assert still_verifies(store) == {K1}


def test_a_key_that_is_not_there_cannot_be_retired(store: Store) -> None:
    assert store.retire(K1).code == "key_not_found"


def test_entries_and_the_daemons_own_are_kept_as_public_keys(store: Store) -> None:
    assert store.sync(held=K1, identity=K3) == AgentsChanged(changed=[A])
    assert store.sync(held=K1, identity=K3) == AgentsChanged()
    assert store.sync(held=K2, identity=K1) == AgentsChanged(changed=[A])
    assert store.entries() == {(K1, "held", "retired"), (K2, "held", "active")}
    assert store.overlap_us(K1, "held") == OVERLAP_US
    assert store.entries(SELF) == {(K3, "identity", "retired"), (K1, "identity", "active")}
    store.sync()
    assert store.overlap_us(K2, "held") == 0
    (agent,) = [store.put(None), directory(store.connection, EVERYTHING, A)][1]
    assert agent.keys == ()


def test_what_an_older_version_knew_is_taken_over_once(store: Store) -> None:
    store.put(K1)
    store.manifest(K2, "wrong_key")
    store.connection.execute("DELETE FROM agent_key")
    store.sync()
    assert store.entries() == {(K1, "api", "active")}
    store.put(None)
    store.manifest(K2)
    store.connection.execute("DELETE FROM agent_key")
    store.sync()
    store.sync()
    assert store.entries() == {(K2, "manifest", "active")}


def still_verifies(store: Store) -> set[bytes]:
    """The keys that verify new tokens once every overlap is over."""
    later_us = store.now_us + 10**9
    rows = keys_of(store.connection, A)
    return set(verifying(rows, issued_at_us=later_us, now_us=later_us, believe_manifests=True))


def test_a_manifest_does_not_bring_back_a_key_within_its_overlap(connection: apsw.Connection) -> None:
    store = Store(connection)
    store.put(None)
    store.add(K1)
    store.retire(K1)
    store.manifest(K1, "verified")
    assert still_verifies(store) == set()


@pytest.mark.parametrize("give", [Store.put, Store.configure])
def test_a_key_that_is_replaced_is_so_too_where_a_manifest_had_shown_it(connection: apsw.Connection, give: Any) -> None:
    store = Store(connection)
    give(store, K1)
    store.manifest(K1, "verified")
    give(store, K2)
    assert still_verifies(store) == {K2}
    if give is Store.put:
        store.retire(K2, 0)
    else:
        give(store, None)
    assert still_verifies(store) == set()


@pytest.mark.parametrize("give", [Store.put, Store.configure])
def test_a_key_that_is_taken_away_is_so_too_where_a_manifest_had_shown_it(
    connection: apsw.Connection, give: Any
) -> None:
    store = Store(connection)
    give(store, K1)
    store.manifest(K1, "verified")
    give(store, None)
    assert still_verifies(store) == set()
    store.manifest(K1)
    assert still_verifies(store) == set()


def test_a_key_that_another_source_has_as_well_is_not_taken_away(store: Store) -> None:
    store.put(K1)
    store.manifest(K1, "verified")
    store.configure(K1)
    assert store.entries() == {
        (K1, "api", "retired"),
        (K1, "configuration", "active"),
        (K1, "manifest", "active"),
    }


def test_an_agent_that_is_given_to_another_tenant_leaves_its_keys_behind(store: Store) -> None:
    store.put(None)
    store.manifest(K1)
    store.add(K2, is_bound=True)
    store.add(K3)
    record = AgentRecord(A, "http://127.0.0.1:1", "acme", None)
    store.run(PutAgent, record, "key:x", store.now_us + 1, OVERLAP_US)
    assert still_verifies(store) == {K3}
    assert (K2, "tenant", "active") not in store.entries()


def test_a_start_does_not_take_what_an_agent_showed_under_its_former_tenant(store: Store) -> None:
    store.put(None)
    store.manifest(K1)
    record = AgentRecord(A, "http://127.0.0.1:1", "acme", None)
    store.run(PutAgent, record, "key:x", store.now_us + 1, OVERLAP_US)
    store.sync()
    assert still_verifies(store) == set()


def test_a_key_that_a_tenant_replaced_has_no_overlap_with_the_next_tenant(store: Store) -> None:
    store.put(K1)
    store.put(K2)
    record = AgentRecord(A, "http://127.0.0.1:1", "acme", public_base64(K3))
    store.run(PutAgent, record, "key:x", store.now_us + 1, OVERLAP_US)
    rows = keys_of(store.connection, A)
    assert verifying(rows, issued_at_us=0, now_us=store.now_us, believe_manifests=True) == {K3}
