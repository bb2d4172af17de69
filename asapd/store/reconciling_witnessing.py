"""Whether what witnesses signed of our checkpoints, and what was seen of other logs, is what was entered of it.

These entries are never erased, so all of it is known, from the first one on.
"""

from __future__ import annotations

from hashlib import sha256

import apsw

from asapd.store import witnessing
from asapd.store.findings import Tally
from asapd.store.rows import fetch, fetch_one
from asapd.store.standing import Entry, Standing, StandingRow


class Cosignatures:
    """What witnesses signed: there may be one a minute for years, so that each is looked up and none is remembered."""

    kinds = ("checkpoint.cosigned",)

    def __init__(self, connection: apsw.Connection) -> None:
        self.log = Standing("audit_cosignature")
        self._connection = connection
        self._after: int | None = None
        self._behind = 0

    def do(self, entry: Entry) -> None:
        """Hold the row of an entry to it."""
        size, witness = entry.details["size"], entry.subject
        if self.log.entries == 1:  # what builds before the first entry kept: nothing, where it names no size
            self._after = entry.details["after_size"]
        self._behind += self._after is None or size > self._after
        sql = "SELECT CAST(line AS BLOB) FROM audit_cosignature WHERE size = ? AND witness = ?"
        row = fetch_one(self._connection, sql, (size, witness))
        where = f"audit_cosignature {size} {witness}"
        if row is None:
            self.log.findings.add(f"{where} is not there, and entry {entry.seq} says that it is")
        elif sha256(row[0]).hexdigest() != entry.details["line_sha256"]:
            self.log.findings.add(f"{where}: line is not the one that entry {entry.seq} knows")

    def compare(self, connection: apsw.Connection) -> Tally:
        """See that there are no others than those that were entered."""
        sql = "SELECT count(*), coalesce(sum(?1 IS NULL OR size > ?1), 0) FROM audit_cosignature"
        rows, behind = fetch(connection, sql, (self._after,))[0]
        if not self.log.entries:
            self.log.retired = rows
        elif behind != self._behind:
            where = f"audit_cosignature, behind {self._after or 0} entries,"
            self.log.findings.add(f"{where} has {behind} rows, and the log has entries of {self._behind}")
        return self.log.tally(rows)


class WitnessedLogs:
    """What was seen of other logs. Who set it back could have this host sign a log that is not the one it saw.

    Each entry has the digest of all there was before it and after it: rows that builds before made have no own.
    """

    kinds = ("log.witnessed",)

    def __init__(self) -> None:
        self.log = Standing("audit_witnessed")
        self._newest: tuple[int, str] | None = None

    def do(self, entry: Entry) -> None:
        """Take in what was seen, which has to go on from what was seen before: else somebody set that back."""
        told, said = entry.details, self.log.said(entry.subject)
        if said is not None and (told["old_size"], told["old_root"]) != (said["size"], said["root"]):
            self.log.findings.add(
                f"audit_witnessed {entry.subject}: entry {entry.seq} goes on from {told['old_size'] or 0} entries "
                f"({told['old_root']}), and the log had said {said['size']} ({said['root']}): it was set back"
            )
        elif self._newest is not None and told["old_logs_digest"] != self._newest[1]:
            between = f"between entries {self._newest[0]} and {entry.seq}"
            self.log.findings.add(f"audit_witnessed: another log, or a log without an entry, was changed {between}")
        self.log.say(entry.subject, entry.seq, size=told["size"], root=told["root"])
        self._newest = entry.seq, told["logs_digest"]

    def compare(self, connection: apsw.Connection) -> Tally:
        """Hold the rows to it, and those without an entry to the digest."""
        seen = witnessing.logs(connection)
        own = [log for log in seen if self.log.said(log[0]) is not None]
        self.log.compare(StandingRow(origin, None, {"size": size, "root": root.hex()}) for origin, size, root in own)
        if self._newest is None:
            self.log.retired = len(seen)
        elif not self.log.findings.count and self._newest[1] != witnessing.logs_digest(seen):
            which = f"audit_witnessed: the {len(seen)} logs, {len(own)} of which have entries,"
            self.log.findings.add(f"{which} are not those that entry {self._newest[0]} knows")
        return self.log.tally(len(seen))
