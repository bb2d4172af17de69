"""Manifests of agents: every version that differs from the one before, as it was served, with its digest."""

from __future__ import annotations

from typing import Any

import apsw
import msgspec

from asapd.core.row_digest import row_digest
from asapd.store import agent_history, agent_keys
from asapd.store.rows import fetch, fetch_one
from asapd.store.tx import Tx
from asapd.store.units.agents import RecordManifest
from asapd.store.units.unit import RowWritten
from asapd.store.visibility import Visibility

_COLUMNS = "fetched_us, digest, verification, sla, sla_error, ttl_seconds, public_key"


class StoredManifest(msgspec.Struct, frozen=True):
    """A manifest of an agent, without its body."""

    fetched_us: int
    digest: str
    verification: str
    sla: dict[str, Any] | None
    sla_error: str | None
    ttl_seconds: int | None
    public_key: str | None


def record(tx: Tx, unit: RecordManifest) -> RowWritten:
    """Keep a version of an agent's manifest."""
    sla = None if unit.sla is None else msgspec.json.encode(unit.sla, order="sorted").decode()
    tx.execute(
        "INSERT INTO manifest (agent, fetched_us, digest, body, verification, sla, sla_error, ttl_seconds, public_key) "
        "VALUES (?,?,?,?,?,?,?,?,?)",
        (
            unit.agent,
            unit.fetched_us,
            unit.digest,
            unit.body,
            unit.verification,
            sla,
            unit.sla_error,
            unit.ttl_seconds,
            unit.public_key,
        ),
    )
    seq = tx.connection.last_insert_rowid()
    kept = {"digest": unit.digest, "verification": unit.verification}
    history = [agent_history.note(tx, unit.agent, "manifest", "asapd", unit.fetched_us, details=kept)]
    if unit.sla_error is not None:
        wrong = unit.sla_error
        history.append(
            agent_history.note(tx, unit.agent, "sla_rejected", "asapd", unit.fetched_us, reason=wrong, details=kept)
        )
    details = {
        "digest": unit.digest,
        "history": history,
        "id": unit.agent,
        "row_digest": row_digest((unit.body, sla, unit.ttl_seconds, unit.public_key)),
        "sla_error": unit.sla_error,
        "verification": unit.verification,
    }
    tx.audit("agent.manifest", "asapd", unit.agent, details, unit.fetched_us)
    agent_keys.see_manifest(tx, unit.agent, unit.verification, unit.public_key, unit.fetched_us)
    return RowWritten(seq)


def versions(
    connection: apsw.Connection, visible: Visibility, agent: str, limit: int, before: int | None
) -> list[tuple[int, StoredManifest]]:
    """Every version of an agent's manifest since it is of a caller's tenant, the newest first, each with its row."""
    rows = fetch(
        connection,
        f"SELECT seq, {_COLUMNS} FROM manifest WHERE agent = ? AND seq < ? AND fetched_us >= ? "
        "ORDER BY seq DESC LIMIT ?",
        (agent, before or 2**62, agent_history.held_since_us(connection, visible, agent), limit),
    )
    return [(row[0], read_manifest(row[1:])) for row in rows]


def body_of(
    connection: apsw.Connection, visible: Visibility, agent: str, digest: str
) -> tuple[StoredManifest, bytes] | None:
    """The newest version of an agent's manifest with a digest (hex SHA-256), and the bytes that the agent served."""
    row = fetch_one(
        connection,
        f"SELECT {_COLUMNS}, body FROM manifest WHERE agent = ? AND digest = ? AND fetched_us >= ? "
        "ORDER BY seq DESC LIMIT 1",
        (agent, digest, agent_history.held_since_us(connection, visible, agent)),
    )
    return None if row is None else (read_manifest(row[:-1]), row[-1])


def read_manifest(row: tuple[Any, ...]) -> StoredManifest:
    """A manifest from its columns, in the order of the struct."""
    fetched_us, digest, verification, sla, *rest = row
    block = None if sla is None else msgspec.json.decode(sla, type=dict[str, Any])
    return StoredManifest(fetched_us, digest, verification, block, *rest)
