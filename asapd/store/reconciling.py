"""Whether everything that was recorded has its entry in the log, says the same as it, and the reverse.

Rows that retention took are told from others by its own entries. So are entries whose content was erased: one that an
erasure names answers for one row of its kind, and any other is a finding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import apsw
import msgspec

from asapd.core.masking import is_masked_form
from asapd.core.row_digest import row_digest
from asapd.core.types import Outcome, format_us
from asapd.core.usage import UsageEvent, content_digest
from asapd.store import ledger_held, usage_days, usage_hours
from asapd.store.companions import Companions, strays
from asapd.store.damaged import unreadable
from asapd.store.erasures import ROW_KINDS, Erasures
from asapd.store.excuses import unattested
from asapd.store.findings import NAMED, Findings, Tally, takes
from asapd.store.reconciling_breaches import reconcile_breaches
from asapd.store.rows import Row, fetch, fetch_one
from asapd.store.usage import COLUMNS
from asapd.store.usage_notes import FIELDS, UsageEntry, read_says

STEP = 2_000
WAITING = 20_000
"""Rows and entries that wait for their other half, which was written in the same commit."""

_PRICE = frozenset({"cost_source", "price_version", "priced_microusd"})
_COLUMNS = ", ".join(COLUMNS)
_OUTCOMES = {outcome.value: outcome.name.lower() for outcome in Outcome}


def reconcile(connection: apsw.Connection, keys: tuple[bytes, ...] = ()) -> tuple[Tally, ...]:
    """Compare usage, tasks, delegations and breaches with the log, and what was erased with what erasures say.

    What explains why something is gone has to be signed by one of the daemon's keys, if any are given.
    """
    # What only grows is read step by step, up to where it ends now; what changes has to be seen at one moment.
    usage, tasks = _compared(connection, "usage", _usage), _compared(connection, "task", _tasks)
    hours, ledger = _compared(connection, "usage_hour", _hours), _compared(connection, "ledger", _ledger)
    connection.execute("SAVEPOINT reconciling")
    try:
        erasures = Erasures(connection)
        return (
            usage,
            tasks,
            hours,
            _compared(connection, "delegation", lambda connection: _delegations(connection, erasures)),
            ledger,
            _compared(connection, "breach", lambda connection: reconcile_breaches(connection, erasures)),
            _days(connection),
            _explained(_erased(erasures), connection, keys),
        )
    finally:
        connection.execute("RELEASE reconciling")


def _compared(connection: apsw.Connection, table: str, compare: Callable[[apsw.Connection], Tally]) -> Tally:
    """A comparison, or in its place which rows cannot be read, so that one changed byte hides behind no crash."""
    try:
        return compare(connection)
    except (ValueError, ArithmeticError, LookupError, TypeError, AttributeError) as error:
        findings = Findings()
        for finding in unreadable(connection, table):
            findings.add(finding)
        if not findings.count:
            findings.add(f"{table}: the rows cannot be compared with the log, {type(error).__name__}: {error}")
        return Tally(table, 0, 0, findings=findings.count, named=tuple(findings.named))


# --- usage


class _Interned:
    """The names behind the numbers of a wide table."""

    def __init__(self, connection: apsw.Connection) -> None:
        self._connection = connection
        self._names: dict[int, str | None] = {}

    def __getitem__(self, number: int) -> str | None:
        if number not in self._names:
            row = fetch_one(self._connection, "SELECT name FROM name WHERE id = ?", (number,))
            self._names[number] = None if row is None else row[0]
        return self._names[number]


def _usage(connection: apsw.Connection) -> Tally:
    findings, names = Findings(), _Interned(connection)
    # In one statement, so that rows and entries are those of one moment.
    entries_through, rows_from, rows_through = fetch(
        connection, "SELECT (SELECT max(seq) FROM audit), (SELECT min(seq) FROM usage), (SELECT max(seq) FROM usage)"
    )[0]
    retention, erasures = _Retention(connection), Erasures(connection)
    entries = erased = rows = at_entry = 0
    numbered = erasures.last_row
    # A forged row may stand before the first that has a number of ours.
    at_row = min(rows_from or 0, 1) - 1
    without_row: dict[int, UsageEntry] = {}
    without_entry: dict[int, str] = {}
    while at_entry < (entries_through or 0):
        found = fetch(
            connection,
            "SELECT seq, event_type, subject, actor, timestamp_us, details FROM audit "
            f"WHERE seq > ? AND seq <= ? AND event_type IN {ROW_KINDS} ORDER BY seq LIMIT ?",
            (at_entry, entries_through, STEP),
        )
        for seq, kind, subject, actor, timestamp_us, details in found:
            if details is None:
                erased += 1
                continue
            entries += 1
            says = read_says(details)
            if says.row in without_row:
                findings.add(f"entry {seq} ({kind}) is of usage row {says.row}, and so is another")
            numbered = max(numbered, says.row)
            without_row[says.row] = UsageEntry(seq, kind, subject, actor, timestamp_us, says)
        is_last = len(found) < STEP
        at_entry = entries_through if is_last else found[-1][0]
        through = (rows_through or 0) if is_last else max(without_row, default=at_row)
        companions = Companions(connection, at_row, through)
        for row in _rows(connection, "usage", _COLUMNS, at_row, through):
            rows += 1
            entry = without_row.pop(row[0], None)
            if entry is not None:
                _compare(entry, row, names, findings)
                companions.compare(entry, findings)
            elif not erasures.has_row(row[0]):
                without_entry[row[0]] = row[1]
            if len(without_entry) > WAITING:
                _settle_rows(connection, without_entry, WAITING // 2, findings)
        companions.settle(erasures, findings)
        at_row = max(at_row, through)
        for number in without_entry.keys() & without_row.keys():
            del without_entry[number], without_row[number]
        # A row and its entry are written together: what is so far behind has no other half.
        retention.settle(without_row, at_row - WAITING, findings)
    retention.settle(without_row, None, findings)
    _settle_rows(connection, without_entry, 0, findings)
    for stray in strays(connection, min(rows_from or 0, 1), rows_through or 0):
        findings.add(stray)
    _count_gone(connection, "usage", numbered, retention.taken + retention.missing, findings)
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
    """What retention says it took: `taken` rows, from before a time.

    `count` entries are of rows that it took, `missing` of rows that nobody says to have taken.
    """

    def __init__(self, connection: apsw.Connection) -> None:
        self.count = self.missing = self.taken = self._before_us = 0
        for (details,) in fetch(
            connection, "SELECT details FROM audit WHERE event_type = 'retention.applied' AND subject = 'usage'"
        ):
            if details is not None:
                applied = msgspec.json.decode(details)
                self._before_us = max(self._before_us, applied["before_us"])
                self.taken += applied["count"]

    def settle(self, without_row: dict[int, UsageEntry], before_row: int | None, findings: Findings) -> None:
        """Give up on entries of rows from before one, or with None on all: retention took them, or they are missing."""
        for number in sorted(number for number in without_row if before_row is None or number < before_row):
            entry = without_row.pop(number)
            if _time_of(entry) < self._before_us and self.count < self.taken:
                self.count += 1
            else:
                self.missing += 1
                findings.add(f"entry {entry.seq} ({entry.kind} {entry.subject}): usage row {number} is not there")


def _count_gone(connection: apsw.Connection, table: str, numbered: int, explained: int, findings: Findings) -> None:
    """Rows are numbered without a hole: one that is gone is missed even where its entry has lost its content."""
    there = fetch(connection, f"SELECT count(*) FROM {table} WHERE seq BETWEEN 1 AND ?", (numbered,))[0][0]
    gone = numbered - there - explained
    if gone > 0:
        findings.add(f"{gone} of the rows 1 to {numbered} of {table} are not there, and nobody says who took them")


def _rows(connection: apsw.Connection, table: str, columns: str, after: int, through: int) -> Iterator[Row]:
    while after < through:
        found = fetch(
            connection,
            f"SELECT {columns} FROM {table} WHERE seq >= ? AND seq <= ? ORDER BY seq LIMIT ?",
            (after + 1, through, STEP),
        )
        yield from found
        after = found[-1][0] if len(found) == STEP else through


def _time_of(entry: UsageEntry) -> int:
    said = entry.says.timestamp_us
    return said if isinstance(said, int) else entry.timestamp_us


def _compare(entry: UsageEntry, columns: Row, names: _Interned, findings: Findings) -> None:
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
    elif entry.kind == "usage.recorded" and not _is_content(row):
        findings.add(f"{where}: is not what was reported, by the digest that entry {entry.seq} has of it")


def _is_content(row: dict[str, Any]) -> bool:
    """Whether a row holds what its digest was made of, before the daemon named the event or attributed it."""
    fields: dict[str, Any] = {
        name: row[name] for name in UsageEvent.__struct_fields__ if name not in {"partial", "labels"}
    }
    labels = None if row["labels"] is None else msgspec.json.decode(row["labels"])
    ids = {row["id"], ""} if row["id"].startswith("use_") else {row["id"]}
    return any(
        content_digest(
            UsageEvent(**{**fields, "id": event_id, "delegation": given}, partial=bool(row["partial"]), labels=labels)
        )
        == row["content"]
        for event_id in ids
        for given in {row["delegation"], None}
    )


# --- tasks


def _tasks(connection: apsw.Connection) -> Tally:
    findings, names = Findings(), _Interned(connection)
    entries_through, rows_from, rows_through, numbered = fetch(
        connection,
        "SELECT (SELECT max(seq) FROM audit), (SELECT min(seq) FROM task), (SELECT max(seq) FROM task), "
        "(SELECT seq FROM sqlite_sequence WHERE name = 'task')",
    )[0]
    said: dict[tuple[Any, ...], tuple[int, int, dict[str, Any]]] = {}
    entries = erased = rows = newest = 0
    for seq, kind, subject, details, at_us in fetch(
        connection,
        "SELECT seq, event_type, subject, details, timestamp_us FROM audit WHERE seq <= ? AND event_type IN "
        "('task.started', 'task.completed', 'task.failed', 'task.abandoned') ORDER BY seq",
        (entries_through or 0,),
    ):
        if details is None:
            erased += 1
            continue
        entries += 1
        told = msgspec.json.decode(details)
        key = (
            told["tenant"],
            told["agent"],
            told["consumer"],
            subject,
            kind.removeprefix("task."),
            told["timestamp_us"],
        )
        said[key] = (seq, at_us, told)
    erasures = Erasures(connection)
    gone = {state: erasures.times(f"task.{state}") for state in ("started", "completed", "failed", "abandoned")}
    columns = "seq, tenant, agent, consumer, task_id, state, timestamp_us, committed_us, error, parent_task_id"
    for seq, tenant, agent, consumer, task_id, state, timestamp_us, committed_us, error, parent in _rows(
        connection, "task", columns, min(rows_from or 0, 1) - 1, rows_through or 0
    ):
        rows += 1
        key = (names[tenant], names[agent], names[consumer], task_id, state, timestamp_us)
        found = said.pop(key, None)
        if found is None:
            if not takes(gone.get(state), committed_us):
                findings.add(f"task row {seq} ({task_id}, {state}) has no entry in the log that says the same")
            continue
        number, at_us, told = found
        where = f"task row {seq} ({task_id}, {state})"
        is_said = "error" in told  # earlier ones of tasks that were given up say neither
        if is_said and not is_masked_form(told["error"], error):
            findings.add(f"{where}: error is {error!r}, and entry {number} says {told['error']!r}")
        if is_said and told.get("parent_task_id") != parent:
            findings.add(
                f"{where}: parent_task_id is {parent!r}, and entry {number} says {told.get('parent_task_id')!r}"
            )
        if at_us != committed_us or number < newest:
            findings.add(f"{where}: was not written where entry {number} was")
        newest = max(newest, number)
    for key, (seq, _, _) in said.items():
        findings.add(f"entry {seq} (task.{key[4]} {key[3]}): there is no such row in task")
    _count_gone(connection, "task", max(rows_through or 0, numbered or 0), len(said), findings)
    return Tally("task", rows, entries, 0, erased, findings.count, tuple(findings.named))


# --- sums by hour


def _hours(connection: apsw.Connection) -> Tally:
    findings = Findings()
    rows, sealed, waiting = usage_hours.compare(connection, findings.add)
    return Tally("usage_hour", rows, sealed, waiting, 0, findings.count, tuple(findings.named))


# --- the ledger


def _ledger(connection: apsw.Connection) -> Tally:
    findings = Findings()
    found = ledger_held.compare(connection, findings.add)
    return Tally("ledger", found.rows, found.entries, found.retired, 0, findings.count, tuple(findings.named))


# --- delegations


def _delegations(connection: apsw.Connection, erasures: Erasures) -> Tally:
    findings = Findings()
    made_at, revoked_at = erasures.times("delegation.created"), erasures.times("delegation.revoked")
    created: dict[str, tuple[int, int, dict[str, Any]]] = {}
    revoked: dict[str, list[tuple[int, str, str | None]]] = {}
    entries = erased = rows = 0
    delegations = fetch(
        connection,
        "SELECT id, delegator, delegate, scopes, max_cost_microusd, max_tasks, expires_us, digest, revoked_us, "
        "registered_us, revoked_by, revoke_reason, CASE WHEN parent IS NOT NULL "
        "THEN coalesce((SELECT id FROM delegation above WHERE above.account = d.parent), '') END, "
        "tenant, jti, issued_us, not_before_us, token "
        "FROM delegation d ORDER BY account",
    )
    for seq, kind, subject, details, at_us, actor in fetch(
        connection,
        "SELECT seq, event_type, subject, details, timestamp_us, actor FROM audit "
        "WHERE event_type IN ('delegation.created', 'delegation.revoked') ORDER BY seq",
    ):
        if details is None:
            erased += 1
        elif kind == "delegation.created":
            entries += 1
            created[subject] = (seq, at_us, msgspec.json.decode(details))
        elif (told := msgspec.json.decode(details))["id"] is not None:  # None: of a token that nobody had shown here
            revoked.setdefault(subject, []).append((at_us, actor, told["reason"]))
    for (
        public_id,
        delegator,
        delegate,
        scopes,
        cost,
        tasks,
        expires_us,
        digest,
        revoked_us,
        made_us,
        *more,
    ) in delegations:
        rows += 1
        revoked_by, why, parent, *unsaid = more
        was_revoked = public_id in revoked or takes(revoked_at, revoked_us)
        if (revoked_us is not None) != was_revoked:
            state = "revoked" if revoked_us is not None else "not revoked"
            findings.add(f"delegation {public_id} is {state}, and the log says otherwise")
        elif public_id in revoked and not any(
            (at_us, actor) == (revoked_us, revoked_by) and is_masked_form(reason, why)
            for at_us, actor, reason in revoked[public_id]
        ):
            findings.add(f"delegation {public_id}: when, by whom and why it was revoked is not what the log says")
        elif revoked_us is None and (revoked_by, why) != (None, None):
            findings.add(f"delegation {public_id} says who revoked it, and nobody did")
        found = created.pop(public_id, None)
        if found is None:
            if not takes(made_at, made_us):
                findings.add(f"delegation {public_id} has no entry in the log")
            continue
        seq, at_us, told = found
        if made_us != at_us:
            findings.add(f"delegation {public_id}: registered_us is {made_us}, and entry {seq} is of {at_us}")
        if "row_digest" in told and told["row_digest"] != row_digest(unsaid):
            findings.add(
                f"delegation {public_id}: is not what was registered, by the digest that entry {seq} has of it"
            )
        is_row = {
            "delegator": delegator,
            "delegate": delegate,
            "scopes": msgspec.json.decode(scopes),
            "max_cost_microusd": cost,
            "max_tasks": tasks,
            "parent": parent,
            "expires_at": format_us(expires_us),
            "digest": digest.hex(),
        }
        if "tenant" in told:  # which entries of older versions do not say
            is_row["tenant"] = unsaid[0]
        for field, value in is_row.items():
            if told.get(field) != value:
                findings.add(f"delegation {public_id}: {field} is {value!r}, and entry {seq} says {told.get(field)!r}")
    for public_id, (seq, _, _) in created.items():
        # Written while this ran, or gone: which of them, a second look says.
        if fetch_one(connection, "SELECT 1 FROM delegation WHERE id = ?", (public_id,)) is None:
            findings.add(f"entry {seq} (delegation.created {public_id}): there is no such delegation")
    return Tally("delegation", rows, entries, 0, erased, findings.count, tuple(findings.named))


# --- sums of days


def _days(connection: apsw.Connection) -> Tally:
    findings = Findings()
    rows = usage_days.compare(connection, findings.add)
    return Tally("usage_day", rows, 0, findings=findings.count, named=tuple(findings.named))


# --- erased entries


def _explained(erased: Tally, connection: apsw.Connection, keys: tuple[bytes, ...]) -> Tally:
    """A tally of what is gone, with what was explained by somebody else than the daemon."""
    false = list(unattested(connection, keys))
    named = (*false, *erased.named)[:NAMED]
    return msgspec.structs.replace(erased, findings=erased.findings + len(false), named=named)


def _erased(erasures: Erasures) -> Tally:
    findings, rows, retired = Findings(), 0, 0
    for seq, kind in erasures.without_content():
        rows += 1
        retired += erasures.is_retired(seq)
        if not erasures.is_explained(seq):
            findings.add(f"entry {seq} ({kind}) has lost its content, and no erasure says so")
    return Tally("erasure", rows, erasures.count, retired, rows - retired, findings.count, tuple(findings.named))
