"""Breaches and their numbered transitions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import apsw
import msgspec

from asapd.core.row_digest import row_digest
from asapd.core.types import SECOND_US, format_us
from asapd.core.windows import window_text
from asapd.store.rows import Row, fetch, fetch_one
from asapd.store.silences import acknowledgement, mark
from asapd.store.tx import Tx
from asapd.store.units.alerts import AlertWritten, BreachRow, WriteBreach
from asapd.store.visibility import Visibility, visible_text

_COLUMNS = (
    "id, agent_id, breach_type, window_us, threshold, threshold_value, actual, actual_value, severity, state, "
    "detected_at_us, samples, tenant, resolved_at_us, resolve_reason, evidence, budget"
)


class Alert(msgspec.Struct, frozen=True):
    """One numbered transition. `params` is what subscribers receive; `severity` is the breach's highest so far.

    `held` says why it is not pushed to webhooks and commands: `silenced` or `acknowledged`. `at_us` is its commit's.
    """

    seq: int
    event: str
    agent_id: str | None
    severity: str
    tenant: str
    params: dict[str, Any]
    held: str | None = None
    at_us: int = 0


def write(tx: Tx, unit: WriteBreach) -> AlertWritten:
    """Write one transition. A transition that is already in the store answers None and writes nothing."""
    breach = unit.breach
    known = tx.row("SELECT state, severity FROM breach WHERE id = ?", (breach.id,))
    already_open = tx.row(
        "SELECT id FROM breach WHERE agent_id IS ? AND breach_type = ? AND budget IS ? AND state = 'open'",
        (breach.agent_id, breach.breach_type, breach.budget),
    )
    stale = (
        (unit.event == "opened" and (known is not None or already_open is not None))
        or (unit.event == "escalated" and known != ("open", "warning"))
        or (unit.event == "resolved" and (known is None or known[0] != "open"))
    )
    if stale:
        return AlertWritten(None)
    seq, evidence = tx.next_seq("alert"), msgspec.json.encode(breach.evidence).decode()
    tx.execute(
        f"INSERT INTO breach ({_COLUMNS}, seq) VALUES ({','.join('?' * 18)}) "
        "ON CONFLICT (id) DO UPDATE SET window_us = excluded.window_us, threshold = excluded.threshold, "
        "threshold_value = excluded.threshold_value, "
        "actual = excluded.actual, actual_value = excluded.actual_value, severity = excluded.severity, "
        "state = excluded.state, samples = excluded.samples, resolved_at_us = excluded.resolved_at_us, "
        "resolve_reason = excluded.resolve_reason, evidence = excluded.evidence, seq = excluded.seq",
        (*msgspec.structs.astuple(breach)[:-2], evidence, breach.budget, seq),
    )
    marked = mark(tx, breach, unit.event, unit.now_us)
    if unit.event == "resolved":
        tx.execute("DELETE FROM breach_told WHERE breach = ?", (breach.id,))
    params = {
        "event": unit.event,
        "seq": seq,
        "breach": {**public(breach), "seq": seq},
        "silence": marked.silence,
        "acknowledged": marked.acknowledged,
    }
    alert = Alert(seq, unit.event, breach.agent_id, breach.severity, breach.tenant, params, marked.held, unit.now_us)
    body = msgspec.json.encode(alert)
    tx.execute("INSERT INTO alert VALUES (?,?,?,?,?)", (seq, unit.now_us, breach.id, unit.event, body))
    tx.has_alerted = True
    details = {
        "actual": breach.actual,
        "agent": breach.agent_id,
        "alert_digest": row_digest([body]),
        "breach_type": breach.breach_type,
        "budget": breach.budget,
        "event": unit.event,
        "evidence_digest": evidence_digest(evidence),
        "id": breach.id,
        "samples": breach.samples,
        "seq": seq,
        "severity": breach.severity,
        "threshold": breach.threshold,
        "window_us": breach.window_us,
    }
    tx.audit("sla.breach", "asapd", breach.agent_id or breach.budget or breach.id, details, unit.now_us)
    return AlertWritten(seq)


def evidence_digest(evidence: str) -> str:
    """The digest that the log has of evidence: of all but a consumer, who may be erased from it later."""
    told = msgspec.json.decode(evidence)
    match told.get("match"):
        case dict() as of:
            told["match"] = {**of, "consumer": None}
    return row_digest([told])


def public(breach: BreachRow) -> dict[str, Any]:
    """A breach as users see it."""
    ended = breach.resolved_at_us
    return {
        "id": breach.id,
        "agent_id": breach.agent_id,
        "budget": breach.budget,
        "breach_type": breach.breach_type,
        "window": window_text(breach.window_us),
        "threshold": breach.threshold,
        "threshold_value": breach.threshold_value,
        "actual": breach.actual,
        "actual_value": breach.actual_value,
        "severity": breach.severity,
        "state": breach.state,
        "detected_at": format_us(breach.detected_at_us),
        "resolved_at": None if ended is None else format_us(ended),
        "resolve_reason": breach.resolve_reason,
        "duration_seconds": None if ended is None else (ended - breach.detected_at_us) / SECOND_US,
        "samples": breach.samples,
    }


def shown(connection: apsw.Connection, breach: BreachRow, seq: int) -> dict[str, Any]:
    """A stored breach as users see it, with the number of its last transition and who acknowledged it."""
    return {**public(breach), "seq": seq, "acknowledged": acknowledgement(connection, breach.id)}


def list_breaches(
    connection: apsw.Connection,
    visible: Visibility,
    *,
    agent: str | None = None,
    state: str | None = None,
    severity: str | None = None,
    breach_type: str | None = None,
    start_us: int | None = None,
    end_us: int | None = None,
    limit: int = 1000,
    before: tuple[int, str] | None = None,
    with_evidence: bool = True,
) -> list[tuple[BreachRow, int]]:
    """Breaches, the newest first, each with the number of its last transition; a negative `limit` is none.

    Evidence may be a hundred times as large as all the rest of a breach.
    """
    where, values = _filtered(visible, agent, state, severity, breach_type, start_us, end_us)
    if before is not None:
        where.append("(detected_at_us, id) < (?, ?)")
        values.extend(before)
    condition = f"WHERE {' AND '.join(where)}" if where else ""
    columns = _COLUMNS if with_evidence else _COLUMNS.replace("evidence", "'{}'")
    rows = fetch(
        connection,
        f"SELECT {columns}, seq FROM breach {condition} ORDER BY detected_at_us DESC, id DESC LIMIT ?",
        (*values, limit),
    )
    return [(_breach(row[:-1]), row[-1]) for row in rows]


def _filtered(
    visible: Visibility,
    agent: str | None,
    state: str | None,
    severity: str | None,
    breach_type: str | None,
    start_us: int | None,
    end_us: int | None,
) -> tuple[list[str], list[Any]]:
    where, values = visible_text(visible, ("agent_id",))
    for column, value in (
        ("agent_id", agent),
        ("state", state),
        ("severity", severity),
        ("breach_type", breach_type),
    ):
        if value is not None:
            where.append(f"{column} = ?")
            values.append(value)
    if start_us is not None:
        where.append("detected_at_us >= ?")
        values.append(start_us)
    if end_us is not None:
        where.append("detected_at_us < ?")
        values.append(end_us)
    return where, values


GROUPS = {"agent": "agent_id", "type": "breach_type", "severity": "severity"}
"""What breaches may be put together by, and its column."""


class BreachGroup(msgspec.Struct, frozen=True):
    """Breaches that are alike, by the values of what they are put together by, in that order.

    `unacknowledged` are open, and nobody has seen to them. `seq` is of the newest transition.
    """

    values: tuple[str | None, ...]
    count: int
    open: int
    critical: int
    unacknowledged: int
    first_us: int
    last_us: int
    seq: int


def group_breaches(
    connection: apsw.Connection,
    visible: Visibility,
    by: Sequence[str],
    limit: int,
    offset: int,
    *,
    agent: str | None = None,
    state: str | None = None,
    severity: str | None = None,
    breach_type: str | None = None,
    start_us: int | None = None,
    end_us: int | None = None,
) -> list[BreachGroup]:
    """Breaches put together by some of `GROUPS`, the groups with most that are open first."""
    where, values = _filtered(visible, agent, state, severity, breach_type, start_us, end_us)
    columns = ", ".join(GROUPS[name] for name in by)
    condition = f"WHERE {' AND '.join(where)}" if where else ""
    rows = fetch(
        connection,
        f"SELECT {columns}, count(*), sum(state = 'open') AS open, sum(state = 'open' AND severity = 'critical'), "
        "sum(state = 'open' AND NOT EXISTS (SELECT 1 FROM breach_ack k WHERE k.breach = breach.id)), "
        f"min(detected_at_us), max(detected_at_us), max(seq) FROM breach {condition} GROUP BY {columns} "
        f"ORDER BY open DESC, {columns} LIMIT ? OFFSET ?",
        (*values, limit, offset),
    )
    return [BreachGroup(tuple(row[: len(by)]), *row[len(by) :]) for row in rows]


def get_breach(connection: apsw.Connection, breach: str) -> tuple[BreachRow, int] | None:
    """One breach by its id."""
    row = fetch_one(connection, f"SELECT {_COLUMNS}, seq FROM breach WHERE id = ?", (breach,))
    return None if row is None else (_breach(row[:-1]), row[-1])


def open_of_budget(connection: apsw.Connection, budget: str) -> BreachRow | None:
    """The open breach of a budget."""
    row = fetch_one(connection, f"SELECT {_COLUMNS} FROM breach WHERE budget = ? AND state = 'open'", (budget,))
    return None if row is None else _breach(row)


def _breach(row: Row) -> BreachRow:
    *plain, evidence, budget = row
    return BreachRow(*[*plain, msgspec.json.decode(evidence), budget])


decode_alert = msgspec.json.Decoder(Alert).decode
"""An alert from its stored body."""


def alerts_after(connection: apsw.Connection, seq: int, limit: int) -> list[Alert]:
    """Transitions in order behind a number."""
    rows = fetch(connection, "SELECT body FROM alert WHERE seq > ? ORDER BY seq LIMIT ?", (seq, limit))
    return [decode_alert(body) for (body,) in rows]


def alert_bounds(connection: apsw.Connection) -> tuple[int, int]:
    """The oldest number that is kept and the newest that was given; the oldest is one more when none is kept."""
    (newest,) = fetch_one(connection, "SELECT seq FROM sqlite_sequence WHERE name = 'alert'") or (0,)
    (oldest,) = fetch(connection, "SELECT min(seq) FROM alert")[0]
    return newest + 1 if oldest is None else oldest, newest
