"""What erasures say they took out of the log: which entries, and which rows of usage these were of."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable

import apsw
import msgspec

from asapd.store.rows import fetch

STEP = 5_000
ROW_KINDS = "('usage.recorded', 'usage.voided', 'usage.repriced')"


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

    def __init__(self, found: Iterable[list[int]]) -> None:
        self._firsts: list[int] = []
        self._lasts: list[int] = []
        for first, last in sorted(found):
            if self._lasts and first <= self._lasts[-1] + 1:
                self._lasts[-1] = max(self._lasts[-1], last)
            else:
                self._firsts.append(first)
                self._lasts.append(last)

    def __contains__(self, number: int) -> bool:
        at = bisect_right(self._firsts, number) - 1
        return at >= 0 and number <= self._lasts[at]


class Erasures:
    """What all entries `erasure.applied` come to. An erased entry that none names explains nothing."""

    def __init__(self, connection: apsw.Connection) -> None:
        self._connection = connection
        self._times: dict[str, Counter[int]] | None = None
        entries: list[list[int]] = []
        rows: list[list[int]] = []
        self.count = 0
        for (details,) in fetch(connection, "SELECT details FROM audit WHERE event_type = 'erasure.applied'"):
            if details is not None:
                told = msgspec.json.decode(details)
                entries += told.get("entries", [])
                rows += told.get("usage_rows", [])
                self.count += 1
        self._entries, self._rows = _Runs(entries), _Runs(rows)

    def has_row(self, number: int) -> bool:
        """Whether the entry of a row of usage was erased."""
        return number in self._rows

    def times(self, event_type: str) -> Counter[int]:
        """When entries of a kind were written that were erased and explained: each answers for one row of that time."""
        if self._times is None:
            self._times = {}
            # One walk for all kinds. Entries of usage, which are the most, are told by the numbers of their rows.
            for seq, kind, timestamp_us in self._connection.execute(
                "SELECT seq, event_type, timestamp_us FROM audit "
                f"WHERE details IS NULL AND event_type NOT IN {ROW_KINDS}"
            ):
                if seq in self._entries:
                    self._times.setdefault(kind, Counter())[timestamp_us] += 1
        return self._times.get(event_type, Counter())

    def unexplained(self) -> Iterable[tuple[int | None, str]]:
        """The number and kind of each entry that lost its content; None for the number where that is explained."""
        after = 0
        while True:
            found = fetch(
                self._connection,
                "SELECT seq, event_type FROM audit WHERE seq > ? AND details IS NULL ORDER BY seq LIMIT ?",
                (after, STEP),
            )
            for seq, kind in found:
                yield (None if seq in self._entries else seq), kind
            if len(found) < STEP:
                return
            after = found[-1][0]
