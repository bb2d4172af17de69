"""The offline check of an export of the audit log."""

from __future__ import annotations

from collections.abc import Iterable

from msgspec import Struct
from msgspec.structs import replace

from asapd.cli.verified import Verified
from asapd.core import audit
from asapd.core.audit import Entry, Fault, Walk
from asapd.wire.export import BadEntryError, read_entry, read_rows


class Verdict(Struct, frozen=True):
    """What a walk of an export found. `first_seq` is the number of the first entry, None when there is none."""

    first_seq: int | None
    walk: Walk


def walk_export(lines: Iterable[bytes]) -> Verdict:
    """Check payloads, hashes and the chain of an export. It may start at any entry, and has no holes from there.

    Raises:
        NotAnExportError: the file holds no audit entries.
    """
    return _walk(read_entry(row) for row in read_rows(lines))


def _walk(entries: Iterable[Entry]) -> Verdict:
    first_seq: int | None = None
    walk = Walk()
    try:
        for entry in entries:
            if first_seq is None:
                first_seq = entry.seq
                if entry.seq > 1:
                    # What came before is not here: the chain is judged from this entry on.
                    walk = Walk(entry.seq - 1, entry.previous_hash)
            walk = audit.verify((entry,), walk)
            if walk.fault is not None:
                break
    except BadEntryError as error:
        fault = Fault(walk.seq + 1 if error.seq is None else error.seq, error.id, error.reason)
        walk = replace(walk, fault=fault)
    return Verdict(first_seq, walk)


def verify(lines: Iterable[bytes]) -> Verified:
    """The verdict over an export.

    Raises:
        NotAnExportError: the file holds no audit entries.
    """
    return _verified(walk_export(lines))


def verify_entries(entries: Iterable[Entry]) -> Verified:
    """The verdict over entries that were read, such as those of an archive."""
    return _verified(_walk(entries))


def _verified(verdict: Verdict) -> Verified:
    walk = verdict.walk
    if walk.fault is not None:
        return Verified(False, f"bad: {walk.fault}")
    if verdict.first_seq is None:
        return Verified(True, "ok: no entries")
    erased = f" ({walk.erased} of them with their content erased)" if walk.erased else ""
    span = f"{verdict.first_seq} to {walk.seq}"
    remarks = (f"the entries before {verdict.first_seq} are not in this file",) if verdict.first_seq > 1 else ()
    return Verified(True, f"ok: {walk.verified} entries{erased}, {span}, the last with hash {walk.hash.hex()}", remarks)
