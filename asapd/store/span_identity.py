"""Spans count once whatever agent they are said to be of: their identity is the trace and span id alone.

The same span comes of two agents when two pipelines export it, of which one names the service otherwise, or after the
attributes that name agents were configured anew. So a span has a second key in the table of identities, of no agent,
unless who reported it may not report for every agent.
"""

from __future__ import annotations

from collections.abc import Sequence

from asapd.core.usage import OTLP, Identity, UsageEvent, identity_key
from asapd.store import identity
from asapd.store.rows import fetch
from asapd.store.tx import Tx


def of_span(tenant: str, event_id: str) -> Identity:
    """The second identity of a span; no event's, for each of those has an agent."""
    return (tenant, "", OTLP, event_id)


def of_others(tx: Tx, tenant: str, spans: Sequence[tuple[int, UsageEvent]]) -> dict[int, int]:
    """Which spans, of pairs of place and event, are usage of another agent: their places, and the rows of that.

    The row is 0 where the other stands before it among these.
    """
    rows = identity.holders(tx.connection, [of_span(tenant, event.id) for _, event in spans])
    agents: dict[int, int] = dict(
        fetch(
            tx.connection,
            "SELECT seq, agent FROM usage WHERE seq IN (SELECT value FROM json_each(?))",
            (str(sorted(rows.values())),),
        )
    )
    known = {its: (agents[row], row) for its, row in rows.items() if row in agents}
    found: dict[int, int] = {}
    for place, event in spans:
        agent = tx.intern(event.agent)
        first, row = known.setdefault(of_span(tenant, event.id), (agent, 0))
        if first != agent:
            found[place] = row
    return found


def keep(tx: Tx, tenant: str, events: Sequence[UsageEvent]) -> None:
    """Remember which rows have the spans of events that are recorded."""
    identities = {(tenant, event.agent, OTLP, event.id) for event in events}
    rows = identity.holders(tx.connection, list(identities))
    tx.insert_many(
        "INSERT OR IGNORE INTO usage_identity VALUES (?,?)",
        sorted((identity_key(*of_span(tenant, its[3])), row) for its, row in rows.items()),
    )
