"""The offline check behind `asapd verify`: an export of the audit log, without a daemon."""

from __future__ import annotations

from collections.abc import Iterable

from msgspec import Struct
from msgspec.structs import replace

from asapd.core.audit import Fault, Walk, verify
from asapd.wire.export import BadEntryError, read_entry, read_rows


class Verdict(Struct, frozen=True):
    """What a walk of an export found. `first_seq` is the number of the first entry, None when there is none."""

    first_seq: int | None
    walk: Walk


def verify_export(lines: Iterable[bytes]) -> Verdict:
    """Check payloads, hashes and the chain of an export. It may start at any entry, and has no holes from there.

    Raises:
        NotAnExportError: the file holds no audit entries.
    """
    first_seq: int | None = None
    walk = Walk()
    try:
        for row in read_rows(lines):
            entry = read_entry(row)
            if first_seq is None:
                first_seq = entry.seq
                if entry.seq > 1:
                    # What came before is not here: the chain is judged from this entry on.
                    walk = Walk(entry.seq - 1, entry.previous_hash)
            walk = verify((entry,), walk)
            if walk.fault is not None:
                break
    except BadEntryError as error:
        fault = Fault(walk.seq + 1 if error.seq is None else error.seq, error.id, error.reason)
        walk = replace(walk, fault=fault)
    return Verdict(first_seq, walk)
