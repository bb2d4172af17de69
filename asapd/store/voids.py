"""Taking back usage: a row with the negative of another, for nothing that was recorded is ever changed."""

from __future__ import annotations

from typing import Any, NamedTuple

import apsw

from asapd.core.budgets import Work
from asapd.core.errors import Refusal
from asapd.core.ledger import Account, Settlement
from asapd.core.ledger import take_back as taken_back
from asapd.core.row_digest import row_digest
from asapd.core.types import HOUR_US
from asapd.store import (
    budgets,
    identity,
    ledger,
    refunds,
    retention,
    usage_behind,
    usage_days,
    usage_hours,
    usage_tasks,
)
from asapd.store.parties import UNLIMITED, debited, may_give_back, paid
from asapd.store.prepared import COLUMNS
from asapd.store.reservations import load, spend
from asapd.store.rows import Row, fetch
from asapd.store.tx import RefuseError, Tx
from asapd.store.units.usage import Voided, VoidUsage
from asapd.store.usage_filter import CORRECTION, LIVE
from asapd.store.visibility import Visibility, visible_names
from asapd.store.void_kinds import BY_HAND, WITHHELD

_COUNTS = (
    "tokens_in",
    "tokens_out",
    "cached_tokens_in",
    "cache_write_tokens",
    "reasoning_tokens",
    "duration_ms",
    "api_calls",
    "cache_write_1h_tokens",
)
_NEGATED = (*_COUNTS, "cost_microusd", "priced_microusd", "reported_microusd")

_NO_SUCH = "there is no usage event {} that counts: check the id, and name its agent and source"


def void(tx: Tx, unit: VoidUsage) -> Voided:
    """Write the compensating row, and take the event out of the rollup, the ledger and the budgets.

    Raises:
        RefuseError: `usage_not_found`, or `usage_voided` for an event that was voided before or is itself a void,
            `invalid` for the correction of a cost, or `forbidden` where what would be given back is not for `unit.by`
            to give.
    """
    was = row_of(tx, unit.seq)
    if was is None:
        raise RefuseError(Refusal("usage_not_found", _NO_SUCH.format(unit.seq)))
    known = tx.row("SELECT seq, voids FROM usage_void WHERE ?1 IN (seq, voids)", (unit.seq,))
    if known is not None:
        what = "is itself a void" if known[0] == unit.seq else "was voided before"
        raise RefuseError(Refusal("usage_voided", f"event {was['id']} {what}: nothing was changed"))
    of = tx.row("SELECT (SELECT id FROM usage WHERE seq = event) FROM usage_repriced WHERE seq = ?", (unit.seq,))
    if of is not None:
        # Retention takes an event before what corrects it, and may have come no further.
        what = (
            "an event that retention took: that is over" if of[0] is None else f"{of[0]}: void that, or price it again"
        )
        detail = f"{was['id']} is no usage, but corrects the cost of {what}"
        raise RefuseError(Refusal("invalid", detail))
    refusal = withheld(tx, was, unit)
    if refusal is not None:
        raise RefuseError(refusal)
    return take_back(tx, was, unit, BY_HAND)


def withheld(tx: Tx, was: dict[str, Any], unit: VoidUsage) -> Refusal | None:
    """Why `unit.by` may not give back what limits the very agents that it acts for: it could be spent without end."""
    if unit.by.is_everything:
        return None
    agent, consumer, project = (name_of(tx, was[column]) for column in ("agent", "consumer", "project"))
    account = account_of(tx, unit.seq, agent)
    path: tuple[str, ...] = ()
    if account is not None:
        if not may_give_back(tx.connection, account, unit.by):
            named = (
                f"reservation {was['reservation']}" if paying_for(tx, unit.seq) else f"delegation {was['delegation']}"
            )
            detail = (
                f"this usage was debited under {named}: only who may act for its delegator, and for every delegator "
                "above, can void it; ask them, or who administers this host"
            )
            return Refusal("forbidden", detail)
        path = tuple(on_path.id for on_path in ledger.path_of(tx, account))
    book = budgets.open_book(tx, unit.actor, unit.now_us)
    work = Work(agent, consumer, project, path)
    if book is not None and book.hard_limits(work, paying_for(tx, unit.seq)):
        detail = f"this usage counts against a hard limit of a budget of this host: {UNLIMITED} can void it"
        return Refusal("forbidden", detail)
    return None


def row_of(tx: Tx, seq: int) -> dict[str, Any] | None:
    """A row of usage by its columns."""
    row = tx.row("SELECT * FROM usage WHERE seq = ?", (seq,))
    names = [name for (_, name, *_) in fetch(tx.connection, "PRAGMA table_info(usage)")]
    return None if row is None else dict(zip(names, row, strict=True))


def take_back(tx: Tx, was: dict[str, Any], unit: VoidUsage, kind: int) -> Voided:
    """Write the compensating row of a kind, and take the event out of what counts it."""
    was = at_current_cost(tx, was)
    tenant, agent, consumer, project = (
        name_of(tx, was[column]) for column in ("tenant", "agent", "consumer", "project")
    )
    void_id, seq = tx.new_id("use", unit.now_us), tx.next_seq("usage")
    book = budgets.open_book(tx, unit.actor, unit.now_us)
    returned = _give_back(tx, book, was, agent, unit.now_us, is_withheld=kind == WITHHELD)
    if book is not None:
        tokens = was["tokens_in"] + was["tokens_out"]
        work = Work(agent, consumer, project, tuple(returned.path))
        book.take_back(
            work,
            was["timestamp_us"],
            tokens,
            was["cost_microusd"],
            returned.budgets_microusd,
            paying_for(tx, unit.seq),
            task_id=was["task_id"],
            seq=unit.seq,
            but_hard=kind == WITHHELD,
            settlement=returned.settlement,
        )
    now = {
        **was,
        **{name: None if was[name] is None else -was[name] for name in _NEGATED},
        "seq": seq,
        "id": void_id,
        "source_seq": None,
        "committed_us": unit.now_us,
        "reported_by": unit.actor,
    }
    tx.execute(f"INSERT INTO usage VALUES ({','.join('?' * len(now))})", tuple(now.values()))
    usage_behind.came(tx, seq, seq + 1)
    tx.execute(
        "INSERT INTO usage_void (seq, voids, reason, superseded) VALUES (?,?,?,?)",
        (seq, unit.seq, unit.reason, kind),
    )
    with usage_hours.changing(tx, [was["timestamp_us"] // HOUR_US], unit.actor, unit.now_us):
        _roll_back(tx, was)
    if book is not None:
        book.flush()
    details: dict[str, Any] = {
        "agent": agent,
        "consumer": consumer,
        "content": was["content"].hex(),
        "cost_microusd": was["cost_microusd"],
        "cost_source": was["cost_source"],
        "delegation": was["delegation"],
        "flags": was["flags"],
        "given_microusd": returned.path,
        "price_version": was["price_version"],
        "priced_microusd": was["priced_microusd"],
        "project": project,
        "reason": unit.reason,
        "refunded_microusd": returned.microusd,
        "reservation": was["reservation"],
        "row": seq,
        "row_digest": row_digest(now[column] for column in COLUMNS),
        "superseded": kind != BY_HAND,
        "task_id": was["task_id"],
        "tenant": tenant,
        "timestamp_us": was["timestamp_us"],
        "voids": was["id"],
        "voids_row": unit.seq,
    }
    if kind == WITHHELD:
        details["withheld"] = True
    if returned.tasks_kept:
        details["tasks_kept"] = returned.tasks_kept
    if returned.settlement is not None:
        details["held_microusd"] = -returned.settlement.release_microusd
        details["held_tasks"] = -returned.settlement.release_tasks
        details["held_tokens"] = -returned.settlement.release_tokens
    tx.audit("usage.voided", unit.actor, void_id, details, unit.now_us)
    return Voided(void_id, seq, was["id"], returned.microusd)


def at_current_cost(tx: Tx, was: dict[str, Any]) -> dict[str, Any]:
    """A row at what it costs with all corrections."""
    row = tx.row(
        "SELECT count(*), sum(cost_microusd), sum(priced_microusd) FROM usage_repriced r JOIN usage USING (seq) "
        "WHERE r.event = ?",
        (was["seq"],),
    )
    if row is None or not row[0]:
        return was
    corrected = {"cost_microusd": (was["cost_microusd"] or 0) + row[1]}
    return {**was, **corrected, "priced_microusd": (was["priced_microusd"] or 0) + row[2]}


def spent_by(tx: Tx, was: dict[str, Any]) -> int:
    """What a row at its current cost spent: that, or where nobody knows it, the estimate that it was settled at."""
    if was["cost_microusd"] is not None:
        return int(was["cost_microusd"])
    row = tx.row("SELECT microusd FROM usage_estimate WHERE seq = ?", (was["seq"],))
    return 0 if row is None or row[0] is None else int(row[0])


def name_of(tx: Tx, number: int) -> str:
    """The name that a number stands for."""
    row = tx.row("SELECT name FROM name WHERE id = ?", (number,))
    assert row is not None
    return str(row[0])


def _roll_back(tx: Tx, was: dict[str, Any]) -> None:
    """Take an event out of its hour; an hour of which nothing is left goes, or empty groups would be shown."""
    for table, period, number in usage_days.holding(tx.connection, was["timestamp_us"] // HOUR_US):
        key = (number, *(was[name] for name in ("tenant", "agent", "consumer", "model", "project", "outcome")))
        where = (
            f"WHERE {period} = ? AND tenant = ? AND agent = ? AND consumer = ? AND model = ? AND project = ? "
            "AND outcome = ?"
        )
        tx.execute(
            f"UPDATE {table} SET events = events - 1, tasks = tasks - ?, cost_microusd = cost_microusd - ?, "
            f"unpriced = unpriced - ?, {', '.join(f'{name} = {name} - ?' for name in _COUNTS)} {where}",
            (
                1 - was["partial"],
                was["cost_microusd"] or 0,
                was["cost_microusd"] is None,
                *(was[name] for name in _COUNTS),
                *key,
            ),
        )
        tx.execute(f"DELETE FROM {table} {where} AND events = 0", key)


# --- the ledger


class Returned(NamedTuple):
    """What an event gave back: to its delegation, to the budgets its reservation is held on, to each of its path.

    `settlement` is what an open reservation holds again of it. `tasks_kept` are those of the path that go on to count
    the task for the sake of usage that retention may have taken.
    """

    microusd: int
    budgets_microusd: int
    path: dict[str, int]
    settlement: Settlement | None = None
    tasks_kept: tuple[str, ...] = ()


def _give_back(
    tx: Tx, book: budgets.Book | None, was: dict[str, Any], agent: str, now_us: int, *, is_withheld: bool
) -> Returned:
    """Give what the event spent back to every account of its path, and to the hold that paid it if that is still open.

    What a reservation gave back before is not given back again.
    """
    account = account_of(tx, was["seq"], agent)
    amount = spent_by(tx, was)
    if account is None:
        return Returned(0, 0, {}) if is_withheld else Returned(amount, amount, {})
    accounts = ledger.path_of(tx, account)
    if is_withheld:
        return Returned(0, 0, {on_path.id: 0 for on_path in accounts})
    shares = dict.fromkeys([*(on_path.account for on_path in accounts), refunds.BUDGETS], amount)
    uncounted, tasks_kept = _uncount_task(tx, was, accounts)
    reservation = paying_for(tx, was["seq"])
    rest, settlement = shares, None
    if reservation is not None:
        found = load(tx, reservation)
        assert found is not None, "it pays for the event"
        if found.is_open(now_us):
            owed = refunds.owed(tx, reservation, list(shares))
            settlement = taken_back(
                found.hold,
                found.estimate,
                max(0, min(amount, *owed.values())),
                another_task=len(uncounted) == len(accounts)
                and (book is None or book.frees_task(reservation, was["task_id"], was["seq"])),
                tokens=was["tokens_in"] + was["tokens_out"],
            )
            spend(tx, found, accounts, settlement)
        back = 0 if settlement is None else -settlement.spend_microusd
        rest = refunds.give_back(tx, reservation, amount - back, list(shares), list(shares))
        shares = {number: back + share for number, share in rest.items()}
    for on_path in accounts:
        ledger.debit(tx, on_path, spent=-rest[on_path.account], tasks=-(on_path.account in uncounted))
    given = {on_path.id: shares[on_path.account] for on_path in accounts}
    return Returned(shares[account], shares[refunds.BUDGETS], given, settlement, tasks_kept)


def _uncount_task(tx: Tx, was: dict[str, Any], accounts: list[Account]) -> tuple[set[int], tuple[str, ...]]:
    """Count the task of an event as used on none of its accounts where nothing else used it; which count it no more.

    Besides, the delegations that count it still as nobody can tell: retention has reached a time at which they could be
    used, and may have taken other usage of the task.
    """
    still_used = _accounts_that_used(tx, was, accounts[-1].account)
    unused = [on_path for on_path in accounts if on_path.account not in still_used]
    kept = tuple(on_path.id for on_path in unused if _was_reached(tx, on_path.account))
    uncounted: set[int] = set()
    for number in (on_path.account for on_path in unused if on_path.id not in kept):
        tx.execute("UPDATE account_task SET used = 0 WHERE account = ? AND task_id = ?", (number, was["task_id"]))
        tx.execute(
            "DELETE FROM account_task WHERE account = ? AND task_id = ? AND used = 0 AND holds = 0",
            (number, was["task_id"]),
        )
        if tx.connection.changes():
            uncounted.add(number)
    return uncounted, kept


def _was_reached(tx: Tx, account: int) -> bool:
    """Whether retention has come to a time at which a delegation could be used."""
    sql = "SELECT 1 FROM delegation WHERE account = ? AND min(issued_us, coalesce(registered_us, issued_us)) < ?"
    return tx.row(sql, (account, retention.retired_edge(tx))) is not None


_PAYING = f"""
FROM usage JOIN reservation r ON r.id = usage.reservation JOIN delegation d USING (account)
WHERE usage.seq = ? AND {paid()}
"""


def paying_for(tx: Tx, seq: int) -> str | None:
    """The reservation that a row was debited to, if it was its delegate's."""
    row = tx.row(f"SELECT r.id {_PAYING}", (seq,))
    return None if row is None else str(row[0])


def account_of(tx: Tx, seq: int, agent: str) -> int | None:
    """The account that a row of an agent was debited to, by the rules of `charging.charge`."""
    row = tx.row(f"SELECT account, d.delegate {_PAYING}", (seq,))
    if row is not None and row[1] != agent:
        return None
    if row is None:
        row = tx.row(
            "SELECT account FROM usage JOIN delegation d ON d.id = usage.delegation "
            f"WHERE usage.seq = ? AND {debited()} AND d.delegate = ?",
            (seq, agent),
        )
    return None if row is None else int(row[0])


def _accounts_that_used(tx: Tx, was: dict[str, Any], root: int) -> set[int]:
    """Accounts on which the task still counts as used, by another event or by a reservation that was settled."""
    usage_behind.looking(tx)
    leaves = {
        account_of(tx, seq, name_of(tx, agent))
        for seq, agent in fetch(
            tx.connection,
            f"SELECT max(seq), agent FROM usage WHERE {usage_tasks.OF_TASK} AND seq <> ? "
            "AND (delegation IS NOT NULL OR reservation IS NOT NULL) "
            f"AND ({LIVE} OR seq IN (SELECT voids FROM usage_void WHERE superseded = {WITHHELD})) "
            f"AND NOT ({CORRECTION}) GROUP BY tenant, agent, delegation, reservation, flags",
            (*usage_tasks.of_task(was["task_id"]), was["seq"]),
        )
    }
    leaves |= {
        account
        for (account,) in fetch(
            tx.connection,
            "WITH RECURSIVE tree (account) AS (SELECT ? UNION ALL "
            "SELECT d.account FROM delegation d JOIN tree ON d.parent = tree.account) "
            "SELECT DISTINCT account FROM reservation JOIN tree USING (account) "
            "WHERE task_id = ? AND state = 'settled'",
            (root, was["task_id"]),
        )
    }
    return {on_path.account for leaf in leaves if leaf is not None for on_path in ledger.path_of(tx, leaf)}


# --- finding


def find_event(
    connection: apsw.Connection,
    visible: Visibility,
    event_id: str,
    agent: str | None,
    source: str | None,
    seq: int | None = None,
) -> list[int]:
    """The rows with an id, of usage of agents that the caller may see; at most one unless ambiguous.

    `seq` is the row that is meant: two tenants may have the same agent, source and id.

    Ids are kept with their agent and source, so every source that was ever met is tried; one that the
    daemon gave is found by its time in the audit log.
    """
    where, values = visible_names(visible, ("agent",))
    for column, name in (("agent", agent), ("source", source)):
        if name is not None:
            where.append(f"{column} = (SELECT id FROM name WHERE name = ?)")
            values.append(name)
    condition = f"WHERE {' AND '.join(where)}" if where else ""
    sources = fetch(
        connection,
        "SELECT (SELECT name FROM name WHERE id = tenant), (SELECT name FROM name WHERE id = agent), "
        f"(SELECT name FROM name WHERE id = source) FROM usage_source {condition}",
        values,
    )
    held = identity.holders(connection, [(*origin, event_id) for origin in sources])
    if not held and event_id.startswith("use_"):
        rows = [row for (row,) in _given_by_daemon(connection, event_id, condition, values)]
    else:
        rows = sorted(held.values())
    return [row for row in rows if seq in {None, row}][:2]


def _given_by_daemon(connection: apsw.Connection, event_id: str, condition: str, values: list[Any]) -> list[Row]:
    from ulid import ULID

    try:
        made_us = ULID.from_str(event_id.removeprefix("use_")).milliseconds * 1_000
    except ValueError:
        return []
    admitted = f"SELECT seq FROM usage {condition} {'AND' if condition else 'WHERE'} seq = noted.row AND id = ?"
    return fetch(
        connection,
        "SELECT row FROM (SELECT details ->> 'row' AS row FROM audit WHERE timestamp_us >= ? AND timestamp_us < ? "
        "AND event_type IN ('usage.recorded', 'usage.voided', 'usage.repriced') AND subject = ?) noted "
        f"WHERE row IN ({admitted}) LIMIT 2",
        (made_us, made_us + 1_000, event_id, *values, event_id),
    )
