"""Usage counts once: by identity, whatever the batches, and a task begins and ends once."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import apsw
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from asapd.core.errors import FieldError, Refusal
from asapd.core.types import HOUR_US
from asapd.core.usage import UNKNOWN_COST, Cost, RollupKey, RollupSums, UsageEvent, rollup
from asapd.store import audit, verifying
from asapd.store.units.exchange import AnyUnit, Envelope
from asapd.store.units.unit import RowWritten
from asapd.store.units.usage import Recorded, RecordTask, RecordUsage, TaskEvent, UsageConflict
from asapd.store.writer import Writer

NOW_US = 1_795_169_203_000_000
EVENT = UsageEvent("t", "urn:asap:agent:a", "urn:asap:agent:c", NOW_US, tokens_in=5, id="e")
TASK = TaskEvent("t", "urn:asap:agent:a", "urn:asap:agent:c", "started", NOW_US)

OpenStore = Callable[[], AbstractContextManager[apsw.Connection]]


def submit(writer: Writer, unit: AnyUnit) -> Any:
    return writer.run([Envelope(1, unit, False)])[0].result


def record(
    writer: Writer, *events: UsageEvent, costs: list[Cost] | None = None, tenant: str = "default", partial: bool = False
) -> Any:
    costs = [UNKNOWN_COST] * len(events) if costs is None else costs
    return submit(writer, RecordUsage(tenant, "key:x", NOW_US, list(events), costs, partial))


@pytest.fixture
def writer(connection: apsw.Connection) -> Writer:
    return Writer(connection)


def count(connection: apsw.Connection, table: str = "usage") -> int:
    return connection.execute(f"SELECT count(*) FROM {table}").get


def test_a_repeat_in_the_same_batch_is_a_duplicate(writer: Writer, connection: apsw.Connection) -> None:
    assert record(writer, EVENT, EVENT) == Recorded(1, 1, 0, ["e", "e"])
    assert count(connection) == 1


def test_a_repeat_in_a_later_batch_is_a_duplicate_beside_new_events(
    writer: Writer, connection: apsw.Connection
) -> None:
    record(writer, EVENT)
    assert record(writer, replace(EVENT, id="f"), EVENT) == Recorded(1, 1, 0, ["f", "e"])
    assert count(connection) == count(connection, "usage_identity") == 2


def test_an_empty_batch_records_nothing(writer: Writer) -> None:
    assert record(writer) == Recorded(0, 0, 0, [])


@pytest.mark.parametrize(
    "other",
    [
        {"id": "f"},
        {"source": "s"},
        {"agent": "urn:asap:agent:b"},
    ],
    ids=str,
)
def test_another_id_source_or_agent_is_another_event(writer: Writer, other: dict[str, Any]) -> None:
    assert record(writer, EVENT, replace(EVENT, **other)).recorded == 2


def test_the_same_identity_in_another_tenant_is_another_event(writer: Writer) -> None:
    assert record(writer, EVENT).recorded == 1
    assert record(writer, EVENT, tenant="other").recorded == 1


def test_no_character_in_a_source_runs_into_the_id(writer: Writer) -> None:
    assert record(writer, replace(EVENT, source="a\0b", id="c"), replace(EVENT, source="a", id="b\0c")).recorded == 2


@pytest.mark.parametrize(
    "other",
    [
        {"tokens_in": 6},
        {"task_id": "u"},
        {"labels": {"a": "b"}},
        {"reported_microusd": 0},
        {"partial": True},
        {"source_seq": 1},
        {"timestamp_us": NOW_US + 1},
    ],
    ids=str,
)
def test_other_content_under_a_taken_identity_refuses_the_whole_batch(
    writer: Writer, connection: apsw.Connection, other: dict[str, Any]
) -> None:
    record(writer, EVENT)
    batch = (replace(EVENT, id="new"), replace(EVENT, **other), EVENT)
    assert record(writer, *batch) == UsageConflict([(1, 1)])
    assert count(connection) == count(connection, "usage_identity") == count(connection, "audit") == 1
    assert record(writer, batch[0]).recorded == 1


def test_a_conflict_inside_a_batch_names_no_stored_row(writer: Writer, connection: apsw.Connection) -> None:
    assert record(writer, EVENT, replace(EVENT, tokens_in=6)) == UsageConflict([(1, 0)])
    assert count(connection) == 0


def test_partial_leaves_the_conflicts_out_and_records_the_rest(writer: Writer, connection: apsw.Connection) -> None:
    record(writer, EVENT)
    changed = replace(EVENT, tokens_in=6)
    batch = (changed, replace(EVENT, id="f"), EVENT, replace(changed, id="f"), replace(EVENT, id="g"))
    assert record(writer, *batch, partial=True) == Recorded(2, 1, 0, ["f", "e", "g"], [(0, 1), (3, 0)])
    assert connection.execute("SELECT id FROM usage ORDER BY seq").fetchall() == [("e",), ("f",), ("g",)]


def test_events_without_an_id_get_one_each_and_are_counted_as_unprotected(
    writer: Writer, connection: apsw.Connection
) -> None:
    nameless = replace(EVENT, id="")
    recorded = record(writer, nameless, EVENT, nameless)
    assert (recorded.recorded, recorded.duplicates, recorded.unprotected) == (3, 0, 2)
    assert [text[:4] for text in recorded.ids] == ["use_", "e", "use_"]
    assert recorded.ids[0] != recorded.ids[2]
    assert all(len(text) == 30 for text in recorded.ids[::2])
    assert record(writer, nameless).recorded == 1
    assert count(connection, "usage_identity") == 1


def test_sums_beyond_64_bits_are_refused_whether_one_request_makes_them_or_two(
    writer: Writer, connection: apsw.Connection
) -> None:
    most = [replace(EVENT, id="", tokens_in=2**53 - 1) for _ in range(1_024)]
    too_many = record(writer, *most, most[0])
    assert isinstance(too_many, Refusal)
    assert (too_many.code, count(connection)) == ("invalid", 0)
    named = FieldError("metrics.tokens_in", "would make the sum of an hour pass 64 bits")
    assert too_many.errors == (named,)
    assert record(writer, *most).recorded == 1_024
    again = record(writer, *most)
    assert isinstance(again, Refusal)
    assert (again.code, again.errors) == ("invalid", (named,))
    assert count(connection) == 1_024
    assert stored_rollup(connection) == rollup((event, UNKNOWN_COST) for event in most)


def test_an_identity_whose_row_was_retired_is_still_taken(writer: Writer, connection: apsw.Connection) -> None:
    record(writer, EVENT)
    connection.execute("UPDATE retention_gate SET open = 1; DELETE FROM usage; UPDATE retention_gate SET open = 0")
    assert record(writer, EVENT) == UsageConflict([(0, 1)])


def test_a_row_number_is_never_given_twice_even_after_retention(writer: Writer, connection: apsw.Connection) -> None:
    record(writer, EVENT, replace(EVENT, id="f"))
    connection.execute("UPDATE retention_gate SET open = 1; DELETE FROM usage; UPDATE retention_gate SET open = 0")
    record(writer, replace(EVENT, id="g"))
    assert connection.execute("SELECT seq FROM usage").get == 3


def test_every_new_event_makes_one_audit_entry_that_names_its_row(writer: Writer, connection: apsw.Connection) -> None:
    record(writer, EVENT, replace(EVENT, id="f", outcome=2), EVENT)
    entries = audit.list_entries(connection, audit.AuditFilter(), 10, 0, descending=False)
    assert [(e["event_type"], e["subject"], e["details"]["row"], e["details"]["outcome"]) for e in entries] == [
        ("usage.recorded", "e", 1, "completed"),
        ("usage.recorded", "f", 2, "failed"),
    ]


small = st.integers(0, 3)
random_events = st.builds(
    UsageEvent,
    task_id=st.sampled_from("tu"),
    agent=st.sampled_from("ab"),
    consumer=st.sampled_from("cd"),
    timestamp_us=st.integers(0, 2).map(lambda hour: NOW_US + hour * HOUR_US),
    tokens_in=small,
    duration_ms=small,
    outcome=st.integers(1, 2),
    partial=st.booleans(),
    id=st.text("xyz", max_size=2),
    model=st.sampled_from(("", "m")),
    project=st.sampled_from(("", "p")),
)
random_costs = st.builds(Cost, st.none() | st.integers(0, 9))

ROLLUP = """
SELECT hour, a.name, c.name, m.name, p.name, outcome, events, tasks, tokens_in, tokens_out, cached_tokens_in,
       cache_write_tokens, reasoning_tokens, duration_ms, api_calls, cost_microusd, unpriced
FROM usage_hour h JOIN name a ON a.id = agent JOIN name c ON c.id = consumer JOIN name m ON m.id = model
JOIN name p ON p.id = project
"""


def stored_rollup(connection: apsw.Connection) -> dict[RollupKey, RollupSums]:
    return {RollupKey(*row[:6]): RollupSums(*row[6:]) for row in connection.execute(ROLLUP).fetchall()}


@settings(max_examples=80, deadline=None)
@given(priced=st.lists(st.tuples(random_events, random_costs), max_size=12), cuts=st.lists(st.integers(1, 4)))
def test_splitting_batches_changes_no_aggregate(
    open_store: OpenStore, priced: list[tuple[UsageEvent, Cost]], cuts: list[int]
) -> None:
    with open_store() as whole, open_store() as split:
        both = (Writer(whole), Writer(split))
        once = record(both[0], *(one for one, _ in priced), costs=[cost for _, cost in priced], partial=True)
        sums = [0, 0, 0]
        rest = list(priced)
        for size in [*cuts, len(priced)]:
            part, rest = rest[:size], rest[size:]
            done = record(both[1], *(one for one, _ in part), costs=[cost for _, cost in part], partial=True)
            sums = [sums[0] + done.recorded, sums[1] + done.duplicates, sums[2] + done.unprotected]
        assert sums == [once.recorded, once.duplicates, once.unprotected]
        assert stored_rollup(whole) == stored_rollup(split)
        seen: dict[tuple[str, str], UsageEvent] = {}
        fresh = [(one, cost) for one, cost in priced if not one.id or seen.setdefault((one.agent, one.id), one) is one]
        assert len(fresh) == once.recorded
        assert stored_rollup(whole) == rollup(fresh)
        assert verifying.report(split, verifying.Request()).is_valid


# --- tasks


def task(writer: Writer, **fields: Any) -> Any:
    return submit(writer, RecordTask(replace(TASK, **fields), "key:x", "default", NOW_US))


def test_a_task_begins_once_and_ends_once(writer: Writer, connection: apsw.Connection) -> None:
    assert task(writer) == RowWritten(1)
    assert task(writer, state="completed", timestamp_us=NOW_US + 5) == RowWritten(2)
    assert task(writer) == RowWritten(1)
    assert task(writer, state="completed", timestamp_us=NOW_US + 5) == RowWritten(2)
    assert [row[0] for row in connection.execute("SELECT event_type FROM audit ORDER BY seq").fetchall()] == [
        "task.started",
        "task.completed",
    ]


def test_another_end_of_the_same_task_is_refused(writer: Writer) -> None:
    task(writer, state="completed")
    for fields in ({"state": "failed"}, {"state": "completed", "timestamp_us": NOW_US + 1}):
        refusal = task(writer, **fields)
        assert isinstance(refusal, Refusal)
        assert refusal.code == "task_conflict"


@pytest.mark.parametrize("other", [{"consumer": "d"}, {"error": "why"}, {"parent_task_id": "p"}])
def test_a_step_that_says_something_else_is_no_repeat(writer: Writer, other: dict[str, Any]) -> None:
    for state in ("started", "failed"):
        task(writer, state=state)
        assert task(writer, state=state, **other).code == "task_conflict"


def test_the_same_task_id_at_another_agent_is_another_task(writer: Writer) -> None:
    assert task(writer) == RowWritten(1)
    assert task(writer, agent="urn:asap:agent:b") == RowWritten(2)
