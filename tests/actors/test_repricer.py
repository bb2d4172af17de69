"""Pricing again goes in parts and small units, does no harm beside other work, and finds nothing a second time."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import apsw
import pytest
import trio
from trio.testing import MockClock

from asapd import config
from asapd.actors import repricer
from asapd.actors.meter import MeterSettings
from asapd.actors.repricer import Progress, RepriceRequest, reprice
from asapd.core.errors import Refusal
from asapd.core.money import to_usd
from asapd.core.pricing import Price, PriceTable
from asapd.core.usage import Cost, UsageEvent
from asapd.runtime.clock import TrioClock
from asapd.store import usage_rows, usage_sums
from asapd.store.database import Database, InlineReaders, InlineRunner, ReadTooLongError
from asapd.store.units.exchange import AnyUnit, Idempotency
from asapd.store.units.usage import CorrectCosts, RecordUsage, VoidUsage
from asapd.store.usage_filter import UsageFilter
from asapd.store.visibility import EVERYTHING
from asapd.store.writer import Writer, open_for_writing

T0 = 1_795_169_203_000_000
EVENTS = 25


class Runner(InlineRunner):
    """Runs units, and lets a test do something before each."""

    before: Callable[[AnyUnit], Any] = staticmethod(lambda unit: None)

    async def execute(self, unit: AnyUnit, *, urgent: bool, idempotency: Idempotency | None) -> Any:
        """Run one unit, unless the test answers for it."""
        answer = self.before(unit)
        return answer or await super().execute(unit, urgent=urgent, idempotency=idempotency)


class Shop:
    """A store with events of two models, and a table that prices one of them."""

    def __init__(self, connection: apsw.Connection) -> None:
        self.connection = connection
        self.runner = Runner(Writer(connection))
        self.database = Database(self.runner, InlineReaders(connection))
        self.settings = MeterSettings(config.Metering(), PriceTable("v2", (Price("m", input_pico=2_000_000),)))
        self.clock = TrioClock(T0)

    async def fill(self) -> None:
        """Record every other event without a cost."""
        events = [
            UsageEvent("t", "urn:asap:agent:a", "c", T0 + n, tokens_in=n or 1, id=f"e{n}", model="n" if n == 7 else "m")
            for n in range(EVENTS)
        ]
        costs = [Cost(n, "priced", n, "v1") if n % 2 else Cost() for n in range(EVENTS)]
        await self.database.submit(RecordUsage("default", "key:x", T0, events, costs))

    async def part(self, after: Progress | None = None, *, dry_run: bool = False, **selected: Any) -> Any:
        """One part of a run."""
        request = RepriceRequest(
            "key:o", dry_run, **{"start_us": None, "end_us": None, "model": None, **selected}, after=after
        )
        return await reprice(self.database, self.clock, self.settings, request)

    async def run(self, *, dry_run: bool = False) -> tuple[int, int]:
        """A whole run: how many parts, and how many events changed."""
        after, parts, changed = None, 0, 0
        while True:
            reply, after = await self.part(after, dry_run=dry_run)
            parts += 1
            changed += sum(row["changed"] for row in reply["data"])
            assert reply["more"] is (after is not None)
            if after is None:
                return parts, changed

    @property
    def total(self) -> Any:
        """What all events cost."""
        return usage_sums.summary(self.connection, UsageFilter(EVERYTHING))["total_cost_usd"]


WHOLE = to_usd(sum(2 * (n or 1) for n in range(EVENTS)) - 7)


@pytest.fixture
async def shop(autojump_clock: MockClock, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A shop whose pages and units are small."""
    monkeypatch.setattr(repricer, "PAGE", 7)
    monkeypatch.setattr(repricer, "STEP", 3)
    connection = open_for_writing(tmp_path / "asapd.db", synchronous="off")
    shop = Shop(connection)
    await shop.fill()
    yield shop
    connection.close()


async def test_a_page_that_takes_too_long_to_read_does_not_deny_what_was_corrected(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, pages = shop.database.read, itertools.count(1)

    async def read_one_page(query: Callable[..., Any], *arguments: Any) -> Any:
        if isinstance(query, partial) and next(pages) > 1:
            raise ReadTooLongError("GAVE UP")
        return await read(query, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(shop.database, "read", read_one_page)
        reply, after = await shop.part()
        assert (sum(row["changed"] for row in reply["data"]), reply["more"]) == (7, True)
        with pytest.raises(ReadTooLongError):
            await shop.part(after)
    reply, after = await shop.part(after)
    assert (reply["more"], after, shop.total) == (False, None, WHOLE)


async def test_a_dry_run_says_what_a_run_then_does_and_a_second_has_nothing_to_do(shop: Shop) -> None:
    before = shop.total
    would, after = await shop.part(dry_run=True)
    assert (after, shop.total) == (None, before)
    did, _ = await shop.part()
    assert did == {**would, "dry_run": False}
    assert shop.total == WHOLE
    other, again = (await shop.part())[0]["data"][::-1]
    assert (again["changed"], again["difference_usd"], other["model"], other["not_in_table"]) == (0, 0, "n", 1)
    assert (again["old_cost_usd"], other["new_cost_usd"]) == (WHOLE - to_usd(7), to_usd(7))


async def test_figures_are_by_model(shop: Shop) -> None:
    reply, _ = await shop.part(dry_run=True)
    known = sum(n for n in range(1, EVENTS, 2)) - 7
    assert reply["data"] == [
        {
            "model": "m",
            "events": EVENTS - 1,
            "changed": EVENTS - 1,
            "first_priced": 13,
            "not_in_table": 0,
            "unpriced_events": 0,
            "old_cost_usd": to_usd(known),
            "new_cost_usd": WHOLE - to_usd(7),
            "difference_usd": WHOLE - to_usd(7) - to_usd(known),
        },
        {
            "model": "n",
            "events": 1,
            "changed": 0,
            "first_priced": 0,
            "not_in_table": 1,
            "unpriced_events": 0,
            "old_cost_usd": to_usd(7),
            "new_cost_usd": to_usd(7),
            "difference_usd": to_usd(0),
        },
    ]
    only, _ = await shop.part(dry_run=True, start_us=T0, end_us=T0 + 1)
    assert (only["data"][0]["events"], only["data"][0]["old_cost_usd"]) == (1, None)


async def test_a_long_run_goes_in_parts_and_leaves_room_between_units(shop: Shop, monkeypatch: Any) -> None:
    monkeypatch.setattr(repricer, "PART_S", 2 * repricer.BREATH_S)
    sizes: list[int] = []
    times: list[float] = []

    def note(unit: AnyUnit) -> None:
        if isinstance(unit, CorrectCosts):
            sizes.append(len(unit.corrections))
            times.append(trio.current_time())

    shop.runner.before = note
    parts, changed = await shop.run()
    assert (changed, shop.total, parts > 2) == (EVENTS - 1, WHOLE, True)
    assert max(sizes) == 3
    assert min(later - one for one, later in itertools.pairwise(times)) >= repricer.BREATH_S
    assert (await shop.run())[1] == 0


async def test_events_of_after_its_beginning_are_left_to_the_next_run(shop: Shop, monkeypatch: Any) -> None:
    monkeypatch.setattr(repricer, "PART_S", 0.01)
    reply, after = await shop.part()
    assert reply["more"]
    late = UsageEvent("t", "urn:asap:agent:a", "c", T0 + 999, tokens_in=1, id="late", model="m")
    await shop.database.submit(RecordUsage("default", "key:x", T0, [late], [Cost()]))
    while after is not None:
        _, after = await shop.part(after)
    assert shop.total == WHOLE
    assert (await shop.run())[1] == 1


async def test_another_table_ends_a_run(shop: Shop, monkeypatch: Any) -> None:
    monkeypatch.setattr(repricer, "PART_S", 0.01)
    _, after = await shop.part()
    shop.settings.prices = PriceTable("v3", (Price("m", input_pico=5_000_000),))
    refused = await shop.part(after)
    assert isinstance(refused, Refusal)
    assert (refused.code, "v3" in refused.detail) == ("prices_changed", True)
    assert (await shop.run())[1] == EVENTS - 1


async def test_what_was_changed_in_between_is_left_alone_and_not_counted(shop: Shop) -> None:
    writer = Writer(shop.connection)
    voided: list[int] = []

    def void(unit: AnyUnit) -> None:
        if isinstance(unit, CorrectCosts) and not voided:
            voided.append(unit.corrections[0].seq)
            from asapd.store.units.exchange import Envelope

            writer.run([Envelope(1, VoidUsage(voided[0], "why", "key:o", T0), False)])

    shop.runner = Runner(writer)
    shop.database = Database(shop.runner, InlineReaders(shop.connection))
    shop.runner.before = void
    assert (await shop.run())[1] == EVENTS - 2
    assert shop.total == WHOLE - to_usd(2)
    assert (await shop.run())[1] == 0


async def test_a_writer_that_is_away_ends_a_part_and_another_run_finishes_it(shop: Shop) -> None:
    count = 0

    def refuse(unit: AnyUnit) -> Refusal | None:
        nonlocal count
        count += isinstance(unit, CorrectCosts)
        return Refusal("writer_unavailable", "away") if count == 3 else None

    shop.runner.before = refuse
    refused = await shop.part()
    assert isinstance(refused, Refusal)
    assert refused.code == "writer_unavailable"
    assert (await shop.run())[1] == EVENTS - 1 - 6
    assert shop.total == WHOLE


async def test_a_reported_cost_is_kept_or_taken_as_preferred(shop: Shop) -> None:
    both = UsageEvent("t", "urn:asap:agent:a", "c", T0 + 99, tokens_in=10, id="r", model="m", reported_microusd=5)
    await shop.database.submit(RecordUsage("default", "key:x", T0, [both], [Cost(15, "priced", 15, "v1")]))
    shop.settings.metering = config.Metering(pricing=config.Pricing(prefer="reported"))
    await shop.run()
    assert shop.total == WHOLE + to_usd(5)
    shop.settings.metering = config.Metering()
    assert (await shop.run())[1] == 1
    assert shop.total == WHOLE + to_usd(20)
    rows = usage_rows.list_usage(shop.connection, UsageFilter(EVERYTHING), 100, None)
    assert [(row["cost_source"]) for row in rows if row["reprices"] == "r"] == ["reported", "priced"]
