"""The past, evidence and penalties by HTTP, and maintenance."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from asapd import config
from asapd.actors.messages import ReconfigureWatcher
from asapd.cli.verify_evidence import verify_evidence
from asapd.core.types import DAY_US, HOUR_US, MINUTE_US, SECOND_US, datetime_us, format_us
from asapd.edge.http.parameters import encode_cursor
from asapd.runtime.ask import ask
from asapd.store.units.agents import RecordProbe
from asapd.store.units.promises import DeclareMaintenance
from tests.edge.house import T0, A, B, C, Edge

SLA = {"availability": "99%", "max_error_rate": "5%"}


async def prepare(edge: Edge, *, every: int = 1, **more: Any) -> None:
    """Two agents; one worked for three hours, a task in each so many minutes, and was down in the second."""
    for agent in (A, C):
        assert (await edge.post("/agents", {"id": agent, "url": "http://127.0.0.1:1", "sla": SLA})).ok(201)
    await prepare_events(edge, every=every, **more)


async def prepare_events(edge: Edge, *, every: int = 1, **more: Any) -> None:
    events = [
        {
            "task_id": f"t{minute}",
            "agent": A,
            "consumer": B,
            "metrics": {"duration_ms": 100},
            "timestamp": format_us(T0 - minute * MINUTE_US),
            "outcome": "failed" if minute <= 60 and minute % 2 else "completed",
            "cost_usd": "0.01",
            **more,
        }
        for minute in range(1, 181, every)
    ]
    assert (await edge.post("/usage", events)).ok(201)
    for minute in range(180, 0, -1):
        up = not 60 < minute <= 120
        probe = RecordProbe(A, T0 - minute * MINUTE_US, up, None, None, None, None, 90 * SECOND_US, "healthy", T0, 0, 0)
        await edge.database.submit(probe)
    edge.committed.notify()
    await wait_all_tasks_blocked()


async def test_figures_of_the_past_come_by_minute_hour_or_day(edge: Edge) -> None:
    await prepare(edge)
    found = (await edge.get(f"/agents/{A}/sla/history?start={format_us(T0 - 3 * HOUR_US)}&end={format_us(T0)}")).ok()
    assert (found["resolution"], found["count"], found["next_cursor"]) == ("hour", 3, None)
    rows = found["data"]
    assert [row["period_start"] for row in rows] == [format_us(T0 - hours * HOUR_US) for hours in (3, 2, 1)]
    assert [row["uptime_percent"] for row in rows] == [100, 0, 100]
    assert [(row["tasks_completed"], row["tasks_failed"]) for row in rows] == [(60, 0), (60, 0), (30, 30)]
    assert [row["compliance_percent"] for row in rows] == [100, 50, 50]
    assert rows[0]["compliance"]["availability"]["met"] is True
    for resolution, count in (("minute", 60), ("hour", 24), ("day", 31)):
        assert (await edge.get(f"/agents/{A}/sla/history?resolution={resolution}&limit=1000")).ok()["count"] == count
    short = (await edge.get(f"/agents/{A}/sla/history?resolution=day&start={format_us(T0 - 150 * MINUTE_US)}")).ok()
    assert [row["tasks_completed"] for row in short["data"]] == [120]


async def test_a_history_is_paged_agent_by_agent_and_gives_each_period_once(edge: Edge) -> None:
    await prepare(edge)
    span = f"start={format_us(T0 - 3 * HOUR_US)}&resolution=hour"
    for limit in (1, 2, 3, 4, 6, 7):
        seen, cursor = [], ""
        while True:
            page = (await edge.get(f"/sla/history?{span}&limit={limit}{cursor}")).ok()
            assert page["count"] <= limit
            seen += [(row["agent_id"], row["period_start"]) for row in page["data"]]
            if page["next_cursor"] is None:
                break
            edge.clock.us += 1  # time goes on from page to page
            cursor = f"&cursor={page['next_cursor']}"
        edge.clock.us = T0
        assert seen == [(agent, format_us(T0 - hours * HOUR_US)) for agent in (A, C) for hours in (3, 2, 1)]
    # Without a start the first page says where it is.
    first = (await edge.get("/sla/history?limit=24")).ok()
    edge.clock.us += HOUR_US
    rest = (await edge.get(f"/sla/history?limit=24&cursor={first['next_cursor']}")).ok()
    edge.clock.us = T0
    assert (rest["start"], rest["end"], rest["count"]) == (first["start"], first["end"], 24)
    assert [row["period_start"] for row in rest["data"]] == [row["period_start"] for row in first["data"]]
    skipped = (await edge.get(f"/sla/history?{span}&limit=2&offset=2")).ok()
    assert [row["agent_id"] for row in skipped["data"]] == [A, C]
    behind = (await edge.get(f"/sla/history?{span}&limit=2&offset=2&cursor={skipped['next_cursor']}")).ok()
    assert [row["agent_id"] for row in behind["data"]] == [C, C]
    # Each page says how much there is in all, whichever it is itself.
    assert [(one["total"], one["offset"], one["limit"]) for one in (skipped, behind)] == [(6, 2, 2)] * 2
    assert (first["total"], rest["total"]) == (48, 48)
    assert (await edge.get(f"/sla/history?{span}&agent_id={C}")).ok()["count"] == 3
    await edge.new_key("nobody", "reader", B)
    assert (await edge.get(f"/sla/history?{span}", key="nobody")).ok()["count"] == 0
    assert (await edge.get(f"/agents/{B}/sla/breaches")).refused(404)["code"] == "agent_not_found"
    assert (await edge.get(f"/agents/{A}/sla/history", key="nobody")).refused(404)["code"] == "agent_not_found"


async def test_clients_of_the_reference_page_through_all_of_a_history(edge: Edge) -> None:
    await prepare(edge)
    span = f"start={format_us(T0 - 150 * MINUTE_US)}"
    seen: list[tuple[str, str]] = []
    while True:
        answer = (await edge.get(f"/asap/sla/history?{span}&limit=4&offset={len(seen)}")).ok()
        assert list(answer) == ["data", "count", "total", "offset", "limit"]
        assert (answer["total"], answer["offset"], answer["limit"]) == (6, len(seen), 4)
        assert answer["count"] == len(answer["data"])
        if not answer["data"]:
            break
        seen += [(row["agent_id"], row["period_start"]) for row in answer["data"]]
    starts = [format_us(T0 - minutes * MINUTE_US) for minutes in (150, 120, 60)]
    assert seen == [(agent, start) for agent in (A, C) for start in starts]
    assert (await edge.get(f"/asap/sla/history?agent_id={C}")).ok()["total"] == 24
    assert (await edge.get("/asap/sla/history?cursor=x")).refused(400)["errors"][0]["field"] == "cursor"


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("resolution=week", "resolution"),
        ("start=2030-01-01T00:00:00Z", "start"),
        ("start=2020-01-02T00:00:00Z&end=2020-01-01T00:00:00Z", "start"),
        ("cursor=x", "cursor"),
        ("window=1h", "window"),
        ("end=0", "start"),
        ("end=0&start=0", "start"),
        *((f"cursor={encode_cursor((A, *times))}", "cursor") for times in ((0, 2**62, 2**62), (9, 1, 5), (1, 2, 5))),
    ],
)
async def test_a_wrong_parameter_is_named(edge: Edge, query: str, field: str) -> None:
    assert (await edge.get(f"/sla/history?{query}")).refused(400)["errors"][0]["field"] == field


async def test_a_report_can_be_explained_in_full(edge: Edge) -> None:
    await prepare(edge)
    plain = (await edge.get(f"/agents/{A}/sla?window=1h")).ok()
    assert "explain" not in plain
    assert plain["reputation"]["provisional"] is False
    assert plain["error_budget"]["error_rate"]["window"] == "30d"
    assert plain["error_budget"]["error_rate"]["exhausted_at"] is not None
    assert {(alert["term"], alert["long_window"]) for alert in plain["burn_alerts"]} >= {("availability", "1h")}
    explained = (await edge.get(f"/agents/{A}/sla?window=1h&explain=true")).ok()
    assert set(explained["explain"]) >= {"uptime_percent", "sla_score", "reputation", "burn_rates"}
    assert all("explain" in row for row in (await edge.get("/sla?explain=true")).ok()["data"])


async def test_evidence_is_a_signed_statement_that_can_be_verified(edge: Edge) -> None:
    await prepare(edge)
    rows: list[Any] = []
    with trio.fail_after(5):
        while not rows:
            await trio.sleep(0.01)
            rows = (await edge.get(f"/agents/{A}/sla/breaches")).ok()["data"]
    for row in rows:
        answer = await edge.get(f"/breaches/{row['id']}/evidence")
        assert answer.ok()["breach"]["id"] == row["id"]
        assert verify_evidence(answer.body, None).faults == []
    assert (await edge.get("/breaches/brc_0/evidence")).refused(404)["code"] == "breach_not_found"


async def give_back(edge: Edge, *tiers: tuple[str, str]) -> None:
    """Reload other credit tiers."""
    sla = config.Sla.model_validate({"credit": [{"below": below, "credit": share} for below, share in tiers]})
    edge.with_settings(sla=sla)
    await ask(edge.mailboxes["watcher"][0], lambda to: ReconfigureWatcher(sla, to), deadline_s=5)


async def test_a_penalty_is_the_highest_credit_that_was_missed(edge: Edge) -> None:
    await prepare(edge)
    route = f"/agents/{A}/sla/penalty"
    bare = (await edge.get(route)).ok()
    assert (bare["period"], bare["complete"], bare["credit_usd"]) == ("2027-01", False, None)
    await give_back(edge, ("99.9%", "10%"), ("99%", "33.3333%"))
    found = (await edge.get(f"{route}?period=2027-01")).ok()
    assert found["cost_usd"] == Decimal("1.8")
    # Two hours of three, and what the last probe still holds.
    assert found["availability_percent"] == pytest.approx(Decimal("66.67"), abs=Decimal("0.3"))
    assert (found["credit_percent"], found["credit_usd"]) == (Decimal("33.3333"), Decimal("0.599999"))
    assert found["explain"]["inputs"]["below_percent"] == "99.0%"
    unknown = (await edge.get(f"{route}?period=2026-12")).ok()
    assert (unknown["complete"], unknown["availability_percent"], unknown["credit_usd"]) == (True, None, None)
    for period in ("2027-02", "2027", "2027-13", "0000-01"):
        assert (await edge.get(f"{route}?period={period}")).refused(400)["errors"][0]["field"] == "period"
    assert (await edge.get("/agents/urn:asap:agent:none/sla/penalty")).refused(404)


async def test_a_month_that_is_over_goes_by_the_tiers_of_then(edge: Edge) -> None:
    await prepare(edge)
    edge.clock.us += SECOND_US
    await give_back(edge, ("99%", "10%"))
    promised_us = edge.clock.us
    edge.clock.us = datetime_us(datetime(2027, 2, 1, tzinfo=UTC))
    await give_back(edge, ("99%", "10.0%"))  # the same, written otherwise
    await give_back(edge, ("99%", "50%"), ("90%", "100%"))
    january = (await edge.get(f"/agents/{A}/sla/penalty?period=2027-01")).ok()
    assert (january["complete"], january["credit_percent"], january["credit_usd"]) == (True, 10, Decimal("0.18"))
    assert (january["tiers"], january["tiers_since"]) == (
        [{"below": "99.0%", "credit": "10.0%"}],
        format_us(promised_us),
    )
    now = (await edge.get(f"/agents/{A}/sla/penalty")).ok()
    assert (now["period"], len(now["tiers"]), now["tiers_since"]) == ("2027-02", 2, format_us(edge.clock.us))
    # Nothing was kept of December: what was kept first is taken for it, and that is said.
    december = (await edge.get(f"/agents/{A}/sla/penalty?period=2026-12")).ok()
    assert (december["tiers"], december["tiers_since"]) == ([], None)
    entries = (await edge.get("/audit/logs?event_type=sla.credits")).ok()["data"]
    assert [entry["details"]["tiers"] for entry in entries] == [
        [{"below": "99.0%", "credit": "10.0%"}],
        [{"below": "99.0%", "credit": "50.0%"}, {"below": "90.0%", "credit": "100.0%"}],
    ]


async def test_who_had_an_agent_may_ask_for_the_time_that_was_its_own(edge: Edge) -> None:
    for tenant in ("first", "second", "third"):
        await edge.new_key(tenant, "reader", tenant=tenant)
    await edge.new_key("elsewhere", "reader", C, tenant="first")
    agent = {"id": A, "url": "http://127.0.0.1:1", "sla": SLA}
    assert (await edge.post("/agents", {**agent, "tenant": "first"})).ok(201)
    await prepare_events(edge)
    await edge.database.submit(DeclareMaintenance(A, T0 - 30 * MINUTE_US, T0 - 20 * MINUTE_US, "ours", "olga", T0))
    await give_back(edge, ("99.9%", "10%"))
    span = f"start={format_us(T0 - 3 * HOUR_US)}&end={format_us(T0)}"

    async def asked(path: str, key: str, status: int = 200) -> Any:
        reply = await edge.get(f"/agents/{A}/sla/{path}", key=key)
        return reply.ok() if status == 200 else reply.refused(status)

    before = await asked(f"history?{span}", "first")
    bill = await asked("penalty", "first")
    assert (bill["cost_usd"], bill["credit_usd"], bill["complete"]) == (Decimal("1.8"), Decimal("0.18"), False)
    assert before["data"][-1]["excluded_seconds"] == 600
    edge.clock.us += 10 * SECOND_US
    until_us = edge.clock.us
    assert (await edge.post("/agents", {**agent, "tenant": "second"})).ok()
    edge.clock.us += HOUR_US
    assert await asked(f"history?{span}", "first") == before
    assert (await edge.get(f"/sla/history?{span}&agent_id={A}", key="first")).ok() == before
    assert {row["breach_type"] for row in (await asked("breaches", "first"))["data"]} == {"error_rate"}
    # What it owes does not change any more; the minutes since are not the first one's to be given back for.
    owed = await asked("penalty", "first")
    assert (owed["cost_usd"], owed["credit_usd"], owed["complete"]) == (Decimal("1.8"), Decimal("0.18"), True)
    assert owed["up_seconds"] + owed["down_seconds"] + owed["excluded_seconds"] <= 3 * 3600 + 10
    assert owed["down_seconds"] == bill["down_seconds"]
    after = await asked(f"history?start={format_us(until_us)}", "first")
    assert {row["unknown_seconds"] for row in after["data"]} == {Decimal(3590), Decimal(10)}
    nothing = await asked("penalty", "second")
    assert (nothing["cost_usd"], nothing["availability_percent"]) == (0, None)
    assert {row["excluded_seconds"] for row in (await asked(f"history?{span}", "second"))["data"]} == {0}
    for stranger in ("third", "elsewhere"):
        for path in ("history", "penalty", "breaches"):
            await asked(path, stranger, 404)
    # Who removed it may ask for it as well, and the host; the host is told of whoever had it last.
    assert (await edge.delete(f"/agents/{A}")).ok()
    for key in ("second", "reader"):
        assert {row["tasks_failed"] for row in (await asked(f"history?{span}", key))["data"]} == {0}
    assert await asked(f"history?{span}", "first") == before
    # Had again, it begins anew for that one as well.
    assert (await edge.post("/agents", {**agent, "tenant": "first"})).ok(201)
    assert {row["tasks_failed"] for row in (await asked(f"history?{span}", "first"))["data"]} == {0}


async def test_a_cost_that_nobody_knows_has_no_credit(edge: Edge) -> None:
    await prepare(edge, cost_usd=None)
    await give_back(edge, ("99%", "10%"))
    found = (await edge.get(f"/agents/{A}/sla/penalty")).ok()
    assert (found["unpriced_events"], found["cost_usd"], found["credit_usd"]) == (180, None, None)
    assert found["credit_percent"] == 10


# --- maintenance


async def test_maintenance_is_declared_listed_ended_and_audited(edge: Edge) -> None:
    await prepare(edge)
    sent = {"agent_id": A, "start": format_us(T0 - 2 * HOUR_US), "duration": "90m", "reason": "new disk"}
    made = (await edge.post("/maintenance", sent, key="operator", headers={"Idempotency-Key": "k"})).ok(201)
    again = (await edge.post("/maintenance", sent, key="operator", headers={"Idempotency-Key": "k"})).ok(201)
    assert again == made
    assert (made["state"], made["agent_id"], made["end"]) == ("over", A, format_us(T0 - 30 * MINUTE_US))
    metrics = (await edge.get(f"/agents/{A}/sla?window=24h")).ok()["metrics"]
    assert (metrics["excluded_seconds"], metrics["down_seconds"]) == (5400, 0)
    assert metrics["tasks_completed"] + metrics["tasks_failed"] == 90
    ahead = {"start": format_us(T0 + HOUR_US), "end": format_us(T0 + DAY_US), "reason": "move"}
    planned = (await edge.post("/maintenance", ahead)).ok(201)
    assert (planned["state"], planned["agent_id"]) == ("planned", None)
    running = (await edge.post("/maintenance", {"agent": C, "duration": "1h", "reason": "x"})).ok(201)
    listed = (await edge.get("/maintenance?limit=2")).ok()
    rest = (await edge.get(f"/maintenance?limit=2&cursor={listed['next_cursor']}")).ok()
    assert {row["id"] for row in listed["data"] + rest["data"]} == {made["id"], planned["id"], running["id"]}
    assert [row["id"] for row in (await edge.get("/maintenance?state=running")).ok()["data"]] == [running["id"]]
    assert (await edge.get(f"/maintenance?agent_id={A}")).ok()["count"] == 2
    log_name = planned["declared_by"]
    for one in (planned, running):
        ended = (await edge.delete(f"/maintenance/{one['id']}")).ok()
        assert (ended["state"], ended["ended_by"]) == ("over", log_name)
    assert (await edge.delete(f"/maintenance/{made['id']}")).refused(409)["code"] == "maintenance_over"
    assert (await edge.delete("/maintenance/mnt_0")).refused(404)["code"] == "maintenance_not_found"
    log = (await edge.get("/audit/logs?event_type=maintenance.declared")).ok()["data"]
    assert {entry["subject"] for entry in log} == {A, C, "*"}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"reason": ""}, "reason"),
        ({"duration": None}, "end"),
        ({"end": "2027-01-16T00:00:00Z"}, "end"),
        ({"duration": "soon"}, "duration"),
        ({"duration": "0s"}, "end"),
        ({"duration": "400d"}, "end"),
        ({"duration": None, "end": "tomorrow"}, "end"),
        ({"start": "1960-01-01T00:00:00Z"}, "start"),
        ({"agent_id": "nobody"}, "agent_id"),
        ({"agent": C}, "agent"),
        ({"agent_id": ""}, "agent_id"),
        ({"agent": ""}, "agent"),
        ({"agent_id": None, "agent": ""}, "agent_id"),
        ({"start": "9999-12-31T23:30:00Z"}, "end"),
        ({"start": "2037-01-25T00:00:00Z"}, "end"),
        ({"start": "2026-01-01T00:00:00Z"}, "end"),
        ({"for": "1h"}, "for"),
    ],
)
async def test_maintenance_that_cannot_be_is_refused_by_field(edge: Edge, change: dict[str, Any], field: str) -> None:
    await prepare(edge)
    sent = {"agent_id": A, "duration": "1h", "reason": "x", **change}
    given = {name: value for name, value in sent.items() if value is not None}
    assert (await edge.post("/maintenance", given)).refused(422)["errors"][0]["field"] == field


@pytest.mark.parametrize("name", ["agent_id", "agent"])
async def test_maintenance_of_null_is_not_that_of_everybody(edge: Edge, name: str) -> None:
    await prepare(edge)
    refused = (await edge.post("/maintenance", {name: None, "duration": "1h", "reason": "x"})).refused(422)
    assert refused["errors"][0]["field"] == name
    assert "leave it out" in refused["detail"]
    assert (await edge.get("/maintenance")).ok()["count"] == 0


async def test_a_window_that_no_calendar_holds_does_not_break_the_list(edge: Edge) -> None:
    await prepare(edge)
    end_us = datetime_us(datetime.max.replace(tzinfo=UTC))
    await edge.database.submit(DeclareMaintenance(A, end_us - HOUR_US, end_us + HOUR_US, "x", "key:root", T0))
    (row,) = (await edge.get("/maintenance")).ok()["data"]
    assert row["end"] == "9999-12-31T23:59:59.999999Z"
    assert (await edge.delete(f"/maintenance/{row['id']}")).ok()["state"] == "over"


async def test_a_key_of_a_tenant_lists_the_maintenance_of_its_agents_and_of_all(edge: Edge) -> None:
    await prepare(edge)
    other = "urn:asap:agent:theirs"
    assert (await edge.post("/agents", {"id": other, "url": "http://127.0.0.1:1", "tenant": "ta"})).ok(201)
    await edge.new_key("ta", "operator", tenant="ta")
    for agent in (A, other, None):
        sent = {"duration": "1h", "reason": "x"} | ({} if agent is None else {"agent_id": agent})
        assert (await edge.post("/maintenance", sent)).ok(201)
    rows = (await edge.get("/maintenance", key="ta")).ok()["data"]
    assert {row["agent_id"] for row in rows} == {None, other}


async def test_maintenance_is_for_those_who_may_act_for_the_agent(edge: Edge) -> None:
    await prepare(edge)
    await edge.new_key("mine", "operator", A)
    sent = {"duration": "1h", "reason": "x"}
    assert (await edge.post("/maintenance", sent, key="mine")).refused(403)
    assert (await edge.post("/maintenance", {**sent, "agent_id": C}, key="mine")).refused(404)
    assert (await edge.post("/maintenance", {**sent, "agent_id": B})).refused(404)["code"] == "agent_not_found"
    assert (await edge.post("/maintenance", {**sent, "agent_id": A}, key="mine")).ok(201)
    theirs = (await edge.post("/maintenance", {**sent, "agent_id": C})).ok(201)
    everybody = (await edge.post("/maintenance", sent)).ok(201)
    assert (await edge.delete(f"/maintenance/{theirs['id']}", key="mine")).refused(404)
    assert (await edge.delete(f"/maintenance/{everybody['id']}", key="mine")).refused(403)
    seen = (await edge.get("/maintenance", key="mine")).ok()["data"]
    assert theirs["id"] not in {row["id"] for row in seen}
    assert everybody["id"] in {row["id"] for row in seen}
