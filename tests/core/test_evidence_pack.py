"""What belongs into an evidence pack, judged from entries alone."""

from __future__ import annotations

from typing import Any

import pytest

from asapd.core.evidence_pack import concerns, delegations, leading_to, opened, stray, uncovered

A, B, C, D = (f"urn:asap:agent:{letter}" for letter in "abcd")


def entry(kind: str, subject: str, details: dict[str, Any] | None = None, time: str = "2") -> dict[str, Any]:
    return {"seq": 1, "event_type": kind, "subject": subject, "details": details or {}, "timestamp": time}


def made(name: str, delegator: str, delegate: str, parent: str | None = None) -> dict[str, Any]:
    terms = {"scopes": [], "max_cost_microusd": 5, "max_tasks": None, "expires_at": "9"}
    said = {"id": name, "parent": parent, "delegator": delegator, "delegate": delegate, **terms}
    return entry("delegation.created", name, said, "1")


@pytest.mark.parametrize(
    ("one", "belongs"),
    [
        (entry("usage.recorded", "use_1", {"agent": A}), True),
        (entry("usage.recorded", "use_1", {"agent": B}), False),
        (entry("agent.state", A), True),
        (entry("key.created", A), False),
        (entry("maintenance.declared", "*"), True),
        (entry("maintenance.ended", B), False),
        (entry("log.alarm", "audit"), True),
        ({**entry("agent.state", A), "details": None}, False),
    ],
)
def test_an_entry_belongs_to_the_agent_that_it_names(one: dict[str, Any], belongs: bool) -> None:
    assert concerns(one, A) is belongs


def test_delegations_belong_as_far_as_they_lead_to_the_agent() -> None:
    chain = [made("1", D, C), made("2", C, B, "1"), made("3", B, A, "2"), made("4", A, D, "gone"), made("5", C, D, "1")]
    assert leading_to(chain, A) == {"1", "2", "3", "4"}
    assert stray(chain[:4], A, "2", "3") is None
    assert stray(chain, A, "2", "3") == f"entry 1 is about a delegation that is none of {A}"
    ended = entry("delegation.revoked", "2", {"id": "2"}, "4")
    assert [(one["id"], one["revoked_at"]) for one in delegations([*chain[:2], ended])] == [("1", None), ("2", "4")]


def test_the_first_entry_without_a_place_is_named() -> None:
    good = entry("agent.state", A)
    assert stray([good], A, "2", "3") is None
    assert stray([good], A, "1", "2") == stray([good], A, "3", "4") == "entry 1 is not of the period"
    assert stray([good, entry("agent.state", B)], A, "2", "3") == f"entry 1 is not about {A}"


def test_breaches_are_those_that_were_opened() -> None:
    told = [
        entry("sla.breach", A, {"id": name, "event": event}) for name, event in (("x", "opened"), ("y", "resolved"))
    ]
    assert opened([*told, entry("agent.state", A)]) == ["x"]


def test_reports_cover_the_period_without_a_gap() -> None:
    def period(start: str, end: str) -> dict[str, str]:
        return {"period_start": start, "period_end": end}

    assert uncovered([period("1", "2"), period("2", "4")], "1", "4") is None
    assert uncovered([period("1", "2"), period("3", "4")], "1", "4") == (
        "a period begins at 3, and the one before it ended at 2"
    )
    assert uncovered([period("1", "1")], "1", "4") is not None
    assert uncovered([], "1", "4") == "the periods end at 1, not at 4"
