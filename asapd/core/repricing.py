"""Pricing recorded usage again: what an event would cost by the table in force, and what has to be corrected."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from asapd.core.pricing import PriceTable
from asapd.core.usage import UsageEvent


class CostedEvent(msgspec.Struct, frozen=True, gc=False):
    """A recorded event, as far as its price goes, and what it costs with all corrections so far.

    `seq` is its row. Costs are None where nobody knows them.
    """

    seq: int
    event: UsageEvent
    microusd: int | None
    priced_microusd: int | None


class Correction(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Row `seq` costs `was_microusd` (None: nobody knew) and is to cost `now_microusd`, by `source`.

    `priced_more_microusd` is the difference of what the tables say, whichever figure counts.
    """

    seq: int
    was_microusd: int | None
    now_microusd: int
    source: str
    priced_more_microusd: int


class ModelChange(msgspec.Struct, frozen=True):
    """Events of one model that were looked at, and what they cost before and after. Sums are over known costs.

    `changed` of the `events` cost something else now, `first_priced` of those had no cost. The table has no row for
    `not_priced` of them, which keep what cost they have; `unpriced` have none, before or after.
    """

    model: str
    events: int = 0
    changed: int = 0
    first_priced: int = 0
    not_priced: int = 0
    unpriced_before: int = 0
    unpriced_after: int = 0
    before_microusd: int = 0
    after_microusd: int = 0

    def plus(self, other: ModelChange) -> ModelChange:
        """Both together."""
        sums = [mine + theirs for mine, theirs in zip(self._counts, other._counts, strict=True)]
        return ModelChange(self.model, *sums)

    @property
    def _counts(self) -> tuple[int, ...]:
        counts: tuple[int, ...] = msgspec.structs.astuple(self)[1:]
        return counts


def correction(recorded: CostedEvent, prices: PriceTable, *, prefer: str) -> Correction | None:
    """What has to be corrected for an event to cost what the table says; None when nothing has.

    An event that the table does not price keeps its cost: that a model is no longer in a table makes nothing cheaper.
    """
    cost = prices.cost(recorded.event, prefer=prefer)
    if cost.priced_microusd is None or cost.microusd is None or cost.microusd == recorded.microusd:
        return None
    assert cost.source is not None
    priced_more_microusd = cost.priced_microusd - (recorded.priced_microusd or 0)
    return Correction(recorded.seq, recorded.microusd, cost.microusd, cost.source, priced_more_microusd)


def changes(
    rows: Iterable[CostedEvent], prices: PriceTable, *, prefer: str
) -> tuple[dict[str, ModelChange], list[Correction]]:
    """What becomes of some events by model, and the corrections that make it so."""
    found: dict[str, ModelChange] = {}
    corrections: list[Correction] = []
    for row in rows:
        change = correction(row, prices, prefer=prefer)
        if change is not None:
            corrections.append(change)
        one = change_of(row, change, is_priced=change is not None or prices.find(row.event) is not None)
        known = found.get(one.model)
        found[one.model] = one if known is None else known.plus(one)
    return found, corrections


def change_of(row: CostedEvent, change: Correction | None, *, is_priced: bool) -> ModelChange:
    """One event, with what becomes of it."""
    after = row.microusd if change is None else change.now_microusd
    return ModelChange(
        row.event.model,
        events=1,
        changed=int(change is not None),
        first_priced=int(change is not None and row.microusd is None),
        not_priced=int(not is_priced),
        unpriced_before=int(row.microusd is None),
        unpriced_after=int(after is None),
        before_microusd=row.microusd or 0,
        after_microusd=after or 0,
    )


def undone(change: Correction, model: str) -> ModelChange:
    """What takes a correction out of the changes again that was not made after all."""
    return ModelChange(
        model,
        changed=-1,
        first_priced=-int(change.was_microusd is None),
        unpriced_after=int(change.was_microusd is None),
        after_microusd=(change.was_microusd or 0) - change.now_microusd,
    )
