"""What is written while a verification reads makes it find nothing wrong, and hides nothing that is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing
from itertools import count
from typing import Any

import apsw
import pytest
from msgspec import structs

from asapd.core.delegation import Claims
from asapd.core.usage import UNKNOWN_COST, Cost, UsageEvent
from asapd.store import (
    budgets_held,
    erasures,
    numbered_rows,
    reconciling_directory,
    reconciling_house,
    reconciling_identity,
    reconciling_usage,
    replaying,
    verifying,
)
from asapd.store.units.audit import EraseConsumer, KeepArchive, RetireAudit
from asapd.store.units.delegations import NewDelegation, RegisterDelegation, Registered
from asapd.store.units.exchange import AnyUnit, Envelope
from asapd.store.units.usage import Attribution, RecordTask, RecordUsage, RetireUsage, TaskEvent, VoidUsage
from asapd.store.visibility import EVERYTHING
from asapd.store.writer import Writer

NOW_US = 1_795_169_203_000_000
AGENT = "urn:asap:agent:a"
MAX = "mailto:max"

OpenStore = Callable[[], AbstractContextManager[apsw.Connection]]
Prepare = Callable[[apsw.Connection, Writer], object]


def take_steps_of(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Have a log of some entries walked as one of millions is."""
    for module in (
        budgets_held,
        erasures,
        numbered_rows,
        reconciling_directory,
        reconciling_house,
        reconciling_identity,
        reconciling_usage,
        replaying,
        verifying,
    ):
        monkeypatch.setattr(module, "STEP", step)


def fill(_: apsw.Connection, writer: Writer) -> None:
    """Record fifty events, ten of them of somebody, a void of one of those, and a task."""
    events = [
        UsageEvent("t", AGENT, f"mailto:{number}" if number % 5 else MAX, NOW_US + number, tokens_in=5, id=f"e{number}")
        for number in range(50)
    ]
    units: list[AnyUnit] = [
        RecordUsage("default", "key:x", NOW_US, events, [UNKNOWN_COST] * 50),
        VoidUsage(46, "no", "key:x", NOW_US, EVERYTHING),
        RecordTask(TaskEvent("t", AGENT, MAX, "started", NOW_US), "key:x", "default", NOW_US),
    ]
    writer.run([Envelope(number, unit, False) for number, unit in enumerate(units)])


def erasure(connection: apsw.Connection) -> EraseConsumer:
    rows = connection.execute("SELECT seq FROM audit WHERE details ->> 'consumer' = ?", (MAX,)).fetchall()
    return EraseConsumer(MAX, "ers_1", [seq for (seq,) in rows], "asked", "key:o", NOW_US, 0)


def moving(connection: apsw.Connection) -> AnyUnit:
    """An erasure of a consumer whose name something else has as well."""
    return structs.replace(erasure(connection), is_shared=True, is_all=True)


def retention(_: apsw.Connection) -> AnyUnit:
    return RetireUsage(NOW_US + 20, "asapd", NOW_US)


def report(connection: apsw.Connection, before: Callable[[int], None]) -> verifying.Report:
    """What a verification comes to; `before` is called before each of its statements outside a snapshot."""
    places = count()

    def trace(*_: Any) -> bool:
        if looking.txn_state("main") == apsw.SQLITE_TXN_NONE:
            before(next(places))
        return True

    with closing(apsw.Connection(connection.db_filename("main"))) as looking:
        looking.exec_trace = trace
        return verifying.report(looking, verifying.Request())


def reports(
    open_store: OpenStore,
    prepare: Prepare,
    made: Callable[[apsw.Connection], list[AnyUnit]],
    *,
    every: int = 1,
) -> Iterator[tuple[int, verifying.Report, verifying.Report]]:
    """What a verification comes to while units are run at a place of it, for each place, and one with nothing beside.

    Places are tried in turn, each `every` behind the one before.
    """
    for place in count(step=every):
        with open_store() as connection:
            writer = Writer(connection)
            prepare(connection, writer)
            units, done = made(connection), []

            def before(at: int) -> None:
                if at == place:  # noqa: B023 -- called before it changes
                    done.append(at)  # noqa: B023
                    for answer in writer.run([Envelope(9, unit, False) for unit in units]):  # noqa: B023
                        assert type(answer.result).__name__ not in {"Failed", "Refusal"}, answer

            found = report(connection, before)
            if not done:
                break
            yield place, found, verifying.report(connection, verifying.Request())
    assert place > 10


@pytest.mark.parametrize(("step", "every"), [(1, 13), (5, 3), (20_000, 1)])
@pytest.mark.parametrize("made", [erasure, moving, retention])
def test_what_goes_meanwhile_is_explained_wherever_it_goes(
    open_store: OpenStore,
    monkeypatch: pytest.MonkeyPatch,
    made: Callable[[apsw.Connection], AnyUnit],
    step: int,
    every: int,
) -> None:
    take_steps_of(monkeypatch, step)
    for place, found, later in reports(open_store, fill, lambda connection: [made(connection)], every=every):
        assert found.is_valid, (place, found)
        assert later.is_valid


# --- what was altered before


def tampered(sql: str) -> Prepare:
    """Twenty events, two in three of them under a delegation and one in three of somebody, and then this."""

    def prepare(connection: apsw.Connection, writer: Writer) -> None:
        claims = Claims("root", "urn:asap:agent:root", AGENT, ("task.*",), None, 10**9, NOW_US, NOW_US + 10**9)
        units: list[AnyUnit] = []
        for number in range(20):
            consumer, under = ("mailto:eve", "root") if number % 3 else (MAX, None)
            event = UsageEvent("t", AGENT, consumer, NOW_US, tokens_in=5, id=f"e{number}", delegation=under)
            units.append(RecordUsage("default", "key:x", NOW_US + number, [event], [Cost(1)]))
        units.insert(1, RegisterDelegation([NewDelegation(claims, "token", b"x")], "key:x", "default", NOW_US))
        writer.run([Envelope(number, unit, False) for number, unit in enumerate(units)])
        for (trigger,) in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'trigger'").fetchall():
            connection.execute(f"DROP TRIGGER {trigger}")
        connection.execute(sql)

    return prepare


def named(found: verifying.Report) -> list[str]:
    assert found.walk.fault is None
    return [name for tally in found.tallies or () for name in tally.named]


def retention_of_entries(connection: apsw.Connection) -> list[AnyUnit]:
    """Of the first, which is of an event under no delegation."""
    last_hash = connection.execute("SELECT hash FROM audit WHERE seq = 1").get
    return [KeepArchive(1, 1, last_hash, NOW_US, "a.gz", "00", "asapd", NOW_US), RetireAudit("asapd", NOW_US, 500)]


@pytest.mark.parametrize("made", [lambda connection: [erasure(connection)], retention_of_entries])
def test_what_goes_meanwhile_hides_no_other_delegation(
    open_store: OpenStore, monkeypatch: pytest.MonkeyPatch, made: Callable[[apsw.Connection], list[AnyUnit]]
) -> None:
    take_steps_of(monkeypatch, 5)
    prepare = tampered("UPDATE delegation SET spent_microusd = spent_microusd - 5")
    wanted = ["delegation root: spent_microusd is 8, and the log comes to 13"]
    for place, found, later in reports(open_store, prepare, made, every=2):
        assert named(found) == wanted, place
        assert named(later) == wanted, place


def test_erasures_that_go_on_and_on_hide_no_other_delegation(
    open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_steps_of(monkeypatch, 2)
    with open_store() as connection:
        writer = Writer(connection)
        tampered("UPDATE delegation SET spent_microusd = spent_microusd - 5")(connection, writer)
        unit = erasure(connection)
        assert isinstance(unit, EraseConsumer)
        left = [EraseConsumer(MAX, "ers_1", [seq], "asked", "key:o", NOW_US, None) for seq in unit.seqs]
        assert len(left) == 7
        walk, steps = replaying.ReplayedLedger.walk, count(1)

        def beside(*arguments: Any) -> int:
            if next(steps) % 4 == 0 and left:
                writer.run([Envelope(9, left.pop(), False)])
            return walk(*arguments)

        monkeypatch.setattr(replaying.ReplayedLedger, "walk", beside)
        assert named(report(connection, lambda _: None)) == [
            "delegation root: spent_microusd is 8, and the log comes to 13"
        ]
        assert not left
        assert next(steps) > 33  # of each try


HOUR_US = 3_600_000_000
OLD_US = NOW_US // HOUR_US * HOUR_US - 10 * HOUR_US


def without_row(number: int) -> Prepare:
    """Ten events, three of them of an hour before, of which somebody takes one with all that it would be missed by."""

    def prepare(connection: apsw.Connection, writer: Writer) -> None:
        events = [
            UsageEvent("t", AGENT, MAX, OLD_US + at + HOUR_US * (at > 2), tokens_in=1, id=f"e{at}") for at in range(10)
        ]
        writer.run([Envelope(1, RecordUsage("default", "key:x", NOW_US, events, [Cost(1)] * 10), False)])
        connection.execute("DROP TRIGGER usage_no_delete")
        connection.execute(
            f"DELETE FROM usage WHERE seq = {number}; DELETE FROM usage_identity WHERE seq = {number}; "
            "UPDATE usage_hour SET events = events - 1, tasks = tasks - 1, tokens_in = tokens_in - 1, "
            f"cost_microusd = cost_microusd - 1 WHERE hour = {OLD_US // HOUR_US}"
        )

    return prepare


@pytest.mark.parametrize("step", [2, 20_000])
@pytest.mark.parametrize("number", [2, 3])
def test_what_retention_takes_meanwhile_stands_for_no_row_that_was_taken_before(
    open_store: OpenStore, monkeypatch: pytest.MonkeyPatch, number: int, step: int
) -> None:
    """A void is as old as what it voids, and retention takes it too: here it takes the rows that are left of three."""
    take_steps_of(monkeypatch, step)
    units: list[AnyUnit] = [
        VoidUsage(1, "no", "key:o", NOW_US, EVERYTHING),
        RetireUsage(OLD_US + HOUR_US, "asapd", NOW_US),
    ]
    for place, found, later in reports(open_store, without_row(number), lambda _: units, every=2):
        (said,) = named(found)
        assert "is not there" in said or "are not there" in said, place
        (said,) = named(later)
        # Where retention took nothing as young, it took none of that row: else it may have been any of as many.
        if number == 3:
            assert said == "entry 3 (usage.recorded e2): usage row 3 is not there"
        else:
            assert said.endswith("usage row 11 is not there, or another: retention took 3 rows, and more are gone")


def test_an_event_that_names_the_token_it_came_with_is_what_was_reported(open_store: OpenStore) -> None:
    """Its delegation has another name here: another delegator's token is called the same."""
    with open_store() as connection:
        writer = Writer(connection)
        tokens = [
            Claims("j", issuer, AGENT, ("task.*",), None, None, NOW_US, NOW_US + 10) for issuer in ("urn:x", "urn:y")
        ]
        for token in tokens:
            link = NewDelegation(token, token.delegator, token.delegator.encode())
            (answer,) = writer.run([Envelope(1, RegisterDelegation([link], "key:x", "default", NOW_US), False)])
        assert isinstance(answer.result, Registered)
        assert answer.result.id != "j"
        event = UsageEvent("t", AGENT, MAX, NOW_US, tokens_in=5, id="e", delegation="j")
        attribution = Attribution(answer.result.id, "j")
        unit = RecordUsage("default", "key:x", NOW_US, [event], [UNKNOWN_COST], attribution=attribution)
        writer.run([Envelope(2, unit, False)])
        assert connection.execute("SELECT delegation FROM usage").get == answer.result.id
        assert verifying.report(connection, verifying.Request()).is_valid
