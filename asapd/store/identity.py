"""Which identities are taken, and by which rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import apsw
import msgspec

from asapd.core.usage import Identity, identity_digest, identity_key
from asapd.store.rows import Row, fetch, fetch_one

_KEYS = "SELECT unhex(value) FROM json_each(?)"


def _packed(keys: Iterable[bytes]) -> str:
    return msgspec.json.encode([key.hex() for key in keys]).decode()


def has_digests(connection: apsw.Connection) -> bool:
    """Whether there are rows from before keys sorted as ids do, which are found by their digests only."""
    found = "SELECT 1 FROM usage WHERE seq <= (SELECT through_seq FROM usage_digest) LIMIT 1"
    return fetch_one(connection, found) is not None


def holders(connection: apsw.Connection, identities: Sequence[Identity]) -> dict[Identity, int]:
    """The rows that have identities, of those that are taken."""
    keys = {identity_key(*identity): identity for identity in identities}
    if has_digests(connection):
        keys |= {identity_digest(identity): identity for identity in identities}
    rows = fetch(connection, f"SELECT key, seq FROM usage_identity WHERE key IN ({_KEYS})", (_packed(keys),))
    return {keys[key]: seq for key, seq in rows}


def known(connection: apsw.Connection, keys: Sequence[bytes]) -> dict[bytes, tuple[int, bytes | None]]:
    """Which keys, or digests, are taken: the row that has each, and that row's content."""
    if not keys:
        return {}
    rows: list[Row] = fetch(
        connection,
        f"SELECT key, i.seq, content FROM usage_identity i LEFT JOIN usage u ON u.seq = i.seq WHERE key IN ({_KEYS})",
        (_packed(keys),),
    )
    return {key: (seq, content) for key, seq, content in rows}


def give_up(connection: apsw.Connection, identities: Sequence[Identity]) -> None:
    """Forget identities whose rows go."""
    keys = [identity_key(*identity) for identity in identities]
    if has_digests(connection):
        keys += [identity_digest(identity) for identity in identities]
    connection.executemany("DELETE FROM usage_identity WHERE key = ?", ((key,) for key in sorted(keys)))
