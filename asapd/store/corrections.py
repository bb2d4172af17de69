"""Correcting what recorded usage cost: a row with the difference, for nothing that was recorded is ever changed."""

from __future__ import annotations

from typing import Any

import apsw
import msgspec

from asapd.core.budgets import Work
from asapd.core.ledger import MOST, Settlement, settle, take_back
from asapd.core.repricing import Correction, CostedEvent
from asapd.core.row_digest import row_digest
from asapd.core.types import HOUR_US
from asapd.core.usage import (
    FLAG_CLOSED_RESERVATION,
    FLAG_OVERRUN,
    FLAGS_OF_THE_LEDGER,
    UsageEvent,
)
from asapd.store import budgets, ledger, usage_behind, usage_days, usage_hours
from asapd.store.prepared import COLUMNS
from asapd.store.reservations import load
from asapd.store.rows import fetch
from asapd.store.tx import Tx
from asapd.store.units.usage import CorrectCosts, CostsCorrected
from asapd.store.usage_filter import CORRECTION, LIVE
from asapd.store.voids import account_of, at_current_cost, name_of, paying_for

_COUNTS = (
    "tokens_in",
    "tokens_out",
    "cached_tokens_in",
    "cache_write_tokens",
    "cache_write_1h_tokens",
    "reasoning_tokens",
    "duration_ms",
    "api_calls",
)
_KEY = ("tenant", "agent", "consumer", "model", "project", "outcome")


def correct(tx: Tx, unit: CorrectCosts) -> CostsCorrected:
    """Correct each event that still costs what its correction says, in the sums, the ledger and the budgets."""
    names = [name for (_, name, *_) in fetch(tx.connection, "PRAGMA table_info(usage)")]
    book = budgets.open_book(tx, unit.actor, unit.now_us)
    skipped: list[int] = []
    kept = 0
    # Once for all: to digest an hour that is sealed takes long if it has many sums.
    with usage_hours.changing(tx, _hours_of(tx, unit), unit.actor, unit.now_us):
        for change in unit.corrections:
            row = tx.row(f"SELECT * FROM usage WHERE seq = ? AND {LIVE} AND NOT ({CORRECTION})", (change.seq,))
            was = None if row is None else at_current_cost(tx, dict(zip(names, row, strict=True)))
            if was is None or was["cost_microusd"] != change.was_microusd:
                skipped.append(change.seq)
            else:
                kept += _correct(tx, book, unit, change, was)
    if book is not None:
        book.flush()
    return CostsCorrected(len(unit.corrections) - len(skipped), skipped, kept)


def _hours_of(tx: Tx, unit: CorrectCosts) -> list[int]:
    seqs = msgspec.json.encode([change.seq for change in unit.corrections]).decode()
    of = "SELECT timestamp_us FROM usage WHERE seq IN (SELECT value FROM json_each(?))"
    return [timestamp_us // HOUR_US for (timestamp_us,) in fetch(tx.connection, of, (seqs,))]


def _correct(tx: Tx, book: budgets.Book | None, unit: CorrectCosts, change: Correction, was: dict[str, Any]) -> bool:
    """Correct one event; whether its reservation stays settled at an estimate."""
    more = change.now_microusd - (change.was_microusd or 0)
    tenant, agent, consumer, project, model = (
        name_of(tx, was[column]) for column in ("tenant", "agent", "consumer", "project", "model")
    )
    spent = _spent(tx, was, change)
    path: tuple[str, ...] = ()
    adjusted = Adjusted(0)
    account = account_of(tx, was["seq"], agent)
    paying = paying_for(tx, was["seq"]) if account is not None else None
    if account is not None:
        path = tuple(on_path.id for on_path in ledger.path_of(tx, account))
        if spent is not None:
            adjusted = _adjust(tx, account, paying, change.now_microusd - spent, unit.now_us)
    flags = FLAG_OVERRUN if adjusted.is_over else 0
    if book is not None:
        flags |= book.correct(
            Work(agent, consumer, project, path),
            was["timestamp_us"],
            more,
            reservation=paying,
            held_microusd=adjusted.microusd,
            settlement=adjusted.settlement,
            is_first=change.was_microusd is None,
            seq=change.seq,
        )
    seq, row_id = tx.next_seq("usage"), tx.new_id("use", unit.now_us)
    now = {
        **was,
        **dict.fromkeys(_COUNTS, 0),
        "seq": seq,
        "id": row_id,
        "source_seq": None,
        "partial": 1,  # no task, and nothing that an agent is judged by
        "error": None,
        "cost_microusd": more,
        "cost_source": change.source,
        "priced_microusd": change.priced_more_microusd,
        "reported_microusd": None,
        "price_version": unit.price_version,
        "flags": flags | was["flags"] & FLAGS_OF_THE_LEDGER,
        "committed_us": unit.now_us,
        "reported_by": unit.actor,
    }
    tx.execute(f"INSERT INTO usage ({', '.join(now)}) VALUES ({','.join('?' * len(now))})", tuple(now.values()))
    usage_behind.came(tx, seq, seq + 1)
    in_ledger = account is None or spent is not None
    tx.execute("INSERT INTO usage_repriced VALUES (?,?,?,?)", (seq, change.seq, change.was_microusd, in_ledger))
    spent_now = change.now_microusd if account is None or spent is None else spent + adjusted.microusd
    if spent_now != change.now_microusd:
        tx.execute("INSERT INTO usage_estimate VALUES (?,?)", (seq, spent_now))
    for table, period, number in usage_days.holding(tx.connection, was["timestamp_us"] // HOUR_US):
        sql = (
            f"UPDATE {table} SET cost_microusd = cost_microusd + ?, unpriced = unpriced - ? "
            f"WHERE {period} = ? AND {' AND '.join(f'{name} = ?' for name in _KEY)}"
        )
        values = (more, change.was_microusd is None, number, *(was[name] for name in _KEY))
        if period == "day":
            usage_days.put(tx, number, sql, values)
        else:
            tx.execute(sql, values)
    details: dict[str, Any] = {
        "agent": agent,
        "consumer": consumer,
        "content": was["content"].hex(),
        "cost_microusd": more,
        "cost_source": change.source,
        "delegation": was["delegation"],
        "flags": now["flags"],
        "held_microusd": 0 if adjusted.settlement is None else -adjusted.settlement.release_microusd,
        "in_ledger": in_ledger,
        "ledger_microusd": adjusted.microusd,
        "model": model,
        "now_microusd": change.now_microusd,
        "price_version": unit.price_version,
        "priced_microusd": change.priced_more_microusd,
        "project": project,
        "reprices": was["id"],
        "reprices_row": change.seq,
        "reservation": was["reservation"],
        "row": seq,
        "row_digest": row_digest(now[column] for column in COLUMNS),
        "task_id": was["task_id"],
        "tenant": tenant,
        "timestamp_us": was["timestamp_us"],
        "was_microusd": change.was_microusd,
    }
    if spent_now != change.now_microusd:
        details["estimate_microusd"] = spent_now
    tx.audit("usage.repriced", unit.actor, row_id, details, unit.now_us)
    return not in_ledger


class Adjusted(msgspec.Struct, frozen=True):
    """What a correction did to a path: how much more it has spent, and the hold that paid of it, if one was open."""

    microusd: int
    settlement: Settlement | None = None
    is_over: bool = False


def _adjust(tx: Tx, account: int, reservation: str | None, microusd: int, now_us: int) -> Adjusted:
    """Have a path spend more, or with a negative amount less, for usage that was debited to it before.

    Under a reservation no more is given back than was spent and not refunded, and while it is open its hold pays first,
    and gets back first.
    """
    settlement = None
    found = None if reservation is None else load(tx, reservation)
    if found is not None:
        if microusd <= 0:
            microusd = max(microusd, found.refunded_microusd - found.used_microusd)
        if found.is_open(now_us):
            more = microusd > 0
            settlement = settle(found.hold, microusd) if more else take_back(found.hold, found.estimate, -microusd)
    released = 0 if settlement is None else settlement.release_microusd
    tx.execute(
        "UPDATE reservation SET used_microusd = min(used_microusd + ?, ?), held_microusd = held_microusd - ? "
        "WHERE id = ?",
        (microusd, MOST, released, reservation),
    )
    path = ledger.path_of(tx, account)
    for on_path in path:
        ledger.debit(tx, on_path, spent=microusd, reserved=-released)
    is_over = microusd > 0 and any(
        on_path.max_cost_microusd is not None and on_path.spent_microusd + microusd > on_path.max_cost_microusd
        for on_path in path
    )
    return Adjusted(microusd, settlement, is_over)


def _spent(tx: Tx, was: dict[str, Any], change: Correction) -> int | None:
    """What an event spent of its path so far, None when nobody knows.

    Its cost, or the estimate it was settled at, or what stayed spent because it had been refunded: a later price that
    is higher must not take that a second time.
    """
    before = tx.row("SELECT min(ledger), max(seq) FROM usage_repriced WHERE event = ?", (change.seq,))
    assert before is not None
    if before[0] == 0:
        return None
    kept = tx.row("SELECT microusd FROM usage_estimate WHERE seq = ?", (before[1] or change.seq,))
    if kept is not None:
        return int(kept[0])
    if change.was_microusd is not None:
        return change.was_microusd
    under_hold = was["reservation"] is not None and not was["flags"] & FLAG_CLOSED_RESERVATION
    # Only an event from before estimates were kept was under a hold and has none here.
    return None if under_hold else 0


# --- finding


class Selection(msgspec.Struct, frozen=True):
    """Which events to price again: those of a time and of a model, which may end in `*`, as of row `through`."""

    through: int
    start_us: int | None = None
    end_us: int | None = None
    model: str | None = None


class Page(msgspec.Struct, frozen=True):
    """Some events, the position (time, row) behind which the next page is, and whether there is one."""

    rows: list[CostedEvent]
    last: tuple[int, int] | None
    more: bool


_ROWS = f"""
SELECT seq, timestamp_us, tokens_in, tokens_out, api_calls, cached_tokens_in, cache_write_tokens, reasoning_tokens,
       cache_write_1h_tokens, (SELECT name FROM name WHERE id = model), (SELECT name FROM name WHERE id = provider),
       reported_microusd, outcome, cost_microusd, priced_microusd,
       (SELECT sum(d.cost_microusd) FROM usage_repriced r JOIN usage d ON d.seq = r.seq WHERE r.event = usage.seq),
       (SELECT sum(d.priced_microusd) FROM usage_repriced r JOIN usage d ON d.seq = r.seq WHERE r.event = usage.seq)
FROM usage WHERE {{where}} AND (timestamp_us, seq) <= (?, ?) AND {LIVE} AND NOT ({CORRECTION})
ORDER BY timestamp_us, seq
"""


def page_to_price(connection: apsw.Connection, selection: Selection, after: tuple[int, int] | None, limit: int) -> Page:
    """What `limit` rows behind a position hold of the events selected, as they are with all corrections."""
    where, values = ["+seq <= ?"], [selection.through]  # the index of time is the one to read
    for bound, condition in ((selection.start_us, "timestamp_us >= ?"), (selection.end_us, "timestamp_us < ?")):
        if bound is not None:
            where.append(condition)
            values.append(bound)
    if after is not None:
        where.append("(timestamp_us, seq) > (?, ?)")
        values.extend(after)
    # First how far to look, whatever the model: a rare one must not make a page of the whole table.
    looked_at = fetch(
        connection,
        f"SELECT timestamp_us, seq FROM usage WHERE {' AND '.join(where)} ORDER BY timestamp_us, seq LIMIT ?",
        (*values, limit),
    )
    if not looked_at:
        return Page([], after, more=False)
    last: tuple[int, int] = (looked_at[-1][0], looked_at[-1][1])
    named: list[Any] = []
    if selection.model is not None and selection.model.endswith("*"):
        where.append("model IN (SELECT id FROM name WHERE substr(name, 1, ?) = ?)")
        named = [len(selection.model) - 1, selection.model[:-1]]
    elif selection.model is not None:
        where.append("model = (SELECT id FROM name WHERE name = ?)")
        named = [selection.model]
    rows = fetch(connection, _ROWS.format(where=" AND ".join(where)), (*values, *named, *last))
    return Page([_costed(*row) for row in rows], last, more=len(looked_at) == limit)


def _costed(
    seq: int,
    timestamp_us: int,
    tokens_in: int,
    tokens_out: int,
    api_calls: int,
    cached: int,
    written: int,
    reasoning: int,
    written_1h: int,
    model: str,
    provider: str,
    reported: int | None,
    outcome: int,
    cost: int | None,
    priced: int | None,
    more: int | None,
    priced_more: int | None,
) -> CostedEvent:
    event = UsageEvent(
        "",
        "",
        "",
        timestamp_us,
        tokens_in,
        tokens_out,
        0,
        api_calls,
        cached,
        written,
        reasoning,
        outcome,
        model=model,
        provider=provider,
        reported_microusd=reported,
        cache_write_1h_tokens=written_1h,
        # A row does not say whether its 0 was told. One that has a price keeps to what it was priced by.
        tells_tokens=tokens_in > 0 or tokens_out > 0 or priced is not None or priced_more is not None,
    )
    if more is None:
        return CostedEvent(seq, event, cost, priced)
    return CostedEvent(seq, event, (cost or 0) + more, (priced or 0) + (priced_more or 0))
