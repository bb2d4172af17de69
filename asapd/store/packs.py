"""What an evidence pack is made from: entries about an agent, its delegations, and the checkpoint before a period."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import apsw

from asapd.core.evidence_pack import MADE, OF_HOST, REVOKED, concerns
from asapd.core.merkle import inclusion_proof, root_of
from asapd.core.types import DEFAULT_TENANT
from asapd.store import audit, seals
from asapd.store.parties import HOLDER, OWNER
from asapd.store.rows import fetch, fetch_one
from asapd.store.seals import SealedAt
from asapd.store.visibility import Visibility

MOST = 10_000
"""Entries of one pack: each has a proof of some twenty hashes, two kilobytes in all, so 20 MB."""

_TOGETHER = 500
"""Proofs made from what was read once: of entries far from each other, each reads 256."""

_MENTIONS = (
    "(subject = ?1 OR details ->> 'agent' = ?1 OR (subject = '*' AND event_type GLOB 'maintenance.*') "
    f"OR (?2 AND event_type IN ({', '.join(repr(kind) for kind in OF_HOST)})))"
)


def mentioned(
    connection: apsw.Connection,
    visible: Visibility,
    agent: str,
    period: tuple[int, int],
    seqs: tuple[int, int],
) -> list[int]:
    """The entries among two numbers (both included) that are about an agent and of a period, at most one too many.

    The caller may see the agent; what was recorded of it for another tenant is left out.

    Raises:
        UnreadableEntryError: one of them cannot be read, so that nobody knows what it is about.
    """
    whole = visible.tenant is None and "*" in visible.agents
    with audit.reading_entries():
        rows = fetch(
            connection,
            "SELECT seq, event_type, subject, details ->> 'agent', details ->> 'tenant', details ->> 'id' FROM audit "
            f"WHERE seq BETWEEN ?3 AND ?4 AND timestamp_us >= ?5 AND timestamp_us < ?6 AND details IS NOT NULL "
            f"AND {_MENTIONS} ORDER BY seq",
            (agent, whole, *seqs, *period),
        )
    found: list[int] = []
    for seq, kind, subject, named, tenant, entry_of in rows:
        if not concerns({"event_type": kind, "subject": subject, "details": {"agent": named}}, agent):
            continue
        if visible.tenant is not None and kind == "sla.breach":
            if fetch_one(connection, "SELECT tenant FROM breach WHERE id = ?", (entry_of,)) == (visible.tenant,):
                found.append(seq)
        elif visible.tenant is None or tenant in (None, visible.tenant, DEFAULT_TENANT):
            found.append(seq)
        if len(found) > MOST:
            break
    return found


def delegated(
    connection: apsw.Connection, agent: str, period: tuple[int, int], may_see: Callable[..., bool]
) -> list[int]:
    """The entries of delegations that an agent gave or had in a period, and of what they were given under.

    `may_see` is asked with the tenants of both ends of each, and the ends; at most one entry too many.
    """
    start_us, end_us = period
    rows = fetch(
        connection,
        "WITH RECURSIVE above (account) AS (SELECT account FROM delegation WHERE ? IN (delegator, delegate) "
        "AND registered_us < ? AND expires_us > ? AND (revoked_us IS NULL OR revoked_us >= ?) UNION "
        "SELECT parent FROM delegation JOIN above USING (account) WHERE parent IS NOT NULL) "
        f"SELECT d.id, {OWNER}, {HOLDER}, d.delegator, d.delegate, d.registered_us, d.revoked_us "
        "FROM above JOIN delegation d USING (account) ORDER BY account LIMIT ?",
        (agent, end_us, start_us, start_us, MOST + 1),
    )
    found: list[int] = []
    for name, owner, holder, delegator, delegate, registered_us, revoked_us in rows:
        if may_see(owner, holder, delegator, delegate):
            for kind, at_us in ((MADE, registered_us), (REVOKED, revoked_us)):
                entries = fetch(
                    connection,
                    "SELECT seq FROM audit WHERE timestamp_us = ? AND event_type = ? AND subject = ?",
                    (at_us, kind, name),
                )
                found += [seq for (seq,) in entries]
    return found


def entries_at(connection: apsw.Connection, seqs: list[int]) -> list[dict[str, Any]]:
    """Entries by their numbers, but for those whose content was erased meanwhile."""
    entries = (audit.get_entry(connection, str(seq)) for seq in seqs)
    return [entry for entry in entries if entry is not None and entry["details"] is not None]


def proofs_at(connection: apsw.Connection, seqs: list[int], size: int) -> tuple[bytes, list[list[bytes]]] | None:
    """The root over the first `size` entries, and what leads there from each entry; None when a node is missing."""
    proofs: list[list[bytes]] = []
    try:
        for at in range(0, len(seqs), _TOGETHER):
            # A new one forgets the entries it has read: those of all proofs would be hundreds of megabytes.
            node = seals.node_of(connection)
            proofs += [inclusion_proof(seq - 1, size, node) for seq in seqs[at : at + _TOGETHER]]
        return root_of(size, seals.node_of(connection)), proofs
    except KeyError:
        return None


def sealed_before(connection: apsw.Connection, at_us: int, origin: str) -> SealedAt | None:
    """The newest checkpoint of a log that was signed before a time and has entries."""
    row = fetch_one(
        connection,
        "SELECT size, root, CAST(note AS BLOB), sealed_us FROM audit_checkpoint WHERE sealed_us < ? AND size > 0 "
        "AND substr(CAST(note AS BLOB), 1, ?) = ? ORDER BY size DESC LIMIT 1",
        (at_us, len(origin) + 1, f"{origin}\n".encode()),
    )
    return None if row is None else seals.sealed(row)
