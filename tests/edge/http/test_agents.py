"""The directory by HTTP: adding, finding, removing, and what is known of each agent."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest
from nacl.signing import SigningKey
from trio.testing import wait_all_tasks_blocked

from asapd.core.errors import Refusal
from asapd.core.types import SECOND_US
from asapd.store.units import AgentRecord, RecordManifest, RecordProbe, SyncAgents
from asapd.wire.keys import public_base64
from tests.edge.house import NOW, T0, A, B, C, Edge

PUBLIC = public_base64(bytes(SigningKey(b"k" * 32).verify_key))
SLA = {"availability": "99.0%", "max_latency_p95_ms": 500, "max_error_rate": "5.0%", "support_hours": "24/7"}


async def add(edge: Edge, agent: str = A, **fields: Any) -> Any:
    return await edge.post("/agents", {"id": agent, "url": "http://127.0.0.1:1", **fields})


async def probe(edge: Edge, agent: str, *, up: bool, ago_s: int = 0, transition_from: str | None = None) -> None:
    unit = RecordProbe(
        agent,
        T0 - ago_s * SECOND_US,
        up,
        "healthy" if up else None,
        1500 if up else None,
        None if up else "timeout",
        None,
        30 * SECOND_US,
        "healthy" if up else "unhealthy",
        T0 - ago_s * SECOND_US,
        1,
        0,
        transition_from,
    )
    assert not isinstance(await edge.database.submit(unit), Refusal)


async def report(edge: Edge, agent: str, latency_ms: int, outcome: str = "completed") -> None:
    event = {
        "task_id": "t",
        "agent": agent,
        "consumer": B,
        "metrics": {"duration_ms": latency_ms},
        "timestamp": NOW,
        "outcome": outcome,
    }
    assert (await edge.post("/usage", event)).ok(201)


async def test_an_agent_that_may_not_be_probed_says_why(edge: Edge) -> None:
    await add(edge)
    assert (await edge.get(f"/agents/{A}")).ok()["not_probed"] is None
    edge.services.unprobed.note(A, "not_allowed", "a is at 10.0.0.1, outside the allowed networks", T0)
    edge.services.unprobed.note(A, "not_allowed", "a is at 10.0.0.1, outside the allowed networks", T0 + SECOND_US)
    why = {
        "reason": "not_allowed",
        "detail": "a is at 10.0.0.1, outside the allowed networks",
        "since": "2027-01-15T08:00:00.000000Z",
    }
    (row,) = (await edge.get("/agents")).ok()["data"]
    assert (row["state"], row["not_probed"]) == ("unknown", why)
    health = (await edge.get(f"/agents/{A}/health")).ok()
    assert (health["state"], health["not_probed"]) == ("unknown", why)


async def test_an_agent_is_added_changed_shown_and_removed(edge: Edge) -> None:
    row = (await add(edge, sla=SLA, public_key=PUBLIC)).ok(201)
    assert (row["id"], row["state"], row["origin"], row["public_key"]) == (A, "unknown", "api", PUBLIC)
    assert row["sla"] == SLA
    assert row["sla_source"] == "config"
    assert row["last_probe"] is None
    changed = (await add(edge, url="http://127.0.0.1:2")).ok(200)
    assert (changed["url"], changed["sla"]) == ("http://127.0.0.1:2", None)
    assert (await edge.get(f"/agents/{A}")).ok() == changed
    assert (await edge.delete(f"/agents/{A}")).ok() == {"removed": [A]}
    assert (await edge.get(f"/agents/{A}")).refused(404)["code"] == "agent_not_found"
    assert (await edge.delete(f"/agents/{A}")).refused(404)["code"] == "agent_not_found"


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"id": "a"}, "id"),
        ({"url": "ftp://x"}, "url"),
        ({"url": "http://"}, "url"),
        ({"url": "http://a:99999"}, "url"),
        ({"url": "http://a b"}, "url"),
        ({"url": "http://a:0"}, "url"),
        ({"public_key": "x"}, "public_key"),
        ({"sla": {"availability": "101%"}}, "sla"),
        ({"tiers": "gold"}, "tiers"),
    ],
)
async def test_a_wrong_agent_names_its_field(edge: Edge, changes: dict[str, Any], field: str) -> None:
    sent = {"id": A, "url": "http://127.0.0.1:1", **changes}
    assert (await edge.post("/agents", sent)).refused(422)["errors"][0]["field"] == field


async def test_a_configured_agent_stays(edge: Edge) -> None:
    unit = SyncAgents([AgentRecord(C, "http://127.0.0.1:1", "default")], "config", T0)
    assert not isinstance(await edge.database.submit(unit), Refusal)
    assert (await edge.delete(f"/agents/{C}")).refused(409)["code"] == "agent_configured"
    assert (await add(edge, C)).refused(409)["code"] == "agent_configured"


async def test_the_directory_is_for_who_may_touch_it(edge: Edge) -> None:
    await add(edge)
    await edge.new_key("own", "operator", B)
    sent = {"id": A, "url": "http://127.0.0.1:1"}
    assert (await edge.post("/agents", sent, key="own")).refused(403)["code"] == "forbidden"
    assert (await edge.post("/agents", sent, key="reader")).refused(403)["code"] == "forbidden"
    assert (await edge.delete(f"/agents/{A}", key="own")).refused(404)["code"] == "agent_not_found"
    assert (await edge.get("/agents", key="own")).ok()["count"] == 0
    assert (await edge.get(f"/agents/{A}/health", key="own")).refused(404)


async def test_another_tenants_agent_is_not_there(edge: Edge) -> None:
    await edge.new_key("one", "operator", tenant="one")
    await edge.new_key("two", "operator", tenant="two")
    sent = {"id": C, "url": "http://127.0.0.1:1"}
    assert (await edge.post("/agents", sent, key="one")).ok(201)["tenant"] == "one"
    assert (await edge.get(f"/agents/{C}", key="two")).refused(404)
    assert (await edge.post("/agents", sent, key="two")).refused(403)["code"] == "forbidden"
    assert (await edge.post("/agents", sent, key="one")).ok(200)["tenant"] == "one"
    assert (await edge.delete(f"/agents/{C}", key="two")).refused(404)["code"] == "agent_not_found"
    assert (await edge.get(f"/agents/{C}", key="one")).ok()["id"] == C
    assert (await edge.delete(f"/agents/{C}", key="one")).ok() == {"removed": [C]}


async def test_agents_are_filtered_by_what_is_known_of_them(edge: Edge) -> None:
    for agent in (A, B, C):
        await add(edge, agent, sla={"max_latency_p95_ms": 500})
    await probe(edge, A, up=True, ago_s=10)
    await probe(edge, B, up=False, ago_s=10)
    await report(edge, A, 100)
    await report(edge, B, 900)
    edge.committed.notify()
    await wait_all_tasks_blocked()

    async def ids(query: str) -> list[str]:
        return [row["id"] for row in (await edge.get(f"/agents?{query}")).ok()["data"]]

    assert await ids("") == [A, B, C]
    assert await ids("state=healthy") == [A]
    assert await ids("state=unhealthy") == [B]
    assert await ids("min_availability=99%25") == [A]
    assert await ids("min_availability=0") == [A, B]
    assert await ids("max_latency_p95_ms=500") == [A]
    assert (await ids("sort=sla_score"))[0] == A
    assert await ids("sort=sla_score&window=30d&limit=2&offset=2") == [C]
    first = (await edge.get("/agents?limit=2")).ok()
    assert await ids(f"cursor={first['next_cursor']}") == [C]


async def test_the_health_of_an_agent_is_paged_from_the_newest(edge: Edge) -> None:
    await add(edge)
    for ago_s in (30, 20, 10):
        await probe(edge, A, up=ago_s != 20, ago_s=ago_s, transition_from="healthy" if ago_s == 20 else None)
    first = (await edge.get(f"/agents/{A}/health?limit=2")).ok()
    assert [row["up"] for row in first["data"]] == [True, False]
    assert first["data"][0]["latency_ms"] == Decimal("1.5")
    assert first["data"][1]["reason"] == "timeout"
    assert [(change["from"], change["to"]) for change in first["transitions"]] == [("healthy", "unhealthy")]
    rest = (await edge.get(f"/agents/{A}/health?limit=2&cursor={first['next_cursor']}")).ok()
    assert (rest["count"], rest["next_cursor"]) == (1, None)
    assert (await edge.get(f"/agents/{A}/health?start={NOW}")).ok()["count"] == 0
    assert (await edge.get("/agents/urn:asap:agent:nobody/health")).refused(404)


async def test_a_manifest_is_shown_by_its_digest(edge: Edge) -> None:
    await add(edge)
    unit = RecordManifest(A, T0, "abc", b"{}", "self_signed", None, None, 60, PUBLIC)
    assert not isinstance(await edge.database.submit(unit), Refusal)
    manifest = (await edge.get(f"/agents/{A}")).ok()["manifest"]
    assert (manifest["digest"], manifest["verification"], manifest["ttl_seconds"]) == ("abc", "self_signed", 60)
