"""Whether every row of usage has its entry in the log, which says the same, and the reverse.

Rows that retention took are told from others by its own entries.
"""

from __future__ import annotations

from typing import Any

import apsw
import msgspec

from asapd.core.row_digest import row_digest
from asapd.core.types import Outcome
from asapd.core.usage import ASSUMED_ACTION, UsageEvent, content_digest
from asapd.store.companions import Companions, strays
from asapd.store.erasures import ROW_KINDS, Erasures, is_erased_since, newest
from asapd.store.findings import Findings, Tally
from asapd.store.numbered_rows import Names, count_gone, rows_of
from asapd.store.prepared import COLUMNS
from asapd.store.rows import Row, fetch, one_moment
from asapd.store.usage_notes import FIELDS, UsageEntry, read_says

STEP = 2_000
WAITING = 20_000
"""Rows and entries that wait for their other half, which was written in the same commit."""

_PRICE = frozenset({"cost_source", "price_version", "priced_microusd"})
_COLUMNS = ", ".join(COLUMNS)
_OUTCOMES = {outcome.value: outcome.name.lower() for outcome in Outcome}


def reconcile_usage(connection: apsw.Connection) -> Tally:
    """Compare every row of usage with its entry, and the reverse."""
    findings, names = Findings(), Names(connection)
    begun = newest(connection)
    retention, erasures = _Retention(connection), Erasures(connection)
    entries = erased = rows = at_entry = numbered = 0
    # A forged row may stand before the first that has a number of ours.
    first = min(fetch(connection, "SELECT min(seq) FROM usage")[0][0] or 0, 1)
    at_row = first - 1
    without_row: dict[int, UsageEntry] = {}
    without_entry: dict[int, str] = {}
    is_last = False
    while not is_last:
        # Reports, retention and erasures go on meanwhile: what is laid side by side is of one moment, and so is the
        # last of it with what is counted in the end.
        with one_moment(connection):
            found = fetch(
                connection,
                "SELECT seq, event_type, subject, actor, timestamp_us, details FROM audit "
                f"WHERE seq > ? AND event_type IN {ROW_KINDS} ORDER BY seq LIMIT ?",
                (at_entry, STEP),
            )
            for seq, kind, subject, actor, timestamp_us, details in found:
                at_entry = seq
                if details is None:
                    erased += 1
                    continue
                entries += 1
                try:
                    says = read_says(details)
                except ValueError as error:
                    findings.add(f"usage: entry {seq} ({kind} {subject}) is none of asapd's, {error}")
                    continue
                if says.row in without_row:
                    findings.add(f"entry {seq} ({kind}) is of usage row {says.row}, and so is another")
                numbered = max(numbered, says.row)
                without_row[says.row] = UsageEntry(seq, kind, subject, actor, timestamp_us, says)
            is_last = len(found) < STEP
            if is_last and is_erased_since(connection, begun):
                erasures = Erasures(connection)
            last_row = fetch(connection, "SELECT max(seq) FROM usage")[0][0] or 0
            through = last_row if is_last else max(without_row, default=at_row)
            companions = Companions(connection, at_row, through)
            for row in rows_of(connection, "usage", _COLUMNS, at_row, through):
                rows += 1
                entry = without_row.pop(row[0], None)
                if entry is not None:
                    _compare(connection, entry, row, names, findings)
                    companions.compare(entry, findings)
                elif not erasures.has_row(row[0]):
                    without_entry[row[0]] = row[1]
                if len(without_entry) > WAITING:
                    _settle_rows(connection, without_entry, WAITING // 2, findings)
            if not companions.are_explained(erasures):
                erasures = Erasures(connection)
            companions.settle(erasures, findings)
            at_row = max(at_row, through)
            for number in without_entry.keys() & without_row.keys():
                del without_entry[number], without_row[number]
            if not is_last:
                # A row and its entry are written together: what is so far behind has no other half.
                retention.settle(without_row, at_row - WAITING, findings)
                continue
            retention.read()
            retention.settle(without_row, None, findings)
            _settle_rows(connection, without_entry, 0, findings)
            for stray in strays(connection, first, last_row):
                findings.add(stray)
            count_gone(
                connection, "usage", max(numbered, erasures.last_row), retention.taken + retention.missing, findings
            )
    return Tally("usage", rows, entries, retention.count, erased, findings.count, tuple(findings.named))


def _settle_rows(connection: apsw.Connection, without_entry: dict[int, str], keep: int, findings: Findings) -> None:
    """Give up on the oldest rows without an entry, all but some."""
    given_up = sorted(without_entry)[: len(without_entry) - keep]
    if not given_up:
        return
    # Read again: what was erased while this ran is explained by then.
    erasures = Erasures(connection)
    for number in given_up:
        row_id = without_entry.pop(number)
        if not erasures.has_row(number):
            findings.add(f"usage row {number} ({row_id}) has no entry in the log")


class _Retention:
    """What retention says it took: `taken` rows, the oldest there were.

    `count` entries are of rows that it took, `missing` of rows that nobody says to have taken.
    """

    def __init__(self, connection: apsw.Connection) -> None:
        self._connection = connection
        self.count = self.missing = self.taken = self._before_us = 0
        self._last_us = -(2**63)
        self.read()

    def read(self) -> None:
        """Read what was taken until now."""
        self.taken = 0
        for (details,) in fetch(
            self._connection, "SELECT details FROM audit WHERE event_type = 'retention.applied' AND subject = 'usage'"
        ):
            if details is not None:
                applied = msgspec.json.decode(details)
                self._before_us = max(self._before_us, applied["before_us"])
                self._last_us = max(self._last_us, applied.get("last_timestamp_us", applied["before_us"]))
                self.taken += applied["count"]

    def settle(self, without_row: dict[int, UsageEntry], before_row: int | None, findings: Findings) -> None:
        """Give up on entries of rows from before one, or with None on all: retention took them, or they are missing."""
        given_up = sorted(number for number in without_row if before_row is None or number < before_row)
        is_read = False
        for number in given_up:
            entry = without_row.pop(number)
            if not is_read and not self._explains(entry):
                self.read()
                is_read = True
            if self._explains(entry):
                self.count += 1
                continue
            self.missing += 1
            # Which of those that are as old retention took it does not say.
            which = f", or another: retention took {self.taken} rows, and more are gone" if self._is_old(entry) else ""
            findings.add(f"entry {entry.seq} ({entry.kind} {entry.subject}): usage row {number} is not there{which}")

    def _explains(self, entry: UsageEntry) -> bool:
        return self._is_old(entry) and self.count < self.taken

    def _is_old(self, entry: UsageEntry) -> bool:
        """Whether retention went as far as an event; earlier entries do not say of what time it was."""
        said = entry.says.timestamp_us
        return said <= self._last_us if isinstance(said, int) else entry.timestamp_us < self._before_us


def _compare(connection: apsw.Connection, entry: UsageEntry, columns: Row, names: Names, findings: Findings) -> None:
    row: dict[str, Any] = dict(zip(COLUMNS, columns, strict=True))
    where = f"usage row {row['seq']} ({row['id']})"
    for name in ("tenant", "source", "agent", "consumer", "model", "provider", "project"):
        row[name] = names[row[name]]
    shown = {**row, "content": row["content"].hex(), "outcome": _OUTCOMES.get(row["outcome"])}
    # An entry leaves out what its cost has not; one from before these were said leaves out all three of any cost.
    is_price_said = entry.says.cost_source is not msgspec.UNSET or entry.says.cost_microusd is None
    for field in FIELDS:
        said = getattr(entry.says, field)
        if said is msgspec.UNSET and is_price_said and field in _PRICE:
            said = None
        if field in {"cost_microusd", "priced_microusd"} and entry.kind == "usage.voided" and isinstance(said, int):
            said = -said  # the entry says what the event had cost
        if said is not msgspec.UNSET and said != shown[field]:
            findings.add(f"{where}: {field} is {shown[field]!r}, and entry {entry.seq} says {said!r}")
            return
    if (row["id"], row["reported_by"], row["committed_us"]) != (entry.subject, entry.actor, entry.timestamp_us):
        findings.add(f"{where}: id, reporter or time of the commit is not what entry {entry.seq} says")
    elif entry.says.row_digest is not msgspec.UNSET and entry.says.row_digest != row_digest(columns):
        findings.add(f"{where}: is not what was written, by the digest that entry {entry.seq} has of it")
    elif entry.kind == "usage.recorded" and not (
        _is_content(row, entry, {row["delegation"], None})
        or _is_content(row, entry, _called(connection, row["delegation"]))
    ):
        findings.add(f"{where}: is not what was reported, by the digest that entry {entry.seq} has of it")


def _called(connection: apsw.Connection, delegation: str | None) -> set[str | None]:
    """What a delegation is called by its token, as an event may say that came with it."""
    return {jti for (jti,) in fetch(connection, "SELECT jti FROM delegation WHERE id = ?", (delegation,))}


def _is_content(row: dict[str, Any], entry: UsageEntry, delegations: set[str | None]) -> bool:
    """Whether a row holds what its digest was made of, before the daemon named the event or attributed it.

    Nor had it given it the action of its reservation, which the entry says then.
    """
    fields: dict[str, Any] = {name: row[name] for name in UsageEvent.__struct_fields__ if name in row}
    del fields["partial"], fields["labels"]
    if entry.says.action is not msgspec.UNSET:
        fields["action"] = ASSUMED_ACTION
    labels = None if row["labels"] is None else msgspec.json.decode(row["labels"])
    ids = {row["id"], ""} if row["id"].startswith("use_") else {row["id"]}
    return any(
        content_digest(
            UsageEvent(**{**fields, "id": event_id, "delegation": given}, partial=bool(row["partial"]), labels=labels)
        )
        == row["content"]
        for event_id in ids
        for given in delegations
    )
