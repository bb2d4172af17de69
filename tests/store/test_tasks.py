"""A task begins once and ends once; one that never came back is abandoned, unless its usage tells how it ended."""

from __future__ import annotations

from typing import Any

import apsw
import pytest
from msgspec.structs import replace

from asapd.core.errors import Refusal
from asapd.core.types import format_us
from asapd.core.usage import UNKNOWN_COST, UsageEvent
from asapd.store import audit, tasks, verifying
from asapd.store.tasks import TaskFilter, family_of, get_task, list_tasks
from asapd.store.units.audit import EraseConsumer
from asapd.store.units.exchange import AnyUnit, Envelope
from asapd.store.units.house import Sweep
from asapd.store.units.unit import RowWritten
from asapd.store.units.usage import RecordTask, RecordUsage, TaskEvent, VoidUsage
from asapd.store.verifying import Request
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
    assert "was given up: nothing was heard of it for metering.task_timeout" in late.detail
    assert "report partial usage meanwhile" in late.detail


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


ENDED = replace(STARTED, state="completed", timestamp_us=NOW_US + 1)


@pytest.mark.parametrize("order", [(STARTED, ENDED), (ENDED, STARTED)])
@pytest.mark.parametrize(
    ("first", "then", "wrong"),
    [
        ({}, {"consumer": "d"}, ["consumer"]),
        ({"parent_task_id": "p1"}, {"parent_task_id": "p2"}, ["parent_task_id"]),
        ({"parent_task_id": "p1"}, {"consumer": "d", "parent_task_id": "p2"}, ["consumer", "parent_task_id"]),
    ],
)
def test_the_other_step_of_a_task_cannot_give_it_to_another(
    writer: Writer,
    connection: apsw.Connection,
    order: tuple[TaskEvent, TaskEvent],
    first: dict[str, Any],
    then: dict[str, Any],
    wrong: list[str],
) -> None:
    earlier = replace(order[0], **first)
    step(writer, earlier)
    refused = step(writer, replace(order[1], **then))
    assert isinstance(refused, Refusal)
    assert (refused.code, [error.field for error in refused.errors]) == ("task_conflict", wrong)
    assert "nothing was recorded" in refused.detail
    assert "send what that said, or name another task" in refused.detail
    ((_, row),) = list_tasks(connection, TaskFilter(EVERYTHING), 9, None)
    assert (row["consumer_id"], row["parent_task_id"]) == ("c", first.get("parent_task_id"))
    assert step(writer, earlier) == RowWritten(1)
    assert isinstance(step(writer, replace(order[1], **first)), RowWritten)


@pytest.mark.parametrize("order", [(STARTED, ENDED), (ENDED, STARTED)])
@pytest.mark.parametrize("naming", [0, 1])
def test_a_step_without_a_parent_says_nothing_of_it(
    writer: Writer, connection: apsw.Connection, order: tuple[TaskEvent, TaskEvent], naming: int
) -> None:
    for place, told in enumerate(order):
        assert isinstance(step(writer, replace(told, parent_task_id="p") if place == naming else told), RowWritten)
    ((_, row),) = list_tasks(connection, TaskFilter(EVERYTHING), 9, None)
    assert (row["state"], row["parent_task_id"]) == ("completed", "p")


def test_a_task_ends_whose_consumer_was_erased_meanwhile(writer: Writer, connection: apsw.Connection) -> None:
    step(writer, STARTED)
    pseudonym = "ers_01J00000000000000000000000"
    submit(writer, EraseConsumer("c", pseudonym, [1], "request 17", "key:admin", NOW_US, 1))
    ((_, row),) = list_tasks(connection, TaskFilter(EVERYTHING), 9, None)
    assert row["consumer_id"] == pseudonym
    assert step(writer, STARTED) == RowWritten(1)
    assert isinstance(step(writer, ENDED), RowWritten)
    assert states(connection) == [("t", "completed")]
    assert verifying.report(connection, Request()).is_valid


def test_an_end_of_another_consumer_that_an_earlier_build_took_stays_and_verifies(
    writer: Writer, connection: apsw.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = replace(ENDED, consumer="d", parent_task_id="p2")
    with monkeypatch.context() as earlier:
        earlier.setattr(tasks, "_agree", lambda *_: None)
        step(writer, replace(STARTED, parent_task_id="p1"))
        step(writer, other)
    assert step(writer, replace(STARTED, parent_task_id="p1")) == RowWritten(1)
    assert step(writer, other) == RowWritten(2)
    ((_, row),) = list_tasks(connection, TaskFilter(EVERYTHING), 9, None)
    assert (row["consumer_id"], row["parent_task_id"]) == ("d", "p2")
    assert verifying.report(connection, Request()).is_valid


def test_usage_for_another_consumer_opens_no_task(writer: Writer, connection: apsw.Connection) -> None:
    usage = UsageEvent("t", A, "d", NOW_US, tokens_in=1, id="e", parent_task_id="p2")
    submit(writer, RecordUsage("default", "key:x", NOW_US, [usage], [UNKNOWN_COST]))
    assert isinstance(step(writer, replace(STARTED, parent_task_id="p1")), RowWritten)
    assert isinstance(step(writer, ENDED), RowWritten)


def test_a_start_that_is_told_late_has_time_until_its_end_is_told(writer: Writer, connection: apsw.Connection) -> None:
    def swept(after_us: int, grace_us: int = 300, timeout_us: int = 1_000) -> list[tuple[str, str]]:
        now_us = NOW_US + after_us
        unit = Sweep(now_us, 0, 0, tasks_before_us=now_us - timeout_us, task_grace_us=grace_us)
        assert submit(writer, unit).tasks_abandoned == sum(state == "abandoned" for _, state in states(connection))
        return states(connection)

    for late in ("t", "u"):
        step(writer, replace(STARTED, task_id=late, timestamp_us=NOW_US - 5_000))
    assert swept(0) == swept(299) == [("t", "started"), ("u", "started")]
    ended = replace(STARTED, state="completed", timestamp_us=NOW_US - 4_000)
    assert isinstance(step(writer, ended), RowWritten)
    assert swept(300) == [("u", "started"), ("t", "completed")]
    assert swept(301) == [("t", "completed"), ("u", "abandoned")]
    row = get_task(connection, EVERYTHING, "u")
    assert row is not None
    assert [row["data"][0][name] for name in ("started_at", "ended_at")] == [
        format_us(NOW_US - 5_000),
        format_us(NOW_US + 301),
    ]


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
