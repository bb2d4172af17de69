"""Alerts of budgets: each limit that spending reaches in the current period, once, through the stream of breaches.

One breach is open for a budget at most: a soft limit opens it as warning, the hard one as critical or escalates it.
"""

from __future__ import annotations

from typing import Any

import msgspec

from asapd.core.budgets import Balance, Budget, Level, Reached, amount_number, amount_text, reached
from asapd.store import breaches
from asapd.store.breaches import open_of_budget
from asapd.store.rows import fetch, fetch_one
from asapd.store.tx import Tx
from asapd.store.units.alerts import BreachRow, WriteBreach

# No tenant owns a budget: whoever is bound to one does not see its breaches.
_NO_TENANT = ""


def check(tx: Tx, budget: Budget, balance: Balance, alerted: int, now_us: int) -> int:
    """Open or escalate the budget's breach when more was reached than was alerted; the level alerted now.

    A period that is over, or has not begun, alerts nothing.
    """
    found = reached(budget, balance)
    if found is None or found.level <= alerted or not balance.start_us <= now_us < balance.end_us:
        return alerted
    known = open_of_budget(tx.connection, budget.name)
    if known is not None and known.evidence["period_end_us"] <= now_us:
        _resolve(tx, known, "period_ended", now_us)
        known = None
    severity = "critical" if found.level is Level.HARD else "warning"
    if known is None:
        row = _row(tx.new_id("brc", now_us), budget, balance, found, severity, now_us)
        breaches.write(tx, WriteBreach("opened", row, now_us))
    elif severity == "critical" and known.severity == "warning":
        row = _row(known.id, budget, balance, found, severity, known.detected_at_us)
        breaches.write(tx, WriteBreach("escalated", row, now_us))
    return found.level


def lower(tx: Tx, budget: Budget, balance: Balance, alerted: int, now_us: int) -> int:
    """Resolve the budget's breach when its limits were raised above what is spent; the level alerted still.

    That is the soft limit, if it is reached and a warning told of it before the breach became critical.
    """
    found = reached(budget, balance)
    level = Level.BELOW if found is None else found.level
    if level >= alerted:
        return alerted
    known = open_of_budget(tx.connection, budget.name)
    if known is None:
        return level
    _resolve(tx, known, "limit_raised", now_us)
    was_warned = _is_escalated(tx, known) and known.evidence["soft"] == msgspec.to_builtins(budget.soft)
    return level if was_warned else Level.BELOW


def _is_escalated(tx: Tx, known: BreachRow) -> bool:
    query = "SELECT 1 FROM alert WHERE breach = ? AND event = 'escalated'"
    return fetch_one(tx.connection, query, (known.id,)) is not None


def resolve(tx: Tx, name: str, reason: str, now_us: int) -> None:
    """Resolve the open breach of a budget, if there is one."""
    known = open_of_budget(tx.connection, name)
    if known is not None:
        _resolve(tx, known, reason, now_us)


def resolve_ended(tx: Tx, now_us: int) -> None:
    """Resolve the breaches of periods that are over."""
    ended = fetch(
        tx.connection,
        "SELECT budget FROM breach WHERE state = 'open' AND budget IS NOT NULL AND evidence ->> 'period_end_us' <= ? "
        "ORDER BY budget",
        (now_us,),
    )
    for (name,) in ended:
        resolve(tx, name, "period_ended", now_us)


def _resolve(tx: Tx, known: BreachRow, reason: str, now_us: int) -> None:
    ended_us = max(now_us, known.detected_at_us)
    row = msgspec.structs.replace(known, state="resolved", resolved_at_us=ended_us, resolve_reason=reason)
    breaches.write(tx, WriteBreach("resolved", row, now_us))


def _row(
    breach_id: str, budget: Budget, balance: Balance, found: Reached, severity: str, detected_at_us: int
) -> BreachRow:
    return BreachRow(
        id=breach_id,
        agent_id=None,
        breach_type="budget",
        window_us=balance.end_us - balance.start_us,
        threshold=amount_text(found.unit, found.limit),
        threshold_value=amount_number(found.unit, found.limit),
        actual=amount_text(found.unit, found.spent),
        actual_value=amount_number(found.unit, found.spent),
        severity=severity,
        state="open",
        detected_at_us=detected_at_us,
        samples=balance.events,
        tenant=_NO_TENANT,
        evidence=_evidence(budget, balance, found),
        budget=budget.name,
    )


def _evidence(budget: Budget, balance: Balance, found: Reached) -> dict[str, Any]:
    return {
        "match": msgspec.to_builtins(budget.match),
        "period": budget.period,
        "timezone": budget.timezone,
        "period_start_us": balance.start_us,
        "period_end_us": balance.end_us,
        "unit": found.unit,
        "level": found.level.name.lower(),
        "limit": found.limit,
        "soft": msgspec.to_builtins(budget.soft),
        "hard": msgspec.to_builtins(budget.hard),
        "balance": msgspec.to_builtins(balance),
    }
