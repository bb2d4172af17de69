"""Entries that explain why something is gone: each has to be the daemon's own word.

Builds before these were signed wrote them too. An operator vouches for those, with an entry that is signed for its
place as they are: it speaks for nothing that is put in later. None behind the first signed one can be vouched for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

import apsw
import msgspec

from asapd.store.rows import fetch
from asapd.store.tx import EXCUSES
from asapd.wire.attestation import is_attested

VOUCHED: Final = "log.vouched"


class Excuse(msgspec.Struct, frozen=True):
    """One of these entries; `details` is None where it has lost its content."""

    seq: int
    kind: str
    subject: str | None
    details: dict[str, Any] | None
    is_signed: bool

    @property
    def what(self) -> str:
        """What it explains."""
        said = self.details or {}
        return ", ".join(f"{name} {_shown(said[name])}" for name in _WHAT if name in said)


def unattested(connection: apsw.Connection, keys: tuple[bytes, ...]) -> Iterator[str]:
    """What is to be said of each that no key of the daemon signed for its place; nothing without keys."""
    if not keys:
        return
    found = read(connection, keys)
    first, through = _first_signed(found), _vouched_through(found)
    for one in found:
        if one.details is None:
            yield f"entry {one.seq} ({one.kind}) has lost its content, which explained why something is gone"
        elif not one.is_signed and one.seq > through:
            hint = "; if an older asapd wrote it, see `asapctl audit vouch`" if one.seq < first else ""
            yield (
                f"entry {one.seq} ({one.kind} {one.subject}) was not signed by this daemon's key: somebody else took, "
                f"or hides who took, what it explains ({one.what}){hint}"
            )


def from_before(found: Sequence[Excuse]) -> list[Excuse]:
    """Those that nobody signed or vouched for, from before the first that was: since then the daemon signs its own."""
    first, through = _first_signed(found), _vouched_through(found)
    return [one for one in found if through < one.seq < first and one.details is not None]


def _first_signed(found: Iterable[Excuse]) -> int:
    return min((one.seq for one in found if one.is_signed), default=2**63)


def _vouched_through(found: Sequence[Excuse]) -> int:
    vouches = [one.details["last_seq"] for one in found if one.is_signed and one.kind == VOUCHED and one.details]
    return min(max(vouches, default=0), _first_signed(found) - 1)


def read(
    connection: apsw.Connection, keys: tuple[bytes, ...], after: int = -(2**63), through: int = 2**63 - 1
) -> list[Excuse]:
    """All of them behind one entry up to another, in their order."""
    kinds = ", ".join(f"'{kind}'" for kind in EXCUSES)
    rows = fetch(
        connection,
        "SELECT seq, event_type, actor, subject, details, previous_hash FROM audit "
        f"WHERE seq > ? AND seq <= ? AND event_type IN ({kinds}) ORDER BY seq",
        (after, through),
    )
    return [_excuse(keys, *row) for row in rows]


def _excuse(
    keys: tuple[bytes, ...], seq: int, kind: str, actor: str, subject: str, details: str | None, previous: bytes
) -> Excuse:
    if details is None:
        return Excuse(seq, kind, subject, None, is_signed=False)
    try:
        said = msgspec.json.decode(details, type=dict[str, Any])
    except ValueError:  # none that was ever signed
        return Excuse(seq, kind, subject, {}, is_signed=False)
    is_signed = any(is_attested(kind, actor, subject, said, previous, key) for key in keys)
    return Excuse(seq, kind, subject, said, is_signed)


_WHAT = ("version", "count", "entries", "usage_rows", "first_row", "last_row")


def _shown(value: object) -> str:
    if isinstance(value, list):
        runs = [f"{first}" if first == last else f"{first} to {last}" for first, last in value[:5]]
        return ", ".join(runs) + (" and more" if len(value) > len(runs) else "")
    return str(value)
