"""A verification finds nothing wrong because of what is written while it reads."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, closing
from itertools import count
from typing import Any

import apsw
import pytest

from asapd.core.delegation import Claims
from asapd.core.usage import UNKNOWN_COST, UsageEvent
from asapd.store import verifying
from asapd.store.units.audit import EraseConsumer
from asapd.store.units.delegations import NewDelegation, RegisterDelegation, Registered
from asapd.store.units.exchange import AnyUnit, Envelope
from asapd.store.units.usage import Attribution, RecordTask, RecordUsage, RetireUsage, TaskEvent, VoidUsage
from asapd.store.visibility import EVERYTHING
from asapd.store.writer import Writer

NOW_US = 1_795_169_203_000_000
AGENT = "urn:asap:agent:a"
MAX = "mailto:max"

OpenStore = Callable[[], AbstractContextManager[apsw.Connection]]


def fill(writer: Writer) -> None:
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


def erasure(connection: apsw.Connection) -> AnyUnit:
    rows = connection.execute("SELECT seq FROM audit WHERE details ->> 'consumer' = ?", (MAX,)).fetchall()
    return EraseConsumer(MAX, "ers_1", [seq for (seq,) in rows], "asked", "key:o", NOW_US, 0)


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


@pytest.mark.parametrize("made", [erasure, retention])
def test_what_goes_meanwhile_is_explained_wherever_it_goes(
    open_store: OpenStore, made: Callable[[apsw.Connection], AnyUnit]
) -> None:
    for place in count():
        with open_store() as connection:
            writer = Writer(connection)
            fill(writer)
            unit = made(connection)
            done: list[int] = []

            def before(at: int) -> None:
                if at == place:  # noqa: B023 -- called before it changes
                    done.append(at)  # noqa: B023
                    writer.run([Envelope(9, unit, False)])  # noqa: B023

            found = report(connection, before)
            if not done:
                break
            assert found.is_valid, (place, found)
            assert verifying.report(connection, verifying.Request()).is_valid
    assert place > 10


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
