"""Authorisations that share a commit come to what each would come to by itself, in their order."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

import apsw
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asapd.core.budgets import Budget, Limits, Match
from asapd.core.ledger import Estimate
from asapd.store import verifying
from asapd.store.units.agents import AgentRecord, PutAgent
from asapd.store.units.delegations import RegisterDelegation, Reserve, Reserved, Revoke, SyncBudgets
from asapd.store.units.exchange import AnyUnit, Envelope, Idempotency
from asapd.store.units.unit import Failed
from asapd.store.writer import Writer
from tests.store.ledger_desk import CHILD, GRANDCHILD, HOUR_US, NOW_US, ROOT, USD, B, C, D, OpenStore, link

SHORT = link("short", B, D, max_tasks=3, expires_at_us=NOW_US + 20)
OTHER = link("other", C, D, max_cost_microusd=2 * USD)
UNSEEN = link("unseen", B, D)
START = [
    RegisterDelegation([ROOT, CHILD, GRANDCHILD], "key:x", "default", NOW_US),
    RegisterDelegation([ROOT, SHORT], "key:x", "default", NOW_US),
    RegisterDelegation([OTHER], "key:x", "theirs", NOW_US),
    PutAgent(AgentRecord(C, "http://c", "theirs"), "key:x", NOW_US),
]


def wish(delegation: str = "grandchild", **fields: Any) -> Reserve:
    said = {"estimate": Estimate(USD), "ttl_us": HOUR_US, "tenant": "default", "task_id": "t", "now_us": NOW_US}
    return Reserve(action="task.execute", actor="key:x", delegation=delegation, **(said | fields))


wishes = st.builds(
    wish,
    st.sampled_from(["root", "child", "grandchild", "short", "other", "nobody"]),
    task_id=st.sampled_from([*"tuvw", 'a"b', "\N{SNOWMAN}"]),
    estimate=st.builds(
        Estimate, st.sampled_from([None, 0, 1, USD, 3 * USD]), st.integers(1, 30), st.sampled_from([None, 5])
    ),
    ttl_us=st.sampled_from([5, HOUR_US]),
    consumer=st.sampled_from([None, "somebody"]),
    is_bound=st.booleans(),
    tenant=st.sampled_from(["default", "theirs"]),
    now_us=st.sampled_from([NOW_US, NOW_US + 10, NOW_US + 30]),
)
units = st.one_of(
    *[wishes] * 8,
    st.just(wish("", chain=[ROOT, UNSEEN])),
    st.sampled_from(["short", "child"]).map(lambda name: Revoke(name, "key:x", "why", NOW_US)),
)


def contents(connection: apsw.Connection) -> dict[str, list[Any]]:
    tables = connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'").fetchall()
    return {name: sorted(map(repr, connection.execute(f"SELECT * FROM {name}").fetchall())) for (name,) in tables}


def submit(writer: Writer, units: Sequence[AnyUnit]) -> list[Any]:
    """The results of units that share a commit."""
    waves = iter([[Envelope(number, unit, True) for number, unit in enumerate(units)]])
    answers = writer.run([], lambda: next(waves, []))
    assert [answer.number for answer in answers] == list(range(len(units)))
    return [answer.result for answer in answers]


@settings(max_examples=60, deadline=None)
@given(commits=st.lists(st.lists(units, min_size=1, max_size=12), min_size=1, max_size=4))
def test_what_shares_a_commit_comes_to_what_it_comes_to_one_by_one(
    open_store: OpenStore, commits: list[list[AnyUnit]]
) -> None:
    with open_store() as one, open_store() as other:
        together, apart = Writer(one, Random(0).randbytes), Writer(other, Random(0).randbytes)
        for unit in START:
            assert submit(together, [unit]) == submit(apart, [unit])
        for commit in commits:
            assert submit(together, commit) == [result for unit in commit for result in submit(apart, [unit])]
        assert contents(one) == contents(other)
        assert verifying.report(one, verifying.Request()).is_valid


def test_no_more_is_held_than_there_is_however_many_ask_at_once(connection: apsw.Connection) -> None:
    writer = Writer(connection)
    submit(writer, START[:1])
    results = submit(writer, [wish(task_id=str(number)) for number in range(12)])
    assert [isinstance(result, Reserved) for result in results] == [True] * 8 + [False] * 4
    assert connection.execute("SELECT id, reserved_microusd, tasks_used FROM delegation").fetchall() == [
        ("root", 8 * USD, 8),
        ("child", 8 * USD, 8),
        ("grandchild", 8 * USD, 8),
    ]


def test_each_account_is_written_once_a_commit(connection: apsw.Connection) -> None:
    writer = Writer(connection)
    submit(writer, START[:1])
    ran: list[str] = []
    connection.set_exec_trace(lambda _, sql, __: ran.append(sql) or True)
    submit(writer, [wish(task_id=str(number), estimate=Estimate(1)) for number in range(6)])
    connection.set_exec_trace(None)
    assert len([sql for sql in ran if sql.startswith("UPDATE delegation")]) == 3
    assert len([sql for sql in ran if sql.startswith("SAVEPOINT")]) == 1


def test_one_that_fails_takes_nobody_along(connection: apsw.Connection) -> None:
    writer = Writer(connection)
    submit(writer, START[:1])
    entries = connection.execute("SELECT count(*) FROM audit").get
    results = submit(writer, [wish(), wish(now_us=2**63), wish()])
    assert [type(result) for result in results] == [Reserved, Failed, Reserved]
    assert connection.execute("SELECT count(*) FROM reservation").get == 2
    assert connection.execute("SELECT count(*) FROM audit").get == entries + 2
    assert verifying.report(connection, verifying.Request()).is_valid


def test_a_budget_is_held_by_each_in_turn(connection: apsw.Connection) -> None:
    writer = Writer(connection)
    budget = Budget("all", Match(), "day", "UTC", hard=Limits(3 * USD))
    submit(writer, [START[0], SyncBudgets([budget], "key:x", NOW_US)])
    results = submit(writer, [wish(task_id=str(number)) for number in range(5)])
    assert [isinstance(result, Reserved) for result in results] == [True] * 3 + [False] * 2


def test_an_idempotency_key_that_shares_a_commit_with_itself_holds_once(connection: apsw.Connection) -> None:
    writer = Writer(connection)
    submit(writer, START[:1])
    key = Idempotency(b"key", b"request", NOW_US)
    waves = iter([[Envelope(number, wish(), True, key) for number in range(3)]])
    answers = writer.run([], lambda: next(waves, []))
    assert len({answer.result.reservation for answer in answers if isinstance(answer.result, Reserved)}) == 1
    assert [answer.replayed for answer in answers] == [False, True, True]


@pytest.mark.parametrize("error", [apsw.FullError, apsw.IOError])
def test_a_disk_that_fails_is_told_to_all(connection: apsw.Connection, error: type[apsw.Error]) -> None:
    writer = Writer(connection)
    submit(writer, START[:1])
    before = contents(connection)

    def fail(_: Any, sql: str, __: Any) -> bool:
        if sql.startswith("INSERT INTO account_task"):
            raise error("no more")
        return True

    connection.set_exec_trace(fail)
    results = submit(writer, [wish(), wish()])
    connection.set_exec_trace(None)
    assert [type(result).__name__ for result in results] == ["NotWritten"] * 2
    assert contents(connection) == before
