"""Retiring the audit log: whole prefixes lose their content, once that is in an archive, and keep their hashes."""

from __future__ import annotations

from typing import Any

import apsw
import msgspec

from asapd.core.errors import Refusal
from asapd.store import budget_counts, seals
from asapd.store.erasures import EXPLAINING, STANDING, erase_payloads, runs, usage_rows_of
from asapd.store.rows import fetch, fetch_one
from asapd.store.times import shown_us
from asapd.store.tx import RefuseError, Tx
from asapd.store.units.audit import AuditRetired, KeepArchive, RetireAudit
from asapd.store.units.unit import RowWritten, Taken

MOST = 50_000
"""Entries of one archive: some eight megabytes, written and verified in a few seconds."""


_TAKEN = f"event_type NOT IN {EXPLAINING} AND event_type NOT IN {STANDING}"


class Archive(msgspec.Struct, frozen=True):
    """An archive that was verified; up to `through_seq` the content of its entries is erased."""

    first_seq: int
    last_seq: int
    through_seq: int
    before_us: int
    file: str
    sha256: str


class Prefix(msgspec.Struct, frozen=True):
    """The next entries that are due, both included, with the hashes of the entry before them and of the last."""

    first_seq: int
    last_seq: int
    previous_hash: bytes
    last_hash: bytes


def newest(connection: apsw.Connection) -> Archive | None:
    """The archive that was made last."""
    row = fetch_one(
        connection,
        "SELECT first_seq, last_seq, through_seq, before_us, file, sha256 FROM audit_archive "
        "ORDER BY first_seq DESC LIMIT 1",
    )
    return None if row is None else Archive(*row)


def due(connection: apsw.Connection, after: int, before_us: int) -> Prefix | None:
    """The next entries behind `after` that were all written before a time, as many as an archive holds.

    None when there is no content among them that retention takes, unless they fill an archive.
    """
    head = fetch(connection, "SELECT max(seq) FROM audit")[0][0] or 0
    end = min(after + MOST, head)
    # Clocks may have been set back: what is behind the first entry that is too young stays with it.
    young = fetch(
        connection,
        "SELECT seq FROM audit WHERE seq > ? AND seq <= ? AND +timestamp_us >= ? ORDER BY seq LIMIT 1",
        (after, end, before_us),
    )
    last = young[0][0] - 1 if young else end
    if last <= after or (last < after + MOST and not counted(connection, after + 1, last).count):
        return None
    hashes: dict[int, bytes] = dict(fetch(connection, "SELECT seq, hash FROM audit WHERE seq IN (?, ?)", (after, last)))
    if last not in hashes or (after and after not in hashes):
        return None  # a hole, which verification names
    return Prefix(after + 1, last, hashes.get(after, bytes(32)), hashes[last])


def counted(connection: apsw.Connection, first: int, last: int) -> Taken:
    """How much content retention takes from some entries, and of which times."""
    found = fetch(
        connection,
        "SELECT count(*), min(seq), max(seq), min(timestamp_us), max(timestamp_us) FROM audit "
        f"WHERE seq BETWEEN ? AND ? AND salt IS NOT NULL AND {_TAKEN}",
        (first, last),
    )[0]
    return Taken(*found)


def strange_block(connection: apsw.Connection, first: int, last: int) -> str | None:
    """What tells that some entries are not those that the tree was grown over; None when nothing does."""
    for block in range((first - 1) // seals.BLOCK, (last - 1) // seals.BLOCK + 1):
        if not seals.is_block_as_kept(connection, block):
            return f"entries {block * seals.BLOCK + 1} to {(block + 1) * seals.BLOCK} are not those that were sealed"
    return None


def keep(tx: Tx, unit: KeepArchive) -> RowWritten:
    """Record an archive, with an entry that names it.

    Raises:
        RefuseError: `log_broken`, when it does not go on where the last one was retired up to, or its last entry is not
            the one of the log.
    """
    known = newest(tx.connection)
    through = 0 if known is None else known.through_seq
    row = tx.row("SELECT hash FROM audit WHERE seq = ?", (unit.last_seq,))
    if unit.first_seq != through + 1 or row is None or row[0] != unit.last_hash:
        detail = f"an archive of entries {unit.first_seq} to {unit.last_seq} is not what comes next: nothing was done"
        raise RefuseError(Refusal("log_broken", detail))
    # What was made before, and nothing of it retired, has become useless: its file is gone.
    tx.execute(
        "INSERT OR REPLACE INTO audit_archive VALUES (?,?,?,?,?,?)",
        (unit.first_seq, unit.last_seq, through, unit.before_us, unit.file, unit.sha256),
    )
    details = {
        "before_us": unit.before_us,
        "file": unit.file,
        "first_seq": unit.first_seq,
        "last_hash": unit.last_hash.hex(),
        "last_seq": unit.last_seq,
        "sha256": unit.sha256,
    }
    tx.audit("audit.archived", unit.actor, "audit", details, unit.now_us)
    return RowWritten(unit.last_seq)


def retire(tx: Tx, unit: RetireAudit) -> AuditRetired:
    """Erase the content of the next entries that are in an archive, and say so in the log.

    What explains to verification why content is gone stays for ever, and so do decisions that stand.
    """
    archive = newest(tx.connection)
    if archive is None or archive.through_seq >= archive.last_seq:
        return AuditRetired(Taken(), more=False)
    through = min(archive.through_seq + unit.limit, archive.last_seq)
    rows = fetch(
        tx.connection,
        f"SELECT seq, timestamp_us FROM audit WHERE seq > ? AND seq <= ? AND salt IS NOT NULL AND {_TAKEN}",
        (archive.through_seq, through),
    )
    taken = Taken()
    if rows:
        seqs, times = [seq for seq, _ in rows], [at_us for _, at_us in rows]
        taken = Taken(len(seqs), min(seqs), max(seqs), min(times), max(times))
        details = {
            "before_us": archive.before_us,
            "count": len(seqs),
            "entries": runs(seqs),
            "file": archive.file,
            "first_seq": seqs[0],
            "last_seq": seqs[-1],
            "sha256": archive.sha256,
            "table": "audit",
            "through_seq": through,
            "usage_rows": runs(usage_rows_of(tx.connection, seqs)),
        }
        counted = budget_counts.changes_of(tx.connection, seqs)
        if counted:
            details["budgets"] = counted.details()
        erase_payloads(tx, seqs)
        tx.audit("retention.applied", unit.actor, "audit", details, unit.now_us)
    tx.execute("UPDATE audit_archive SET through_seq = ? WHERE first_seq = ?", (through, archive.first_seq))
    return AuditRetired(taken, more=through < archive.last_seq)


def shown(before_us: int | None, goes: Taken) -> dict[str, Any]:
    """What went, or would go, as it is told to whoever asked."""
    times = {"before": before_us, "oldest": goes.oldest_us, "newest": goes.newest_us}
    return {
        "count": goes.count,
        "first_seq": goes.first,
        "last_seq": goes.last,
        **{name: shown_us(at_us) for name, at_us in times.items()},
    }
