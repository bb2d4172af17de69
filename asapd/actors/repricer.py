"""Pricing recorded usage again by the table in force: page by page, in small units that leave ingest its room."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec
import trio

from asapd.actors.meter import MeterSettings
from asapd.actors.slow_reads import ReadTooLongError
from asapd.core.errors import Refusal
from asapd.core.money import to_usd
from asapd.core.pricing import PriceTable
from asapd.core.repricing import Correction, ModelChange, changes, undone
from asapd.runtime.clock import Clock
from asapd.store import usage_rows
from asapd.store.corrections import Page, Selection, page_to_price
from asapd.store.database import Database
from asapd.store.units.usage import CorrectCosts

PAGE = 500
"""Rows read and priced in one go, in a reader's thread: some milliseconds."""

STEP = 50
"""Corrections in one unit: each writes a row, an audit entry and the ledger, together in ten milliseconds."""

BREATH_S = 0.02
"""Between two units, which take about as long: ingest has at least half of the writer."""

PART_S = 10.0
"""How long one request goes on before it answers how far it came."""


class Progress(msgspec.Struct, frozen=True, array_like=True):
    """How far a run came: the last position, the newest row when it began, and the table it goes by."""

    time_us: int
    seq: int
    through: int
    price_version: str


@dataclass(frozen=True)
class RepriceRequest:
    """Price events of a time and of a model (which may end in `*`) again, from where the part before ended."""

    actor: str
    dry_run: bool
    start_us: int | None
    end_us: int | None
    model: str | None
    after: Progress | None


async def reprice(
    database: Database, clock: Clock, settings: MeterSettings, request: RepriceRequest
) -> tuple[dict[str, Any], Progress | None] | Refusal:
    """Correct what costs something else by the table in force, or only say what would be; and where to go on.

    Each correction is checked again where it is written, so that a run beside another, beside voids, or after one that
    was broken off does no harm: what is right already is not touched.
    """
    prices, prefer = settings.prices, settings.metering.pricing.prefer
    after = request.after
    if after is not None and after.price_version != prices.version:
        detail = f"the price table is now {prices.version}, and this run went by {after.price_version}: begin anew"
        return Refusal("prices_changed", detail)
    through = await database.read(usage_rows.newest_seq) if after is None else after.through
    selection = Selection(through, request.start_us, request.end_us, request.model)
    position = None if after is None else (after.time_us, after.seq)
    totals: dict[str, ModelChange] = {}
    estimates_kept = 0
    look = partial(_look, prices=prices, prefer=prefer)
    begun_s = clock.monotonic_s()
    is_begun = False
    while True:  # at least one page: a part that does nothing would never end a run
        try:
            page, found, corrections = await database.read(look, selection, position)
        except ReadTooLongError:
            if not is_begun:
                raise
            break  # the pages before are corrected: of these it tells, and the next part begins where they end
        is_begun = True
        for name, change in found.items():
            _add(totals, name, change)
        if not request.dry_run:
            models = {row.seq: row.event.model for row in page.rows}
            kept = await _correct(database, clock, request.actor, prices.version, corrections, models, totals)
            if isinstance(kept, Refusal):
                return kept
            estimates_kept += kept
        position = page.last
        if not page.more or clock.monotonic_s() - begun_s >= PART_S:
            break
    reply = {
        "dry_run": request.dry_run,
        "price_version": prices.version,
        "data": [public(change) for _, change in sorted(totals.items())],
        "estimates_kept": estimates_kept,
        "more": page.more,
    }
    if not page.more or position is None:
        return reply, None
    return reply, Progress(position[0], position[1], through, prices.version)


def _look(
    connection: Any, selection: Selection, after: tuple[int, int] | None, *, prices: PriceTable, prefer: str
) -> tuple[Page, dict[str, ModelChange], list[Correction]]:
    page = page_to_price(connection, selection, after, PAGE)
    return page, *changes(page.rows, prices, prefer=prefer)


async def _correct(
    database: Database,
    clock: Clock,
    actor: str,
    version: str,
    corrections: list[Correction],
    models: dict[int, str],
    totals: dict[str, ModelChange],
) -> int | Refusal:
    """Write corrections step by step, and take those that were not made out of the totals again."""
    kept = 0
    for start in range(0, len(corrections), STEP):
        step = corrections[start : start + STEP]
        done = await database.submit(CorrectCosts(step, version, actor, clock.now_us()))
        if isinstance(done, Refusal):
            return done
        kept += done.estimates_kept
        left_alone = set(done.skipped)
        for one in step:
            if one.seq in left_alone:
                _add(totals, models[one.seq], undone(one, models[one.seq]))
        await trio.sleep(BREATH_S)
    return kept


def _add(totals: dict[str, ModelChange], name: str, change: ModelChange) -> None:
    known = totals.get(name)
    totals[name] = change if known is None else known.plus(change)


def public(change: ModelChange) -> dict[str, Any]:
    """What became of a model's events as users see it; a sum is `null` where no event has a cost."""
    known_before = change.events > change.unpriced_before
    known_after = change.events > change.unpriced_after
    return {
        "model": change.model or None,
        "events": change.events,
        "changed": change.changed,
        "first_priced": change.first_priced,
        "not_in_table": change.not_priced,
        "unpriced_events": change.unpriced_after,
        "old_cost_usd": to_usd(change.before_microusd) if known_before else None,
        "new_cost_usd": to_usd(change.after_microusd) if known_after else None,
        "difference_usd": to_usd(change.after_microusd - change.before_microusd),
    }
