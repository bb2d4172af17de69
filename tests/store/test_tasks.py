"""A task begins once and ends once; one that never came back is abandoned, unless its usage tells how it ended."""

from __future__ import annotations

from typing import Any

import apsw
import pytest
from msgspec.structs import replace

from asapd.core.errors import Refusal
from asapd.core.usage import UNKNOWN_COST, UsageEvent
from asapd.store import audit, tasks
from asapd.store.tasks import TaskFilter, family_of, get_task, list_tasks
from asapd.store.units.exchange import AnyUnit, Envelope
from asapd.store.units.house import Sweep
from asapd.store.units.unit import RowWritten
from asapd.store.units.usage import RecordTask, RecordUsage, TaskEvent, VoidUsage
from asapd.store.visibility import EVERYTHING, Visibility
from asapd.store.writer import Writer

NOW_US = 1_795_169_203_000_000
A = "urn:asap:agent:a"
STARTED = TaskEvent("t", A, "c", "started", NOW_US)


@pytest.fixture
def writer(connection: apsw.Connection) -> Writer:
    return Writer(connection)


def submit(writer: Writer, unit: AnyUnit) -> Any:
    return writer.run([Envelope(1, unit, False)])[0].result


def step(writer: Writer, task: TaskEvent, tenant: str = "default") -> Any:
    return submit(writer, RecordTask(task, "key:x", tenant, NOW_US))


def sweep(writer: Writer, before_us: int, limit: int = 500) -> Any:
    return submit(writer, Sweep(NOW_US + 9_000_000, 0, 0, limit, tasks_before_us=before_us))


def states(connection: apsw.Connection) -> list[tuple[str, str]]:
    return [(row["task_id"], row["state"]) for _, row in list_tasks(connection, TaskFilter(EVERYTHING), 99, None)]


def test_a_task_of_which_nothing_is_heard_is_abandoned_once(writer: Writer, connection: apsw.Connection) -> None:
    step(writer, STARTED)
    step(writer, replace(STARTED, task_id="young", timestamp_us=NOW_US + 10))
    assert sweep(writer, NOW_US + 5).tasks_abandoned == 1
    assert sweep(writer, NOW_US + 5).tasks_abandoned == 0
    assert states(connection) == [("young", "started"), ("t", "abandoned")]
    (entry,) = audit.list_entries(connection, audit.AuditFilter(event_type="task.abandoned"), 9, 0, descending=False)
    assert (entry["subject"], entry["details"]["started_us"]) == ("t", NOW_US)
    late = step(writer, replace(STARTED, state="completed", timestamp_us=NOW_US + 7))
    assert isinstance(late, Refusal)
    assert "already abandoned" in late.detail


def test_a_task_that_ended_is_not_abandoned_in_whatever_order_it_was_told(
    writer: Writer, connection: apsw.Connection
) -> None:
    ended = replace(STARTED, state="completed", timestamp_us=NOW_US + 1_500)
    step(writer, ended)
    assert isinstance(step(writer, STARTED), RowWritten)
    assert step(writer, ended) == RowWritten(1)
    assert sweep(writer, NOW_US + 5).tasks_abandoned == 0
    ((_, row),) = list_tasks(connection, TaskFilter(EVERYTHING), 9, None)
    assert (row["state"], row["duration_ms"], row["started_at"]) == ("completed", 1, "2026-11-20T10:06:43.000000Z")


@pytest.mark.parametrize(("after_us", "duration_ms"), [(-1, None), (0, 0), (1_000, 1)])
def test_an_end_before_its_start_is_kept_and_says_nothing_of_the_time_between(
    writer: Writer, connection: apsw.Connection, after_us: int, duration_ms: int | None
) -> None:
    step(writer, STARTED)
    assert isinstance(step(writer, replace(STARTED, state="completed", timestamp_us=NOW_US + after_us)), RowWritten)
    ((_, row),) = list_tasks(connection, TaskFilter(EVERYTHING), 9, None)
    assert (row["state"], row["duration_ms"]) == ("completed", duration_ms)


@pytest.mark.parametrize(("partial", "state"), [(False, "failed"), (True, "abandoned")])
def test_a_task_with_usage_ended_as_that_says(
    writer: Writer, connection: apsw.Connection, partial: bool, state: str
) -> None:
    step(writer, STARTED)
    usage = UsageEvent("t", A, "c", NOW_US + 1, outcome=2, partial=partial, error="boom", id="e")
    submit(writer, RecordUsage("default", "key:x", NOW_US, [usage], [UNKNOWN_COST]))
    sweep(writer, NOW_US + 5)
    assert states(connection) == [("t", state)]


def test_a_task_that_is_still_reported_of_is_not_abandoned(writer: Writer, connection: apsw.Connection) -> None:
    step(writer, STARTED)
    step(writer, replace(STARTED, task_id="gone"))
    interim = UsageEvent("t", A, "c", NOW_US + 7, tokens_in=1, partial=True, id="interim")
    submit(writer, RecordUsage("default", "key:x", NOW_US, [interim], [UNKNOWN_COST]))
    assert sweep(writer, NOW_US + 5).tasks_abandoned == 1
    assert states(connection) == [("t", "started"), ("gone", "abandoned")]
    assert sweep(writer, NOW_US + 7).tasks_abandoned == 0
    assert sweep(writer, NOW_US + 8).tasks_abandoned == 1
    (*_, entry) = audit.list_entries(connection, audit.AuditFilter(event_type="task.abandoned"), 9, 0, descending=False)
    assert (entry["subject"], entry["details"]["started_us"]) == ("t", NOW_US)


def test_a_long_list_of_overdue_tasks_is_worked_off_in_steps(writer: Writer, connection: apsw.Connection) -> None:
    for number in range(3):
        step(writer, replace(STARTED, task_id=f"t{number}"))
    assert sweep(writer, NOW_US + 1, limit=2).more
    assert not sweep(writer, NOW_US + 1, limit=2).more
    assert {state for _, state in states(connection)} == {"abandoned"}


def test_a_family_is_met_once_even_when_it_is_a_ring(
    writer: Writer, connection: apsw.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    for task, parent in (("a", "c"), ("b", "a"), ("c", "b")):
        usage = UsageEvent(task, A, "c", NOW_US, tokens_in=1, id=task, parent_task_id=parent)
        submit(writer, RecordUsage("default", "key:x", NOW_US, [usage], [UNKNOWN_COST]))
    assert family_of(connection, EVERYTHING, "a") == (["b"], ["a", "b", "c"], False)
    found = get_task(connection, EVERYTHING, "a")
    assert found is not None
    assert (found["own"]["total_tokens"], found["with_descendants"]["total_tokens"]) == (1, 3)
    assert get_task(connection, Visibility("other"), "a") is None
    monkeypatch.setattr(tasks, "MAX_FAMILY", 1)
    assert family_of(connection, EVERYTHING, "a") == (["b"], ["a", "b"], True)


def test_who_was_a_parent_by_mistake_is_none_once_that_is_voided(writer: Writer, connection: apsw.Connection) -> None:
    for event_id, parent in (("wrong", "p"), ("right", "q")):
        usage = UsageEvent("child", A, "c", NOW_US, tokens_in=5, id=event_id, parent_task_id=parent)
        submit(writer, RecordUsage("default", "key:x", NOW_US, [usage], [UNKNOWN_COST]))
    submit(writer, VoidUsage(1, "another's child", "key:o", NOW_US))
    assert get_task(connection, EVERYTHING, "p") is None
    found = get_task(connection, EVERYTHING, "q")
    assert found is not None
    assert (found["children"], found["with_descendants"]["total_tokens"]) == (["child"], 5)
