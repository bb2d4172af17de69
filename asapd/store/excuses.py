"""Entries that explain why something is gone: each has to be the daemon's own word."""

from __future__ import annotations

from collections.abc import Iterator

import apsw
import msgspec

from asapd.store.rows import fetch
from asapd.store.tx import EXCUSES
from asapd.wire.attestation import is_attested


def unattested(connection: apsw.Connection, keys: tuple[bytes, ...]) -> Iterator[str]:
    """What is to be said of each that no key of the daemon signed for its place; nothing without keys."""
    if not keys:
        return
    kinds = ", ".join(f"'{kind}'" for kind in EXCUSES)
    rows = fetch(
        connection,
        "SELECT seq, event_type, actor, subject, details, previous_hash FROM audit "
        f"WHERE event_type IN ({kinds}) ORDER BY seq",
    )
    for seq, kind, actor, subject, details, previous_hash in rows:
        if details is None:
            yield f"entry {seq} ({kind}) has lost its content, which explained why something is gone"
            continue
        said = msgspec.json.decode(details)
        if not any(is_attested(kind, actor, subject, said, previous_hash, key) for key in keys):
            what = ", ".join(f"{name} {_shown(said[name])}" for name in _WHAT if name in said)
            yield (
                f"entry {seq} ({kind} {subject}) was not signed by this daemon's key: somebody else took, or hides who "
                f"took, what it explains ({what})"
            )


_WHAT = ("count", "entries", "usage_rows", "first_row", "last_row")


def _shown(value: object) -> str:
    if isinstance(value, list):
        runs = [f"{first}" if first == last else f"{first} to {last}" for first, last in value[:5]]
        return ", ".join(runs) + (" and more" if len(value) > len(runs) else "")
    return str(value)
