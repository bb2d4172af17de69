"""The directory of agents, their probes and uptime."""

from __future__ import annotations

from typing import Any

import apsw
import msgspec

from asapd.core.agent_keys import AgentKey
from asapd.core.errors import FieldError, Refusal
from asapd.core.flapping import Flaps
from asapd.core.uptime import Segment, fold_probe
from asapd.store import agent_history, agent_keys, maintenance
from asapd.store.manifests import StoredManifest, read_manifest
from asapd.store.rows import fetch
from asapd.store.tx import RefuseError, Tx
from asapd.store.units.agents import AgentRecord, AgentsChanged, PutAgent, RecordProbe, RemoveAgent, SyncAgents
from asapd.store.units.unit import RowWritten
from asapd.store.visibility import Visibility, visible_text

_COLUMNS = "url, tenant, public_key, tier, sla, health"


class DirectoryAgent(msgspec.Struct, frozen=True):
    """An agent as the directory holds it, with its newest manifest and probe, and its keys but for held ones.

    `last_good` is the newest manifest with an SLA that counts, where that of the newest one does not. What was before
    `held_since_us` was with another tenant, and what is from `held_until_us` on is with another or none.
    """

    id: str
    url: str
    tenant: str
    origin: str
    public_key: str | None
    tier: str | None
    sla: dict[str, Any] | None
    added_us: int
    state: str
    since_us: int
    ok_streak: int
    fail_streak: int
    manifest: StoredManifest | None
    last_probe: StoredProbe | None
    keys: tuple[AgentKey, ...] = ()
    health: str = "probe"
    flaps: Flaps = Flaps()
    last_good: StoredManifest | None = None
    held_since_us: int = 0
    held_until_us: int | None = None


class StoredProbe(msgspec.Struct, frozen=True):
    """One probe: `up` is what counts for uptime, `reason` why it failed. `pushed`: the agent's own report."""

    ts_us: int
    up: bool
    status: str | None
    latency_us: int | None
    reason: str | None
    detail: str | None
    hold_us: int
    pushed: bool = False
    agent_status: str | None = None


# --- units


def put(tx: Tx, unit: PutAgent) -> AgentsChanged:
    """Add or change an agent through the API.

    Raises:
        RefuseError: the agent comes from the configuration, which then decides; or it is not for its tenant to add; or
            its key was retired.
    """
    row = tx.row("SELECT origin, tenant FROM agent WHERE id = ?", (unit.agent.id,))
    if unit.is_bound and (_is_claimed(tx, unit.agent) if row is None else row[1] != unit.agent.tenant):
        detail = (
            f"this key may not act for {unit.agent.id}, of which the host or another tenant knows: "
            "have it added with a key without a tenant, or in the configuration"
        )
        raise RefuseError(Refusal("forbidden", detail))
    if row is not None and row[0] == "config":
        raise RefuseError(
            Refusal("agent_configured", f"{unit.agent.id} is set in the configuration file: change it there and reload")
        )
    if agent_keys.is_retired(tx, unit.agent.id, agent_keys.read_key(unit.agent.public_key)):
        reason = "was retired: if it is to count again, import it with `asapctl agents keys import`"
        raise RefuseError(
            Refusal("invalid", f"nothing was changed: public_key {reason}", (FieldError("public_key", reason),))
        )
    return _write(tx, [unit.agent], "api", unit.actor, unit.now_us, unit.key_overlap_us)


# Tasks are ordered by tenant first; there are few.
_CLAIMED = """
WITH RECURSIVE tenants (tenant) AS (
  SELECT min(tenant) FROM task UNION ALL
  SELECT (SELECT min(t.tenant) FROM task t WHERE t.tenant > tenants.tenant) FROM tenants WHERE tenant IS NOT NULL
)
SELECT EXISTS (SELECT 1 FROM agent_key WHERE agent = ?1 AND source IN ('held', 'import', 'identity'))
  OR EXISTS (SELECT 1 FROM delegation WHERE ?1 IN (delegator, delegate) AND tenant <> ?2)
  OR EXISTS (
    SELECT 1 FROM usage_source JOIN name a ON a.id = agent JOIN name t ON t.id = tenant
    WHERE a.name = ?1 AND t.name <> ?2
  )
  OR EXISTS (
    SELECT 1 FROM tenants JOIN name n ON n.id = tenants.tenant
    JOIN task s ON s.tenant = tenants.tenant AND s.agent = (SELECT id FROM name WHERE name = ?1) WHERE n.name <> ?2
  )
"""


def _is_claimed(tx: Tx, agent: AgentRecord) -> bool:
    """Whether an agent that is in no directory is known to others than its tenant.

    To add it would give that tenant what was reported of the agent and what it was given, or a key of the host's.
    """
    row = tx.row(_CLAIMED, (agent.id, agent.tenant))
    return row is not None and bool(row[0])


def remove(tx: Tx, unit: RemoveAgent) -> AgentsChanged:
    """Take an agent out of the directory; what was recorded of it stays."""
    row = tx.row("SELECT origin FROM agent WHERE id = ?", (unit.id,))
    if row is None:
        raise RefuseError(Refusal("agent_not_found", f"there is no agent {unit.id} in the directory: check the id"))
    if row[0] == "config":
        raise RefuseError(
            Refusal("agent_configured", f"{unit.id} is set in the configuration file: remove it there and reload")
        )
    return _delete(tx, [unit.id], unit.actor, unit.now_us)


def sync(tx: Tx, unit: SyncAgents) -> AgentsChanged:
    """Make the configured agents be these; one that was added through the API is taken over."""
    wanted = {agent.id for agent in unit.agents}
    gone = [
        agent_id
        for (agent_id,) in fetch(tx.connection, "SELECT id FROM agent WHERE origin = 'config' ORDER BY id")
        if agent_id not in wanted
    ]
    written = _write(tx, unit.agents, "config", unit.actor, unit.now_us, unit.key_overlap_us)
    removed = _delete(tx, gone, unit.actor, unit.now_us)
    return AgentsChanged(written.added, written.changed, removed.removed)


def _write(
    tx: Tx, agents: list[AgentRecord], origin: str, actor: str, now_us: int, key_overlap_us: int
) -> AgentsChanged:
    added: list[str] = []
    changed: list[str] = []
    for agent in agents:
        sla = None if agent.sla is None else msgspec.json.encode(agent.sla, order="sorted").decode()
        values = (agent.url, agent.tenant, agent.public_key, agent.tier, sla, agent.health)
        known = tx.row(f"SELECT origin, {_COLUMNS} FROM agent WHERE id = ?", (agent.id,))
        history: list[str] = []
        if known is None:
            held_since_us = agent_history.held_since_us(tx.connection, Visibility(tenant=agent.tenant), agent.id)
            tx.execute(
                f"INSERT INTO agent (id, origin, {_COLUMNS}, added_us, since_us, held_since_us) "
                "VALUES (?,?,?,?,?,?,?,?,?,?,?)",
                (agent.id, origin, *values, now_us, now_us, min(held_since_us, now_us)),
            )
            added.append(agent.id)
            if held_since_us > now_us:
                maintenance.end_all(tx, agent.id, actor, now_us)
        elif known != (origin, *values):
            is_handed_on = known[2] != agent.tenant
            if is_handed_on:
                history.append(
                    agent_history.note(tx, agent.id, "removed", actor, now_us, reason="given to another tenant")
                )
            tx.execute(
                "UPDATE agent SET origin = ?, url = ?, tenant = ?, public_key = ?, tier = ?, sla = ?, health = ? "
                "WHERE id = ?",
                (origin, *values, agent.id),
            )
            changed.append(agent.id)
            if is_handed_on:
                _begin_anew(tx, agent.id, actor, now_us)
                known = None
        else:
            continue
        event = "agent.added" if agent.id in added else "agent.changed"
        history.append(_note_written(tx, agent.id, known, (origin, *values), actor, now_us))
        details = {
            "health": agent.health,
            "history": history,
            "id": agent.id,
            "origin": origin,
            "public_key": agent.public_key,
            "sla": sla,
            "tenant": agent.tenant,
            "tier": agent.tier,
            "url": agent.url,
        }
        tx.audit(event, actor, agent.id, details, now_us)
        source = agent_keys.source_of(origin)
        agent_keys.place(tx, agent.id, source, agent_keys.read_key(agent.public_key), actor, now_us, key_overlap_us)
        if origin == "config":
            # What the API said of an agent ends when the configuration takes it over.
            agent_keys.place(tx, agent.id, "api", None, actor, now_us, 0)
    return AgentsChanged(added, changed)


def _begin_anew(tx: Tx, agent: str, actor: str, now_us: int) -> None:
    """What an agent was with another tenant is not for this one to see, nor to be judged by.

    The other's keys speak for it no more.
    """
    agent_keys.forget(tx, agent, actor, now_us)
    tx.execute(
        "UPDATE agent SET held_since_us = ?1, since_us = ?1, state = iif(state = 'paused', state, 'unknown'), "
        "ok_streak = 0, fail_streak = 0, changed = 0, verdict = NULL, flapping_since_us = NULL WHERE id = ?2",
        (now_us, agent),
    )
    maintenance.end_all(tx, agent, actor, now_us)


def _note_written(
    tx: Tx, agent: str, known: tuple[Any, ...] | None, new: tuple[Any, ...], actor: str, now_us: int
) -> str:
    """Keep what an agent was added as, or which of it changed from what to what; the digest of that."""
    names = ("origin", *_COLUMNS.split(", "))
    if known is None:
        reason = "stands in the configuration" if new[0] == "config" else "added by hand"
        made = dict(zip(names, new, strict=True))
        return agent_history.note(tx, agent, "added", actor, now_us, reason=reason, details=made)
    differ = {name: [old, now] for name, old, now in zip(names, known, new, strict=True) if old != now}
    reason = f"{', '.join(differ)} changed"
    return agent_history.note(tx, agent, "changed", actor, now_us, reason=reason, details=differ)


def _delete(tx: Tx, agents: list[str], actor: str, now_us: int) -> AgentsChanged:
    for agent in agents:
        known = tx.row("SELECT origin, state FROM agent WHERE id = ?", (agent,))
        assert known is not None
        reason = "stands in the configuration no more" if known[0] == "config" else "removed by hand"
        gone = agent_history.note(tx, agent, "removed", actor, now_us, reason=reason, details={"state": known[1]})
        tx.execute("DELETE FROM agent WHERE id = ?", (agent,))
        tx.audit("agent.removed", actor, agent, {"history": [gone], "id": agent}, now_us)
        agent_keys.forget(tx, agent, actor, now_us)
    return AgentsChanged(removed=agents)


def record_probe(tx: Tx, unit: RecordProbe) -> RowWritten:
    """Write a probe, extend the agent's uptime by it, and set its state."""
    agent = tx.intern(unit.agent)
    last = tx.row(
        "SELECT start_us, end_us, up FROM uptime_segment WHERE agent = ? ORDER BY start_us DESC LIMIT 1", (agent,)
    )
    newest = tx.row("SELECT max(ts_us) FROM probe WHERE agent = ?", (agent,))
    segment = None if last is None else Segment(last[0], last[1], bool(last[2]))
    changed, new = fold_probe(
        segment, unit.ts_us, unit.up, unit.hold_us, last_probe_us=newest[0] if newest is not None else None
    )
    if changed is not None:
        tx.execute(
            "UPDATE uptime_segment SET end_us = ?, up = ? WHERE agent = ? AND start_us = ?",
            (changed.end_us, changed.up, agent, changed.start_us),
        )
    if new is not None:
        tx.execute("INSERT INTO uptime_segment VALUES (?,?,?,?)", (agent, new.start_us, new.end_us, new.up))
    tx.execute(
        "INSERT INTO probe (agent, ts_us, up, status, latency_us, reason, detail, hold_us, pushed, agent_status) "
        "VALUES (?,?,?,?,?,?,?,?,?,?)",
        (
            *(agent, unit.ts_us, unit.up, unit.status, unit.latency_us, unit.reason, unit.detail, unit.hold_us),
            *(unit.pushed, unit.agent_status),
        ),
    )
    seq = tx.connection.last_insert_rowid()
    tx.execute(
        "UPDATE agent SET state = ?, since_us = ?, ok_streak = ?, fail_streak = ?, changed = ?, verdict = ?, "
        "flapping_since_us = ? WHERE id = ?",
        (
            *(unit.state, unit.since_us, unit.ok_streak, unit.fail_streak, unit.changed, unit.verdict),
            *(unit.flapping_since_us, unit.agent),
        ),
    )
    if unit.transition_from is not None or unit.flap is not None:
        _note_health(tx, unit)
    return RowWritten(seq)


def _note_health(tx: Tx, unit: RecordProbe) -> None:
    if unit.flap is not None:
        noted = agent_history.note(tx, unit.agent, unit.flap, "asapd", unit.ts_us)
        flap = {"history": [noted], "id": unit.agent, "state": unit.state}
        tx.audit(f"agent.{unit.flap}", "asapd", unit.agent, flap, unit.ts_us)
    if unit.transition_from is not None:
        reason, states = unit.transition_reason or unit.reason, (unit.transition_from, unit.state)
        noted = agent_history.note(tx, unit.agent, "state", "asapd", unit.ts_us, states=states, reason=reason)
        details = {
            "from": unit.transition_from,
            "history": [noted],
            "id": unit.agent,
            "reason": reason,
            "to": unit.state,
        }
        tx.audit("agent.state", "asapd", unit.agent, details, unit.ts_us)


# --- reading

_DIRECTORY = """
SELECT a.id, a.url, a.tenant, a.origin, a.public_key, a.tier, a.sla, a.added_us, a.state, a.since_us, a.ok_streak,
       a.fail_streak, m.fetched_us, m.digest, m.verification, m.sla, m.sla_error, m.ttl_seconds, m.public_key,
       p.ts_us, p.up, p.status, p.latency_us, p.reason, p.detail, p.hold_us, p.pushed, p.agent_status, a.health,
       a.changed, a.verdict, a.flapping_since_us,
       g.fetched_us, g.digest, g.verification, g.sla, g.sla_error, g.ttl_seconds, g.public_key, a.held_since_us
FROM agent a
LEFT JOIN manifest m ON m.fetched_us >= a.held_since_us AND m.seq = (SELECT max(seq) FROM manifest WHERE agent = a.id)
LEFT JOIN manifest g ON m.sla_error IS NOT NULL AND g.fetched_us >= a.held_since_us
  AND g.seq = (SELECT max(seq) FROM manifest WHERE agent = a.id AND sla_error IS NULL)
LEFT JOIN probe p ON p.ts_us >= a.held_since_us AND p.seq = (
  SELECT seq FROM probe WHERE agent = (SELECT id FROM name WHERE name = a.id) ORDER BY ts_us DESC, seq DESC LIMIT 1)
"""


def directory(connection: apsw.Connection, visible: Visibility, agent: str | None = None) -> list[DirectoryAgent]:
    """All agents that a caller may see, or one, in the order of their ids."""
    where, values = visible_text(visible, ("a.id",), ("a.tenant",))
    if agent is not None:
        where.append("a.id = ?")
        values.append(agent)
    condition = f"WHERE {' AND '.join(where)}" if where else ""
    keys: dict[str, list[AgentKey]] = {}
    for key in agent_keys.keys_of(connection, agent):
        if key.source not in ("held", "identity"):
            keys.setdefault(key.agent, []).append(key)
    rows = fetch(connection, f"{_DIRECTORY} {condition} ORDER BY a.id", values)
    return [_directory_agent(*row, tuple(keys.get(row[0], ()))) for row in rows]


def standing(connection: apsw.Connection) -> tuple[int, list[str], list[str]]:
    """How many agents there are, which of them are paused, and which flap."""
    total = fetch(connection, "SELECT count(*) FROM agent")[0][0]
    paused = fetch(connection, "SELECT id FROM agent WHERE state = 'paused' ORDER BY id LIMIT 100")
    flapping = fetch(connection, "SELECT id FROM agent WHERE flapping_since_us IS NOT NULL ORDER BY id LIMIT 100")
    return total, [row[0] for row in paused], [row[0] for row in flapping]


def _directory_agent(*row: Any) -> DirectoryAgent:
    fetched_us, probed_us = row[12], row[19]
    newest = (
        None if fetched_us is None else read_manifest(row[12:19]),
        None if probed_us is None else _probe(*row[19:28]),
    )
    good = None if row[32] is None else read_manifest(row[32:39])
    rest = (row[40], row[28], Flaps(*row[29:32]), good, row[39])
    return DirectoryAgent(*[*row[:6], _json(row[6]), *row[7:12], *newest, *rest])


def _probe(ts_us: int, up: int, *rest: Any) -> StoredProbe:
    status, latency_us, reason, detail, hold_us, pushed, agent_status = rest
    return StoredProbe(ts_us, bool(up), status, latency_us, reason, detail, hold_us, bool(pushed), agent_status)


def _json(text: str | None) -> dict[str, Any] | None:
    return None if text is None else msgspec.json.decode(text, type=dict[str, Any])


def probes(
    connection: apsw.Connection, agent: str, start_us: int | None, end_us: int | None, limit: int, before: int | None
) -> list[tuple[int, StoredProbe]]:
    """Probes of an agent, the newest first, each with its row number."""
    rows = fetch(
        connection,
        "SELECT seq, ts_us, up, status, latency_us, reason, detail, hold_us, pushed, agent_status FROM probe "
        "WHERE agent = (SELECT id FROM name WHERE name = ?) AND ts_us >= ? AND ts_us < ? AND seq < ? "
        "ORDER BY ts_us DESC, seq DESC LIMIT ?",
        (agent, start_us or 0, end_us or 2**62, before or 2**62, limit),
    )
    return [(row[0], _probe(*row[1:])) for row in rows]


class ProbeFact(msgspec.Struct, frozen=True):
    """What a follower needs to know of a probe."""

    seq: int
    agent: str
    ts_us: int
    up: bool
    hold_us: int


def probes_after(connection: apsw.Connection, seq: int, limit: int) -> list[ProbeFact]:
    """Probes in commit order behind a row number."""
    rows = fetch(
        connection,
        "SELECT seq, name, ts_us, up, hold_us FROM probe JOIN name ON name.id = agent WHERE seq > ? "
        "ORDER BY seq LIMIT ?",
        (seq, limit),
    )
    return [ProbeFact(*row) for row in rows]
