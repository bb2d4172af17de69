"""Many breaches at once: put together, and acknowledged together."""

from __future__ import annotations

from typing import Any

import pytest

from tests.edge.house import A, B, Edge


async def prepare(edge: Edge) -> None:
    await edge.breach(number=1, agent=f"{A}1")
    await edge.breach(number=2, agent=f"{A}2", severity="critical")
    await edge.breach(number=3, agent=B)
    await edge.breach("resolved", number=3, agent=B)


async def groups(edge: Edge, query: str, key: str = "reader") -> list[tuple[Any, ...]]:
    found = (await edge.get(f"/breaches/groups?{query}", key=key)).ok()
    names = ("agent_id", "breach_type", "severity", "count", "open", "critical", "unacknowledged")
    return [tuple(row[name] for name in names if name in row) for row in found["data"]]


async def test_breaches_are_put_together_with_most_open_first(edge: Edge) -> None:
    await prepare(edge)
    assert await groups(edge, "") == [(f"{A}1", 1, 1, 0, 1), (f"{A}2", 1, 1, 1, 1), (B, 1, 0, 0, 0)]
    assert await groups(edge, "group_by=type") == [("latency", 3, 2, 1, 2)]
    assert await groups(edge, "group_by=type,severity&state=open") == [
        ("latency", "critical", 1, 1, 1, 1),
        ("latency", "warning", 1, 1, 0, 1),
    ]
    assert await groups(edge, f"agent_id={B}") == [(B, 1, 0, 0, 0)]
    first = (await edge.get("/breaches/groups?limit=2", key="reader")).ok()
    rest = (await edge.get(f"/breaches/groups?limit=2&cursor={first['next_cursor']}", key="reader")).ok()
    assert [row["agent_id"] for row in (*first["data"], *rest["data"])] == [f"{A}1", f"{A}2", B]
    assert (first["data"][0]["seq"], rest["next_cursor"]) == (1, None)
    assert first["data"][0]["first_detected_at"] == first["data"][0]["last_detected_at"]


async def test_groups_hold_what_a_caller_may_see(edge: Edge) -> None:
    await prepare(edge)
    await edge.new_key("reader-b", "reader", B)
    await edge.new_key("stranger", "reader", tenant="x")
    assert await groups(edge, "group_by=severity", "reader-b") == [("warning", 1, 0, 0, 0)]
    assert await groups(edge, "", "stranger") == []


async def test_all_that_fit_are_acknowledged_once(edge: Edge) -> None:
    await prepare(edge)
    await edge.new_key("operator-b", "operator", B)
    assert (await edge.post("/breaches/ack", {"type": "latency"}, key="operator-b")).ok()["count"] == 0
    done = (await edge.post("/breaches/ack", {"agent": f"{A}*", "severity": "critical", "comment": "on it"})).ok()
    assert done["count"] == 1
    (row,) = (await edge.get("/sla/breaches?severity=critical")).ok()["data"]
    assert (done["acknowledged"], row["acknowledged"]["comment"]) == ([row["id"]], "on it")
    assert await groups(edge, "group_by=type") == [("latency", 3, 2, 1, 1)]
    assert (await edge.post("/breaches/ack", {"type": "latency"})).ok()["count"] == 1
    assert (await edge.post("/breaches/ack", {"agent": "*"})).ok() == {"acknowledged": [], "count": 0}


async def test_what_is_gone_meanwhile_does_not_end_it(edge: Edge) -> None:
    await prepare(edge)
    for breach in ("breach", "breach_ack"):
        edge.connection.execute(f"DROP TRIGGER IF EXISTS {breach}_kept")
    edge.connection.execute(
        "CREATE TEMP TRIGGER gone AFTER INSERT ON breach_ack BEGIN DELETE FROM breach WHERE id <> new.breach; END"
    )
    done = (await edge.post("/breaches/ack", {"agent": f"{A}*"})).ok()
    assert done["count"] == 1


async def test_how_many_were_acknowledged_before_it_failed_is_told(edge: Edge) -> None:
    for number in range(40):
        await edge.breach(number=number, agent=f"{A}{number}")
    (pages,) = next(edge.connection.execute("PRAGMA page_count"))
    edge.connection.execute(f"PRAGMA max_page_count = {pages + 5}")
    refused = (await edge.post("/breaches/ack", {"agent": "*", "comment": "x" * 1000})).refused(503)
    (count,) = next(edge.connection.execute("SELECT count(*) FROM breach_ack"))
    assert 0 < count < 40
    assert refused["code"] == "storage_full"
    assert refused["detail"].startswith(f"{count} of the breaches were acknowledged, and then: nothing was written")
    edge.connection.execute(f"PRAGMA max_page_count = {pages + 5000}")
    assert (await edge.post("/breaches/ack", {"agent": "*"})).ok()["count"] == 40 - count


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "agent"),
        ({"comment": "x"}, "agent"),
        ({"agent": "nobody"}, "agent"),
        ({"type": "dance"}, "type"),
        ({"severity": "low"}, "severity"),
        ({"severity": "warning", "agents": "x"}, "agents"),
    ],
)
async def test_what_says_nothing_of_which_acknowledges_nothing(edge: Edge, body: dict[str, Any], field: str) -> None:
    assert (await edge.post("/breaches/ack", body)).refused(422)["errors"][0]["field"] == field


async def test_who_may_not_is_refused_and_a_wrong_group_is_named(edge: Edge) -> None:
    (await edge.post("/breaches/ack", {"agent": "*"}, key="reader")).refused(403)
    (await edge.get("/breaches/groups", key="ingest")).refused(403)
    for query, field in (("group_by=agent,x", "group_by"), ("state=old", "state"), ("nonsense=1", "nonsense")):
        refused = (await edge.get(f"/breaches/groups?{query}", key="reader")).refused(400)
        assert refused["errors"][0]["field"] == field
