"""Budgets by HTTP: who sees them, what they show, and how a refusal names one."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from asapd.cli.verify import verify_file
from asapd.core.audit import as_they_are
from asapd.core.budgets import Budget, Limits, Match
from asapd.core.errors import Refusal
from asapd.store.units.delegations import SyncBudgets
from asapd.wire.audit_archive import compressor, read_archive
from tests.edge.house import IDENTITY, NOW, T0, A, B, Edge
from tests.edge.http.test_delegations import authorize, token

USD = 1_000_000
RESEARCH = Budget("research/eu west", Match(agent=B), "day", "UTC", Limits(USD // 2), Limits(USD, 1_000, 3))


@pytest.fixture
async def host(edge: Edge) -> Edge:
    """An edge that goes by two budgets."""
    both = [RESEARCH, Budget("whole host", Match(), "month", "Europe/Berlin", hard=Limits(100 * USD))]
    assert not isinstance(await edge.database.submit(SyncBudgets(both, "test", T0)), Refusal)
    return edge


async def use(edge: Edge, **fields: Any) -> Any:
    event = {"task_id": "t1", "agent": B, "consumer": A, "timestamp": NOW, "cost_usd": "0.40", "metrics": {}, **fields}
    return (await edge.post("/usage", event)).ok(201)


async def test_a_budget_shows_its_limits_and_what_is_left(host: Edge) -> None:
    await use(host, metrics={"tokens_in": 100, "tokens_out": 20})
    listed = (await host.get("/budgets")).ok()
    assert [row["name"] for row in listed["data"]] == ["research/eu west", "whole host"]
    row = (await host.get("/budgets/research%2Feu%20west")).ok()
    assert row == listed["data"][0]
    assert row["match"] == {"agent": B}
    assert (row["period"], row["timezone"]) == ("day", "UTC")
    assert (row["period_start"], row["period_end"]) == ("2027-01-15T00:00:00.000000Z", "2027-01-16T00:00:00.000000Z")
    assert row["soft"] == {"usd": Decimal("0.5"), "tokens": None, "tasks": None}
    assert row["hard"] == {"usd": Decimal("1.0"), "tokens": 1000, "tasks": 3}
    assert row["spent"] == {"usd": Decimal("0.4"), "tokens": 120, "tasks": 1}
    assert row["reserved"] == {"usd": 0, "tokens": 0, "tasks": 0}
    assert row["remaining"] == {"usd": Decimal("0.6"), "tokens": 880, "tasks": 2}
    assert row["burn_rate_per_hour"] == {"usd": Decimal("0.05"), "tokens": 15, "tasks": 0.125}
    assert row["forecast"]["usd"]["exhausted_at"] == "2027-01-15T20:00:00.000000Z"
    assert row["spike"]["usd"] is None
    assert row["open_breach"] is None
    first = (await host.get("/budgets?limit=1")).ok()
    rest = (await host.get(f"/budgets?limit=1&cursor={first['next_cursor']}")).ok()
    assert [row["name"] for row in rest["data"]] == ["whole host"]
    assert rest["next_cursor"] is None


async def test_a_budget_is_shown_whatever_slashes_its_name_has(edge: Edge) -> None:
    names = ["/b", "/", "b/", "a//b"]
    budgets = [Budget(name, Match(), "day", "UTC", hard=Limits(USD)) for name in names]
    assert not isinstance(await edge.database.submit(SyncBudgets(budgets, "test", T0)), Refusal)
    for name in names:
        assert (await edge.get(f"/budgets/{quote(name, safe='')}")).ok()["name"] == name
    assert (await edge.get("/budgets/%2Fother")).refused(404)["code"] == "budget_not_found"


async def test_a_budget_is_seen_by_those_who_may_see_all_its_work(host: Edge) -> None:
    await host.new_key("of b", "reader", B)
    await host.new_key("of tenant", "reader", "*", tenant="default")
    assert [row["name"] for row in (await host.get("/budgets", key="of b")).ok()["data"]] == ["research/eu west"]
    assert (await host.get("/budgets", key="of tenant")).ok()["count"] == 0
    refused = (await host.get("/budgets/whole%20host", key="of b")).refused(404)
    assert refused["code"] == "budget_not_found"
    assert (await host.get("/budgets", key="ingest")).refused(403)["code"] == "forbidden"
    assert (await host.get("/budgets?colour=red")).refused(400)["code"] == "bad_parameter"
    assert (await host.get("/budgets/none?colour=red")).refused(400)["code"] == "bad_parameter"


async def test_a_refusal_names_the_budget_its_numbers_and_the_renewal(host: Edge) -> None:
    missing = (await authorize(host)).refused(422)
    assert (missing["code"], missing["errors"][0]["field"]) == ("missing_estimate", "estimate.tokens")
    allowed = (await authorize(host, estimate={"cost_usd": "0.90", "tokens": 500})).ok()
    assert allowed["remaining"] == {"cost_usd": Decimal("0.1"), "tasks": 2, "tokens": 500}
    reservation = allowed["reservation"]["id"]
    assert (await host.get(f"/reservations/{reservation}")).ok()["remaining"] == allowed["remaining"]
    denied = (await authorize(host, task_id="t2", estimate={"cost_usd": "0.05", "tokens": 600})).refused(403)
    assert (denied["decision"], denied["code"]) == ("deny", "insufficient_budget")
    assert denied["budget"] == {
        "name": "research/eu west",
        "unit": "tokens",
        "limit": 1000,
        "spent": 0,
        "reserved": 500,
        "remaining": 500,
        "needed": 600,
        "period_start": "2027-01-15T00:00:00.000000Z",
        "renews_at": "2027-01-16T00:00:00.000000Z",
    }
    assert denied["detail"].startswith("budget research/eu west: 500 tokens left in this period, 600 tokens needed")
    settled = (await host.post(f"/reservations/{reservation}/settle", {"cost_usd": "0.10", "tokens": 30})).ok()
    assert settled["remaining"] == {"cost_usd": Decimal("0.9"), "tasks": 2, "tokens": 970}


async def test_who_may_not_see_a_budget_is_not_told_what_others_spent(host: Edge) -> None:
    await host.new_key("of b", "ingest", B)
    await host.new_key("of tenant", "ingest", "*", tenant="default")
    await use(host, cost_usd="0.40")
    asked = {"token": token(), "task_id": "t1", "estimate": {"cost_usd": "0.70", "tokens": 10}}
    seen = (await host.post("/delegations/authorize", asked, key="of b")).refused(403)["budget"]
    assert (seen["limit"], seen["spent"], seen["reserved"]) == (Decimal("1.0"), Decimal("0.4"), 0)
    denied = (await host.post("/delegations/authorize", asked, key="of tenant")).refused(403)
    assert denied["budget"] == {**seen, "limit": None, "spent": None, "reserved": None}
    assert "0.4" not in denied["detail"]
    assert "1.0" not in denied["detail"]


async def test_an_alert_of_a_budget_is_a_breach_of_no_agent(host: Edge) -> None:
    await use(host, cost_usd="1.20")
    (row,) = (await host.get("/usage")).ok()["data"]
    assert "overrun" in row["flags"]
    (breach,) = (await host.get("/sla/breaches?type=budget")).ok()["data"]
    assert (breach["agent_id"], breach["budget"], breach["severity"]) == (None, "research/eu west", "critical")
    assert (breach["threshold"], breach["threshold_value"], breach["window"]) == ("1.0 USD", 1, "24h")
    assert (await host.get("/budgets/research%2Feu%20west")).ok()["open_breach"] == breach
    evidence = (await host.get(f"/breaches/{breach['id']}/evidence")).ok()["evidence"]
    assert (evidence["unit"], evidence["limit"], evidence["balance"]["spent_microusd"]) == ("usd", USD, 1_200_000)
    await host.new_key("of b", "reader", B)
    await host.new_key("of tenant", "reader", "*", tenant="default")
    for key in ("of b", "of tenant"):
        assert (await host.get("/sla/breaches", key=key)).ok()["count"] == 0
        assert (await host.get(f"/breaches/{breach['id']}/evidence", key=key)).refused(404)


@pytest.mark.parametrize("build", ["this", "older"])
async def test_what_a_huge_event_did_to_a_budget_can_be_proved_and_verified_elsewhere(
    host: Edge, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, build: str
) -> None:
    if build == "older":
        monkeypatch.setattr("asapd.store.tx.canonical_details", as_they_are)
    await use(host, metrics={"tokens_in": 2**53 - 1, "tokens_out": 10}, cost_usd=None)
    file = tmp_path / "log.ndjson"
    file.write_bytes((await host.get("/audit/export")).body)
    assert verify_file(file, None).is_good, verify_file(file, None).verdict
    (over,) = (await host.get("/audit/logs?event_type=budget.overrun")).ok()["data"]
    assert over["details"]["spent"] == (str(2**53 + 9) if build == "this" else 2**53 + 9)
    proof = tmp_path / "entry.tlog-proof"
    proof.write_bytes((await host.get(f"/audit/proof/inclusion?id={over['seq']}&format=tlog-proof")).body)
    assert verify_file(proof, bytes(IDENTITY.verify_key)).is_good
    (breach,) = (await host.get("/sla/breaches?type=budget")).ok()["data"]
    statement = tmp_path / "evidence.json"
    answer = await host.get(f"/breaches/{breach['id']}/evidence")
    assert answer.status == 200
    statement.write_bytes(answer.body)
    assert verify_file(statement, bytes(IDENTITY.verify_key)).is_good, verify_file(statement, None).verdict
    archive = tmp_path / "log.gz"
    with archive.open("wb") as raw, compressor(raw) as lines:
        lines.write(file.read_bytes())
    with archive.open("rb") as raw:
        assert [entry.seq for entry in read_archive(raw)][-1] >= over["seq"]
