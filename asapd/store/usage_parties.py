"""The rows of agents and of consumers, by `usage_party`, in which those of each are in the order of their times."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from asapd.store.usage_behind import SIDES, THROUGH


class Party(NamedTuple):
    """Whose rows: those that have one of some numbers in a column of `SIDES`, as SQL compares them."""

    column: str
    is_one_of: str
    """Such as `= (SELECT id FROM name WHERE name = ?)`."""
    values: Sequence[Any]

    @property
    def of_entries(self) -> str:
        """The condition on `usage_party`."""
        return f"side = {SIDES.index(self.column)} AND party {self.is_one_of}"

    @property
    def of_rows(self) -> str:
        """The condition on rows."""
        return f"+{self.column} {self.is_one_of}"


def named(column: str, name: str) -> Party:
    """The rows that have a name in a column."""
    return Party(column, "= (SELECT id FROM name WHERE name = ?)", (name,))


Bound = tuple[str, Sequence[int]]
"""A condition on when rows are, in which `{time}` and `{row}` stand for the columns, and its values."""


def held_to(bounds: Sequence[Bound], time: str = "timestamp_us", row: str = "seq") -> list[str]:
    """Bounds as conditions on columns."""
    return [condition.format(time=time, row=row) for condition, _ in bounds]


def _whose(parties: Sequence[Party]) -> tuple[str, list[Any]]:
    condition = " OR ".join(its.of_rows for its in parties)
    return f"({condition})", [value for its in parties for value in its.values]


def rows_of(parties: Sequence[Party], bounds: Sequence[Bound] = ()) -> tuple[list[str], list[Any]]:
    """The conditions that a row is of any of some parties and within bounds, and their values.

    Other conditions that an index could answer have a `+` before them: SQLite takes theirs for the narrower.
    """
    limits = [value for _, values in bounds for value in values]
    entries = held_to(bounds, "time_us", "row")
    found = [f"SELECT row FROM usage_party WHERE {' AND '.join([its.of_entries, *entries])}" for its in parties]
    whose, numbers = _whose(parties)
    found.append(f"SELECT seq FROM usage WHERE seq > {THROUGH} AND {whose}")
    conditions = [f"seq IN ({' UNION ALL '.join(found)})", whose, *held_to(bounds, "+timestamp_us", "+seq")]
    values = [value for its in parties for value in (*its.values, *limits)]
    return conditions, [*values, *numbers, *numbers, *limits]


def in_order(
    parties: Sequence[Party],
    bounds: Sequence[Bound] = (),
    where: Sequence[str] = (),
    values: Sequence[Any] = (),
    *,
    descending: bool = False,
) -> tuple[str, list[Any]]:
    """A query for `time_us` and `row` of the rows of any of some parties, in their order, each once, and its values.

    `where` are more conditions on the rows, with their `values`. Of one name no more rows are read than are asked for.
    """
    direction = "DESC" if descending else "ASC"
    limits = [value for _, its in bounds for value in its]
    unindexed = [f"+({condition})" for condition in where]
    parts: list[str] = []
    bound: list[Any] = []
    for its in parties:
        # What an entry says is held to its row: one that somebody put there finds nothing.
        own = [its.of_rows, "+timestamp_us = time_us"]
        conditions = [its.of_entries, *held_to(bounds, "time_us", "row"), *own, *unindexed]
        parts.append(
            "SELECT time_us, row FROM usage_party CROSS JOIN usage ON usage.seq = usage_party.row "
            f"WHERE {' AND '.join(conditions)}"
        )
        bound += [*its.values, *limits, *its.values, *values]
    whose, numbers = _whose(parties)
    conditions = [f"seq > {THROUGH}", whose, *held_to(bounds, "+timestamp_us", "+seq"), *unindexed]
    # The index of time would have all rows in order, of which the newest few are wanted.
    parts.append(f"SELECT timestamp_us, seq FROM usage NOT INDEXED WHERE {' AND '.join(conditions)}")
    query = f"{' UNION '.join(parts)} ORDER BY time_us {direction}, row {direction}"
    return query, [*bound, *numbers, *limits, *values]
