"""What a comparison of records with the log comes to."""

from __future__ import annotations

from collections import Counter

import msgspec

NAMED = 20
"""Findings that are named; the rest are counted."""


class Tally(msgspec.Struct, frozen=True):
    """What was compared of one table; `findings` counts what is wrong, `named` says it of the first."""

    table: str
    rows: int
    entries: int
    retired: int = 0
    erased: int = 0
    findings: int = 0
    named: tuple[str, ...] = ()


class Findings:
    """Counts, and keeps the first."""

    def __init__(self) -> None:
        self.count = 0
        self.named: list[str] = []

    def add(self, finding: str) -> None:
        self.count += 1
        if len(self.named) < NAMED:
            self.named.append(finding)


def takes(times: Counter[int] | None, at_us: int | None) -> bool:
    """Whether an entry of a time was erased that answers for no other row; from now on it answers for this one."""
    if times is None or at_us is None or times[at_us] <= 0:
        return False
    times[at_us] -= 1
    return True
