"""A transition of a breach is written once, numbered, and found again by those who follow."""

from __future__ import annotations

from typing import Any

import apsw
import pytest
from msgspec.structs import replace

from asapd.store import audit, breaches
from asapd.store.units.alerts import AlertWritten, BreachRow, WriteBreach
from asapd.store.units.exchange import Envelope
from asapd.store.visibility import EVERYTHING, Visibility
from asapd.store.writer import Writer

NOW_US = 1_795_169_203_000_000
HOUR_US = 3_600_000_000
A, B = "urn:asap:agent:a", "urn:asap:agent:b"
OPENED = BreachRow(
    id="brc_1",
    agent_id=A,
    breach_type="latency",
    window_us=HOUR_US,
    threshold="100ms",
    threshold_value=100.0,
    actual="150ms",
    actual_value=150.0,
    severity="warning",
    state="open",
    detected_at_us=NOW_US,
    samples=25,
    tenant="default",
    evidence={"samples": [1, 2]},
)
ESCALATED = replace(OPENED, severity="critical", actual="300ms", actual_value=300.0)
RESOLVED = replace(ESCALATED, state="resolved", resolved_at_us=NOW_US + 90_500_000, resolve_reason="recovered")


class Store:
    def __init__(self, connection: apsw.Connection) -> None:
        self.connection = connection
        self.writer = Writer(connection)

    def write(self, event: str, breach: BreachRow) -> int | None:
        result = self.writer.run([Envelope(1, WriteBreach(event, breach, breach.detected_at_us), True)])[0].result
        assert isinstance(result, AlertWritten)
        return result.seq

    def ids(self, visible: Visibility = EVERYTHING, **filters: Any) -> list[str]:
        return [breach.id for breach, _ in breaches.list_breaches(self.connection, visible, **filters)]


@pytest.fixture
def store(connection: apsw.Connection) -> Store:
    return Store(connection)


def test_each_transition_has_its_number_and_is_written_once(store: Store) -> None:
    for seq, (event, breach) in enumerate((("opened", OPENED), ("escalated", ESCALATED), ("resolved", RESOLVED)), 1):
        assert store.write(event, breach) == seq
        assert store.write(event, breach) is None
        assert breaches.get_breach(store.connection, "brc_1") == (breach, seq)
    assert audit.head(store.connection)[0] == 3
    assert breaches.alert_bounds(store.connection) == (1, 3)


def test_a_second_breach_of_the_same_kind_does_not_open_while_one_is_open(store: Store) -> None:
    second = replace(OPENED, id="brc_2")
    store.write("opened", OPENED)
    assert store.write("opened", second) is None
    assert store.write("opened", replace(second, breach_type="availability")) == 2
    assert store.write("opened", replace(second, id="brc_3", agent_id=B)) == 3
    store.write("resolved", RESOLVED)
    assert store.write("opened", second) is None  # its id was used
    assert store.write("opened", replace(second, id="brc_4")) == 5


@pytest.mark.parametrize(("event", "breach"), [("escalated", ESCALATED), ("resolved", RESOLVED)])
def test_what_never_opened_neither_escalates_nor_resolves(store: Store, event: str, breach: BreachRow) -> None:
    assert store.write(event, breach) is None
    assert store.ids() == []


def test_a_resolved_breach_does_not_escalate(store: Store) -> None:
    store.write("opened", OPENED)
    store.write("resolved", replace(RESOLVED, severity="warning"))
    assert store.write("escalated", ESCALATED) is None


def test_alerts_are_read_on_from_a_number_as_subscribers_receive_them(store: Store) -> None:
    store.write("opened", OPENED)
    store.write("resolved", RESOLVED)
    opened, resolved = breaches.alerts_after(store.connection, 0, 10)
    assert breaches.alerts_after(store.connection, 1, 10) == [resolved]
    assert breaches.alerts_after(store.connection, 0, 1) == [opened]
    assert (opened.seq, opened.event, opened.agent_id, opened.severity) == (1, "opened", A, "warning")
    assert resolved.params == {
        "event": "resolved",
        "seq": 2,
        "breach": {
            "id": "brc_1",
            "agent_id": A,
            "budget": None,
            "breach_type": "latency",
            "window": "1h",
            "threshold": "100ms",
            "threshold_value": 100.0,
            "actual": "300ms",
            "actual_value": 300.0,
            "severity": "critical",
            "state": "resolved",
            "detected_at": "2026-11-20T10:06:43.000000Z",
            "resolved_at": "2026-11-20T10:08:13.500000Z",
            "resolve_reason": "recovered",
            "duration_seconds": 90.5,
            "samples": 25,
            "seq": 2,
        },
        "silence": None,
        "acknowledged": None,
    }


def test_alert_numbers_go_on_after_all_alerts_were_retired(store: Store) -> None:
    assert breaches.alert_bounds(store.connection) == (1, 0)
    store.write("opened", OPENED)
    store.connection.execute("UPDATE retention_gate SET open = 1; DELETE FROM alert")
    assert store.write("resolved", RESOLVED) == 2
    assert breaches.alert_bounds(store.connection) == (2, 2)


@pytest.mark.parametrize(
    ("window_us", "text"),
    [(HOUR_US, "1h"), (24 * HOUR_US, "24h"), (168 * HOUR_US, "7d"), (90_000_000, "90s"), (120_000_000, "2m")],
)
def test_windows_are_shown_as_they_are_configured(window_us: int, text: str) -> None:
    assert breaches.public(replace(OPENED, window_us=window_us))["window"] == text


def test_breaches_are_listed_newest_first_by_filter_and_page(store: Store) -> None:
    for number in range(4):
        store.write(
            "opened",
            replace(
                OPENED,
                id=f"brc_{number}",
                agent_id=(A, B)[number % 2],
                breach_type=("latency", "availability")[number // 2],
                severity=("warning", "critical")[number // 3],
                detected_at_us=NOW_US + number // 2,
                tenant=("one", "two")[number % 2],
            ),
        )
    store.write("resolved", replace(RESOLVED, agent_id=B, id="brc_3"))
    assert store.ids() == ["brc_3", "brc_2", "brc_1", "brc_0"]
    assert store.ids(limit=2) == ["brc_3", "brc_2"]
    assert store.ids(before=(NOW_US + 1, "brc_2")) == ["brc_1", "brc_0"]
    assert store.ids(agent=A) == ["brc_2", "brc_0"]
    assert store.ids(state="resolved") == ["brc_3"]
    assert store.ids(severity="warning") == ["brc_2", "brc_1", "brc_0"]
    assert store.ids(breach_type="latency") == ["brc_1", "brc_0"]
    assert store.ids(start_us=NOW_US + 1) == ["brc_3", "brc_2"]
    assert store.ids(end_us=NOW_US + 1) == ["brc_1", "brc_0"]
    assert store.ids(Visibility("one")) == ["brc_2", "brc_0"]
    assert store.ids(Visibility(None, (B,))) == ["brc_3", "brc_1"]


def test_an_unknown_breach_is_none(store: Store) -> None:
    assert breaches.get_breach(store.connection, "brc_9") is None
