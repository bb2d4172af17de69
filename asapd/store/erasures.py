"""What erasures and retention say they took out of the log: which entries, and which rows of usage these were of."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator

import apsw
import msgspec

from asapd.store.rows import fetch
from asapd.store.tx import Tx

STEP = 5_000
ROW_KINDS = "('usage.recorded', 'usage.voided', 'usage.repriced')"
_ASKED_KINDS = (
    "('task.started', 'task.completed', 'task.failed', 'task.abandoned', 'delegation.created', 'delegation.revoked', "
    "'sla.breach')"
)
"""Entries of rows that may be older than what retention took: of others nobody asks, and they may be millions."""
EXPLAINING = (
    "('erasure.applied', 'retention.applied', 'audit.archived', 'usage.sealed', 'log.restored', 'log.vouched', "
    "'upgrade.counted', 'checkpoint.cosigned', 'log.witnessed')"
)
"""Entries that say why something is gone, what was there before, and of witnessing: about no consumer, never erased."""
STANDING = (
    "('key.created', 'key.revoked', 'agent.added', 'agent.changed', 'agent.removed', 'agent.key_added', "
    "'agent.key_retired', 'agent.key_claimed', 'agent.key_withdrawn', 'agent.manifest', 'agent.promise', "
    "'sla.credits', 'maintenance.declared', 'maintenance.ended', 'watch.interrupted', 'watch.corrected', "
    "'budgets.changed')"
)
"""Decisions that stand until another is entered, few as they are: retention leaves them their content."""


def usage_rows_of(connection: apsw.Connection, seqs: list[int]) -> list[int]:
    """The rows of usage that some entries are of."""
    rows = fetch(
        connection,
        "SELECT details ->> 'row' FROM audit "
        f"WHERE seq IN (SELECT value FROM json_each(?)) AND json_valid(details) AND event_type IN {ROW_KINDS}",
        (msgspec.json.encode(seqs).decode(),),
    )
    return [row for (row,) in rows]


def erase_payloads(tx: Tx, seqs: list[int]) -> None:
    """Take the content of entries away; the caller says so in the same unit."""
    tx.execute("UPDATE retention_gate SET open = 1")
    tx.insert_many(
        "UPDATE audit SET actor = NULL, subject = NULL, details = NULL, salt = NULL WHERE seq = ?",
        ((seq,) for seq in seqs),
    )
    tx.execute("UPDATE retention_gate SET open = 0")


def newest(connection: apsw.Connection) -> int:
    """The number of the newest entry; 0 without any."""
    return fetch(connection, "SELECT max(seq) FROM audit")[0][0] or 0


def is_erased_since(connection: apsw.Connection, seq: int) -> bool:
    """Whether an erasure, or retention of the log, took content since an entry was the newest."""
    found = (
        "SELECT 1 FROM audit WHERE seq > ? AND (event_type = 'erasure.applied' "
        "OR (event_type = 'retention.applied' AND subject = 'audit')) LIMIT 1"
    )
    return bool(fetch(connection, found, (seq,)))


def runs(numbers: Iterable[int]) -> list[list[int]]:
    """Numbers as runs, [first, last] each, in ascending order."""
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and number <= found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return found


class _Runs:
    """Whether a number is in one of many runs, which may overlap."""

    def __init__(self, found: Iterable[tuple[int, int]]) -> None:
        self._firsts: list[int] = []
        self._lasts: list[int] = []
        for first, last in sorted(found):
            if self._lasts and first <= self._lasts[-1] + 1:
                self._lasts[-1] = max(self._lasts[-1], last)
            else:
                self._firsts.append(first)
                self._lasts.append(last)

    def numbers(self) -> Iterator[int]:
        """All of them, in order."""
        for first, last in zip(self._firsts, self._lasts, strict=True):
            yield from range(first, last + 1)

    def __contains__(self, number: int) -> bool:
        at = bisect_right(self._firsts, number) - 1
        return at >= 0 and number <= self._lasts[at]


class _Gone(msgspec.Struct, frozen=True):
    """What an entry says that went; earlier ones do not say all of it."""

    entries: list[tuple[int, int]] = []
    usage_rows: list[tuple[int, int]] = []


_read_gone = msgspec.json.Decoder(_Gone).decode


class Erasures:
    """What all entries `erasure.applied`, and those of retention of the log, come to.

    An erased entry that none of them names explains nothing.
    """

    def __init__(self, connection: apsw.Connection) -> None:
        self._connection = connection
        self._times: dict[str, Counter[int]] | None = None
        entries: list[tuple[int, int]] = []
        retired: list[tuple[int, int]] = []
        rows: list[tuple[int, int]] = []
        self.count = 0
        self.odd: list[str] = []
        """What is said of those that no build ever made: they explain nothing."""
        for seq, kind, details in fetch(
            connection,
            "SELECT seq, event_type, details FROM audit WHERE event_type = 'erasure.applied' "
            "OR (event_type = 'retention.applied' AND subject = 'audit')",
        ):
            if details is not None:
                self.count += 1
                try:
                    told = _read_gone(details)
                except ValueError as error:
                    self.odd.append(f"entry {seq} ({kind}) is none of asapd's, {error}")
                    continue
                (entries if kind == "erasure.applied" else retired).extend(told.entries)
                rows += told.usage_rows
        self._entries, self._retired, self._rows = _Runs([*entries, *retired]), _Runs(retired), _Runs(rows)
        self.last_row = max((last for _, last in rows), default=0)
        """The largest number among the rows of usage whose entries were erased."""

    def has_row(self, number: int) -> bool:
        """Whether the entry of a row of usage was erased."""
        return number in self._rows

    def rows(self) -> Iterator[int]:
        """All rows of usage whose entry was erased, in order."""
        return self._rows.numbers()

    def is_retired(self, number: int) -> bool:
        """Whether retention took the content of an entry."""
        return number in self._retired

    def times(self, event_type: str) -> Counter[int]:
        """When entries of a kind were written that were erased and explained: each answers for one row of that time."""
        if self._times is None:
            self._times = {}
            # One walk for all kinds. Entries of usage, which are the most, are told by the numbers of their rows.
            for seq, kind, timestamp_us in self._connection.execute(
                "SELECT seq, event_type, timestamp_us FROM audit "
                f"WHERE details IS NULL AND event_type IN {_ASKED_KINDS}"
            ):
                if seq in self._entries:
                    self._times.setdefault(kind, Counter())[timestamp_us] += 1
        return self._times.get(event_type, Counter())

    def is_explained(self, number: int) -> bool:
        """Whether an erasure or retention says that it took the content of an entry."""
        return number in self._entries

    def without_content(self) -> Iterable[tuple[int, str]]:
        """The number and kind of each entry that lost its content."""
        after = 0
        while True:
            found = fetch(
                self._connection,
                "SELECT seq, event_type FROM audit WHERE seq > ? AND details IS NULL ORDER BY seq LIMIT ?",
                (after, STEP),
            )
            yield from found
            if len(found) < STEP:
                return
            after = found[-1][0]
