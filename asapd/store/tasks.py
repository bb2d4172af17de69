"""The life of tasks: each begins once and ends once, by its own word, by its usage, or because it never came back."""

from __future__ import annotations

from typing import Any, NamedTuple

import apsw
import msgspec

from asapd.core.errors import FieldError, Refusal
from asapd.core.types import Outcome, format_us
from asapd.store import outcomes, usage_behind
from asapd.store.erasure import is_pseudonym
from asapd.store.rows import fetch
from asapd.store.tx import RefuseError, Tx
from asapd.store.units.unit import RowWritten
from asapd.store.units.usage import RecordTask, TaskEvent
from asapd.store.usage_filter import CORRECTION, LIVE
from asapd.store.usage_sums import totals_of_tasks
from asapd.store.usage_tasks import OF_TASK, of_task
from asapd.store.visibility import Visibility, visible_names

STATES = ("started", "completed", "failed", "abandoned")

MAX_FAMILY = 10_000
"""Descendants whose usage is added up with a task's own; a task with more says so."""

_INSERT = (
    "INSERT INTO task (tenant, agent, consumer, task_id, state, timestamp_us, error, committed_us, parent_task_id) "
    "VALUES (?,?,?,?,?,?,?,?,?)"
)
_OF_START = (
    "(SELECT s.{} FROM task s WHERE s.tenant = t.tenant AND s.agent = t.agent AND s.task_id = t.task_id "
    "AND (s.state = 'started') = 1)"
)


class _Step(NamedTuple):
    """A step as it was recorded; `consumer` is None where that was erased."""

    seq: int
    state: str
    timestamp_us: int
    error: str | None
    parent: str | None
    consumer: str | None


def record_task(tx: Tx, unit: RecordTask) -> RowWritten:
    """Record one step of a task's life; sending the same step again answers the row that is there.

    Raises:
        RefuseError: `task_conflict`, when the same step was told otherwise, or the other one is of another consumer or
            parent. Earlier builds took such ends: they stay, and are repeats when they are sent again.
    """
    task = unit.task
    is_start = task.state == "started"
    key = (tx.intern(unit.tenant), tx.intern(task.agent), task.task_id)
    steps = _steps(tx, key)
    known, other = steps.get(is_start), steps.get(not is_start)
    if known is not None:
        told = (task.state, task.timestamp_us, task.error, task.parent_task_id)
        if (known.state, known.timestamp_us, known.error, known.parent) == told and _is_of(known, task):
            return RowWritten(known.seq)
        if known.state == "abandoned":
            raise RefuseError(
                _conflict(
                    f"task {task.task_id} was given up: nothing was heard of it for metering.task_timeout",
                    "lengthen that setting if tasks take so long, or report partial usage meanwhile",
                )
            )
        raise RefuseError(
            _conflict(
                f"task {task.task_id} is already {known.state}, at another time or in another way",
                "a task begins once and ends once: repeat a step as it was sent, or name another task",
            )
        )
    if other is not None:
        _agree(other, task)
    tx.execute(
        _INSERT,
        (
            *key[:2],
            tx.intern(task.consumer),
            task.task_id,
            task.state,
            task.timestamp_us,
            task.error,
            unit.now_us,
            task.parent_task_id,
        ),
    )
    seq = tx.connection.last_insert_rowid()
    if not is_start:
        tx.execute("DELETE FROM task_open WHERE tenant = ? AND agent = ? AND task_id = ?", key)
    elif other is None:
        tx.execute("INSERT INTO task_open VALUES (?,?,?,?,?)", (seq, *key, task.timestamp_us))
    details: dict[str, Any] = {
        "agent": task.agent,
        "consumer": task.consumer,
        "error": task.error,
        "task_id": task.task_id,
        "tenant": unit.tenant,
        "timestamp_us": task.timestamp_us,
    }
    if task.parent_task_id is not None:
        details["parent_task_id"] = task.parent_task_id
    outcomes.settle(tx, *key)
    tx.audit(f"task.{task.state}", unit.actor, task.task_id, details, unit.now_us)
    return RowWritten(seq)


def _steps(tx: Tx, key: tuple[int, int, str]) -> dict[bool, _Step]:
    """The steps of a task by whether they are its start."""
    rows = fetch(
        tx.connection,
        "SELECT state = 'started', (SELECT name FROM name WHERE id = consumer), seq, state, timestamp_us, error, "
        "parent_task_id FROM task WHERE tenant = ? AND agent = ? AND task_id = ? AND (state = 'started') IN (0, 1)",
        key,
    )
    return {
        bool(began): _Step(seq, state, timestamp_us, error, parent, None if is_pseudonym(consumer) else consumer)
        for began, consumer, seq, state, timestamp_us, error, parent in rows
    }


def _is_of(step: _Step, task: TaskEvent) -> bool:
    """Whether a step was of this consumer, as far as is known: a task whose consumer is erased meanwhile can end."""
    return step.consumer in {None, task.consumer}


def _agree(step: _Step, task: TaskEvent) -> None:
    """Refuse a step that is of another consumer or parent than the other step says, which need not name a parent."""
    parents = {step.parent, task.parent_task_id} - {None}
    differs = [
        name
        for name, is_same in (("consumer", _is_of(step, task)), ("parent_task_id", len(parents) < 2))
        if not is_same
    ]
    if differs:
        what = "start" if step.state == "started" else f"end ({step.state})"
        raise RefuseError(
            _conflict(
                f"task {task.task_id} has another {' and another '.join(differs)} in its {what}",
                "both steps of a task are of one consumer and one parent: send what that said, or name another task",
                tuple(FieldError(name, f"is another than in the task's {what}") for name in differs),
            )
        )


def _conflict(what: str, hint: str, errors: tuple[FieldError, ...] = ()) -> Refusal:
    return Refusal("task_conflict", f"nothing was recorded: {what}; {hint}", errors)


def abandon_overdue(tx: Tx, before_us: int, grace_us: int, now_us: int, limit: int) -> int:
    """Give up tasks of which nothing was heard since a time and that did not end; returns how many were closed.

    A task whose usage has come in ended as that says. One with interim reports since is still running, and is looked at
    again when these are as old. One whose start was recorded less than `grace_us` ago was told late, maybe by a spool
    whose next line is its end: it is looked at again after that.
    """
    overdue = fetch(
        tx.connection,
        "SELECT s.seq, s.committed_us, s.tenant, s.agent, s.consumer, s.task_id, s.timestamp_us, s.parent_task_id, "
        "(SELECT name FROM name WHERE id = s.tenant), (SELECT name FROM name WHERE id = s.agent), "
        "(SELECT name FROM name WHERE id = s.consumer) "
        "FROM task_open o JOIN task s USING (seq) WHERE o.started_us < ? ORDER BY o.started_us LIMIT ?",
        (before_us, limit),
    )
    closed = 0
    for seq, recorded_us, *of_start in overdue:
        if now_us - grace_us < recorded_us <= now_us:  # a clock that was ahead then puts nothing off
            # This gets as old as `before_us` when the grace is over.
            again_us = recorded_us + grace_us - (now_us - before_us)
            tx.execute("UPDATE task_open SET started_us = ? WHERE seq = ?", (again_us, seq))
            continue
        tenant, agent, consumer, task_id, started_us, parent, tenant_name, agent_name, consumer_name = of_start
        usage_behind.looking(tx)
        its_rows = f"{OF_TASK} AND +tenant = ? AND +agent = ? AND {LIVE}"
        key = (*of_task(task_id), tenant, agent)
        heard = tx.row(
            f"SELECT outcome, timestamp_us, error, id FROM usage WHERE {its_rows} AND NOT partial "
            "ORDER BY timestamp_us DESC, seq DESC LIMIT 1",
            key,
        )
        interim = tx.row(
            f"SELECT max(timestamp_us) FROM usage WHERE {its_rows} AND partial AND NOT ({CORRECTION})", key
        )
        if heard is None and interim is not None and (interim[0] or 0) >= before_us:
            tx.execute("UPDATE task_open SET started_us = ? WHERE seq = ?", (interim[0], seq))
            continue
        details: dict[str, Any] = {
            "agent": agent_name,
            "consumer": consumer_name,
            "parent_task_id": parent,
            "started_us": started_us,
            "task_id": task_id,
            "tenant": tenant_name,
        }
        if heard is None:
            state, ended_us, error = "abandoned", now_us, None
        else:
            state, ended_us, error = Outcome(heard[0]).name.lower(), heard[1], heard[2]
            details["usage"] = heard[3]
        details |= {"error": error, "timestamp_us": ended_us}
        tx.execute(_INSERT, (tenant, agent, consumer, task_id, state, ended_us, error, now_us, parent))
        tx.execute("DELETE FROM task_open WHERE seq = ?", (seq,))
        outcomes.settle(tx, tenant, agent, task_id)
        tx.audit(f"task.{state}", "asapd", task_id, details, now_us)
        closed += 1
    return closed


class TaskFilter(msgspec.Struct, frozen=True):
    """Which tasks; None means any."""

    visible: Visibility
    agent: str | None = None
    consumer: str | None = None
    state: str | None = None
    task: str | None = None


def list_tasks(
    connection: apsw.Connection, query: TaskFilter, limit: int, after: int | None, *, descending: bool = False
) -> list[tuple[int, dict[str, Any]]]:
    """Tasks known from their life cycle, each with the number of its last step, in the order of those."""
    where, values = visible_names(query.visible, ("agent", "consumer"))
    for column, name in (("agent", query.agent), ("consumer", query.consumer)):
        if name is not None:
            where.append(f"t.{column} = (SELECT id FROM name WHERE name = ?)")
            values.append(name)
    if query.task is not None:
        where.append("t.task_id = ?")
        values.append(query.task)
    if query.state == "started":
        where.append("t.seq IN (SELECT seq FROM task_open)")
    elif query.state is not None:
        where.append("t.state = ?")
        values.append(query.state)
    else:
        where.append("(t.state <> 'started' OR t.seq IN (SELECT seq FROM task_open))")
    if after is not None:
        where.append(f"t.seq {'<' if descending else '>'} ?")
        values.append(after)
    rows = fetch(
        connection,
        "SELECT t.seq, t.task_id, (SELECT name FROM name WHERE id = t.agent), (SELECT name FROM name WHERE id = "
        "t.consumer), t.state, t.timestamp_us, t.error, "
        f"coalesce(t.parent_task_id, {_OF_START.format('parent_task_id')}), {_OF_START.format('timestamp_us')} "
        f"FROM task t WHERE {' AND '.join(where)} ORDER BY t.seq {'DESC' if descending else 'ASC'} LIMIT ?",
        (*values, limit),
    )
    return [(row[0], _public(*row[1:])) for row in rows]


def _public(
    task_id: str,
    agent: str,
    consumer: str,
    state: str,
    timestamp_us: int,
    error: str | None,
    parent: str | None,
    started_us: int | None,
) -> dict[str, Any]:
    ended_us = None if state == "started" else timestamp_us
    # An end before the start is a clock's mistake, which tells nothing of the time in between.
    known = started_us is not None and ended_us is not None and started_us <= ended_us
    return {
        "task_id": task_id,
        "agent_id": agent,
        "consumer_id": consumer,
        "state": state,
        "parent_task_id": parent,
        "started_at": None if started_us is None else format_us(started_us),
        "ended_at": None if ended_us is None else format_us(ended_us),
        "duration_ms": (timestamp_us - (started_us or 0)) // 1_000 if known else None,
        "error": error,
    }


def family_of(connection: apsw.Connection, visible: Visibility, task: str) -> tuple[list[str], list[str], bool]:
    """Children and all descendants of a task that the caller may see, and whether there are more than MAX_FAMILY.

    A task that is its own ancestor is met once.
    """
    where, values = visible_names(visible, ("agent", "consumer"))
    condition = "".join(f" AND {part}" for part in where)
    children: list[str] = []
    found = {task: None}
    level = [task]
    while level and len(found) <= MAX_FAMILY + 1:
        parents = msgspec.json.encode(level).decode()
        rows = fetch(
            connection,
            f"SELECT task_id FROM usage WHERE parent_task_id IN (SELECT value FROM json_each(?)){condition} AND {LIVE} "
            f"UNION SELECT task_id FROM task WHERE parent_task_id IN (SELECT value FROM json_each(?)){condition} "
            "ORDER BY 1 LIMIT ?",
            (parents, *values, parents, *values, MAX_FAMILY + 1),
        )
        level = [child for (child,) in rows if child not in found]
        children = children or level
        found.update(dict.fromkeys(level))
    family = list(found)
    return children, family[: MAX_FAMILY + 1], len(family) > MAX_FAMILY + 1


def get_task(connection: apsw.Connection, visible: Visibility, task: str) -> dict[str, Any] | None:
    """A task with its steps, its own totals, and those with all its descendants; None when nothing is known of it.

    Two agents may use the same id: `data` then has a row for each, and the totals are over both.
    """
    rows = [row for _, row in list_tasks(connection, TaskFilter(visible, task=task), 100, None)]
    own = totals_of_tasks(connection, visible, [task])
    children, family, truncated = family_of(connection, visible, task)
    if not rows and not own["total_events"] and not children:
        return None
    return {
        "task_id": task,
        "state": rows[-1]["state"] if rows else None,
        "data": rows,
        "count": len(rows),
        "own": own,
        "children": children[:1_000],
        "descendants": len(family) - 1,
        "descendants_truncated": truncated,
        "with_descendants": totals_of_tasks(connection, visible, family),
    }
