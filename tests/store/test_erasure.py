"""Erasing a consumer: its name is nowhere any more, every sum and every proof stays."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import apsw
import pytest
from msgspec import structs

from asapd.core.budgets import Budget, Limits, Match
from asapd.core.errors import Refusal
from asapd.core.repricing import Correction
from asapd.core.usage import Cost, UsageEvent
from asapd.store import audit, delegation_news, erasure, namesakes, renumbering, usage_sums, verifying
from asapd.store.units.agents import AgentRecord, PutAgent
from asapd.store.units.alerts import AddSilence, RemoveSilence, Silence
from asapd.store.units.audit import EraseConsumer, Erased
from asapd.store.units.delegations import SyncBudgets
from asapd.store.units.exchange import AnyUnit, Envelope
from asapd.store.units.usage import CorrectCosts, RecordTask, RecordUsage, TaskEvent, VoidUsage
from asapd.store.usage_filter import UsageFilter
from asapd.store.verifying import Request
from asapd.store.visibility import EVERYTHING
from asapd.store.writer import Writer, open_for_writing
from tests.store.ledger_desk import Ledger, link

NOW_US = 1_795_169_203_000_000
A, MAX, EVE = "urn:asap:agent:a", "mailto:max", "mailto:eve"


@pytest.fixture
def writer(connection: apsw.Connection) -> Writer:
    made = Writer(connection)
    for consumer in (MAX, EVE):
        events = [UsageEvent("t", A, consumer, NOW_US, 5, 5, id=f"{consumer}{number}") for number in range(3)]
        submit(made, RecordUsage("t", "key:x", NOW_US, events, [Cost(7)] * 3))
        submit(made, RecordTask(TaskEvent("t" + consumer[-3:], A, consumer, "started", NOW_US), "key:x", "t", NOW_US))
    return made


def submit(writer: Writer, unit: AnyUnit) -> Any:
    return writer.run([Envelope(1, unit, False)])[0].result


def erase(writer: Writer, seqs: list[int], consumer: str = MAX) -> Any:
    return submit(writer, EraseConsumer(consumer, "ers_1", seqs, "request 17", "key:admin", NOW_US))


def counts(connection: apsw.Connection, consumer: str) -> dict[str, int]:
    """Of entries, what two windows of them have."""
    entries = sum(erasure.count_entries(connection, consumer, *window) for window in ((0, 3), (3, 1_000)))
    return {"entries": entries, **erasure.count_of(connection, consumer)}


def test_what_is_kept_is_counted_and_found(connection: apsw.Connection, writer: Writer) -> None:
    assert counts(connection, MAX) == {"entries": 4, "usage": 3, "task": 1, "breach": 0}
    assert erasure.entries_of(connection, MAX, 0, 10) == [1, 2, 3, 4]
    assert erasure.entries_of(connection, MAX, 2, 1) == [3]
    assert erasure.entries_of(connection, MAX, 1, 10, 3) == [2, 3]
    assert counts(connection, "nobody") == {"entries": 0, "usage": 0, "task": 0, "breach": 0}


def test_the_name_goes_and_the_log_and_every_sum_stay(connection: apsw.Connection, writer: Writer) -> None:
    before = usage_sums.summary(connection, UsageFilter(EVERYTHING))
    head = audit.head(connection)
    assert erase(writer, [1, 2, 3, 4]) == Erased(4, True, "ers_1")
    assert counts(connection, MAX) == {"entries": 0, "usage": 0, "task": 0, "breach": 0}
    assert erasure.count_of(connection, "ers_1")["usage"] == 3
    assert usage_sums.summary(connection, UsageFilter(EVERYTHING)) == before
    entry = audit.get_entry(connection, "2")
    assert entry is not None
    assert entry["actor"] is entry["subject"] is entry["details"] is entry["salt"] is None
    told = audit.get_entry(connection, "9")
    assert told is not None
    assert (told["event_type"], told["subject"], told["previous_hash"]) == ("erasure.applied", "ers_1", head[1])
    assert told["details"] == {
        "count": 4,
        "entries": [[1, 4]],
        "first_seq": 1,
        "last_seq": 4,
        "reason": "request 17",
        "usage_rows": [[1, 3]],
    }
    report = verifying.report(connection, Request())
    assert (report.is_valid, report.walk.erased, report.walk.verified) == (True, 4, 9)
    assert report.tallies is not None
    assert [(tally.table, tally.rows, tally.entries, tally.erased) for tally in report.tallies[:2]] == [
        ("usage", 6, 3, 3),
        ("task", 2, 1, 1),
    ]
    dump = " ".join(
        str(row) for table in ("audit", "usage", "task", "name") for row in connection.execute(f"SELECT * FROM {table}")
    )
    assert MAX not in dump.replace(f"{MAX}0", "").replace(f"{MAX}1", "").replace(
        f"{MAX}2", ""
    )  # ids are the reporter's


@pytest.mark.parametrize("project", ["", MAX])
def test_what_was_erased_is_in_no_page_of_the_file(tmp_path: Path, project: str) -> None:
    """Where a project has the name too it stays there, and nowhere else; the news are longer than a page."""
    path, copy = tmp_path / "asapd.db", tmp_path / "vacuumed.db"
    path.touch()
    with contextlib.closing(open_for_writing(path, synchronous="off")) as connection:
        writer = Writer(connection)
        other = UsageEvent("t", A, EVE, NOW_US, 5, 5, id="other", project=project)
        submit(writer, RecordUsage("t", "key:x", NOW_US, [other], [Cost(7)]))
        for part in range(4):
            ids = [f"{part}-{number}" for number in range(50)]
            events = [UsageEvent(f"t{one}", A, MAX, NOW_US, 5, 5, id=one, delegation="unknown") for one in ids]
            submit(writer, RecordUsage("t", "key:x", NOW_US, events, [Cost(7)] * len(events)))
        seqs = erasure.entries_of(connection, MAX, 0, 999)
        salts = [salt for seq, salt in connection.execute("SELECT seq, salt FROM audit") if seq in seqs]
        assert len(seqs) == len(salts) == 200
        hours, _ = renumbering.hours_of(connection, namesakes.number_of(connection, MAX), -namesakes.LAST)
        news = delegation_news.naming(connection, MAX, 0, 99)
        unit = EraseConsumer(MAX, "ers_1", seqs, "r", "key:admin", NOW_US, 0, news, is_all=True, hours=hours)
        steps = [submit(writer, unit), *(submit(writer, structs.replace(unit, seqs=[], news=[])) for _ in range(2))]
        assert (steps[-1].is_whole, steps[0].is_shared) == (True, bool(project))
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        connection.execute("VACUUM INTO ?", (str(copy),))
        raw = path.read_bytes()
    assert raw.count(MAX.encode()) == copy.read_bytes().count(MAX.encode()) == (2 if project else 0)
    assert [salt for salt in salts if salt in raw] == []


def test_an_erased_entry_answers_for_one_row_and_no_more(connection: apsw.Connection, writer: Writer) -> None:
    erase(writer, [1, 2, 3, 4])
    connection.execute("DROP TRIGGER audit_no_delete; DROP TRIGGER usage_no_delete")
    names = [row[0] for row in connection.execute("SELECT name FROM pragma_table_info('usage')") if row[0] != "seq"]
    columns = ", ".join(names)
    connection.execute(f"INSERT INTO usage (seq, {columns}) SELECT 50, {columns} FROM usage WHERE seq = 1")
    report = verifying.report(connection, Request())
    assert report.tallies is not None
    assert report.tallies[0].findings == 1


def report_more(writer: Writer, count: int) -> None:
    events = [UsageEvent("t", A, MAX, NOW_US, id=f"more{count}-{number}") for number in range(count)]
    submit(writer, RecordUsage("t", "key:x", NOW_US, events, [Cost(7)] * count))


def test_the_log_verifies_after_every_step_of_an_erasure_beside_ingest(
    connection: apsw.Connection, writer: Writer
) -> None:
    for seqs in ([1, 2], [3]):
        step = submit(writer, EraseConsumer(MAX, "ers_1", seqs, "r", "key:admin", NOW_US, None))
        assert step == Erased(len(seqs), False, "ers_1")
        assert verifying.report(connection, Request()).is_valid
        report_more(writer, len(seqs))
    last = submit(writer, EraseConsumer(MAX, "ers_1", [4], "r", "key:admin", NOW_US, 4))
    assert last == Erased(4, True, "ers_1")
    assert counts(connection, MAX) == {"entries": 0, "usage": 0, "task": 0, "breach": 0}
    assert erasure.count_of(connection, "ers_1")["usage"] == 6
    assert verifying.report(connection, Request()).is_valid
    report_more(writer, 3)
    assert submit(writer, EraseConsumer(MAX, "ers_2", [], "r", "key:admin", NOW_US, 0)) == Erased(3, True, "ers_2")
    assert verifying.report(connection, Request()).is_valid


def test_a_name_stays_while_more_came_than_one_step_erases(
    connection: apsw.Connection, writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(erasure, "LATE", 2)
    for _ in range(2):
        result = erase(writer, [])
        assert isinstance(result, Erased)
    assert result == Erased(2, True, "ers_1")
    assert erasure.count_of(connection, MAX)["usage"] == 0
    assert verifying.report(connection, Request()).is_valid


def test_a_consumer_that_only_reservations_name_is_erased_and_the_log_verifies(connection: apsw.Connection) -> None:
    desk = Ledger(connection)
    desk.register(link("root", max_cost_microusd=10))
    desk.submit(structs.replace(desk.wish(delegation="root", cost=5), consumer=MAX))
    assert desk.submit(EraseConsumer(MAX, "ers_1", [], "request 17", "key:admin", NOW_US, 0)) == Erased(
        0, True, "ers_1"
    )
    assert verifying.report(connection, Request()).is_valid
    assert connection.execute("SELECT consumer, salt FROM reservation").fetchall() == [("ers_1", None)]


def test_the_consumer_can_come_again_as_somebody_new(connection: apsw.Connection, writer: Writer) -> None:
    erase(writer, [1, 2, 3, 4])
    submit(writer, RecordUsage("t", "key:x", NOW_US, [UsageEvent("t", A, MAX, NOW_US)], [Cost(7)]))
    assert counts(connection, MAX) == {"entries": 1, "usage": 1, "task": 0, "breach": 0}
    assert verifying.report(connection, Request()).is_valid


@pytest.mark.parametrize("consumer", [A, "urn:asap:agent:listed"])
def test_an_agent_is_refused_and_nothing_is_erased(connection: apsw.Connection, writer: Writer, consumer: str) -> None:
    submit(writer, PutAgent(AgentRecord("urn:asap:agent:listed", "http://x", "t"), "key:x", NOW_US))
    refused = erase(writer, [1], consumer)
    assert isinstance(refused, Refusal)
    assert refused.code == "consumer_is_agent"
    assert verifying.report(connection, Request()).walk.erased == 0


@pytest.mark.parametrize(
    "change",
    [
        "actor = 'x'",
        "actor = NULL",
        "hash = x'00', actor = NULL, subject = NULL, details = NULL, salt = NULL",
        "seq = 99, actor = NULL, subject = NULL, details = NULL, salt = NULL",
        "event_type = 'x', actor = NULL, subject = NULL, details = NULL, salt = NULL",
    ],
)
def test_through_the_open_gate_an_entry_can_be_erased_and_nothing_else_changed(
    connection: apsw.Connection, writer: Writer, change: str
) -> None:
    connection.execute("UPDATE retention_gate SET open = 1")
    with pytest.raises(apsw.ConstraintError, match="append-only"):
        connection.execute(f"UPDATE audit SET {change} WHERE seq = 1")
    assert verifying.report(connection, Request()).is_valid


def consumers(connection: apsw.Connection) -> set[str]:
    """Whom reservations and evidence of budgets name."""
    evidence = "SELECT evidence ->> '$.match.consumer' FROM breach WHERE budget IS NOT NULL"
    return {name for (name,) in connection.execute(f"SELECT consumer FROM reservation UNION {evidence}")}


def test_reservations_and_breaches_go_step_by_step_and_after_an_end_in_between_under_the_same_pseudonym(
    connection: apsw.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(erasure, "ROWS", 2)
    desk = Ledger(connection)
    desk.register(link("root", max_cost_microusd=100))
    for day in range(3):
        budget = Budget(f"max{day}", Match(consumer=MAX), "day", "UTC", soft=Limits(microusd=1))
        desk.submit(SyncBudgets([budget], "asapd", NOW_US))
        desk.use(5, consumer=MAX, agent=A)
    wish = structs.replace(desk.wish(delegation="root", cost=5), consumer=MAX)
    for _ in range(5):
        desk.submit(wish)
    steps = 0
    while True:
        steps += 1
        desk.restart()  # nothing of an erasure is in memory
        unit = EraseConsumer(MAX, f"ers_{steps}", [], "request 17", "key:admin", NOW_US, 0)
        done = desk.submit(unit)
        assert done.pseudonym == "ers_1"
        assert verifying.report(desk.connection, Request()).is_valid
        if done.is_whole:
            break
        assert desk.connection.execute("SELECT * FROM erasure_begun").fetchall() == [(MAX, "ers_1")]
        if steps == 1:
            desk.submit(wish)  # what comes in between is part of it
    assert (steps, consumers(desk.connection)) == (4, {"ers_1"})
    assert desk.connection.execute("SELECT count(*) FROM name WHERE name = ?", (MAX,)).get == 0
    assert desk.connection.execute("SELECT * FROM erasure_begun").fetchall() == []
    desk.submit(wish)
    assert consumers(desk.connection) == {"ers_1", MAX}
    desk.connection.close()


def test_each_step_finds_its_rows_by_an_index(connection: apsw.Connection) -> None:
    for table, condition in (("reservation", "consumer = 'x'"), ("breach", erasure._OF_BREACH.replace("?", "'x'"))):
        sql = f"EXPLAIN QUERY PLAN SELECT id FROM {table} WHERE {condition} LIMIT 9"
        plan = " ".join(str(row[-1]) for row in connection.execute(sql))
        assert f"USING INDEX {table}_consumer" in plan or f"USING COVERING INDEX {table}_consumer" in plan, plan


def test_somebody_who_reports_under_the_pseudonym_keeps_nobody_from_getting_one(
    connection: apsw.Connection, writer: Writer
) -> None:
    submit(writer, EraseConsumer(MAX, "ers_1", [1], "request 17", "key:admin", NOW_US, None))
    report = UsageEvent("t", A, "ers_1", NOW_US, 5, 5, id="late")
    submit(writer, RecordUsage("t", "key:x", NOW_US, [report], [Cost(7)]))
    last = EraseConsumer(MAX, "ers_2", [2, 3, 4], "request 17", "key:admin", NOW_US, 4)
    step = submit(writer, last)
    assert (step.is_whole, step.is_moved) == (False, True)
    assert submit(writer, structs.replace(last, seqs=[], is_all=True)).is_whole
    names = connection.execute("SELECT name FROM name WHERE id IN (SELECT consumer FROM usage) ORDER BY id").fetchall()
    assert names == [(EVE,), ("ers_1",)]
    assert connection.execute("SELECT count(*) FROM name WHERE name = ?", (MAX,)).get == 0
    assert counts(connection, MAX) == {"entries": 0, "usage": 0, "task": 0, "breach": 0}


def own_entries(connection: apsw.Connection, name: str) -> list[int]:
    return erasure.entries_of(connection, name, 0, 99)


@pytest.mark.parametrize("name", ["uid:0 pid:21976", "key:ops", "asapd", "t", f"{EVE}0", "budgets"])
def test_who_did_something_and_what_it_is_about_is_no_consumer(
    connection: apsw.Connection, writer: Writer, name: str
) -> None:
    """Entries are of the consumer that they name as such, whoever made them and whatever they are about."""
    submit(writer, VoidUsage(1, "r", "uid:0 pid:21976", NOW_US))
    submit(writer, CorrectCosts([Correction(2, 7, 9, "priced", 2)], "w", "key:ops", NOW_US))
    submit(writer, SyncBudgets([Budget("b", Match(), "day", "UTC", soft=Limits(tokens=1))], "asapd", NOW_US))
    submit(writer, RecordTask(TaskEvent(name, A, EVE, "started", NOW_US), "key:x", "t", NOW_US))
    report = UsageEvent("x", A, name, NOW_US, 5, 5, id="own")
    submit(writer, RecordUsage("t", "key:x", NOW_US, [report], [Cost(7)]))
    (own,) = connection.execute("SELECT seq FROM audit WHERE details ->> 'consumer' = ?", (name,)).fetchall()
    assert own_entries(connection, name) == [*own]
    assert erase(writer, [], name).entries == 1
    found = verifying.report(connection, Request())
    assert (found.is_valid, found.walk.erased) == (True, 1)


@pytest.mark.parametrize("kind", ["usage.voided", "usage.repriced"])
def test_what_older_builds_erased_because_of_its_actor_is_explained(
    connection: apsw.Connection, writer: Writer, kind: str
) -> None:
    submit(writer, VoidUsage(1, "r", "key:ops", NOW_US))
    submit(writer, CorrectCosts([Correction(2, 7, 9, "priced", 2)], "w", "key:ops", NOW_US))
    table = {"usage.voided": "usage_void", "usage.repriced": "usage_repriced"}[kind]
    ((seq, row),) = connection.execute(
        "SELECT seq, details ->> 'row' FROM audit WHERE event_type = ?", (kind,)
    ).fetchall()
    submit(writer, EraseConsumer("key:ops", "ers_1", [seq], "r", "key:admin", NOW_US, None))
    assert verifying.report(connection, Request()).is_valid
    # But it may say so of nothing else than work of the same consumer, task and time.
    connection.execute(f"DROP TRIGGER {table}_no_update")
    column = {"usage_void": "voids", "usage_repriced": "event"}[table]
    connection.execute(f"UPDATE {table} SET {column} = 4 WHERE seq = ?", (row,))
    found = verifying.report(connection, Request())
    assert found.tallies is not None
    assert any(named.startswith(f"{table} row {row}: ") for named in found.tallies[0].named)


def add_silence(writer: Writer, actor: str, at_us: int, ends_us: int = NOW_US + 3_600_000_000) -> str:
    wanted = Silence("", None, None, None, None, 0, ends_us, actor, "a deploy")
    added: Silence = submit(writer, AddSilence(wanted, actor, at_us, at_us))
    return added.id


def erase_as_before(connection: apsw.Connection, writer: Writer, actor: str) -> None:
    """As older builds did: what an actor did who is called like the consumer."""
    found = connection.execute("SELECT seq FROM audit WHERE actor = ?", (actor,)).fetchall()
    submit(writer, EraseConsumer(actor, "ers_1", [seq for (seq,) in found], "r", "key:admin", NOW_US, None))


def test_what_an_erasure_took_leaves_what_others_decided_to_be_judged(
    connection: apsw.Connection, writer: Writer
) -> None:
    add_silence(writer, "key:bob", NOW_US)
    add_silence(writer, "key:ops", NOW_US + 1)
    erase_as_before(connection, writer, "key:ops")
    assert verifying.report(connection, Request()).is_valid
    connection.execute("UPDATE silence SET comment = 'another' WHERE author = 'key:bob'")
    found = verifying.report(connection, Request())
    assert "comment is 'another'" in " ".join(named for tally in found.tallies or () for named in tally.named)


def test_what_an_erased_entry_may_have_changed_is_no_finding(connection: apsw.Connection, writer: Writer) -> None:
    add_silence(writer, "key:bob", NOW_US, NOW_US + 1)
    changed = add_silence(writer, "key:bob", NOW_US)
    submit(writer, RemoveSilence(changed, "key:ops", NOW_US + 5))
    add_silence(writer, "key:bob", NOW_US + 2)
    erase_as_before(connection, writer, "key:ops")
    report = verifying.report(connection, Request())
    assert report.is_valid, report.tallies


def test_what_was_forgotten_with_an_erased_entry_is_not_missing(connection: apsw.Connection, writer: Writer) -> None:
    add_silence(writer, "key:bob", NOW_US, NOW_US + 1)
    add_silence(writer, "key:ops", NOW_US + 2)  # which forgets the first
    assert connection.execute("SELECT count(*) FROM silence").get == 1
    erase_as_before(connection, writer, "key:ops")
    assert verifying.report(connection, Request()).is_valid
