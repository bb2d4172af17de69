"""Which identities are taken, and by which rows."""

from __future__ import annotations

from collections.abc import Sequence

import apsw
import msgspec

from asapd.core.usage import Identity, UsageEvent, content_digest, identity_digest, identity_key
from asapd.store.rows import Row, fetch, fetch_one


def has_digests(connection: apsw.Connection) -> bool:
    """Whether there are rows from before keys sorted as ids do, which are found by their digests only."""
    found = "SELECT 1 FROM usage WHERE seq <= (SELECT through_seq FROM usage_digest) LIMIT 1"
    return fetch_one(connection, found) is not None


def holders(connection: apsw.Connection, identities: Sequence[Identity]) -> dict[Identity, int]:
    """The rows that have identities, of those that are taken."""
    keys = {identity_key(*identity): identity for identity in identities}
    if has_digests(connection):
        keys |= {identity_digest(identity): identity for identity in identities}
    if not keys:
        return {}
    looked_up = "SELECT key, seq FROM usage_identity WHERE key IN carray(?)"
    return {keys[key]: seq for key, seq in fetch(connection, looked_up, (apsw.carray(tuple(keys)),))}


def known(connection: apsw.Connection, keys: Sequence[bytes]) -> dict[bytes, tuple[int, bytes | None]]:
    """Which keys, or digests, are taken: the row that has each, and that row's content."""
    if not keys:
        return {}
    rows: list[Row] = fetch(
        connection,
        # A join, not IN: that would sort the keys into a table of its own first, which costs as much as the look.
        "SELECT i.key, i.seq, content FROM carray(?) j CROSS JOIN usage_identity i ON i.key = j.value "
        "LEFT JOIN usage u ON u.seq = i.seq",
        (apsw.carray(tuple(keys)),),
    )
    return {key: (seq, content) for key, seq, content in rows}


def repeats(connection: apsw.Connection, tenant: str, events: Sequence[UsageEvent]) -> list[bool | None]:
    """Of each event, what its identity says to who reports it: True a repeat, False other content, None neither."""
    identities = [(tenant, event.agent, event.source, event.id) for event in events]
    seqs = holders(connection, [identity for identity in identities if identity[3]])
    rows = fetch(
        connection,
        "SELECT seq, content FROM usage WHERE seq IN (SELECT value FROM json_each(?))",
        (msgspec.json.encode(list(seqs.values())).decode(),),
    )
    contents: dict[int, bytes] = dict(rows)
    taken = {identity: contents.get(seq) for identity, seq in seqs.items()}
    found: list[bool | None] = []
    for identity, event in zip(identities, events, strict=True):
        content = content_digest(event)
        found.append(taken[identity] == content if event.id and identity in taken else None)
        taken.setdefault(identity, content)
    return found


def give_up(connection: apsw.Connection, held: Sequence[tuple[Identity, int]]) -> None:
    """Forget identities whose rows go, each with its row.

    Only where the row is the one that has the identity: an event without an id is named by the daemon, and a voiding
    row as well, and by such a name an event may come that has it for its identity.
    """
    keys = [(identity_key(*identity), seq) for identity, seq in held]
    if has_digests(connection):
        keys += [(identity_digest(identity), seq) for identity, seq in held]
    connection.executemany("DELETE FROM usage_identity WHERE key = ? AND seq = ?", sorted(keys))
