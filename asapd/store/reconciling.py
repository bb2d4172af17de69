"""Whether everything that was recorded has its entry in the log, says the same as it, and the reverse.

Rows that retention took are told from others by its own entries. So are entries whose content was erased: one that an
erasure names answers for one row of its kind, and any other is a finding.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import apsw
import msgspec

from asapd.core.types import Outcome, format_us
from asapd.core.usage import UsageEvent, content_digest
from asapd.store import usage_days
from asapd.store.damaged import unreadable
from asapd.store.erasures import ROW_KINDS, Erasures
from asapd.store.rows import Row, fetch, fetch_one

STEP = 2_000
WAITING = 20_000
"""Rows and entries that wait for their other half, which was written in the same commit."""
NAMED = 20
"""Findings that are named; the rest are counted."""


class Tally(msgspec.Struct, frozen=True):
    """What was compared of one table; `findings` counts what is wrong, `named` says it of the first."""

    table: str
    rows: int
    entries: int
    retired: int = 0
    erased: int = 0
    findings: int = 0
    named: tuple[str, ...] = ()


class _Findings:
    """Counts, and keeps the first."""

    def __init__(self) -> None:
        self.count = 0
        self.named: list[str] = []

    def add(self, finding: str) -> None:
        self.count += 1
        if len(self.named) < NAMED:
            self.named.append(finding)


def reconcile(connection: apsw.Connection) -> tuple[Tally, ...]:
    """Compare usage, tasks, delegations and breaches with the log, and what was erased with what erasures say."""
    # What only grows is read step by step, up to where it ends now; what changes has to be seen at one moment.
    usage, tasks = _compared(connection, "usage", _usage), _compared(connection, "task", _tasks)
    connection.execute("SAVEPOINT reconciling")
    try:
        erasures = Erasures(connection)
        return (
            usage,
            tasks,
            _compared(connection, "delegation", lambda connection: _delegations(connection, erasures)),
            _compared(connection, "breach", lambda connection: _breaches(connection, erasures)),
            _days(connection),
            _erased(erasures),
        )
    finally:
        connection.execute("RELEASE reconciling")


def _compared(connection: apsw.Connection, table: str, compare: Callable[[apsw.Connection], Tally]) -> Tally:
    """A comparison, or in its place which rows cannot be read, so that one changed byte hides behind no crash."""
    try:
        return compare(connection)
    except (ValueError, ArithmeticError, LookupError, TypeError, AttributeError) as error:
        findings = _Findings()
        for finding in unreadable(connection, table):
            findings.add(finding)
        if not findings.count:
            findings.add(f"{table}: the rows cannot be compared with the log, {type(error).__name__}: {error}")
        return Tally(table, 0, 0, findings=findings.count, named=tuple(findings.named))


# --- usage


class _Says(msgspec.Struct, frozen=True):
    """What an entry says of a row of usage; what it does not say is UNSET."""

    row: int
    agent: Any = msgspec.UNSET
    api_calls: Any = msgspec.UNSET
    consumer: Any = msgspec.UNSET
    content: Any = msgspec.UNSET
    cost_microusd: Any = msgspec.UNSET
    delegation: Any = msgspec.UNSET
    duration_ms: Any = msgspec.UNSET
    flags: Any = msgspec.UNSET
    outcome: Any = msgspec.UNSET
    reservation: Any = msgspec.UNSET
    task_id: Any = msgspec.UNSET
    tenant: Any = msgspec.UNSET
    timestamp_us: Any = msgspec.UNSET
    tokens_in: Any = msgspec.UNSET
    tokens_out: Any = msgspec.UNSET


_read_says = msgspec.json.Decoder(_Says)
_FIELDS = _Says.__struct_fields__[1:]
_COLUMNS = (
    "seq, id, tenant, source, source_seq, agent, consumer, task_id, timestamp_us, tokens_in, tokens_out, "
    "cached_tokens_in, cache_write_tokens, reasoning_tokens, duration_ms, api_calls, outcome, partial, error, model, "
    "provider, project, cost_microusd, reported_microusd, delegation, reservation, action, flags, parent_task_id, "
    "labels, trace_id, content, committed_us, reported_by, cache_write_1h_tokens"
)
_NAMES = _COLUMNS.split(", ")
_OUTCOMES = {outcome.value: outcome.name.lower() for outcome in Outcome}


class _Entry(msgspec.Struct, frozen=True):
    seq: int
    kind: str
    subject: str
    actor: str
    timestamp_us: int
    says: _Says


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
    findings, names = _Findings(), _Interned(connection)
    # In one statement, so that rows and entries are those of one moment.
    entries_through, rows_from, rows_through = fetch(
        connection, "SELECT (SELECT max(seq) FROM audit), (SELECT min(seq) FROM usage), (SELECT max(seq) FROM usage)"
    )[0]
    retention, erasures = _Retention(connection), Erasures(connection)
    entries = erased = rows = at_entry = 0
    # A forged row may stand before the first that has a number of ours.
    at_row = min(rows_from or 0, 1) - 1
    without_row: dict[int, _Entry] = {}
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
            says = _read_says.decode(details)
            if says.row in without_row:
                findings.add(f"entry {seq} ({kind}) is of usage row {says.row}, and so is another")
            without_row[says.row] = _Entry(seq, kind, subject, actor, timestamp_us, says)
        is_last = len(found) < STEP
        at_entry = entries_through if is_last else found[-1][0]
        through = (rows_through or 0) if is_last else max(without_row, default=at_row)
        for row in _rows(connection, "usage", _COLUMNS, at_row, through):
            rows += 1
            entry = without_row.pop(row[0], None)
            if entry is not None:
                _compare(entry, dict(zip(_NAMES, row, strict=True)), names, findings)
            elif not erasures.has_row(row[0]):
                without_entry[row[0]] = row[1]
            if len(without_entry) > WAITING:
                _settle_rows(connection, without_entry, WAITING // 2, findings)
        at_row = max(at_row, through)
        for number in without_entry.keys() & without_row.keys():
            del without_entry[number], without_row[number]
        # A row and its entry are written together: what is so far behind has no other half.
        retention.settle(without_row, at_row - WAITING, findings)
    retention.settle(without_row, None, findings)
    _settle_rows(connection, without_entry, 0, findings)
    return Tally("usage", rows, entries, retention.count, erased, findings.count, tuple(findings.named))


def _settle_rows(connection: apsw.Connection, without_entry: dict[int, str], keep: int, findings: _Findings) -> None:
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
    """What retention says it took: so many rows, from before a time. `count` entries are of rows that it took."""

    def __init__(self, connection: apsw.Connection) -> None:
        self.count = self._taken = self._before_us = 0
        for (details,) in fetch(
            connection, "SELECT details FROM audit WHERE event_type = 'retention.applied' AND subject = 'usage'"
        ):
            if details is not None:
                applied = msgspec.json.decode(details)
                self._before_us = max(self._before_us, applied["before_us"])
                self._taken += applied["count"]

    def settle(self, without_row: dict[int, _Entry], before_row: int | None, findings: _Findings) -> None:
        """Give up on entries of rows from before one, or with None on all: retention took them, or they are missing."""
        for number in sorted(number for number in without_row if before_row is None or number < before_row):
            entry = without_row.pop(number)
            if _time_of(entry) < self._before_us and self.count < self._taken:
                self.count += 1
            else:
                findings.add(f"entry {entry.seq} ({entry.kind} {entry.subject}): usage row {number} is not there")


def _rows(connection: apsw.Connection, table: str, columns: str, after: int, through: int) -> Iterator[Row]:
    while after < through:
        found = fetch(
            connection,
            f"SELECT {columns} FROM {table} WHERE seq >= ? AND seq <= ? ORDER BY seq LIMIT ?",
            (after + 1, through, STEP),
        )
        yield from found
        after = found[-1][0] if len(found) == STEP else through


def _time_of(entry: _Entry) -> int:
    said = entry.says.timestamp_us
    return said if isinstance(said, int) else entry.timestamp_us


def _compare(entry: _Entry, row: dict[str, Any], names: _Interned, findings: _Findings) -> None:
    where = f"usage row {row['seq']} ({row['id']})"
    for name in ("tenant", "source", "agent", "consumer", "model", "provider", "project"):
        row[name] = names[row[name]]
    shown = {**row, "content": row["content"].hex(), "outcome": _OUTCOMES.get(row["outcome"])}
    for field in _FIELDS:
        said = getattr(entry.says, field)
        if field == "cost_microusd" and entry.kind == "usage.voided" and isinstance(said, int):
            said = -said  # the entry says what the event had cost
        if said is not msgspec.UNSET and said != shown[field]:
            findings.add(f"{where}: {field} is {shown[field]!r}, and entry {entry.seq} says {said!r}")
            return
    if (row["id"], row["reported_by"], row["committed_us"]) != (entry.subject, entry.actor, entry.timestamp_us):
        findings.add(f"{where}: id, reporter or time of the commit is not what entry {entry.seq} says")
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
    findings, names = _Findings(), _Interned(connection)
    entries_through, rows_from, rows_through = fetch(
        connection, "SELECT (SELECT max(seq) FROM audit), (SELECT min(seq) FROM task), (SELECT max(seq) FROM task)"
    )[0]
    said: dict[tuple[Any, ...], int] = {}
    entries = erased = rows = 0
    for seq, kind, subject, details in fetch(
        connection,
        "SELECT seq, event_type, subject, details FROM audit WHERE seq <= ? AND event_type IN "
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
        said[key] = seq
    erasures = Erasures(connection)
    gone = {state: erasures.times(f"task.{state}") for state in ("started", "completed", "failed", "abandoned")}
    columns = "seq, tenant, agent, consumer, task_id, state, timestamp_us, committed_us"
    for seq, tenant, agent, consumer, task_id, state, timestamp_us, committed_us in _rows(
        connection, "task", columns, min(rows_from or 0, 1) - 1, rows_through or 0
    ):
        rows += 1
        key = (names[tenant], names[agent], names[consumer], task_id, state, timestamp_us)
        if said.pop(key, None) is None and not _takes(gone.get(state), committed_us):
            findings.add(f"task row {seq} ({task_id}, {state}) has no entry in the log that says the same")
    for key, seq in said.items():
        findings.add(f"entry {seq} (task.{key[4]} {key[3]}): there is no such row in task")
    return Tally("task", rows, entries, 0, erased, findings.count, tuple(findings.named))


def _takes(times: Counter[int] | None, at_us: int | None) -> bool:
    """Whether an entry of a time was erased that answers for no other row; from now on it answers for this one."""
    if times is None or at_us is None or times[at_us] <= 0:
        return False
    times[at_us] -= 1
    return True


# --- delegations


def _delegations(connection: apsw.Connection, erasures: Erasures) -> Tally:
    findings = _Findings()
    made_at, revoked_at = erasures.times("delegation.created"), erasures.times("delegation.revoked")
    created: dict[str, tuple[int, dict[str, Any]]] = {}
    revoked: set[str] = set()
    entries = erased = rows = 0
    delegations = fetch(
        connection,
        "SELECT id, delegator, delegate, scopes, max_cost_microusd, max_tasks, expires_us, digest, revoked_us, "
        "registered_us "
        "FROM delegation ORDER BY account",
    )
    for seq, kind, subject, details in fetch(
        connection,
        "SELECT seq, event_type, subject, details FROM audit "
        "WHERE event_type IN ('delegation.created', 'delegation.revoked') ORDER BY seq",
    ):
        if details is None:
            erased += 1
        elif kind == "delegation.created":
            entries += 1
            created[subject] = (seq, msgspec.json.decode(details))
        elif msgspec.json.decode(details)["id"] is not None:  # None: of a token that nobody had shown here
            revoked.add(subject)
    for public_id, delegator, delegate, scopes, cost, tasks, expires_us, digest, revoked_us, made_us in delegations:
        rows += 1
        was_revoked = public_id in revoked or _takes(revoked_at, revoked_us)
        if (revoked_us is not None) != was_revoked:
            state = "revoked" if revoked_us is not None else "not revoked"
            findings.add(f"delegation {public_id} is {state}, and the log says otherwise")
        found = created.pop(public_id, None)
        if found is None:
            if not _takes(made_at, made_us):
                findings.add(f"delegation {public_id} has no entry in the log")
            continue
        seq, told = found
        is_row = {
            "delegator": delegator,
            "delegate": delegate,
            "scopes": msgspec.json.decode(scopes),
            "max_cost_microusd": cost,
            "max_tasks": tasks,
            "expires_at": format_us(expires_us),
            "digest": digest.hex(),
        }
        for field, value in is_row.items():
            if told.get(field) != value:
                findings.add(f"delegation {public_id}: {field} is {value!r}, and entry {seq} says {told.get(field)!r}")
    for public_id, (seq, _) in created.items():
        # Written while this ran, or gone: which of them, a second look says.
        if fetch_one(connection, "SELECT 1 FROM delegation WHERE id = ?", (public_id,)) is None:
            findings.add(f"entry {seq} (delegation.created {public_id}): there is no such delegation")
    return Tally("delegation", rows, entries, 0, erased, findings.count, tuple(findings.named))


# --- breaches


_BREACH = ("agent", "breach_type", "budget", "window_us", "threshold", "actual", "samples", "severity")


def _breaches(connection: apsw.Connection, erasures: Erasures) -> Tally:
    findings = _Findings()
    alerts = fetch(
        connection,
        "SELECT seq, breach, event, ts_us FROM alert WHERE event IN ('opened', 'escalated', 'resolved') ORDER BY seq",
    )
    told: dict[int, tuple[int, dict[str, Any]]] = {}
    gone = erasures.times("sla.breach")
    entries = erased = 0
    for seq, details in fetch(
        connection, "SELECT seq, details FROM audit WHERE event_type = 'sla.breach' ORDER BY seq"
    ):
        if details is None:
            erased += 1
            continue
        entries += 1
        said = msgspec.json.decode(details)
        told[said["seq"]] = (seq, said)
    # What the last entry of each breach says; None where that was erased.
    last: dict[str, dict[str, Any] | None] = {said["id"]: said for _, said in told.values()}
    for number, breach, event, ts_us in alerts:
        found = told.pop(number, None)
        if found is not None:
            last[breach] = found[1]
            if (found[1]["id"], found[1]["event"]) != (breach, event):
                findings.add(f"alert {number} is {event} {breach}, and entry {found[0]} says otherwise")
        elif _takes(gone, ts_us):
            last[breach] = None
        else:
            findings.add(f"alert {number} ({event} {breach}) has no entry in the log")
    for number, (seq, said) in told.items():
        if fetch_one(connection, "SELECT 1 FROM alert WHERE seq = ?", (number,)) is None:
            findings.add(f"entry {seq} (sla.breach {said['id']}): alert {number} is not there")
    for breach, state, *values in fetch(
        connection,
        "SELECT id, state, agent_id, breach_type, budget, window_us, threshold, actual, samples, severity FROM breach",
    ):
        if breach not in last:
            findings.add(f"breach {breach} has no entry in the log")
            continue
        said_last = last.pop(breach)
        if said_last is None:
            continue
        if (said_last["event"] == "resolved") != (state == "resolved"):
            findings.add(f"breach {breach} is {state}, and the log says {said_last['event']}")
        for name, value in zip(_BREACH, values, strict=True):
            if said_last[name] != value:
                findings.add(f"breach {breach}: {name} is {value!r}, and the log says {said_last[name]!r}")
    for breach in last:
        findings.add(f"breach {breach} is not there, and the log has entries of it")
    return Tally("breach", len(alerts), entries, 0, erased, findings.count, tuple(findings.named))


# --- sums of days


def _days(connection: apsw.Connection) -> Tally:
    findings = _Findings()
    rows = usage_days.compare(connection, findings.add)
    return Tally("usage_day", rows, 0, findings=findings.count, named=tuple(findings.named))


# --- erased entries


def _erased(erasures: Erasures) -> Tally:
    findings, rows = _Findings(), 0
    for seq, kind in erasures.unexplained():
        rows += 1
        if seq is not None:
            findings.add(f"entry {seq} ({kind}) has lost its content, and no erasure says so")
    return Tally("erasure", rows, erasures.count, 0, rows, findings.count, tuple(findings.named))
