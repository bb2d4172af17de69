"""Promises by HTTP: figures, verdicts, breaches and their evidence."""

from __future__ import annotations

from typing import Any

import pytest
from trio.testing import wait_all_tasks_blocked

from asapd import config
from asapd.core.types import HOUR_US
from tests.edge.house import NOW, A, B, C, Edge

SLA = {"availability": "99%", "max_latency_p95_ms": 500, "max_error_rate": "5%"}


async def prepare(edge: Edge) -> None:
    for agent in (A, C):
        sent: dict[str, Any] = {"id": agent, "url": "http://127.0.0.1:1"}
        if agent == A:
            sent["sla"] = SLA
        assert (await edge.post("/agents", sent)).ok(201)
    events = [
        {
            "task_id": f"t{number}",
            "agent": A,
            "consumer": B,
            "metrics": {"duration_ms": 100},
            "timestamp": NOW,
            "outcome": "failed" if number == 0 else "completed",
        }
        for number in range(4)
    ]
    assert (await edge.post("/usage", events)).ok(201)
    edge.committed.notify()
    await wait_all_tasks_blocked()


async def test_the_report_of_an_agent_has_figures_promise_and_verdicts(edge: Edge) -> None:
    await prepare(edge)
    report = (await edge.get(f"/agents/{A}/sla?window=1h")).ok()
    assert report["window"] == "1h"
    assert (report["metrics"]["tasks_completed"], report["metrics"]["tasks_failed"]) == (3, 1)
    assert report["metrics"]["uptime_percent"] is None
    assert report["sla"]["max_latency_p95_ms"] == 500
    assert report["sla_source"] == "config"
    assert report["compliance"]["error_rate"]["met"] is False
    assert report["compliance"]["latency"]["met"] is True
    assert report["compliance"]["availability"]["actual_value"] is None
    assert report["open_breaches"] == []
    bare = (await edge.get(f"/agents/{C}/sla")).ok()
    assert (bare["sla"], bare["compliance"], bare["window"]) == (None, {}, "24h")


async def test_the_report_over_all_agents_is_paged(edge: Edge) -> None:
    await prepare(edge)
    first = (await edge.get("/sla?limit=1")).ok()
    assert [row["agent_id"] for row in first["data"]] == [A]
    rest = (await edge.get(f"/sla?limit=1&cursor={first['next_cursor']}")).ok()
    assert [row["agent_id"] for row in rest["data"]] == [C]
    assert rest["next_cursor"] is None
    assert (await edge.get(f"/sla?agent_id={A}")).ok()["count"] == 1
    await edge.new_key("nobody", "reader", B)
    assert (await edge.get("/sla", key="nobody")).ok()["count"] == 0


async def test_an_agent_that_is_not_there_or_not_seen_is_404(edge: Edge) -> None:
    await prepare(edge)
    assert (await edge.get("/agents/urn:asap:agent:none/sla")).refused(404)["code"] == "agent_not_found"
    await edge.new_key("nobody", "reader", B)
    assert (await edge.get(f"/agents/{A}/sla", key="nobody")).refused(404)["code"] == "agent_not_found"
    assert (await edge.get("/sla", key="ingest")).refused(403)


async def test_a_window_must_be_a_configured_one(edge: Edge) -> None:
    await prepare(edge)
    assert (await edge.get("/sla?window=2h")).refused(400)["errors"][0]["field"] == "window"
    edge.with_settings(sla=config.Sla(windows=["1h"]))
    assert (await edge.get("/sla")).ok()["window"] == "1h"
    edge.with_settings(sla=config.Sla(windows=["1h"], breach_window="2h"))
    # The watcher still goes by the settings that it was started with.
    assert edge.services.settings().sla.windows_us == (HOUR_US,)
    assert (await edge.get("/sla?window=2h")).refused(422)["errors"][0]["field"] == "window"
    assert (await edge.get(f"/agents/{A}/sla?window=2h")).refused(422)["code"] == "invalid"


async def test_breaches_are_filtered_and_paged(edge: Edge) -> None:
    await prepare(edge)
    await edge.breach(number=1)
    edge.clock.us += 1_000_000
    await edge.breach(number=2, severity="critical", kind="error_rate")
    await edge.breach("resolved", number=2, severity="critical", kind="error_rate")
    await edge.breach(number=3, agent=C)

    async def ids(query: str, path: str = "/sla/breaches", **options: Any) -> list[str]:
        return [row["id"] for row in (await edge.get(f"{path}?{query}", **options)).ok()["data"]]

    assert set(await ids("")) == {"brc_1", "brc_2", "brc_3"}
    assert await ids("severity=critical") == ["brc_2"]
    assert await ids("state=resolved") == ["brc_2"]
    assert await ids("type=availability") == []
    assert set(await ids("type=latency&state=open")) == {"brc_1", "brc_3"}
    assert await ids(f"agent_id={C}") == ["brc_3"]
    assert await ids("", f"/agents/{C}/sla/breaches") == ["brc_3"]
    assert await ids(f"end={NOW.replace('00Z', '01Z')}") == ["brc_1"]
    first = (await edge.get("/sla/breaches?limit=2")).ok()
    assert await ids(f"limit=2&cursor={first['next_cursor']}") == ["brc_1"]
    await edge.new_key("reader-c", "reader", C)
    assert await ids("", key="reader-c") == ["brc_3"]
    report = (await edge.get(f"/agents/{A}/sla")).ok()
    assert [row["id"] for row in report["open_breaches"]] == ["brc_1"]


async def test_the_evidence_of_a_breach_is_shown_to_who_may_see_it(edge: Edge) -> None:
    await edge.breach(number=1, tenant="one")
    shown = (await edge.get("/breaches/brc_1/evidence")).ok()
    assert shown["evidence"] == {"samples": 20}
    assert (shown["breach"]["id"], shown["breach"]["seq"]) == ("brc_1", 1)
    assert (await edge.get("/breaches/brc_9/evidence")).refused(404)["code"] == "breach_not_found"
    await edge.new_key("nobody", "reader", B)
    await edge.new_key("other", "reader", tenant="two")
    for key in ("nobody", "other"):
        assert (await edge.get("/breaches/brc_1/evidence", key=key)).refused(404)["code"] == "breach_not_found"


@pytest.mark.parametrize("query", ["severity=mild", "type=weather", "state=maybe"])
async def test_a_word_nobody_knows_is_refused(edge: Edge, query: str) -> None:
    assert (await edge.get(f"/sla/breaches?{query}")).refused(400)["code"] == "bad_parameter"
