"""Which stored events a question is about, as conditions on their rows, and which rows count."""

from __future__ import annotations

from typing import Any, Final

import apsw
import msgspec

from asapd.store.rows import fetch
from asapd.store.usage_behind import SIDES
from asapd.store.usage_parties import Bound, Party, named
from asapd.store.usage_tasks import OF_TASK, of_task
from asapd.store.visibility import Visibility, visible_agents, visible_names

LIVE = (
    "seq NOT IN (SELECT seq FROM usage_void) AND seq NOT IN (SELECT voids FROM usage_void) AND NOT EXISTS ("
    "SELECT 1 FROM usage_repriced r JOIN usage_void v ON v.voids = r.event WHERE r.seq = usage.seq)"
)
"""Raw rows that count: neither voided nor a void, nor a correction of the cost of what was voided."""

CORRECTION = "seq IN (SELECT seq FROM usage_repriced)"
"""Raw rows that are no usage, but correct the cost of another."""

# A row under a reservation need not name its delegation. Both sides have an index of their own.
_UNDER = (
    "(delegation = ? OR reservation IN "
    "(SELECT r.id FROM reservation r JOIN delegation d ON d.account = r.account WHERE d.id = ?))"
)


FEW_NAMES: Final = 16
"""Names whose rows are read beside each other, each in order."""


class UsageFilter(msgspec.Struct, frozen=True):
    """Which events; `start_us` inclusive, `end_us` exclusive. None means any.

    With `counting` rows are only of events that count: no voids, nothing voided, no corrections. Sums hold no others.
    """

    visible: Visibility
    agent: str | None = None
    consumer: str | None = None
    task: str | None = None
    model: str | None = None
    outcome: int | None = None
    delegation: str | None = None
    project: str | None = None
    start_us: int | None = None
    end_us: int | None = None
    counting: bool = False


def of_dimensions(query: UsageFilter) -> tuple[list[str], list[Any]]:
    """The conditions on what sums are kept by, and their values; of raw rows and of sums alike."""
    where, values = visible_names(query.visible, ("agent", "consumer"))
    for column, name in (
        ("agent", query.agent),
        ("consumer", query.consumer),
        ("model", query.model),
        ("project", query.project),
    ):
        if name is not None:
            where.append(f"{column} = (SELECT id FROM name WHERE name = ?)")
            values.append(name)
    if query.outcome is not None:
        where.append("outcome = ?")
        values.append(query.outcome)
    return where, values


def of_rows(query: UsageFilter) -> tuple[list[str], list[Any]]:
    """All conditions on raw rows but for those of time, and their values."""
    where, values = of_dimensions(query)
    if query.delegation is not None:
        where.append(_UNDER)
        values += [query.delegation, query.delegation]
    if query.task is not None:
        where = [*(f"+({condition})" for condition in where), OF_TASK]
        values += of_task(query.task)
    if query.counting:
        where += [LIVE, f"NOT ({CORRECTION})"]
    return where, values


def within(column: str, low: int | None, high: int | None) -> tuple[list[str], list[int]]:
    """The conditions of a half-open range, and their values; None leaves a side open."""
    bounds = [(">=", low), ("<", high)]
    given = [(sign, bound) for sign, bound in bounds if bound is not None]
    return [f"{column} {sign} ?" for sign, _ in given], [bound for _, bound in given]


def parties(query: UsageFilter) -> list[Party]:
    """By whose rows a question about single rows is answered best: none where there is a narrower way, or no party."""
    if query.task is not None or query.delegation is not None:
        return []
    for column, name in (("consumer", query.consumer), ("agent", query.agent)):
        if name is not None:
            return [named(column, name)]
    return seen(query.visible)


def seen(visible: Visibility) -> list[Party]:
    """The parties of whose rows a caller may see none but theirs; none where no pattern limits it."""
    admitted = visible_agents(visible)
    return [] if admitted is None else [Party(column, *admitted) for column in SIDES]


def one_by_one(connection: apsw.Connection, whose: list[Party]) -> list[Party]:
    """Parties by each of their names, if these are few: then no rows are sorted that are not asked for."""
    found: list[Party] = []
    for its in whose:
        ids = fetch(connection, f"SELECT id FROM name WHERE id {its.is_one_of} LIMIT ?", (*its.values, FEW_NAMES + 1))
        if len(ids) > FEW_NAMES:
            return whose
        found += [Party(its.column, "= ?", number) for number in ids]
    return found


def in_time(start_us: int | None, end_us: int | None) -> list[Bound]:
    """A half-open range of time as bounds; None leaves a side open."""
    conditions, values = within("{time}", start_us, end_us)
    return [(condition, (value,)) for condition, value in zip(conditions, values, strict=True)]
