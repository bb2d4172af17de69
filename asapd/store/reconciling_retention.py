"""Whether what retention remembers is what it entered: how far usage went, which hours are sealed, and each archive."""

from __future__ import annotations

from typing import Any

import apsw

from asapd.store.erasures import EXPLAINING, STANDING
from asapd.store.findings import Tally
from asapd.store.rows import fetch
from asapd.store.standing import Entry, Standing, StandingRow

_COLUMNS = ("first_seq", "last_seq", "through_seq", "before_us", "file", "sha256")
_LEFT = (
    "SELECT min(seq) FROM audit WHERE seq > ? AND seq <= ? AND salt IS NOT NULL "
    f"AND event_type NOT IN {EXPLAINING} AND event_type NOT IN {STANDING}"
)


class Retired:
    """What it entered is never erased, so all of it is known.

    Events from before what it remembers are taken no more: who set that back could have a retired one counted again.
    """

    kinds = ("retention.applied", "usage.sealed", "audit.archived")

    def __init__(self) -> None:
        self.log = Standing("audit_archive")
        self._usage = (0, 0, 0)
        self._hour = -1
        self._through = 0

    def do(self, entry: Entry) -> None:
        """Take in a step."""
        told = entry.details
        if entry.kind == "usage.sealed":
            self._hour = told.get("through_hour", self._hour)
        elif entry.kind == "audit.archived":
            # One that was made before, of which nothing went, gives way to the next of the same beginning.
            names = ("last_seq", "before_us", "file", "sha256")
            self.log.say(told["first_seq"], entry.seq, **{name: told[name] for name in names})
        elif entry.subject == "usage":
            before_us, through, events = self._usage
            self._usage = max(before_us, told["before_us"]), max(through, told["last_row"]), events + told["count"]
        elif entry.subject == "audit":
            self._through = told.get("through_seq", told["last_seq"])  # earlier ones do not say

    def compare(self, connection: apsw.Connection) -> Tally:
        """Hold the rows to it."""
        for table, columns, said in (
            ("usage_retired", "before_us, through_seq, events", self._usage),
            ("usage_hour_sealed", "through_hour", (self._hour,)),
        ):
            rows = fetch(connection, f"SELECT {columns} FROM {table}")
            if rows != [said]:
                self.log.findings.add(f"{table} is {rows}, and the log comes to {said}")
        archives = fetch(connection, f"SELECT {', '.join(_COLUMNS)} FROM audit_archive ORDER BY first_seq")
        named: list[dict[str, Any]] = [dict(zip(_COLUMNS, row, strict=True)) for row in archives]
        ends = [one["through_seq"] + 1 for one in named]
        through = named[-1]["through_seq"] if named else 0
        left = fetch(connection, _LEFT, (self._through, through))[0][0]
        is_one_after_another = ends[:-1] == [one["first_seq"] for one in named[1:]]
        is_whole = all(one["through_seq"] <= one["last_seq"] for one in named)
        if not is_one_after_another or not is_whole or through < self._through or left is not None:
            self.log.findings.add(
                f"audit_archive: entries to {through} are said to have been retired, and the log says {self._through}"
            )
        return self.log.compare(StandingRow(one["first_seq"], None, one) for one in named)
