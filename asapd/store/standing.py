"""Things that stand until they are changed or go: what the log last said of each, against the rows there are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable
from typing import Any

import msgspec

from asapd.core.masking import FREE_TEXT, is_masked_form
from asapd.store.findings import Findings, Tally, takes


class Entry(msgspec.Struct, frozen=True):
    """An entry of the log whose content is there."""

    seq: int
    kind: str
    at_us: int
    actor: str
    subject: str
    details: dict[str, Any]


class StandingRow(msgspec.Struct, frozen=True):
    """A row of a table: by what the log knows it, when it was made, and what an entry may say of it."""

    key: Hashable
    made_us: int | None
    values: dict[str, Any]


class Standing:
    """What the log says of the things in one table.

    A thing that was made by an entry whose content is gone, or that one may have changed, is counted as retired, not
    judged. Retention takes whole beginnings of the log. What an erasure of an older build took stands among entries of
    others, and excuses nothing that these say but where no row has it for its own.
    """

    def __init__(self, table: str) -> None:
        self.table = table
        self.findings = Findings()
        self.entries = self.erased = self.retired = self.lost_us = self._retired_seq = 0
        self._said: dict[Hashable, tuple[int, dict[str, Any] | None]] = {}
        self._lost: Counter[int] = Counter()
        self._erased: dict[int, list[int]] = {}

    def lose(self, seq: int, at_us: int, *, is_retired: bool) -> None:
        """An entry about one of the things has no content any more, by retention or else by an erasure."""
        self.erased += 1
        self.lost_us = max(self.lost_us, at_us)
        self._lost[at_us] += 1
        if is_retired:
            self._retired_seq = max(self._retired_seq, seq)
        else:
            self._erased.setdefault(at_us, []).append(seq)

    def say(self, key: Hashable, seq: int, **values: Any) -> None:
        """An entry says so of a thing, beside what was said before."""
        self._said[key] = seq, {**(self.said(key) or {}), **values}

    def end(self, key: Hashable, seq: int) -> None:
        """An entry says that a thing went."""
        self._said[key] = seq, None

    def forget(self, key: Hashable) -> None:
        """What was said of a thing does not hold any more, and nothing is known of it."""
        self._said.pop(key, None)

    def said(self, key: Hashable) -> dict[str, Any] | None:
        """What was said of a thing so far; None of one that went, or that nobody spoke of."""
        return self._said.get(key, (0, None))[1]

    def follow(self, key: Hashable, number: int, newest: int) -> int:
        """Rows are numbered in the order of their entries: the newest entry of them so far."""
        seq = self._said.get(key, (0, None))[0]
        if seq and seq < newest:
            self.findings.add(f"{self.table} row {number} was not written where entry {seq} was")
        return max(seq, newest)

    def known(self) -> list[Hashable]:
        """All that the log speaks of."""
        return list(self._said)

    def was_lost(self, at_us: int) -> bool:
        """Whether an entry of a time lost its content, for which many rows may be."""
        return self._lost[at_us] > 0

    def is_lost(self, made_us: int | None) -> bool:
        """Whether an entry of a time lost its content, which then answers for one row."""
        if not takes(self._lost, made_us):
            return False
        if made_us is not None and self._erased.get(made_us):
            self._erased[made_us].pop()
        return True

    def compare(self, rows: Iterable[StandingRow]) -> Tally:
        """Hold the rows, which are read now, to what was said."""
        count = 0
        differing: list[tuple[int, list[str]]] = []
        for row in rows:
            count += 1
            where = f"{self.table} {_shown(row.key)}"
            seq, values = self._said.pop(row.key, (0, None))
            if seq < self._retired_seq if seq else self.is_lost(row.made_us):
                self.retired += 1
            elif not seq:
                self.findings.add(f"{where} has no entry in the log")
            elif values is None:
                differing.append((seq, [f"{where} is there, and entry {seq} says that it went"]))
            elif differs := self._differences(row, seq, values):
                differing.append((seq, differs))
        for key, (seq, values) in self._said.items():
            if values is not None and seq > self._retired_seq:
                where = f"{self.table} {_shown(key)}"
                differing.append((seq, [f"{where} is not there, and entry {seq} says that it is"]))
        self._settle(differing)
        return self.tally(count)

    def _settle(self, differing: list[tuple[int, list[str]]]) -> None:
        """Name what differs, but for what an erased entry may have changed that made none of the rows."""
        changed_seq = max((seq for seqs in self._erased.values() for seq in seqs), default=0)
        for seq, differs in differing:
            if seq < changed_seq:
                self.retired += 1
                continue
            for finding in differs:
                self.findings.add(finding)

    def tally(self, rows: int) -> Tally:
        """What was found, of so many rows."""
        named = tuple(self.findings.named)
        return Tally(self.table, rows, self.entries, self.retired, self.erased, self.findings.count, named)

    def _differences(self, row: StandingRow, seq: int, values: dict[str, Any]) -> list[str]:
        found = []
        for name, said in values.items():
            value = row.values.get(name)
            is_so = is_masked_form(said, value) if name in FREE_TEXT else said == value
            if not is_so:
                found.append(
                    f"{self.table} {_shown(row.key)}: {name} is {value!r}, and the log says {said!r} (entry {seq})"
                )
        return found


def _shown(key: Hashable) -> str:
    return " ".join(map(str, key)) if isinstance(key, tuple) else str(key)
