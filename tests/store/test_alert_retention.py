"""Alerts go by their age, oldest first and without a hole, and never before every push target has come past them."""

from __future__ import annotations

from typing import Any

import apsw
from msgspec.structs import replace

from asapd.store import alert_retention, breaches, reconciling, silences
from asapd.store.units.alerts import (
    AddSilence,
    AlertsRetired,
    PassTarget,
    RetireAlerts,
    Silence,
    SyncTargets,
    WriteBreach,
)
from asapd.store.units.exchange import Envelope
from asapd.store.writer import Writer
from tests.store.test_breaches import NOW_US, OPENED


def submit(connection: apsw.Connection, *units: Any) -> Any:
    writer = Writer(connection)
    return [writer.run([Envelope(1, unit, True)])[0].result for unit in units][-1]


def opened(number: int, at_us: int | None = None) -> WriteBreach:
    row = replace(OPENED, id=f"brc_{number}", agent_id=f"urn:asap:agent:{number}")
    return WriteBreach("opened", row, NOW_US + (number if at_us is None else at_us))


def resolved(number: int, at_us: int) -> WriteBreach:
    unit = opened(number, at_us)
    return replace(unit, event="resolved", breach=replace(unit.breach, state="resolved", resolved_at_us=NOW_US + at_us))


def retire(connection: apsw.Connection, before: int, limit: int = 500) -> AlertsRetired:
    result: AlertsRetired = submit(connection, RetireAlerts(NOW_US + before, "key:o", NOW_US, limit))
    return result


def kept(connection: apsw.Connection) -> list[int]:
    return [alert.seq for alert in breaches.alerts_after(connection, 0, 100)]


def test_the_oldest_go_in_steps_and_numbers_go_on(connection: apsw.Connection) -> None:
    submit(connection, *(opened(number) for number in range(1, 6)))
    assert not alert_retention.is_due(connection, NOW_US)
    assert alert_retention.due(connection, NOW_US + 4)["count"] == 3
    assert retire(connection, 4, limit=2) == AlertsRetired(2, more=True)
    assert retire(connection, 4, limit=2) == AlertsRetired(1, more=False)
    assert retire(connection, 4) == AlertsRetired(0, more=False)
    assert (kept(connection), breaches.alert_bounds(connection)) == ([4, 5], (4, 5))
    retire(connection, 100)
    assert breaches.alert_bounds(connection) == (6, 5)
    assert submit(connection, opened(6)).seq == 6


def test_what_is_kept_has_no_holes_when_the_clock_was_put_back(connection: apsw.Connection) -> None:
    submit(connection, opened(1, 50), opened(2, 10), opened(3, 60))
    assert retire(connection, 40) == AlertsRetired(0, more=False)
    assert alert_retention.due(connection, NOW_US + 40)["count"] == 0
    assert retire(connection, 55) == AlertsRetired(2, more=False)
    assert kept(connection) == [3]


def test_what_a_target_has_still_to_take_stays(connection: apsw.Connection) -> None:
    submit(connection, opened(1), SyncTargets(["hook"]), opened(2), opened(3))
    assert retire(connection, 100) == AlertsRetired(1, more=False)
    assert not alert_retention.is_due(connection, NOW_US + 100)
    assert alert_retention.due(connection, NOW_US + 100)["count"] == 0
    submit(connection, PassTarget("hook", 2), PassTarget("hook", 1))
    assert alert_retention.is_due(connection, NOW_US + 100)
    assert retire(connection, 100) == AlertsRetired(1, more=False)
    assert kept(connection) == [3]


def test_who_heard_of_the_beginning_hears_of_the_end_and_nobody_else(connection: apsw.Connection) -> None:
    """Also when what was told is gone by then."""
    silence = Silence("", "urn:asap:agent:2", None, None, None, NOW_US, NOW_US + 1000, "o", "")
    submit(connection, opened(1), AddSilence(silence, "o", NOW_US, 0), opened(2))
    assert retire(connection, 100).rows == 2
    submit(connection, resolved(1, 2000), resolved(2, 2000))
    assert [alert.held for alert in breaches.alerts_after(connection, 0, 10)] == [None, "silenced"]
    assert connection.execute("SELECT count(*) FROM breach_told").get == 0
    assert silences.acknowledgement(connection, "brc_1") is None


def test_the_log_says_what_went_and_nothing_else_may_be_missing(connection: apsw.Connection) -> None:
    submit(connection, *(opened(number) for number in range(1, 5)))
    retire(connection, 3)

    def told() -> tuple[int, int]:
        tally = next(one for one in reconciling.reconcile(connection) if one.table == "breach")
        return tally.retired, tally.findings

    assert told() == (2, 0)
    connection.execute("UPDATE retention_gate SET open = 1; DELETE FROM alert WHERE seq = 3")
    assert told() == (2, 1)
