"""What the house decided is held to the log: each column of each table, what is gone, and what was put in."""

from __future__ import annotations

from typing import Literal

import apsw
import pytest
from nacl.signing import SigningKey

from asapd.core.usage import Cost, UsageEvent
from asapd.store import agent_history
from asapd.store.former import last_held
from asapd.store.reconciling import reconcile
from asapd.store.units.agents import (
    AgentRecord,
    ChangeAgentState,
    ImportAgentKey,
    PutAgent,
    RecordManifest,
    RecordProbe,
    RemoveAgent,
    RetireAgentKey,
    SyncAgents,
    SyncKeys,
)
from asapd.store.units.alerts import AckBreach, AddSilence, BreachRow, RemoveSilence, Silence, WriteBreach
from asapd.store.units.audit import KeepArchive, RetireAudit
from asapd.store.units.delegations import ImportRevocations, Revocation
from asapd.store.units.house import ApiKey, CreateKey, Note, RevokeKey, Sweep
from asapd.store.units.promises import (
    DeclareMaintenance,
    EndMaintenance,
    PromiseRecord,
    RecordBlind,
    RecordPromises,
    UndoJump,
)
from asapd.store.units.usage import RecordUsage, RetireUsage
from asapd.store.visibility import Visibility
from asapd.wire.keys import jwk_thumbprint, public_base64
from tests.store.ledger_desk import CHILD, HOUR_US, NOW_US, ROOT, A, B, C, D, Ledger

KEYS = [bytes(SigningKey(bytes([number]) * 32).verify_key) for number in range(1, 7)]
KEY_THEN = public_base64(KEYS[1])
BREACH = BreachRow("brc_1", A, "latency", 60_000_000, "1", 1.0, "2", 2.0, "warning", "open", NOW_US, 20, "default")


def findings(connection: apsw.Connection) -> list[str]:
    return [finding for tally in reconcile(connection) for finding in tally.named]


def altered(connection: apsw.Connection, *statements: str) -> list[str]:
    """What is found while the file is another, whose guards somebody took away."""
    connection.execute("PRAGMA foreign_keys = OFF; SAVEPOINT altering")
    try:
        for (name,) in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'trigger'").fetchall():
            connection.execute(f"DROP TRIGGER {name}")
        for statement in statements:
            connection.execute(statement)
        return findings(connection)
    finally:
        connection.execute("ROLLBACK TO altering; RELEASE altering")


@pytest.fixture
def house(connection: apsw.Connection) -> Ledger:
    ledger = Ledger(connection)
    ledger.register(ROOT, CHILD)
    ledger.now_us += 1
    ledger.revoke("child")
    submit = ledger.submit
    for name, tenant in (("k1", None), ("k2", "t")):
        submit(CreateKey(ApiKey(name, name, "reader", ["*"], tenant, False, b"d" * 32, NOW_US), "asapd", NOW_US))
    submit(RevokeKey("k2", "key:k1", NOW_US + 1))
    submit(SyncKeys([(D, KEYS[0])], (B, KEYS[1]), "asapd", NOW_US, 0))
    submit(SyncKeys([(D, KEYS[2])], (B, KEYS[1]), "asapd", NOW_US + 1, 5))
    submit(SyncAgents([AgentRecord(D, "http://d", "default", None, "gold", {"availability": "99%"})], "asapd", NOW_US))
    submit(PutAgent(AgentRecord(A, "http://u:secret@a", "default", public_base64(KEYS[3])), "key:k1", NOW_US))
    submit(PutAgent(AgentRecord(A, "http://a", "t", public_base64(KEYS[3])), "key:k1", NOW_US + 1))
    submit(PutAgent(AgentRecord(C, "http://c", "default"), "key:k1", NOW_US))
    submit(ImportAgentKey(C, KEYS[4], "key:k1", NOW_US, 0, is_bound=True))
    submit(RetireAgentKey(C, jwk_thumbprint(KEYS[4]), "key:k1", NOW_US + 2, 9))
    submit(
        RecordManifest(C, NOW_US, "d1", b"{}", "self_signed", {"availability": 99}, None, 60, public_base64(KEYS[5]))
    )
    submit(RecordManifest(C, NOW_US + 1, "d2", b"{ }", "unsigned", None, "no block", None, None))
    submit(RecordProbe(A, NOW_US + 3, True, "healthy", 5, None, None, 9, "healthy", NOW_US, 1, 0, "unknown"))
    submit(ChangeAgentState(A, "pause", "key:k1", NOW_US + 4, "password in http://u:secret@a"))
    promises = [
        PromiseRecord(A, "default", NOW_US, None, None),
        PromiseRecord(A, "default", NOW_US, "config", {"availability": "99%"}),
        PromiseRecord(C, "default", NOW_US, "manifest", {"availability": 99}, "d1", "odd"),
    ]
    submit(RecordPromises(promises))
    for _ in range(2):
        made = submit(
            DeclareMaintenance(A, NOW_US, NOW_US + HOUR_US, "sk-abcdefghijklmnopqrstuvwxyz", "key:k1", NOW_US)
        )
    submit(EndMaintenance(made.id, "key:k2", NOW_US + 9))
    for ends_us in (NOW_US + 5, NOW_US + HOUR_US):
        silence = Silence("", A, "latency", None, None, 0, ends_us, "me", "why")
        quiet = submit(AddSilence(silence, "key:k1", NOW_US, 0))
    submit(RemoveSilence(quiet.id, "key:k1", NOW_US + 6))
    submit(WriteBreach("opened", BREACH, NOW_US))
    submit(AckBreach("brc_1", "seen", "key:k1", NOW_US + 1))
    submit(RecordBlind(NOW_US, NOW_US + 5, "stopped"))
    submit(RecordBlind(NOW_US, NOW_US + 7, "stopped"))
    submit(RecordBlind(NOW_US + 20, NOW_US + 30, "clock_set"))
    submit(RecordBlind(NOW_US + 40, NOW_US + 50, "stopped"))
    submit(UndoJump(NOW_US + 20, NOW_US + 40, NOW_US + 25))
    return ledger


def test_untouched_all_of_it_agrees(house: Ledger) -> None:
    assert findings(house.connection) == []
    tallies = {tally.table: tally for tally in reconcile(house.connection)}
    counts = {table: tallies[table].rows for table in ("api_key", "agent", "agent_key", "agent_event", "blind")}
    assert counts == {"api_key": 2, "agent": 3, "agent_key": 6, "agent_event": 10, "blind": 2}


COLUMNS = {
    "api_key": ("name", "role", "agents", "tenant", "may_sign", "digest", "created_us", "revoked_us"),
    "agent": ("url", "tenant", "origin", "public_key", "tier", "sla", "health", "added_us"),
    "agent_key": ("agent", "public_key", "source", "state", "until_us"),
    "agent_event": ("agent", "tenant", "ts_us", "event", "actor", "old_state", "new_state", "reason", "details"),
    "manifest": ("agent", "fetched_us", "digest", "body", "verification", "sla", "sla_error", "ttl_seconds"),
    "promise": ("agent", "tenant", "since_us", "source", "sla", "manifest_digest", "error"),
    "maintenance": ("agent", "start_us", "end_us", "declared_us", "declared_by", "ended_us", "ended_by"),
    "silence": ("agent", "breach_type", "severity", "tenant", "created_us", "ends_us", "author", "comment"),
    "breach_ack": ("breach", "at_us", "actor", "comment"),
    "blind": ("start_us", "end_us", "cause"),
    "revocation": ("issuer", "jti", "revoked_us", "expires_us", "recorded_us"),
}


@pytest.mark.parametrize(("table", "column"), [(table, column) for table, names in COLUMNS.items() for column in names])
def test_a_changed_column_of_any_row_is_named(house: Ledger, table: str, column: str) -> None:
    put = "CASE type WHEN 'INTEGER' THEN 1 WHEN 'BLOB' THEN x'00' ELSE 'x' END"
    changed = (
        f"CASE typeof({column}) WHEN 'text' THEN CASE {column} GLOB '[[{{]*' WHEN 1 THEN '[]' ELSE {column} || 'x' END "
        f"WHEN 'blob' THEN zeroblob(32) WHEN 'integer' THEN {column} + 1 "
        f"ELSE (SELECT {put} FROM pragma_table_info('{table}') WHERE name = '{column}') END"
    )
    ids = "rowid" if table not in {"api_key", "agent", "agent_key", "maintenance", "silence", "breach_ack"} else None
    key = ids or {"breach_ack": "breach", "agent_key": "agent || hex(public_key) || source"}.get(table, "id")
    there = house.connection.execute(f"SELECT {key} FROM {table}").fetchall()
    # Of a promise of nothing from the start, and of a key that only a manifest shows, no entry says anything.
    for (row,) in there[1:] if table == "promise" else there:
        found = altered(house.connection, f"UPDATE {table} SET {column} = {changed} WHERE {key} = {row!r}")
        assert any(finding.startswith(table) for finding in found), (row, found)


@pytest.mark.parametrize("table", COLUMNS)
def test_a_row_that_is_gone_is_missed(house: Ledger, table: str) -> None:
    where = (
        "WHERE state = 'active'" if table == "agent_key" else "WHERE source IS NOT NULL" if table == "promise" else ""
    )
    assert any(
        finding.startswith(table) or table in finding
        for finding in altered(house.connection, f"DELETE FROM {table} {where}")
    )


PUT_IN = {
    "api_key": f"INSERT INTO api_key VALUES ('ff', 'mine', 'admin', '[\"*\"]', NULL, 1, x'00', {NOW_US}, NULL)",
    "agent_key": f"INSERT INTO agent_key VALUES ('{A}', zeroblob(32), 'import', 'active', {NOW_US}, NULL, NULL)",
    "agent": "INSERT INTO agent (id, url, tenant, origin, added_us, since_us) VALUES ('x', '', 't', 'api', 1, 0)",
    "agent_event": (
        "INSERT INTO agent_event (agent, tenant, ts_us, event, actor) "
        f"VALUES ('{A}', 'default', {NOW_US}, 'removed', 'asapd')"
    ),
    "manifest": (
        "INSERT INTO manifest (agent, fetched_us, digest, body, verification) "
        f"VALUES ('{A}', {NOW_US}, 'd', x'00', 'unsigned')"
    ),
    "promise": f"INSERT INTO promise (agent, tenant, since_us) VALUES ('{A}', 'default', {NOW_US + 5})",
    "maintenance": f"INSERT INTO maintenance VALUES ('mnt_0', NULL, 0, {NOW_US}, 'r', {NOW_US}, 'me', NULL, NULL)",
    "silence": f"INSERT INTO silence VALUES ('sil_0', NULL, NULL, NULL, NULL, {NOW_US}, {NOW_US}, 'me', '')",
    "breach_ack": f"INSERT INTO breach_ack VALUES ('brc_2', {NOW_US}, 'me', '')",
    "blind": f"INSERT INTO blind VALUES ({NOW_US + 100}, {NOW_US + 200}, 'stopped')",
    "revocation": (
        "INSERT INTO revocation (issuer, jti, revoked_us, expires_us, recorded_us) "
        f"VALUES ('{A}', 'root', {NOW_US}, {NOW_US}, {NOW_US})"
    ),
}


@pytest.mark.parametrize("table", COLUMNS)
def test_a_row_that_was_put_in_is_named(house: Ledger, table: str) -> None:
    assert any(finding.startswith(table) for finding in altered(house.connection, PUT_IN[table]))


def test_events_that_changed_places_are_named(house: Ledger) -> None:
    swapped = "UPDATE agent_event SET seq = CASE seq WHEN 1 THEN 99 WHEN 99 THEN 2 ELSE 1 END WHERE seq IN ({})"
    found = altered(house.connection, swapped.format(1), swapped.format(2), swapped.format(99))
    assert any("was not written where entry" in finding for finding in found)


def test_an_agent_that_left_takes_its_keys_along(house: Ledger) -> None:
    house.submit(RemoveAgent(C, "key:k1", NOW_US + 50))
    house.submit(RemoveAgent(A, "key:k1", NOW_US + 50))
    assert findings(house.connection) == []
    assert altered(
        house.connection,
        f"INSERT INTO agent (id, url, tenant, origin, added_us, since_us) VALUES ('{C}', '', 't', 'api', 1, 0)",
    )
    house.submit(PutAgent(AgentRecord(C, "http://c2", "default"), "key:k1", NOW_US + 60))
    assert findings(house.connection) == []


def test_a_key_that_is_retired_by_itself_leaves_the_row_of_its_agent(house: Ledger) -> None:
    house.submit(RetireAgentKey(A, jwk_thumbprint(KEYS[3]), "key:k1", NOW_US + 2, HOUR_US))
    assert findings(house.connection) == []
    house.submit(RetireAgentKey(A, jwk_thumbprint(KEYS[3]), "key:k1", NOW_US + 3, 0))
    assert findings(house.connection) == []


def test_a_key_that_a_manifest_claims_and_then_does_not_is_known(house: Ledger) -> None:
    key = public_base64(KEYS[1])
    house.submit(RecordManifest(C, NOW_US + 5, "d3", b"", "key_changed", None, None, None, key))
    assert findings(house.connection) == []
    assert altered(house.connection, "UPDATE agent_key SET state = 'active' WHERE state = 'claimed'")
    assert altered(house.connection, "DELETE FROM agent_key WHERE state = 'claimed'")
    house.submit(RecordManifest(C, NOW_US + 6, "d4", b"", "verified", None, None, None, public_base64(KEYS[5])))
    assert findings(house.connection) == []
    house.submit(RecordManifest(C, NOW_US + 7, "d5", b"", "key_changed", None, None, None, key))
    house.submit(ImportAgentKey(C, KEYS[1], "key:k1", NOW_US + 8, 5))
    assert findings(house.connection) == []


def test_a_claimed_key_goes_with_its_agent_and_not_by_itself(house: Ledger) -> None:
    for number in (5, 60):
        claimed = RecordManifest(C, NOW_US + number, f"c{number}", b"", "key_changed", None, None, None, KEY_THEN)
        house.submit(claimed)
        assert altered(house.connection, "DELETE FROM agent_key WHERE state = 'claimed'")
        house.submit(RemoveAgent(C, "key:k1", NOW_US + number + 1))
        assert findings(house.connection) == []
        house.submit(PutAgent(AgentRecord(C, "http://c2", "default", public_base64(KEYS[2])), "k", NOW_US + number + 2))
        assert findings(house.connection) == []


def test_an_agent_that_another_tenant_gets_has_both_events(house: Ledger) -> None:
    house.submit(PutAgent(AgentRecord(C, "http://c", "elsewhere"), "key:k1", NOW_US + 9))
    assert findings(house.connection) == []


@pytest.mark.parametrize("key", [KEYS[1], None])
def test_an_agent_that_another_tenant_gets_leaves_its_keys_behind(house: Ledger, key: bytes | None) -> None:
    house.submit(PutAgent(AgentRecord(A, "http://a", "u", key and public_base64(key)), "key:k1", NOW_US + 9))
    house.submit(PutAgent(AgentRecord(C, "http://c", "u"), "key:k1", NOW_US + 9))
    assert findings(house.connection) == []


def test_entries_of_older_builds_do_not_say_whose_an_agent_is(house: Ledger) -> None:
    untold = "UPDATE audit SET details = json_remove(details, '$.tenant') WHERE event_type = '{}'"
    kinds = ("agent.added", "agent.changed")
    assert altered(house.connection, *(untold.format(kind) for kind in kinds)) == []


def test_a_claimed_key_that_an_operator_confirmed_may_be_retired_later(house: Ledger) -> None:
    claimed = RecordManifest(C, NOW_US + 7, "d5", b"", "key_changed", None, None, None, public_base64(KEYS[2]))
    house.submit(claimed)
    house.submit(ImportAgentKey(C, KEYS[2], "key:k1", NOW_US + 8, 0))
    assert findings(house.connection) == []
    house.submit(RetireAgentKey(C, jwk_thumbprint(KEYS[2]), "key:k1", NOW_US + 9, 0))
    assert findings(house.connection) == []


def test_what_a_quiet_daemon_sweeps_is_not_missed(house: Ledger) -> None:
    house.submit(Sweep(NOW_US + 9 * HOUR_US, 0, 0, revocations_before_us=NOW_US + 8 * HOUR_US, uptime_before_us=2**60))
    assert findings(house.connection) == []


def test_lists_may_say_other_times_and_tokens_that_nobody_showed(house: Ledger) -> None:
    unseen, known = Revocation(A, "unseen", NOW_US, NOW_US + HOUR_US), Revocation(B, "child", 5, NOW_US + 2 * HOUR_US)
    house.submit(ImportRevocations([unseen, known], "them", "k", 1, b"d", 0, "key:k1", NOW_US + 5))
    assert findings(house.connection) == []
    for statement in (
        "DELETE FROM revocation WHERE jti = 'unseen'",
        "DELETE FROM revocation WHERE jti = 'child'",
        "UPDATE revocation SET expires_us = 7",
        "UPDATE revocation SET recorded_us = 7 WHERE jti = 'unseen'",
        "UPDATE revocation SET revoked_us = revoked_us + 1 WHERE jti = 'unseen'",
        "UPDATE revocation SET jti = 'other' WHERE jti = 'unseen'",
    ):
        assert any(finding.startswith("revocation") for finding in altered(house.connection, statement)), statement


def test_a_token_that_nobody_showed_is_held_to_the_times_that_lists_came_to(house: Ledger) -> None:
    lists = ((NOW_US, HOUR_US), (NOW_US + 1, 3 * HOUR_US), (NOW_US - 5, HOUR_US), (NOW_US, 2 * HOUR_US))
    for revoked_us, lifetime_us in lists:
        said = Revocation(A, "unseen", revoked_us, NOW_US + lifetime_us)
        house.submit(ImportRevocations([said], "them", "k", 1, b"d", 0, "key:k1", NOW_US + 5))
    assert findings(house.connection) == []
    for change in (f"expires_us = {NOW_US + 3 * HOUR_US - 1}", f"revoked_us = {NOW_US - 4}"):
        (found,) = altered(house.connection, f"UPDATE revocation SET {change} WHERE jti = 'unseen'")
        assert "its times are not what entry" in found
    (found,) = altered(house.connection, "DELETE FROM revocation WHERE jti = 'unseen'")
    assert "is not there" in found


def test_rows_that_cannot_be_read_are_named(house: Ledger) -> None:
    broken = "CAST(x'ff' AS TEXT)"
    for table, column in (("api_key", "name"), ("agent", "url"), ("promise", "source"), ("maintenance", "reason")):
        found = altered(house.connection, f"UPDATE {table} SET {column} = {broken}")
        assert any(f"{table} row" in finding and column in finding for finding in found), found


def test_what_retention_took_is_not_judged(house: Ledger) -> None:
    late_us = NOW_US + 3 * HOUR_US
    house.submit(RecordManifest(D, NOW_US + 7, "d9", b"", "verified", None, None, None, public_base64(KEYS[2])))
    for expires_us in (HOUR_US, 2 * HOUR_US):
        named = [Revocation(A, name, NOW_US, NOW_US + expires_us) for name in ("u1", "u2", "u3")]
        house.submit(ImportRevocations(named, "them", "k", 1, b"d", 0, "key:k1", NOW_US + expires_us))
    assert findings(house.connection) == []
    last, digest = house.connection.execute("SELECT seq, hash FROM audit ORDER BY seq DESC LIMIT 1").fetchone() or (
        0,
        b"",
    )
    house.submit(KeepArchive(1, last, digest, late_us, "f", "s", "asapd", late_us))
    house.submit(RetireAudit("asapd", late_us))
    assert findings(house.connection) == []
    tallies = {tally.table: tally for tally in reconcile(house.connection)}
    assert tallies["silence"].retired == tallies["silence"].rows == 2
    assert (tallies["api_key"].retired, tallies["api_key"].rows) == (0, 2)  # decisions that stand keep their entries
    assert altered(house.connection, PUT_IN["agent_key"].replace(str(NOW_US), "5"))
    house.submit(RevokeKey("k1", "asapd", late_us))
    house.submit(
        EndMaintenance(
            house.connection.execute("SELECT id FROM maintenance WHERE ended_us IS NULL").get, "k", NOW_US + 5
        )
    )
    assert findings(house.connection) == []
    assert altered(house.connection, "UPDATE api_key SET revoked_us = NULL")


def test_the_newest_events_of_agents_are_missed_even_where_their_numbers_went_with_them(house: Ledger) -> None:
    found = altered(
        house.connection,
        "DELETE FROM agent_event WHERE seq = (SELECT max(seq) FROM agent_event)",
        "UPDATE sqlite_sequence SET seq = seq - 1 WHERE name = 'agent_event'",
    )
    assert found == ["entry 24 (agent.paused): there is no such row in agent_event"]


def test_what_lists_said_of_a_token_is_held_to_the_last_that_changed_it(house: Ledger) -> None:
    for revoked_us, expires_us in ((5, HOUR_US), (9, HOUR_US), (3, 2 * HOUR_US)):
        named = [Revocation(A, "unseen", NOW_US + revoked_us, NOW_US + expires_us)]
        house.submit(ImportRevocations(named, "them", "k", 1, b"d", 0, "key:k1", NOW_US + revoked_us))
    assert findings(house.connection) == []
    for column in ("revoked_us", "expires_us", "recorded_us"):
        found = altered(house.connection, f"UPDATE revocation SET {column} = {column} - 1 WHERE jti = 'unseen'")
        assert found[0].startswith(f"revocation of unseen by {A}: its times are not what entry")
    assert altered(house.connection, "DELETE FROM revocation WHERE jti = 'unseen'")


@pytest.mark.parametrize("column", ["before_us", "through_seq", "events"])
def test_how_far_retention_went_is_held_to_what_it_entered(house: Ledger, column: str) -> None:
    house.submit(RecordUsage("t", "key:x", NOW_US, [UsageEvent("t", A, B, NOW_US)], [Cost()]))
    house.submit(RetireUsage(NOW_US + 1, "asapd", NOW_US + 2 * HOUR_US))
    assert findings(house.connection) == []
    found = altered(house.connection, f"UPDATE usage_retired SET {column} = 0")
    assert any(finding.startswith("usage_retired is ") for finding in found)


def test_a_clock_that_is_set_back_changes_nothing_of_since_when_an_agent_is_its_tenants(
    connection: apsw.Connection,
) -> None:
    ledger = Ledger(connection)

    def put(tenant: str, at_us: int) -> None:
        ledger.submit(PutAgent(AgentRecord(A, "http://a", tenant), "key:k1", at_us))

    def leave(at_us: int) -> None:
        ledger.submit(RemoveAgent(A, "key:k1", at_us))

    def change(verb: Literal["pause", "resume"], at_us: int) -> None:
        ledger.submit(ChangeAgentState(A, verb, "key:k1", at_us))

    put("one", NOW_US)
    put("two", NOW_US + 10)
    ((since_us,),) = connection.execute("SELECT held_since_us FROM agent").fetchall()
    change("pause", NOW_US + 5)
    assert findings(connection) == []
    assert agent_history.held_since_us(connection, Visibility(tenant="two"), A) == since_us == NOW_US + 10
    # As an upgrade while that was the earliest would have left it.
    assert altered(connection, f"UPDATE agent SET held_since_us = {NOW_US + 5}") == []
    for forged_us in (0, NOW_US, NOW_US + 4, NOW_US + 11):
        assert len(altered(connection, f"UPDATE agent SET held_since_us = {forged_us}")) == 1
    leave(NOW_US + 4)
    former = last_held(connection, Visibility(tenant="two"), A)
    assert former is not None
    assert (former.held_since_us, former.held_until_us) == (NOW_US + 10, NOW_US + 4)
    put("two", NOW_US + 3)
    change("pause", NOW_US + 2)
    assert findings(connection) == []


def test_an_entry_that_no_build_ever_made_is_named_and_hides_nothing_else(house: Ledger) -> None:
    odd = "UPDATE audit SET details = '{0}' WHERE seq = (SELECT max(seq) FROM audit WHERE event_type = '{1}')"
    found = altered(
        house.connection,
        odd.format("{}", "watch.interrupted"),
        odd.format("[1]", "silence.removed"),
        odd.format("nonsense", "maintenance.ended"),
        "UPDATE breach_ack SET comment = 'other'",
    )
    for kind in ("watch.interrupted asapd", "silence.removed", "maintenance.ended"):
        assert any(f"({kind}" in said and "is none of asapd's" in said for said in found), (kind, found)
    assert any(said.startswith("breach_ack brc_1: comment is") for said in found)


@pytest.mark.parametrize("kind", ["erasure.applied", "usage.recorded"])
@pytest.mark.parametrize("details", ["[]", '{"entries": 1, "row": "x"}', "nonsense"])
def test_an_odd_entry_of_an_erasure_or_of_usage_is_named_as_well(
    connection: apsw.Connection, kind: str, details: str
) -> None:
    ledger = Ledger(connection)
    ledger.submit(RecordUsage("t", "key:x", NOW_US, [UsageEvent("t", A, "c", NOW_US, 1, 1)], [Cost(1)]))
    ledger.submit(Note(kind, "key:x", "odd", {}, NOW_US))
    odd = f"UPDATE audit SET details = '{details}' WHERE subject = 'odd'"
    found = altered(connection, odd, "UPDATE usage SET tokens_in = 9")
    assert any(f"({kind}" in said and "is none of asapd's" in said for said in found), found
    assert any("tokens_in is 9" in said for said in found), found
