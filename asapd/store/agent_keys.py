"""Public keys of agents: placed, imported, seen in manifests, retired; every change is audited in its own commit."""

from __future__ import annotations

import apsw
import msgspec

from asapd.core.agent_keys import AgentKey, KeyState, Sighting, Source, sighting
from asapd.core.errors import Refusal
from asapd.store.rows import fetch
from asapd.store.tx import RefuseError, Tx
from asapd.store.units.agents import AgentsChanged, ImportAgentKey, RetireAgentKey, SyncKeys
from asapd.wire.keys import KeyFormatError, jwk_thumbprint, load_public, public_base64

_COLUMNS = "agent, public_key, source, state, since_us, retired_us, until_us"
# Sources with one key at a time that are changed where they come from.
_FIXED: tuple[Source, ...] = ("configuration", "held", "identity")
# Verdicts on a manifest that was soundly signed, by whomever: `public_key` is who did.
_SIGNED = ("verified", "self_signed", "wrong_key", "key_changed")


def keys_of(connection: apsw.Connection, agent: str | None = None) -> list[AgentKey]:
    """The keys of an agent, or of all, in the order of agents and of when each was known."""
    where, values = ("", ()) if agent is None else ("WHERE agent = ?", (agent,))
    rows = fetch(
        connection, f"SELECT {_COLUMNS} FROM agent_key {where} ORDER BY agent, since_us, public_key, source", values
    )
    return [AgentKey(*row) for row in rows]


def claimed(connection: apsw.Connection) -> list[AgentKey]:
    """All keys that manifests were signed with and nobody confirmed."""
    return [key for key in keys_of(connection) if key.state == "claimed"]


# --- units


def sync(tx: Tx, unit: SyncKeys) -> AgentsChanged:
    """Make the held keys and the daemon's own be these, and take over what an older version kept elsewhere."""
    held = dict(unit.held)
    gone = fetch(tx.connection, "SELECT agent FROM agent_key WHERE source = 'held' AND state = 'active'")
    changed = [
        agent
        for agent in sorted({*held, *(agent for (agent,) in gone)})
        if place(tx, agent, "held", held.get(agent), unit.actor, unit.now_us, unit.overlap_us)
    ]
    if unit.identity is not None:
        agent, key = unit.identity
        place(tx, agent, "identity", key, unit.actor, unit.now_us, unit.overlap_us)
    _take_over(tx, unit.now_us)
    return AgentsChanged(changed=changed)


def _take_over(tx: Tx, now_us: int) -> None:
    """Keys of agents that were written before there was a directory of keys."""
    given = fetch(
        tx.connection,
        "SELECT id, origin, public_key FROM agent WHERE public_key IS NOT NULL AND NOT EXISTS "
        "(SELECT 1 FROM agent_key k WHERE k.agent = agent.id AND k.source IN ('configuration', 'api'))",
    )
    for agent, origin, text in given:
        place(tx, agent, source_of(origin), read_key(text), "asapd", now_us, 0)
    seen = fetch(
        tx.connection,
        "SELECT m.agent, m.public_key, m.fetched_us FROM manifest m JOIN agent a ON a.id = m.agent "
        "WHERE m.seq = (SELECT max(seq) FROM manifest WHERE agent = a.id) "
        "AND m.fetched_us >= max(a.added_us, a.held_since_us) "
        "AND m.public_key IS NOT NULL AND m.verification IN ('verified', 'self_signed') "
        "AND NOT EXISTS (SELECT 1 FROM agent_key k WHERE k.agent = a.id AND k.source = 'manifest')",
    )
    for agent, text, fetched_us in seen:
        see(tx, agent, read_key(text), fetched_us)


def add(tx: Tx, unit: ImportAgentKey) -> AgentsChanged:
    """Take a key from an operator; keys learned from manifests step back for it.

    Raises:
        RefuseError: the agent's keys are decided elsewhere.
    """
    rows = keys_of(tx.connection, unit.agent)
    _refuse_fixed(rows)
    source: Source = "tenant" if unit.is_bound else "import"
    if _find(rows, unit.public_key, source, "active") is not None:
        return AgentsChanged()
    _add(tx, AgentKey(unit.agent, unit.public_key, source, "active", unit.now_us), unit.actor)
    for row in rows:
        if row.source == "manifest" and row.state == "active" and row.public_key != unit.public_key:
            _retire(tx, row, unit.actor, unit.now_us, unit.overlap_us)
    _confirm(tx, rows, unit.public_key, unit.now_us)
    return AgentsChanged(changed=[unit.agent])


def retire(tx: Tx, unit: RetireAgentKey) -> AgentsChanged:
    """Retire a key by its thumbprint, from all its sources, or end an overlap earlier; dismisses a claimed one.

    Raises:
        RefuseError: there is no such key, or it is decided elsewhere.
    """
    rows = [row for row in keys_of(tx.connection, unit.agent) if jwk_thumbprint(row.public_key) == unit.kid]
    if not rows:
        raise RefuseError(
            Refusal("key_not_found", f"{unit.agent} has no key {unit.kid}: see `asapctl agents keys list {unit.agent}`")
        )
    _refuse_fixed(rows)
    until_us = unit.now_us + unit.overlap_us
    changed = False
    for row in rows:
        if row.state == "retired":
            if row.until_us is None or row.until_us <= until_us:
                continue
            ended = msgspec.structs.replace(row, until_us=until_us)
            _put(tx, ended)
            _tell(tx, "agent.key_retired", ended, unit.actor, unit.now_us)
        else:
            _retire(tx, row, unit.actor, unit.now_us, unit.overlap_us if row.state == "active" else 0)
            if row.source == "api":
                tx.execute("UPDATE agent SET public_key = NULL WHERE id = ?", (unit.agent,))
        changed = True
    return AgentsChanged(changed=[unit.agent] if changed else [])


def _refuse_fixed(rows: list[AgentKey]) -> None:
    for row in rows:
        if row.state != "active" or row.source not in _FIXED:
            continue
        where = {
            "configuration": "the configuration file pins its key: change it there and reload",
            "held": "the daemon holds its key in keys_dir: change the file there and reload",
            "identity": "this is the daemon itself: its key is identity.pem",
        }[row.source]
        raise RefuseError(Refusal("key_fixed", f"the keys of {row.agent} were not changed: {where}"))


# --- what other units do with keys


def place(tx: Tx, agent: str, source: Source, key: bytes | None, actor: str, now_us: int, overlap_us: int) -> bool:
    """Make `key` the one active key of a source, or with None leave it none; whether anything changed.

    A key that is replaced keeps its overlap; one that is taken away without another has none. What a manifest had
    shown goes with it, or the key would outlive its overlap: any key, or of one that is taken away the same, unless
    another source has it.
    """
    rows = keys_of(tx.connection, agent)
    active = [row for row in rows if row.state == "active"]
    given = {row.public_key for row in active if row.source not in (source, "manifest")}
    taken = {row.public_key for row in active if row.source == source} - given
    changed = False
    for row in active:
        is_shown = row.source == "manifest" and (key is not None or row.public_key in taken)
        if (row.source == source or is_shown) and row.public_key != key:
            _retire(tx, row, actor, now_us, 0 if key is None else overlap_us)
            changed = True
    if key is None or _find(rows, key, source, "active") is not None:
        return changed
    _add(tx, AgentKey(agent, key, source, "active", now_us), actor)
    _confirm(tx, rows, key, now_us)
    return True


def see(tx: Tx, agent: str, key: bytes | None, now_us: int) -> None:
    """A manifest of the agent was soundly signed with a key: take it, or only remember that it was claimed."""
    if key is None:
        return
    rows = keys_of(tx.connection, agent)
    match sighting(rows, key, now_us):
        case Sighting.FIRST:
            _add(tx, AgentKey(agent, key, "manifest", "active", now_us), "asapd")
        case Sighting.KNOWN:
            own = [row for row in rows if row.public_key == key]
            # One that is known only for its overlap does not become one without an end.
            if any(row.state == "active" for row in own) and all(row.source != "manifest" for row in own):
                _put(tx, AgentKey(agent, key, "manifest", "active", now_us))
        case Sighting.CHANGED:
            if _find(rows, key, "manifest", "claimed") is None:
                retired = _find(rows, key, "manifest", "retired")
                if retired is not None:
                    # The claim takes its row, and is forgotten with the agent: that the key was retired is not.
                    _put(tx, msgspec.structs.replace(retired, source="former"))
                claim = AgentKey(agent, key, "manifest", "claimed", now_us)
                _put(tx, claim)
                active = {jwk_thumbprint(row.public_key) for row in rows if row.state == "active"}
                _tell(tx, "agent.key_claimed", claim, "asapd", now_us, active=sorted(active))
    for row in rows:
        if row.state == "claimed" and row.public_key != key:
            withdrawn = _ended(row, now_us, 0)
            _put(tx, withdrawn)
            _tell(tx, "agent.key_withdrawn", withdrawn, "asapd", now_us)


def see_manifest(tx: Tx, agent: str, verification: str, key: str | None, now_us: int) -> None:
    """What a stored manifest says of the agent's key; one without a sound signature says nothing."""
    if verification in _SIGNED:
        see(tx, agent, read_key(key), now_us)


def forget(tx: Tx, agent: str, actor: str, now_us: int) -> None:
    """An agent left the directory: what it brought along goes too, so that its next key is a first one again.

    A key that was retired before is kept as a former one: to add the agent again is not to say that it counts again.
    """
    for row in keys_of(tx.connection, agent):
        if row.source in ("configuration", "api", "tenant", "manifest"):
            if row.state == "active":
                _retire(tx, row, actor, now_us, 0)
            elif row.state == "retired":
                until_us = now_us if row.until_us is None else min(row.until_us, now_us)
                _put(tx, msgspec.structs.replace(row, source="former", until_us=until_us))
            tx.execute(
                "DELETE FROM agent_key WHERE agent = ? AND public_key = ? AND source = ?",
                (agent, row.public_key, row.source),
            )


def is_retired(tx: Tx, agent: str, key: bytes | None) -> bool:
    """Whether a key of the agent was retired and nothing has it in force: who posts it again may not know that."""
    states = {row.state for row in keys_of(tx.connection, agent) if row.public_key == key}
    return "retired" in states and "active" not in states


def source_of(origin: str) -> Source:
    """The source of a key that stands with the agent itself."""
    return "configuration" if origin == "config" else "api"


def read_key(text: str | None) -> bytes | None:
    """A key as agents and manifests have it, raw; None where it is none that can be used."""
    try:
        return None if text is None else load_public(text)
    except KeyFormatError:
        return None


def _find(rows: list[AgentKey], key: bytes, source: Source, state: KeyState) -> AgentKey | None:
    return next((row for row in rows if (row.public_key, row.source, row.state) == (key, source, state)), None)


def _confirm(tx: Tx, rows: list[AgentKey], key: bytes, now_us: int) -> None:
    """A key that only a manifest claimed was given by an operator as well."""
    if _find(rows, key, "manifest", "claimed") is not None:
        _put(tx, AgentKey(rows[0].agent, key, "manifest", "active", now_us))


def _add(tx: Tx, key: AgentKey, actor: str) -> None:
    _put(tx, key)
    _tell(tx, "agent.key_added", key, actor, key.since_us)


def _retire(tx: Tx, row: AgentKey, actor: str, now_us: int, overlap_us: int) -> None:
    ended = _ended(row, now_us, overlap_us)
    _put(tx, ended)
    _tell(tx, "agent.key_retired", ended, actor, now_us)


def _ended(row: AgentKey, now_us: int, overlap_us: int) -> AgentKey:
    return msgspec.structs.replace(row, state="retired", retired_us=now_us, until_us=now_us + overlap_us)


def _put(tx: Tx, key: AgentKey) -> None:
    tx.execute(f"INSERT OR REPLACE INTO agent_key ({_COLUMNS}) VALUES (?,?,?,?,?,?,?)", msgspec.structs.astuple(key))


def _tell(tx: Tx, event: str, key: AgentKey, actor: str, now_us: int, **more: list[str]) -> None:
    details = {
        "id": key.agent,
        "kid": jwk_thumbprint(key.public_key),
        "public_key": public_base64(key.public_key),
        "retired_us": key.retired_us,
        "source": key.source,
        "until_us": key.until_us,
        **more,
    }
    tx.audit(event, actor, key.agent, details, now_us)
