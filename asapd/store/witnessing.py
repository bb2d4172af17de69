"""What was seen of other daemons' logs, and what others saw of ours; each has its entry, written in the same commit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from hashlib import sha256
from typing import Any

import apsw

from asapd.core.errors import Refusal
from asapd.core.merkle import EMPTY_ROOT, is_consistent
from asapd.core.row_digest import row_digest
from asapd.store.rows import fetch, fetch_one
from asapd.store.tx import RefuseError, Tx
from asapd.store.units.audit import KeepCosignature, Witness, Witnessed
from asapd.store.units.unit import RowWritten
from asapd.wire.signed_note import NoteMalformedError, cosigned_us, read_signature


def witness(tx: Tx, unit: Witness) -> Witnessed:
    """Take a checkpoint for the newest of its log, if it is that log going on; looking and storing are one.

    Raises:
        RefuseError: with `Witnessed` of the size that was seen, when the request begins at another; with
            `witness_inconsistent`, when the log is not the one that was seen.
    """
    row = tx.row("SELECT size, root FROM audit_witnessed WHERE origin = ?", (unit.origin,))
    size, root = (0, EMPTY_ROOT) if row is None else (row[0], row[1])
    if unit.old_size != size or (unit.size == size and unit.root != root and row is not None):
        raise RefuseError(Witnessed(size, is_taken=False))
    if not is_consistent(size, unit.size, unit.proof, root, unit.root):
        detail = f"the log of {unit.size} entries is not the one of {size} that this witness has seen"
        raise RefuseError(Refusal("witness_inconsistent", detail))
    if row is not None and unit.size == size:
        return Witnessed(size, is_taken=True)
    before = logs_digest(logs(tx.connection))
    tx.execute(
        "INSERT INTO audit_witnessed VALUES (?,?,?) ON CONFLICT DO UPDATE SET size = excluded.size, "
        "root = excluded.root",
        (unit.origin, unit.size, unit.root),
    )
    details = {
        "logs_digest": logs_digest(logs(tx.connection)),
        "old_logs_digest": before,
        "old_root": None if row is None else root.hex(),
        "old_size": None if row is None else size,
        "root": unit.root.hex(),
        "size": unit.size,
    }
    tx.audit("log.witnessed", "asapd", unit.origin, details, unit.now_us)
    return Witnessed(unit.size, is_taken=True)


def logs(connection: apsw.Connection) -> list[tuple[str, int, bytes]]:
    """The logs that were witnessed: origin, size and root of each."""
    return fetch(connection, "SELECT origin, size, root FROM audit_witnessed ORDER BY origin")


def logs_digest(seen: Iterable[tuple[str, int, bytes]]) -> str:
    """SHA-256, in hex, of all that was seen of them: those that builds before took in have no entry of their own."""
    values: list[Any] = [value for log in seen for value in log]
    return row_digest(values)


def keep(tx: Tx, unit: KeepCosignature) -> RowWritten:
    """Keep what a witness signed of one of our checkpoints."""
    which = unit.size, unit.witness
    if tx.row("SELECT 1 FROM audit_cosignature WHERE size = ? AND witness = ?", which) is None:
        (after,) = tx.row("SELECT max(size) FROM audit_cosignature") or (None,)
        tx.execute("INSERT INTO audit_cosignature VALUES (?,?,?)", (*which, unit.line))
        digest = sha256(unit.line.encode()).hexdigest()
        details = {"after_size": after, "line_sha256": digest, "size": unit.size}
        tx.audit("checkpoint.cosigned", "asapd", unit.witness, details, unit.now_us)
    return RowWritten(unit.size)


def cosignatures(connection: apsw.Connection, size: int) -> list[str]:
    """The signature lines of witnesses below a checkpoint."""
    rows = fetch(
        connection, "SELECT CAST(line AS BLOB) FROM audit_cosignature WHERE size = ? ORDER BY witness", (size,)
    )
    return [line.decode(errors="replace") for (line,) in rows]


def cosigned(connection: apsw.Connection, witness: str) -> int:
    """The largest size that a witness signed; 0 when it signed none."""
    row = fetch_one(connection, "SELECT max(size) FROM audit_cosignature WHERE witness = ?", (witness,))
    return 0 if row is None or row[0] is None else int(row[0])


def miscosigned(
    connection: apsw.Connection, after: int, through: int, witnesses: Mapping[str, bytes]
) -> list[tuple[int, str]]:
    """What is wrong with signatures of witnesses whose keys (by name) are known, with the size of the checkpoint."""
    rows = fetch(
        connection,
        "SELECT s.size, CAST(s.witness AS BLOB), CAST(s.line AS BLOB), CAST(c.note AS BLOB) FROM audit_cosignature s "
        "LEFT JOIN audit_checkpoint c USING (size) WHERE s.size > ? AND s.size <= ? ORDER BY s.size",
        (after, through),
    )
    found: list[tuple[int, str]] = []
    for size, witness, line, note in rows:
        name = witness.decode(errors="replace")
        which = f"the signature of {name} under the checkpoint of {size} entries"
        if note is None:
            found.append((size, f"{which} is of no checkpoint that is there"))
        elif name in witnesses and not _is_cosigned(note, line, name, witnesses[name]):
            found.append((size, f"{which} does not verify"))
        elif not line.startswith(b"\xe2\x80\x94 " + witness + b" "):
            found.append((size, f"{which} is not by that name"))
    return found


def _is_cosigned(note: bytes, line: bytes, name: str, key: bytes) -> bool:
    try:
        signature = read_signature(line.decode().removesuffix("\n"))
        body = note.decode().rpartition("\n\n")[0] + "\n"
    except (UnicodeDecodeError, NoteMalformedError):
        return False
    return cosigned_us(body, signature, name, key) is not None
