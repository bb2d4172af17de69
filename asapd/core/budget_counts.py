"""What the log says of budgets: by how much each counter of a period changed.

Sums of changes come to what a period has counted, in whatever order they are added: what one commit changed is one
entry, and what retention took out of the log is one sum.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from typing import Any, Final

COUNTERS: Final = (
    "end_us",
    "events",
    "unpriced",
    "spent_microusd",
    "reserved_microusd",
    "spent_tokens",
    "reserved_tokens",
    "counts_tasks",
    "tasks_used",
    "tasks_reserved",
    "alerted",
)
"""What a period holds; all of them are 0 before it begins."""

MARKS: Final = ("tasks", "reservations")
"""Sums of marks, modulo 2**128: of the tasks that a period counts, and of the reservations that are held on it."""

_NAMES: Final = COUNTERS + MARKS
_COLUMNS: Final = tuple(name for name in COUNTERS if name != "counts_tasks")
_TASKS: Final = _COLUMNS.index("tasks_used")
_MODULUS: Final = 1 << 128

Key = tuple[int, int]
"""A period: the number of its budget, which is given once, and when it begins."""


def task_mark(task_id: str, used: int, holds: int) -> int:
    """What a task adds to the sum of marks, as it is counted."""
    return _mark(f"task {used} {holds} {task_id}")


def reservation_mark(reservation: str) -> int:
    """What a reservation adds that is held on a period."""
    return _mark(f"reservation {reservation}")


def _mark(text: str) -> int:
    return int.from_bytes(sha256(text.encode()).digest()[:16], "big")


class BudgetChanges:
    """Changes of counters by period, and the budgets that were removed with all their periods."""

    def __init__(self) -> None:
        self.periods: dict[Key, dict[str, int]] = {}
        self.removed: set[int] = set()

    def __bool__(self) -> bool:
        return bool(self.periods or self.removed)

    def clear(self) -> None:
        """Forget all."""
        self.periods.clear()
        self.removed.clear()

    def add(self, key: Key, changes: Mapping[str, int]) -> None:
        """Add what changed of a period."""
        known = self.periods.setdefault(key, {})
        for name, change in changes.items():
            known[name] = known.get(name, 0) + change
            if name in MARKS:
                known[name] %= _MODULUS
            if not known[name]:
                del known[name]
        if not known:
            del self.periods[key]

    def take(self, details: Mapping[str, Any]) -> None:
        """Add what an entry says."""
        self.removed.update(details.get("removed", ()))
        for said in details.get("periods", ()):
            changes = {name: int(said[name], 16) for name in MARKS if name in said}
            changes |= {name: int(said[name]) for name in COUNTERS if name in said}
            self.add((said["budget"], int(said["start_us"])), changes)

    def details(self) -> dict[str, Any]:
        """What an entry is to say."""
        said: dict[str, Any] = {"periods": [_said(key, changes) for key, changes in sorted(self.periods.items())]}
        if self.removed:
            said["removed"] = sorted(self.removed)
        return said

    def of_budgets(self) -> dict[Key, dict[str, int]]:
        """What the periods of all budgets come to that were not removed."""
        return {key: changes for key, changes in self.periods.items() if key[0] not in self.removed}


def _said(key: Key, changes: Mapping[str, int]) -> dict[str, Any]:
    told = {name: f"{value:032x}" if name in MARKS else value for name, value in changes.items()}
    return {"budget": key[0], "start_us": key[1], **told}


def counters(values: Sequence[int | None], *, tasks: int = 0, reservations: int = 0) -> dict[str, int]:
    """A row's counters by name, in the order of `COUNTERS` without `counts_tasks`, with its sums of marks.

    Tasks that are not counted are None.
    """
    return {**changed(BEFORE, values), "tasks": tasks % _MODULUS, "reservations": reservations % _MODULUS}


BEFORE: Final = (0, 0, 0, 0, 0, 0, 0, None, 0, 0)
"""The counters of a period that has not begun."""


def changed(before: Sequence[int | None], after: Sequence[int | None]) -> dict[str, int]:
    """By how much the counters of a row differ, each by its name; those that do."""
    found = {
        name: (now or 0) - (was or 0) for name, was, now in zip(_COLUMNS, before, after, strict=True) if was != now
    }
    if "tasks_used" in found:
        was, now = before[_TASKS], after[_TASKS]
        found["counts_tasks"] = (now is not None) - (was is not None)
    return found


def differences(held: Mapping[str, int], said: Mapping[str, int]) -> Iterable[tuple[str, int, int]]:
    """Each name of which a period holds another value than the log comes to: the name, and both."""
    for name in _NAMES:
        if held.get(name, 0) != said.get(name, 0):
            yield name, held.get(name, 0), said.get(name, 0)
