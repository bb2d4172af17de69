"""What agents were held to, from when on: append-only, by the watcher's word."""

from __future__ import annotations

from typing import Any

import apsw
import msgspec

from asapd.core.types import MINUTE_US
from asapd.store.rows import fetch
from asapd.store.tx import Tx
from asapd.store.units.promises import PromiseRecord, RecordPromises
from asapd.store.units.unit import RowWritten

LEARNING_US = 10 * MINUTE_US
"""A manifest that is first read so soon after its agent was added was its promise from the start."""

_COLUMNS = "agent, tenant, since_us, source, sla, manifest_digest, error"
_NEWEST = "(SELECT max(seq) FROM promise n WHERE n.agent = a.id AND n.tenant = a.tenant)"


def record(tx: Tx, unit: RecordPromises) -> RowWritten:
    """Keep what agents are held to from now on; that one promises nothing from the start needs no entry."""
    seq = 0
    for one in unit.promises:
        is_first = tx.row("SELECT 1 FROM promise WHERE agent = ? AND tenant = ?", (one.agent, one.tenant)) is None
        sla = None if one.sla is None else msgspec.json.encode(one.sla, order="sorted").decode()
        tx.execute(
            f"INSERT INTO promise ({_COLUMNS}) VALUES (?,?,?,?,?,?,?)",
            (one.agent, one.tenant, one.since_us, one.source, sla, one.manifest_digest, one.error),
        )
        seq = tx.connection.last_insert_rowid()
        if is_first and one.source is None and one.error is None:
            continue
        details = {
            "error": one.error,
            "id": one.agent,
            "manifest_digest": one.manifest_digest,
            "since_us": one.since_us,
            "sla": one.sla,
            "source": one.source,
            "tenant": one.tenant,
        }
        tx.audit("agent.promise", "asapd", one.agent, details, one.since_us)
    return RowWritten(seq)


def newest(connection: apsw.Connection) -> list[PromiseRecord]:
    """What each agent of the directory was last said to be held to."""
    rows = fetch(connection, f"SELECT {_columns('p')} FROM agent a JOIN promise p ON p.seq = {_NEWEST}")
    return [_record(*row) for row in rows]


def held(connection: apsw.Connection, agent: str, tenant: str) -> list[PromiseRecord]:
    """What an agent of a tenant was held to, in order; each until the next."""
    rows = fetch(
        connection,
        f"SELECT {_COLUMNS} FROM promise WHERE agent = ? AND tenant = ? ORDER BY seq",
        (agent, tenant),
    )
    return _in_order([_record(*row) for row in rows])


def support_hours(connection: apsw.Connection, since_us: int) -> dict[str, list[tuple[int, str | None]]]:
    """By agent the support hours that it had and from when on, each until the next, where they changed after a time."""
    rows = fetch(
        connection,
        f"SELECT {_columns('p')} FROM agent a JOIN promise p ON p.agent = a.id AND p.tenant = a.tenant "
        "WHERE a.id IN (SELECT agent FROM promise WHERE since_us >= ?1) AND p.seq >= coalesce((SELECT max(seq) "
        "FROM promise q WHERE q.agent = a.id AND q.tenant = a.tenant AND q.since_us < ?1), 0) ORDER BY p.agent, p.seq",
        (since_us,),
    )
    by_agent: dict[str, list[PromiseRecord]] = {}
    for row in rows:
        by_agent.setdefault(row[0], []).append(_record(*row))
    return {agent: hours_of(_in_order(found)) for agent, found in by_agent.items()}


def hours_of(records: list[PromiseRecord]) -> list[tuple[int, str | None]]:
    """The support hours in what an agent was held to, and from when on."""
    found: list[tuple[int, str | None]] = []
    for one in records:
        hours = None if one.sla is None else one.sla.get("support_hours")
        if not found or found[-1][1] != hours:
            found.append((one.since_us, hours))
    return found


def errors(connection: apsw.Connection, limit: int = 100) -> list[tuple[str, str]]:
    """Agents of which a source of their promise does not count, and why."""
    return fetch(
        connection,
        f"SELECT a.id, p.error FROM agent a JOIN promise p ON p.seq = {_NEWEST} "
        "WHERE p.error IS NOT NULL ORDER BY a.id LIMIT ?",
        (limit,),
    )


def _in_order(records: list[PromiseRecord]) -> list[PromiseRecord]:
    """By time as well: what was said later holds from its time on, also when the clock had gone back."""
    found: list[PromiseRecord] = []
    for one in records:
        while found and found[-1].since_us >= one.since_us:
            found.pop()
        learnt = len(found) == 1 and _was_not_known_yet(found[0], one)
        found.append(msgspec.structs.replace(one, since_us=found.pop().since_us) if learnt else one)
    return found


def _was_not_known_yet(first: PromiseRecord, second: PromiseRecord) -> bool:
    soon = second.since_us - first.since_us <= LEARNING_US
    return soon and first.source in (None, "tier", "default") and second.source == "manifest"


def _columns(table: str) -> str:
    return ", ".join(f"{table}.{column}" for column in _COLUMNS.split(", "))


def _record(*row: Any) -> PromiseRecord:
    agent, tenant, since_us, source, sla, digest, error = row
    block = None if sla is None else msgspec.json.decode(sla, type=dict[str, Any])
    return PromiseRecord(agent, tenant, since_us, source, block, digest, error)
