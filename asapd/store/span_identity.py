"""Spans count once whatever agent they are said to be of: their identity is the trace and span id alone.

The same span comes of two agents when two pipelines export it, of which one names the service otherwise, or after the
attributes that name agents were configured anew. So a span has a second key in the table of identities, of no agent,
unless who reported it may not report for every agent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from asapd.core.usage import OTLP, Identity, UsageEvent, content_digest, identity_key
from asapd.store import identity
from asapd.store.rows import fetch
from asapd.store.tx import Tx
from asapd.store.units.usage import RecordUsage


def of_span(tenant: str, event_id: str) -> Identity:
    """The second identity of a span; no event's, for each of those has an agent."""
    return (tenant, "", OTLP, event_id)


def has_tokens(event: UsageEvent) -> bool:
    """Whether a span tells of any tokens; one of 0 takes nothing away from others."""
    return event.tokens_in > 0 or event.tokens_out > 0


class Refused(NamedTuple):
    """Why a span is not recorded: its identity has the row `seq`, 0 where that is of another span of the same unit.

    `is_others` says that it is usage of another agent, and `has_its_tokens` that the tokens which the span tells, if
    any, are counted all the same.
    """

    seq: int
    is_others: bool
    has_its_tokens: bool


class _Holder(NamedTuple):
    seq: int
    agent: int
    content: bytes
    tokens_in: int
    tokens_out: int

    def refuses(self, event: UsageEvent, agent: int) -> Refused:
        has_its_tokens = has_tokens(event) and (self.tokens_in, self.tokens_out) == (event.tokens_in, event.tokens_out)
        return Refused(self.seq, self.agent != agent, has_its_tokens)


def refused(tx: Tx, unit: RecordUsage) -> dict[int, Refused]:
    """Which spans were reported before, of another agent or with other content: their places, and what has them."""
    own = [(unit.tenant, event.agent, event.source, event.id) for event in unit.events]
    of_nobody = [of_span(unit.tenant, event.id) for event in unit.events]
    rows = identity.holders(tx.connection, [*own, *of_nobody])
    held = {
        row[0]: _Holder(*row)
        for row in fetch(
            tx.connection,
            "SELECT seq, agent, content, tokens_in, tokens_out FROM usage "
            "WHERE seq IN (SELECT value FROM json_each(?))",
            (str(sorted(rows.values())),),
        )
    }
    known = {its: held[row] for its, row in rows.items() if row in held}
    found: dict[int, Refused] = {}
    spans = list(zip(unit.events, own, of_nobody, strict=True))
    # One without tokens may give way, and holds nothing then: of two in a unit it is the one that is refused.
    for place in sorted(range(len(spans)), key=lambda place: not has_tokens(spans[place][0])):
        event, its, span = spans[place]
        agent, content = tx.intern(event.agent), unit.contents[place] if unit.contents else content_digest(event)
        new = _Holder(0, agent, content, event.tokens_in, event.tokens_out)
        holder = known.setdefault(span, new)
        if holder.agent == agent:
            holder = known.setdefault(its, new)
        if (holder.agent, holder.content) != (agent, content):
            found[place] = holder.refuses(event, agent)
    return found


def keep(tx: Tx, tenant: str, events: Sequence[UsageEvent]) -> None:
    """Remember which rows have the spans of events that are recorded."""
    identities = {(tenant, event.agent, OTLP, event.id) for event in events}
    rows = identity.holders(tx.connection, list(identities))
    tx.insert_many(
        "INSERT OR IGNORE INTO usage_identity VALUES (?,?)",
        sorted((identity_key(*of_span(tenant, its[3])), row) for its, row in rows.items()),
    )
