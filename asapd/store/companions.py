"""Tables whose rows have the number of a row of usage: voids, corrections, and what unknown costs were settled at."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import apsw
import msgspec

from asapd.core.masking import is_masked_form
from asapd.store.erasures import Erasures
from asapd.store.findings import Findings
from asapd.store.rows import fetch
from asapd.store.usage_notes import Says, UsageEntry
from asapd.store.void_kinds import BY_HAND, SUPERSEDED, WITHHELD

Columns = tuple[Any, ...]

_COMPANIONS = {
    "usage_void": "voids, reason, superseded",
    "usage_repriced": "event, was_microusd, ledger",
    "usage_estimate": "microusd",
}
"""Tables whose rows have the number of a row of usage, with what they say of it."""


def _is_void(found: Columns | None, says: Says) -> bool:
    if found is None:
        return False
    voids, reason, kind = found
    said = WITHHELD if says.withheld is True else SUPERSEDED if says.superseded else BY_HAND
    is_kind = says.superseded is msgspec.UNSET or kind == said  # earlier ones do not say
    return voids == says.voids_row and is_kind and is_masked_form(says.reason, reason)


def _is_correction(found: Columns | None, says: Says) -> bool:
    if found is None:
        return False
    event, was_microusd, ledger = found
    in_ledger = bool(ledger) if says.in_ledger is msgspec.UNSET else says.in_ledger  # earlier ones do not say
    return (event, was_microusd, bool(ledger)) == (says.reprices_row, says.was_microusd, in_ledger)


def _is_estimate(found: Columns | None, says: Says) -> bool:
    if says.estimate_microusd is msgspec.UNSET:
        is_paid_for = says.cost_microusd is None and says.reservation is not None
        return found is None or is_paid_for  # earlier ones of an unknown cost under a reservation do not say
    return found == (None if says.estimate_microusd is None else (says.estimate_microusd,))


class Companions:
    """What other tables say of some rows of usage: that they void or correct others, or were settled at an estimate."""

    def __init__(self, connection: apsw.Connection, after: int, through: int) -> None:
        self._connection = connection
        self._found: dict[str, dict[int, Columns]] = {}
        for table, columns in _COMPANIONS.items():
            rows = fetch(
                connection,
                f"SELECT seq, {columns} FROM {table} WHERE seq >= ? AND seq <= ? ORDER BY seq",
                (after + 1, through),
            )
            self._found[table] = {row[0]: row[1:] for row in rows}

    def compare(self, entry: UsageEntry, findings: Findings) -> None:
        """Hold what is said of a row to its entry."""
        says = entry.says
        if not any(self._found.values()) and entry.kind == "usage.recorded" and says.estimate_microusd is msgspec.UNSET:
            return  # most rows have none
        void, correction, estimate = (self._found[table].pop(says.row, None) for table in _COMPANIONS)
        is_so = {
            "usage_void": void is None if entry.kind != "usage.voided" else _is_void(void, says),
            "usage_repriced": correction is None
            if entry.kind != "usage.repriced"
            else _is_correction(correction, says),
            "usage_estimate": _is_estimate(estimate, says),
        }
        for table, is_said in is_so.items():
            if not is_said:
                findings.add(f"usage row {says.row}: {table} does not say of it what entry {entry.seq} says")

    def are_explained(self, erasures: Erasures) -> bool:
        """Whether all that is left is of rows whose entry was erased."""
        return next(self._unexplained(erasures), None) is None

    def settle(self, erasures: Erasures, findings: Findings) -> None:
        """Name what is left and not explained so."""
        for table, seq in self._unexplained(erasures):
            findings.add(f"{table} row {seq}: there is no such row of usage that the log knows of")

    def _unexplained(self, erasures: Erasures) -> Iterator[tuple[str, int]]:
        for table, found in self._found.items():
            for seq, (first, *_) in found.items():
                about = seq if table == "usage_estimate" else first
                # An erasure takes the entries of both; older builds took what an actor did who is called like it.
                is_known = erasures.has_row(seq) and (erasures.has_row(about) or self._is_of(seq, about))
                if not is_known:
                    yield table, seq

    def _is_of(self, seq: int, event: int) -> bool:
        """Whether a row is of the same work as an event: all there is to hold it to where that alone has an entry."""
        rows = fetch(
            self._connection,
            "SELECT DISTINCT tenant, agent, consumer, task_id, timestamp_us FROM usage WHERE seq IN (?, ?)",
            (seq, event),
        )
        return len(rows) == 1


def strays(connection: apsw.Connection, first: int, last: int) -> Iterator[str]:
    """What is said of rows before `first` and behind `last` that are not there."""
    for table in _COMPANIONS:
        rows = fetch(
            connection,
            f"SELECT seq FROM {table} c WHERE (seq < ? OR seq > ?) "
            "AND NOT EXISTS (SELECT 1 FROM usage WHERE usage.seq = c.seq)",
            (first, last),
        )
        for (seq,) in rows:
            yield f"{table} row {seq}: there is no such row of usage"
