"""The breach of a budget is what its evidence makes of it, and every change of either is told."""

from __future__ import annotations

import copy
import json
from typing import Any
from zoneinfo import ZoneInfo

import apsw
import pytest
from msgspec.structs import replace
from nacl.signing import SigningKey

from asapd.cli.verify_evidence import verify_evidence
from asapd.core.budget_evidence import faults
from asapd.core.budgets import Limits
from asapd.core.types import MAX_INT
from asapd.core.usage import Cost, UsageEvent
from asapd.store.breaches import list_breaches, public
from asapd.store.units.usage import RecordUsage
from asapd.store.visibility import EVERYTHING
from asapd.wire.statement import sign_evidence
from tests.store.test_budgets import DAILY, DESK, MIDNIGHT_US, NOON_US, USD, B, Desk

KEY = SigningKey(b"k" * 32)


def leaves(value: Any, at: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    if isinstance(value, dict):
        return [found for name, inner in value.items() for found in leaves(inner, (*at, name))]
    return [at] if type(value) is int else []


@pytest.mark.parametrize("zone", ["UTC", "America/New_York"])
@pytest.mark.parametrize("unit", ["usd", "tokens", "tasks"])
def test_a_breach_of_a_budget_is_computed_anew(connection: apsw.Connection, unit: str, zone: str) -> None:
    desk = Desk(connection)
    limits = {"usd": Limits(microusd=5 * USD), "tokens": Limits(tokens=50), "tasks": Limits(tasks=1)}[unit]
    desk.sync(replace(DAILY, timezone=zone, period="month", soft=limits, hard=Limits(10 * USD, 100, 2)))
    desk.use(6 * USD, tokens_in=60)
    verify(desk, "warning")
    desk.use(6 * USD, tokens_in=60, task_id="other")
    desk.use(task_id="third")
    verify(desk, "critical")
    desk.now_us = MIDNIGHT_US + 40 * 86_400_000_000
    desk.sweep()
    verify(desk, "critical")


def verify(desk: Desk, severity: str) -> None:
    ((row, seq),) = list_breaches(desk.connection, EVERYTHING)
    breach, evidence = {**public(row), "seq": seq}, row.evidence
    assert breach["severity"] == severity
    found = verify_evidence(sign_evidence(breach, evidence, KEY, NOON_US), None)
    assert found.faults == []
    assert "is asapd's word" in found.on_trust[0]
    for at in leaves(evidence):
        # Counts of other units, which no limit was reached of, are asapd's word as well.
        if at[0] in ("soft", "hard") or (at[0] == "balance" and at[1] not in ("start_us", "end_us", "events")):
            continue
        changed = copy.deepcopy(evidence)
        place = changed
        for name in at[:-1]:
            place = place[name]
        place[at[-1]] += 1
        assert faults(breach, changed, ZoneInfo), at
    for name, value in breach.items():
        if name in ("id", "seq", "budget", "resolve_reason") or (name == "resolved_at" and value is None):
            continue
        other = "2020-01-01T00:00:00Z" if name.endswith("_at") else f"{value}0" if isinstance(value, str) else 77
        try:
            assert faults({**breach, name: other}, evidence, ZoneInfo), name
        except ValueError:
            assert name.endswith("_value")


def test_what_is_no_evidence_of_a_budget_and_what_reached_nothing_are_told(connection: apsw.Connection) -> None:
    desk = Desk(connection)
    desk.sync(DAILY)
    desk.use(9 * USD)
    ((row, _),) = list_breaches(connection, EVERYTHING)
    below = copy.deepcopy(row.evidence)
    below["balance"]["spent_microusd"] = USD
    assert faults(public(row), below, ZoneInfo)[0].startswith("verdict: no limit is reached")
    for name in (None, "balance", "match", "soft", "hard"):
        added = copy.deepcopy(row.evidence)
        (added if name is None else added[name])["extra"] = 1
        (fault,) = verify_evidence(sign_evidence({**public(row), "seq": 1}, added, KEY, NOON_US), None).faults
        assert fault == f"evidence{'' if name is None else '.' + name}: has extra, which does not belong there"
    for broken in (
        {},
        {**row.evidence, "timezone": "Nowhere/Else"},
        {**row.evidence, "balance": 5},
    ):
        (fault,) = verify_evidence(sign_evidence({**public(row), "seq": 1}, broken, KEY, NOON_US), None).faults
        assert fault.startswith("evidence: it has not the form")


@pytest.mark.parametrize("unit", ["usd", "tokens"])
def test_a_breach_by_more_than_json_keeps_exact_is_computed_anew(connection: apsw.Connection, unit: str) -> None:
    desk = Desk(connection)
    limit = Limits(microusd=5 * USD) if unit == "usd" else Limits(tokens=50)
    desk.sync(replace(DAILY, soft=Limits(), hard=limit))
    events = [UsageEvent("t", B, DESK, NOON_US, tokens_in=MAX_INT, tokens_out=10 + at) for at in range(3)]
    desk.submit(RecordUsage("default", "key:x", NOON_US, events, [Cost(MAX_INT)] * 3))
    verify(desk, "critical")
    ((row, seq),) = list_breaches(desk.connection, EVERYTHING)
    signed = sign_evidence({**public(row), "seq": seq}, row.evidence, KEY, NOON_US)
    told = json.loads(signed)["evidence"]["balance"]
    assert (told["spent_tokens"], told["spent_microusd"]) == (str(3 * MAX_INT + 33), str(3 * MAX_INT))
    name = "spent_microusd" if unit == "usd" else "spent_tokens"
    for other in (str(int(told[name]) + 1), f"0{told[name]}", "60"):
        altered = {**row.evidence, "balance": {**row.evidence["balance"], name: other}}
        assert verify_evidence(sign_evidence({**public(row), "seq": seq}, altered, KEY, NOON_US), None).faults
