"""What budgets have counted, as the log has it: every change of a period is entered in its commit."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from hashlib import sha256

import apsw
import msgspec

from asapd.core.budget_counts import BudgetChanges, Key, counters, reservation_mark, task_mark
from asapd.store.rows import fetch
from asapd.store.tx import Tx

FIELDS = (
    "end_us, events, unpriced, spent_microusd, reserved_microusd, spent_tokens, reserved_tokens, tasks_used, "
    "tasks_reserved, alerted"
)


_DEFINITIONS = (
    "SELECT id, name, agent, consumer, project, delegation, period, timezone, since_us, since_seq, soft_microusd, "
    "soft_tokens, soft_tasks, hard_microusd, hard_tokens, hard_tasks FROM budget ORDER BY id"
)


def definitions_digest(connection: apsw.Connection) -> str:
    """SHA-256 of the salt and of all budgets there are, in hex."""
    salt = fetch(connection, "SELECT salt FROM budget_salt")
    return sha256(msgspec.json.encode([salt, fetch(connection, _DEFINITIONS)])).hexdigest()


def say_definitions(tx: Tx) -> str:
    """That digest with another salt, for the entry that says what budgets there are from now on."""
    tx.execute("UPDATE budget_salt SET salt = ?", (tx.salts(1),))
    return definitions_digest(tx.connection)


def changes_of(connection: apsw.Connection, seqs: list[int]) -> BudgetChanges:
    """What some entries come to, once their content is gone."""
    found = BudgetChanges()
    for (details,) in fetch(
        connection,
        "SELECT details FROM audit WHERE seq IN (SELECT value FROM json_each(?)) AND event_type = 'budgets.counted'",
        (msgspec.json.encode(seqs).decode(),),
    ):
        found.take(msgspec.json.decode(details))
    return found


def periods(connection: apsw.Connection) -> Iterator[tuple[Key, dict[str, int]]]:
    """Every period there is, with what it holds."""
    tasks, reservations = defaultdict[int, int](int), defaultdict[int, int](int)
    for period, *task in connection.execute("SELECT period, task_id, used, holds FROM budget_task"):
        tasks[period] += task_mark(*task)
    for period, reservation in connection.execute("SELECT period, reservation FROM reservation_budget"):
        reservations[period] += reservation_mark(reservation)
    for number, budget, start_us, *values in connection.execute(
        f"SELECT id, budget, start_us, {FIELDS} FROM budget_period ORDER BY budget, start_us"
    ):
        found = counters(values, tasks=tasks.pop(number, 0), reservations=reservations.pop(number, 0))
        yield (budget, start_us), found
