"""Identities of events are held to the rows that have them."""

from __future__ import annotations

import re

import apsw
import pytest

from asapd.core.usage import OTLP, Cost, UsageEvent, identity_digest, identity_key
from asapd.store import reconciling_identity, span_identity
from asapd.store.reconciling_identity import reconcile_identities
from asapd.store.units.usage import RecordUsage, RetireUsage
from tests.store.ledger_desk import NOW_US, A, Ledger


@pytest.fixture
def ledger(connection: apsw.Connection, monkeypatch: pytest.MonkeyPatch) -> Ledger:
    monkeypatch.setattr(reconciling_identity, "STEP", 3)
    made = Ledger(connection)
    events = [UsageEvent("t", A, A, NOW_US, id=name) for name in ("a", "b", "x" * 60, "")]
    events += [UsageEvent("t", A, A, NOW_US + 9, id="span", source=OTLP)]
    made.submit(RecordUsage("default", "key:x", NOW_US, events, [Cost(None)] * 5))
    span_key = identity_key(*span_identity.of_span("default", "span"))
    connection.execute("INSERT OR IGNORE INTO usage_identity VALUES (?, 5)", (span_key,))
    made.void(1)
    return made


def findings(ledger: Ledger) -> tuple[str, ...]:
    return reconcile_identities(ledger.connection).named


def test_each_identity_is_taken_by_its_row(ledger: Ledger) -> None:
    assert findings(ledger) == ()
    assert reconcile_identities(ledger.connection).rows == 6
    ledger.submit(RetireUsage(NOW_US + 1, "asapd", NOW_US + 5))
    assert findings(ledger) == ()


def test_rows_from_before_keys_sorted_have_digests(ledger: Ledger) -> None:
    ledger.connection.execute("UPDATE usage_digest SET through_seq = 1")
    assert findings(ledger)
    digest = identity_digest(("default", A, "", "a"))
    ledger.connection.execute("UPDATE usage_identity SET key = ? WHERE seq = 1", (digest,))
    assert findings(ledger) == ()


@pytest.mark.parametrize(
    ("sql", "said"),
    [
        ("DELETE FROM usage_identity WHERE seq = 2", r"usage row 2 \(b\): its identity is taken by nobody"),
        ("UPDATE usage_identity SET seq = 1 WHERE seq = 2", r"usage row 2 \(b\): its identity is taken by row 1"),
        ("UPDATE usage_identity SET key = x'00' WHERE seq = 3", "usage_identity 00 is taken by usage row 3"),
        (
            "INSERT INTO usage_identity VALUES (x'07', 1)",
            "usage_identity 07 is taken by usage row 1, which has another",
        ),
        ("INSERT INTO usage_identity VALUES (x'07', 99)", "usage_identity 07 is taken by usage row 99"),
    ],
)
def test_one_that_is_gone_changed_or_put_in_is_named(ledger: Ledger, sql: str, said: str) -> None:
    ledger.connection.execute(sql)
    assert any(re.search(said, finding) for finding in findings(ledger))
