"""Holds budgets to what the log says: definitions, each counter of each period, tasks, reservations.

Every commit that changes them enters by how much, so the sums of these entries are what the periods hold. What a build
before the first of these entries had counted is in the entry of the upgrade, on trust.
"""

from __future__ import annotations

from collections.abc import Callable

import apsw
import msgspec

from asapd.core.budget_counts import MARKS, BudgetChanges, Key, differences
from asapd.core.types import format_us
from asapd.store import budget_counts
from asapd.store.erasures import newest
from asapd.store.rows import fetch, fetch_one, one_moment

STEP = 20_000
"""Entries that are looked through in one go, most of which are of no budget."""

_ENTRIES = """
SELECT seq, event_type, details FROM audit WHERE seq > ? AND seq <= ? AND (
  event_type IN ('budgets.counted', 'budgets.changed', 'upgrade.counted')
  OR (event_type = 'retention.applied' AND subject = 'audit')
) ORDER BY seq
"""
_WHAT = {"tasks": "the tasks that are counted", "reservations": "the reservations that are held on it"}


class Held(msgspec.Struct):
    """What was compared: periods, by how many entries; `trusted` of the periods were there before an upgrade."""

    rows: int = 0
    entries: int = 0
    trusted: int = 0
    definitions: tuple[int, str | None] | None = None
    """The entry that said last what budgets there are, and their digest; None where that was erased."""


def compare(connection: apsw.Connection, add: Callable[[str], None]) -> Held:
    """Add up all that the log says, and name each period that holds something else."""
    for is_stepwise in (True, True, False):
        said, before, held = BudgetChanges(), BudgetChanges(), Held()
        head, begun = 0, newest(connection)
        while is_stepwise and newest(connection) - head > STEP:
            head = _walk(connection, head, head + STEP, said, before, held)
        # The last entries and the rows are read at one moment.
        with one_moment(connection):
            if head and _is_retired_since(connection, begun):
                continue  # what was added up would come again, in the sum of what retention took meanwhile
            last = newest(connection)
            while head < last:
                head = _walk(connection, head, min(head + STEP, last), said, before, held)
            _compare(connection, said, before, held, add)
            break
    return held


def _is_retired_since(connection: apsw.Connection, seq: int) -> bool:
    found = "SELECT 1 FROM audit WHERE seq > ? AND event_type = 'retention.applied' AND subject = 'audit' LIMIT 1"
    return fetch_one(connection, found, (seq,)) is not None


def _walk(
    connection: apsw.Connection, after: int, through: int, said: BudgetChanges, before: BudgetChanges, held: Held
) -> int:
    for seq, kind, details in fetch(connection, _ENTRIES, (after, through)):
        told = {} if details is None else msgspec.json.decode(details)
        if kind == "budgets.changed" or "definitions_digest" in told:
            held.definitions = seq, told.get("definitions_digest")
        if kind == "budgets.counted":
            said.take(told)
        elif "budgets" in told:
            said.take(told["budgets"])
            if kind == "upgrade.counted":
                before.take(told["budgets"])
        else:
            continue
        held.entries += 1
    return through


def _compare(
    connection: apsw.Connection, said: BudgetChanges, before: BudgetChanges, held: Held, add: Callable[[str], None]
) -> None:
    names: dict[int, str] = dict(fetch(connection, "SELECT id, name FROM budget"))
    if held.definitions is None:
        for name in names.values():
            add(f"budget {name} has no entry in the log")
    elif held.definitions[1] not in {None, budget_counts.definitions_digest(connection)}:
        add(f"budget: the definitions are not those that entry {held.definitions[0]} knows")
    wanted, trusted = said.of_budgets(), before.of_budgets()
    for key, holds in budget_counts.periods(connection):
        held.rows += 1
        told = wanted.pop(key, None)
        if told is None:
            add(f"{_where(key, names)} has no entry in the log")
            continue
        held.trusted += key in trusted
        for name, value, other in differences(holds, told):
            if name in MARKS:
                add(f"{_where(key, names)}: {_WHAT[name]} are not those that the log knows")
            else:
                add(f"{_where(key, names)}: {name} is {value}, and the log comes to {other}")
        if key[0] not in names:
            add(f"{_where(key, names)}: there is no such budget")
    for key in sorted(wanted):
        add(f"{_where(key, names)} is not there, and the log has entries of it")
    strays = (
        "SELECT 'budget_task', period, task_id FROM budget_task WHERE period NOT IN (SELECT id FROM budget_period) "
        "UNION ALL SELECT 'reservation_budget', period, reservation FROM reservation_budget "
        "WHERE period NOT IN (SELECT id FROM budget_period)"
    )
    for table, period, of in connection.execute(strays):
        add(f"{table} {period} {of}: there is no such period")


def _where(key: Key, names: dict[int, str]) -> str:
    budget, start_us = key
    try:
        start = format_us(start_us)
    except (ValueError, OverflowError):  # a number that was altered
        start = str(start_us)
    return f"budget {names.get(budget, f'number {budget}')}, period from {start}"
