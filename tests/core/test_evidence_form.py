"""Evidence has the members of its form and no others; of other forms than today's little is said."""

from __future__ import annotations

from typing import Any

import pytest

from asapd.core.evidence_form import malformed

BREACH: dict[str, Any] = {
    "id": "brc_1",
    "agent_id": "urn:asap:agent:a",
    "budget": None,
    "breach_type": "latency",
    "window": "1h",
    "threshold": "500ms",
    "threshold_value": 500,
    "actual": "900ms",
    "actual_value": 900,
    "severity": "warning",
    "state": "open",
    "detected_at": "2027-01-15T08:00:00.000000Z",
    "resolved_at": None,
    "resolve_reason": None,
    "duration_seconds": None,
    "samples": 20,
    "seq": 1,
}
FIRST_FORM = {"breach_type": "latency", "samples": 20}


@pytest.mark.parametrize(
    ("breach", "evidence", "expected"),
    [
        (BREACH, FIRST_FORM, []),
        # A later asapd may hold what it likes; that it is not known is said elsewhere.
        (BREACH, {"form": 3, "whatever": 1}, []),
        (
            BREACH,
            {**FIRST_FORM, "steps": [], "untimed": 0},
            ["evidence: has steps, untimed, and does not say its form"],
        ),
        (BREACH, {"form": 2}, ["evidence: Object missing required field `agent_id`"]),
        (
            BREACH,
            {"form": 2, "opened_with": {"steps": []}},
            [
                "evidence: Object missing required field `agent_id`",
                "evidence.opened_with: has steps, and does not say its form",
            ],
        ),
        ({**BREACH, "more": 1}, FIRST_FORM, ["breach: Object contains unknown field `more`"]),
        ({**BREACH, "agent_id": None}, {"match": {}, "balance": 5}, []),
        (
            {**BREACH, "agent_id": None},
            {"match": {"x": 1}, "form": 2},
            [
                "evidence: has form, which does not belong there",
                "evidence.match: has x, which does not belong there",
            ],
        ),
    ],
)
def test_what_does_not_belong_there_is_named(
    breach: dict[str, Any], evidence: dict[str, Any], expected: list[str]
) -> None:
    assert malformed(breach, evidence) == expected
