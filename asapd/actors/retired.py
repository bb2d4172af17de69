"""What applying retention comes to: what went, by which time, and whether more of it is due."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Generic, TypeVar

import msgspec

from asapd.core.errors import Refusal
from asapd.store.units.unit import Taken

Before = TypeVar("Before", bound=int | None)


class Retired(msgspec.Struct, Generic[Before], frozen=True):
    """What went of that from before a time, None of what never goes; `more` where the time was over before all did."""

    taken: Taken
    before_us: Before
    more: bool


class Went:
    """What went so far of what is named so."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.taken = Taken()

    def add(self, taken: Taken) -> None:
        """That went as well."""
        self.taken = self.taken.plus(taken)

    def refused(self, refusal: Refusal) -> Refusal:
        """A refusal on the way, which says what went before it."""
        return refused(refusal, {self.what: self.taken.count})


def refused(refusal: Refusal, went: Mapping[str, int]) -> Refusal:
    """A refusal that says as well what went before it, or beside it: of that no other reply tells."""
    told = "".join(f"; {count} {what} went all the same" for what, count in went.items() if count)
    return msgspec.structs.replace(refusal, detail=refusal.detail + told)
