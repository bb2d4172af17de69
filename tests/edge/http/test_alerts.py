"""Acknowledging, silencing, and looking after push targets, as a client sees it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import trio

from asapd.actors.dispatcher import Target
from asapd.core.pushing import Failed
from asapd.core.types import HOUR_US, SECOND_US
from asapd.store import silences
from asapd.store.breaches import Alert
from tests.edge.house import A, B, Edge


async def entries(edge: Edge, kind: str) -> list[Any]:
    found: list[Any] = (await edge.get(f"/audit/logs?event_type={kind}")).ok()["data"]
    return found


async def counted(edge: Edge, path: str, count: int) -> None:
    """Wait until a list is so long."""
    with trio.fail_after(5):
        while (await edge.get(path)).ok()["count"] != count:  # noqa: ASYNC110 -- what is waited for is in the store
            await trio.sleep(0.01)


async def test_a_breach_is_acknowledged_once_and_shows_by_whom(edge: Edge) -> None:
    await edge.breach()
    made = (await edge.post("/breaches/brc_1/ack", {"comment": "on it"}, key="operator")).ok(201)
    assert made["acknowledged"]["comment"] == "on it"
    assert made["breach"]["acknowledged"] == made["acknowledged"]
    again = (await edge.post("/breaches/brc_1/ack", {"comment": "me too"})).ok()
    assert again["acknowledged"] == made["acknowledged"]
    (row,) = (await edge.get("/sla/breaches")).ok()["data"]
    assert row["acknowledged"] == made["acknowledged"]
    (entry,) = await entries(edge, "breach.acknowledged")
    assert (entry["subject"], entry["details"]["comment"]) == ("brc_1", "on it")
    assert entry["actor"].startswith("key:")


async def test_only_what_is_open_and_seen_can_be_acknowledged(edge: Edge) -> None:
    await edge.breach()
    await edge.breach("resolved")
    assert (await edge.post("/breaches/brc_1/ack", {})).refused(409)["code"] == "breach_closed"
    assert (await edge.post("/breaches/none/ack", {})).refused(404)["code"] == "breach_not_found"
    await edge.new_key("operator-b", "operator", B)
    assert (await edge.post("/breaches/brc_1/ack", {}, key="operator-b")).refused(404)["code"] == "breach_not_found"
    assert (await edge.post("/breaches/brc_1/ack", {"why": 1})).refused(422)["errors"][0]["field"] == "why"


async def test_a_silence_is_made_listed_ended_and_audited(edge: Edge) -> None:
    body = {"agent": f"{A}*", "severity": "warning", "duration": "2h", "comment": "moving", "author": "anna"}
    first = await edge.post("/silences", body, headers={"Idempotency-Key": "k"}, key="operator")
    made = first.ok(201)
    assert (await edge.post("/silences", body, headers={"Idempotency-Key": "k"}, key="operator")).ok(201) == made
    assert made["expires_at"] == "2027-01-15T10:00:00.000000Z"
    assert (made["author"], made["state"], made["agent"]) == ("anna", "active", f"{A}*")
    until = {"type": "budget", "expires_at": "2027-01-15T09:00:00Z"}
    second = (await edge.post("/silences", until)).ok(201)
    assert second["author"].startswith("key:")
    listed = (await edge.get("/silences?limit=1", key="reader")).ok()
    assert [one["id"] for one in listed["data"]] == [made["id"]]
    rest = (await edge.get(f"/silences?cursor={listed['next_cursor']}")).ok()
    assert [one["id"] for one in rest["data"]] == [second["id"]]
    assert (await edge.delete(f"/silences/{made['id']}")).ok()["state"] == "expired"
    assert (await edge.delete(f"/silences/{made['id']}")).ok()["state"] == "expired"
    assert [one["id"] for one in (await edge.get("/silences")).ok()["data"]] == [second["id"]]
    assert (await edge.get("/silences?expired=true")).ok()["count"] == 2
    assert (await edge.delete("/silences/none")).refused(404)["code"] == "silence_not_found"
    assert [len(await entries(edge, kind)) for kind in ("silence.added", "silence.removed")] == [2, 1]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"duration": "1h"}, "agent"),
        ({"agent": "nobody", "duration": "1h"}, "agent"),
        ({"type": "dance", "duration": "1h"}, "type"),
        ({"severity": "low", "duration": "1h"}, "severity"),
        ({"severity": "warning"}, "duration"),
        ({"severity": "warning", "duration": "1h", "expires_at": 1}, "duration"),
        ({"severity": "warning", "duration": "soon"}, "duration"),
        ({"severity": "warning", "duration": "500d"}, "duration"),
        ({"severity": "warning", "expires_at": "2026-01-01T00:00:00Z"}, "expires_at"),
        ({"severity": "warning", "duration": "1h", "agents": "x"}, "agents"),
        ({"severity": "warning", "duration": "1h", "author": " \t"}, "author"),
    ],
)
async def test_a_wrong_silence_is_refused_by_its_field(edge: Edge, body: dict[str, Any], field: str) -> None:
    assert (await edge.post("/silences", body)).refused(422)["errors"][0]["field"] == field


async def test_a_key_silences_within_its_patterns_and_its_tenant(edge: Edge, monkeypatch: pytest.MonkeyPatch) -> None:
    await edge.new_key("operator-a", "operator", f"{A}*")
    await edge.new_key("operator-x", "operator", tenant="x")
    whole = (await edge.post("/silences", {"severity": "warning", "duration": "1h"})).ok(201)
    other = (await edge.post("/silences", {"agent": B, "duration": "1h"})).ok(201)
    for too_far in ({"severity": "warning"}, {"agent": B}, {"agent": "urn:asap:agent:*"}):
        body = {**too_far, "duration": "1h"}
        assert (await edge.post("/silences", body, key="operator-a")).refused(403)["code"] == "forbidden"
    own = (await edge.post("/silences", {"agent": f"{A}1", "duration": "1h"}, key="operator-a")).ok(201)
    seen = (await edge.get("/silences", key="operator-a")).ok()["data"]
    assert {one["id"] for one in seen} == {whole["id"], own["id"]}
    (await edge.delete(f"/silences/{whole['id']}", key="operator-a")).refused(403)
    (await edge.delete(f"/silences/{other['id']}", key="operator-a")).refused(404)
    (await edge.delete(f"/silences/{own['id']}", key="operator-a")).ok()
    # One of a tenant fits only what is of that tenant.
    of_x = (await edge.post("/silences", {"agent": "urn:asap:agent:c*", "duration": "1h"}, key="operator-x")).ok(201)
    (await edge.delete(f"/silences/{whole['id']}", key="operator-x")).refused(403)
    (await edge.delete(f"/silences/{whole['id']}")).ok()
    await edge.breach(number=1, agent="urn:asap:agent:c1", tenant="x")
    await edge.breach(number=2, agent="urn:asap:agent:c2")
    bodies = [row[0].decode() for row in edge.connection.execute("SELECT body FROM alert ORDER BY seq").fetchall()]
    assert [f'"silence":"{of_x["id"]}"' in body for body in bodies] == [True, False]
    monkeypatch.setattr(silences, "MOST_SILENCES", 2)
    full = await edge.post("/silences", {"agent": B, "duration": "1h"})
    assert full.refused(409)["code"] == "too_many_silences"


@pytest.mark.parametrize(
    ("pattern", "shown"),
    [("*", True), ("urn:asap:agent:*", True), (f"{A}1", True), (f"{A}1*", True), (B, False), (f"{A}2*", False)],
)
async def test_a_key_sees_what_may_hold_back_its_alerts(edge: Edge, pattern: str, shown: bool) -> None:
    """Its alerts are marked with the id of the silence that fits."""
    await edge.new_key("one", "reader", f"{A}1")
    made = (await edge.post("/silences", {"agent": pattern, "duration": "1h"})).ok(201)
    found = (await edge.get("/silences", key="one")).ok()["data"]
    assert [one["id"] for one in found] == ([made["id"]] if shown else [])


async def test_the_hosts_silences_tell_no_tenant_of_anothers_agents(edge: Edge) -> None:
    for tenant in ("x", "y"):
        await edge.new_key(f"operator-{tenant}", "operator", tenant=tenant)
        sent = {"id": f"urn:asap:agent:{tenant}-1", "health": "heartbeat", "tenant": tenant}
        (await edge.post("/agents", sent)).ok(201)
    patterns = ("y-1", "y-*", "y*", "x-*", "*", "free", "free*")
    made = {}
    for pattern in patterns:
        body = {"agent": f"urn:asap:agent:{pattern}", "duration": "1h", "comment": "secret"}
        made[pattern] = (await edge.post("/silences", body)).ok(201)["id"]
    seen = {one["id"] for one in (await edge.get("/silences", key="operator-x")).ok()["data"]}
    assert {pattern for pattern in patterns if made[pattern] in seen} == {"x-*", "*", "free", "free*"}
    for pattern in patterns:
        gone = await edge.delete(f"/silences/{made[pattern]}", key="operator-x")
        gone.refused(404 if made[pattern] not in seen else 403)
    seen_by_y = {one["id"] for one in (await edge.get("/silences", key="operator-y")).ok()["data"]}
    assert {pattern for pattern in patterns if made[pattern] not in seen_by_y} == {"x-*"}


async def test_a_silence_that_is_over_marks_nothing(edge: Edge) -> None:
    (await edge.post("/silences", {"agent": "*", "duration": "1h"})).ok(201)
    edge.clock.us += HOUR_US + SECOND_US
    assert (await edge.get("/silences")).ok()["data"] == []
    await edge.breach()
    (body,) = edge.connection.execute("SELECT body FROM alert").fetchall()
    assert b'"silence":null' in body[0]


async def test_targets_and_dead_letters_are_shown_and_delivered_again(edge: Edge) -> None:
    taken: list[int] = []
    answer: list[Failed | None] = [Failed("answered with status 500")]

    async def send(alerts: Sequence[Alert], now_us: int) -> Failed | None:
        await trio.lowlevel.checkpoint()
        if answer[0] is None:
            taken.extend(alert.seq for alert in alerts)
        return answer[0]

    every = ("opened", "escalated", "resolved")
    edge.dispatch.replace((Target("pager", "webhook", every, "warning", 0, send),))
    await counted(edge, "/alerts/targets", 1)
    await edge.breach()
    await counted(edge, "/alerts/dead-letters", 1)
    (letter,) = (await edge.get("/alerts/dead-letters?target=pager", key="reader")).ok()["data"]
    assert (letter["target"], letter["seq"], letter["alert"]["breach"]["id"]) == ("pager", 1, "brc_1")
    (target,) = (await edge.get("/alerts/targets", key="reader")).ok()["data"]
    assert (target["state"], target["dead_letters"], target["backlog"]) == ("failing", 1, 0)
    assert target["last_error"] == "answered with status 500"
    answer[0] = None
    asked = await edge.post(f"/alerts/dead-letters/{letter['id']}/redeliver", key="operator")
    assert asked.ok(202) == {"id": letter["id"], "redelivering": True}
    await counted(edge, "/alerts/dead-letters", 0)
    assert taken == [1]
    gone = await edge.post(f"/alerts/dead-letters/{letter['id']}/redeliver")
    assert gone.refused(404)["code"] == "dead_letter_not_found"
    (await edge.post(f"/alerts/dead-letters/{10**30}/redeliver")).refused(404)
    assert [len(await entries(edge, kind)) for kind in ("alert.undelivered", "alert.redelivered")] == [1, 1]
    await edge.new_key("reader-a", "reader", A)
    (await edge.get("/alerts/targets", key="reader-a")).refused(403)


async def test_targets_are_listed_in_pages(edge: Edge) -> None:
    async def send(alerts: Sequence[Alert], now_us: int) -> Failed | None:
        raise AssertionError

    edge.dispatch.replace(tuple(Target(name, "command", ("opened",), "warning", 0, send) for name in ("one", "two")))
    await counted(edge, "/alerts/targets", 2)
    first = (await edge.get("/alerts/targets?limit=1", key="reader")).ok()
    rest = (await edge.get(f"/alerts/targets?limit=5&cursor={first['next_cursor']}", key="reader")).ok()
    assert sorted(row["name"] for row in first["data"] + rest["data"]) == ["one", "two"]
    assert (first["count"], rest["next_cursor"]) == (1, None)
    assert (await edge.get("/alerts/targets?limit=0")).refused(400)["errors"][0]["field"] == "limit"
