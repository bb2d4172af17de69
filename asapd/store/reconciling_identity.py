"""Whether each identity of an event is taken by the row that has it: else a resend counts twice, or never counts."""

from __future__ import annotations

from typing import Any

import apsw
import msgspec

from asapd.core.usage import OTLP, identity_digest, identity_key
from asapd.store.findings import Findings, Tally
from asapd.store.rows import fetch, one_moment
from asapd.store.span_identity import of_span

STEP = 2_000

_ROWS = """
SELECT u.seq, u.id, t.name, a.name, coalesce(s.name, '') FROM usage u
JOIN name t ON t.id = u.tenant JOIN name a ON a.id = u.agent LEFT JOIN name s ON s.id = u.source
WHERE u.seq > ? ORDER BY u.seq LIMIT ?
"""
_HOLDERS = "SELECT key, seq FROM usage_identity WHERE key IN (SELECT unhex(value) FROM json_each(?))"
_COUNT = "SELECT count(*) FROM usage_identity WHERE seq <= ? OR seq > (SELECT coalesce(max(seq), 0) FROM usage)"
_TAKEN = """
SELECT i.key, i.seq, u.id, t.name, a.name, coalesce(s.name, '') FROM usage_identity i LEFT JOIN usage u ON u.seq = i.seq
LEFT JOIN name t ON t.id = u.tenant LEFT JOIN name a ON a.id = u.agent LEFT JOIN name s ON s.id = u.source
WHERE i.key > ? ORDER BY i.key LIMIT ?
"""


def reconcile_identities(connection: apsw.Connection) -> Tally:
    """Hold the identities that are taken to the rows of usage, which are held to their entries elsewhere."""
    findings, rows, mine = Findings(), 0, 0
    digests_through = fetch(connection, "SELECT max(through_seq) FROM usage_digest")[0][0] or 0
    after, first = -(2**63), fetch(connection, "SELECT min(seq) FROM usage")[0][0]
    after = after if first is None else first - 1
    while found := _step(connection, after, digests_through, findings):
        rows += found[0]
        mine += found[1]
        after = found[2]
    # Most often there are as many as were found, and none has to be looked at by itself.
    if fetch(connection, _COUNT, (after,))[0][0] != mine:
        _strays(connection, digests_through, findings)
    return Tally("usage_identity", rows, 0, findings=findings.count, named=tuple(findings.named))


def _step(
    connection: apsw.Connection, after: int, digests_through: int, findings: Findings
) -> tuple[int, int, int] | None:
    """How many rows there were, how many identities are theirs, and the number of the last; None at the end."""
    # Rows and identities of one moment: retention takes both.
    with one_moment(connection):
        rows = fetch(connection, _ROWS, (after, STEP))
        keys = {row[0]: _keys(row, digests_through) for row in rows}
        wanted = [key.hex() for ours in keys.values() for key in ours]
        holders: dict[bytes, int] = dict(fetch(connection, _HOLDERS, (msgspec.json.encode(wanted).decode(),)))
    mine = 0
    for number, event_id, *_ in rows:
        first, *more = keys[number]
        held = holders.get(first)
        mine += (held == number) + sum(holders.get(key) == number for key in more)
        # The daemon names events without an id, voids and corrections so: of these nobody sends a repeat.
        if held != number and not event_id.startswith("use_"):
            by = "nobody" if held is None else f"row {held}"
            findings.add(f"usage row {number} ({event_id}): its identity is taken by {by}, so a repeat is no repeat")
    return (len(rows), mine, rows[-1][0]) if rows else None


def _keys(row: tuple[Any, ...], digests_through: int) -> list[bytes]:
    number, event_id, tenant, agent, source = row
    identities = [(tenant, agent, source, event_id)]
    if source == OTLP:
        identities.append(of_span(tenant, event_id))
    keyed = [identity_key(*its) for its in identities]
    # A row from before keys sorted as ids do has a digest in the place of the one, or of both.
    return [*map(identity_digest, identities), *keyed] if number <= digests_through else keyed


def _strays(connection: apsw.Connection, digests_through: int, findings: Findings) -> None:
    after = b""
    while found := fetch(connection, _TAKEN, (after, STEP)):
        for key, number, *row in found:
            if row[0] is None or key not in _keys((number, *row), digests_through):
                findings.add(f"usage_identity {key.hex()} is taken by usage row {number}, which has another")
        after = found[-1][0]
