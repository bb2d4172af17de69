"""What every unit of work is, and the answers any may get.

One writer runs units, each in a savepoint of a shared transaction. A unit that is refused (by a `Refusal`, `Denied` or
`UsageConflict`) or fails is rolled back alone.
"""

from __future__ import annotations

from typing import Generic, TypeVar

import msgspec

R_co = TypeVar("R_co", covariant=True)


class Unit(msgspec.Struct, Generic[R_co], frozen=True, tag=True):
    """Something to write; `R_co` is what its handler answers."""


class RowWritten(msgspec.Struct, frozen=True, tag=True):
    """A row was written; its number in its table."""

    seq: int


class Taken(msgspec.Struct, frozen=True):
    """Rows that went: how many, the lowest and the highest number, the oldest and the newest time; None of no rows."""

    count: int = 0
    first: int | None = None
    last: int | None = None
    oldest_us: int | None = None
    newest_us: int | None = None

    def plus(self, other: Taken) -> Taken:
        """These and others."""

        def known(name: str) -> list[int]:
            return [value for one in (self, other) if (value := getattr(one, name)) is not None]

        return Taken(
            self.count + other.count,
            min(known("first"), default=None),
            max(known("last"), default=None),
            min(known("oldest_us"), default=None),
            max(known("newest_us"), default=None),
        )


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The handler of this unit had a bug; nothing of the unit was written."""

    error: str


class NotWritten(msgspec.Struct, frozen=True, tag=True):
    """The whole commit failed for a reason of the disk; nothing of it was written."""

    error: str
    full: bool
