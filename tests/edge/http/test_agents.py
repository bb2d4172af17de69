"""The directory by HTTP: adding, finding, removing, and what is known of each agent."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest
from nacl.signing import SigningKey
from trio.testing import wait_all_tasks_blocked

from asapd.core.errors import Refusal
from asapd.core.types import SECOND_US
from asapd.edge.http.agent_search import read_wanted, search
from asapd.edge.http.parameters import Parameters
from asapd.store.units.agents import AgentRecord, RecordManifest, RecordProbe, SyncAgents
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
        ({"url": "http://a/latest/meta-data?x="}, "url"),
        ({"url": "http://a/admin#"}, "url"),
        ({"url": "http://a\\b"}, "url"),
        ({"public_key": "x"}, "public_key"),
        ({"sla": {"availability": "101%"}}, "sla"),
        ({"tiers": "gold"}, "tiers"),
        ({"tier": "gold"}, "tier"),
        ({"url": None}, "url"),
        ({"health": "guess"}, "health"),
        ({"sla": {"availability": "99.5.5%"}}, "sla"),
        ({"sla": {"max_error_rate": "-5%"}}, "sla"),
        ({"sla": {"support_hours": "Foo"}}, "sla.support_hours"),
        ({"sla": {"support_hours": "business Europe/Nowhere"}}, "sla.support_hours"),
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
    for agent in (C, "urn:asap:agent:nobody"):
        imported = await edge.post(f"/agents/{agent}/keys", {"public_key": PUBLIC}, key="two")
        assert imported.refused(404)["code"] == "agent_not_found"
    assert (await edge.post("/agents", sent, key="one")).ok(200)["tenant"] == "one"
    assert (await edge.delete(f"/agents/{C}", key="two")).refused(404)["code"] == "agent_not_found"
    assert (await edge.get(f"/agents/{C}", key="one")).ok()["id"] == C
    assert (await edge.delete(f"/agents/{C}", key="one")).ok() == {"removed": [C]}


async def test_no_route_of_one_agent_tells_another_tenant_that_it_is_there(edge: Edge) -> None:
    await edge.new_key("one", "admin", tenant="one")
    await edge.new_key("two", "admin", tenant="two")
    (await edge.post("/agents", {"id": C, "url": "http://127.0.0.1:1"}, key="one")).ok(201)
    routes = {
        (method, rule.rule)
        for rule in edge.app.url_map.iter_rules()
        for method in (rule.methods or set()) & {"GET", "POST", "DELETE"}
        if "<agent>" in rule.rule
    }
    assert len(routes) > 10
    for method, rule in sorted(routes):
        told = []
        for agent in (C, "urn:asap:agent:nobody"):
            path = rule.replace("<agent>", agent).replace("<digest>", "x").replace("<kid>", "x")
            body = {"public_key": PUBLIC} if (method, rule) == ("POST", "/agents/<agent>/keys") else {}
            reply = await edge.call(method, path, body if method == "POST" else None, key="two")
            told.append(reply.body.replace(agent.encode(), b"X"))
            assert reply.refused(404)["code"] == "agent_not_found", (method, rule)
        assert told[0] == told[1], (method, rule)


async def test_a_tenants_key_adds_agents_to_no_other_tenant(edge: Edge) -> None:
    await edge.new_key("one", "operator", tenant="one")
    sent = {"id": C, "url": "http://127.0.0.1:1", "tenant": "two"}
    refused = (await edge.post("/agents", sent, key="one")).refused(403)
    assert (refused["code"], refused["errors"][0]["field"]) == ("forbidden", "tenant")
    (await edge.get(f"/agents/{C}")).refused(404)
    assert (await edge.post("/agents", {**sent, "tenant": "one"}, key="one")).ok(201)["tenant"] == "one"


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


# --- search


def row(agent: str, **known: Any) -> dict[str, Any]:
    figures = {"uptime_percent": None, "latency_p95_ms": None, "sla_score": None}
    return {"id": agent, "state": "healthy", "agent_status": None, "flapping": False, **figures, **known}


ROWS = [
    row("a", uptime_percent=99.5, latency_p95_ms=100, sla_score=80.0, agent_status="READY"),
    row("b", uptime_percent=99.4, latency_p95_ms=50, sla_score=100.0, agent_status="BUSY", flapping=True),
    row("c", state="unknown"),
    row("d", uptime_percent=100.0, state="degraded", sla_score=80.0),
    row("e", latency_p95_ms=101, state="stale", agent_status="DRAINING"),
    row("f", uptime_percent=0.0, latency_p95_ms=100, sla_score=0.0, state="unhealthy"),
]


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("", "abcdef"),
        ("min_availability=99.5", "ad"),
        ("min_availability=99.5%", "ad"),
        ("min_availability=99.4", "abd"),
        ("min_availability=0", "abdf"),
        ("min_availability=100", "d"),
        ("max_latency_p95_ms=100", "abf"),
        ("max_latency_p95_ms=100.5", "abf"),
        ("max_latency_p95_ms=0", ""),
        ("min_availability=99&max_latency_p95_ms=60", "b"),
        ("state=unknown", "c"),
        ("state=stale", "e"),
        ("state=paused", ""),
        ("status=READY", "a"),
        ("status=DRAINING", "e"),
        ("flapping=true", "b"),
        ("flapping=false", "acdef"),
        ("sort=sla_score", "badfce"),
        ("sort=id", "abcdef"),
        ("sort=sla_score&min_availability=1", "bad"),
        ("sort=sla_score&offset=2", "dfce"),
    ],
)
@pytest.mark.parametrize("limit", [1, 2, 5, 100])
def test_a_search_finds_the_same_agents_in_the_same_order_whatever_the_pages(
    query: str, expected: str, limit: int
) -> None:
    """A figure that is not known keeps nothing, and comes last."""
    given = [tuple(part.split("=")) for part in query.split("&") if part]
    found, cursor = "", None
    while True:
        more = [] if cursor is None else [("cursor", cursor)]
        parameters = Parameters([*given, ("limit", str(limit)), *more])  # type: ignore[list-item]  # pairs, by the =
        wanted = read_wanted(parameters)
        parameters.done()
        page = search(ROWS, wanted)
        assert page["count"] == len(page["data"]) <= limit
        found += "".join(one["id"] for one in page["data"])
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert found == expected


@pytest.mark.parametrize(
    "wrong",
    [
        *("min_availability=99.5.5%25", "min_availability=-5", "min_availability=1000", "min_availability=nan"),
        *("max_latency_p95_ms=fast", "state=up", "status=ready", "sort=name", "flapping=maybe", "limit=0", "cursor=x"),
    ],
)
async def test_a_search_that_cannot_be_read_is_refused_by_name(edge: Edge, wrong: str) -> None:
    refused = (await edge.get(f"/agents?{wrong}")).refused(400)
    assert refused["errors"][0]["field"] == wrong.split("=")[0]


# --- life


async def test_an_agent_that_reports_by_itself_needs_no_url_and_shows_what_it_said(edge: Edge) -> None:
    await edge.new_key("own", "ingest", A)
    added = (await edge.post("/agents", {"id": A, "health": "heartbeat"})).ok(201)
    assert (added["url"], added["health"], added["state"]) == (None, "heartbeat", "unknown")
    sent = {"status": "degraded", "agent_status": "BUSY", "ttl_seconds": 20}
    assert (await edge.post(f"/agents/{A}/heartbeat", sent, key="own")).ok() == {
        "agent_id": A,
        "state": "degraded",
        "agent_status": "BUSY",
        "holds_until": "2027-01-15T08:00:20.000000Z",
    }
    (shown,) = (await edge.get("/agents?status=BUSY")).ok()["data"]
    assert (shown["state"], shown["last_probe"]["source"]) == ("degraded", "heartbeat")
    edge.clock.us += 21 * SECOND_US
    shown = (await edge.get(f"/agents/{A}")).ok()
    assert (shown["state"], shown["agent_status"]) == ("stale", None)
    assert (await edge.get("/agents?status=BUSY")).ok()["count"] == 0


async def test_a_heartbeat_is_of_the_agent_that_the_key_may_report_for(edge: Edge) -> None:
    await edge.new_key("own", "ingest", A)
    await edge.new_key("foreign", "ingest", tenant="other")
    for agent in (A, B):
        await edge.post("/agents", {"id": agent, "health": "heartbeat"})
    await add(edge, C)
    assert (await edge.call("POST", f"/agents/{A}/heartbeat", key="own")).ok()["state"] == "healthy"
    assert (await edge.post(f"/agents/{B}/heartbeat", {}, key="own")).refused(403)["code"] == "forbidden"
    for agent in (A, C, "urn:asap:agent:nobody"):
        refused = (await edge.post(f"/agents/{agent}/heartbeat", {}, key="foreign")).refused(404)
        assert (refused["code"], "there is no agent" in refused["detail"]) == ("agent_not_found", True)
    assert (await edge.post(f"/agents/{A}/heartbeat", {}, key="operator")).refused(403)["code"] == "forbidden"
    assert (await edge.post(f"/agents/{C}/heartbeat", {})).refused(409)["code"] == "agent_is_probed"
    assert (await edge.post("/agents/urn:asap:agent:x/heartbeat", {})).refused(404)["code"] == "agent_not_found"


@pytest.mark.parametrize(
    ("sent", "field"),
    [
        ({"status": "fine"}, "status"),
        ({"agent_status": "ASLEEP"}, "agent_status"),
        ({"ttl_seconds": 0}, "ttl_seconds"),
        ({"ttl_seconds": "20"}, "ttl_seconds"),
        ({"agent_id": B}, "agent_id"),
        ({"load": 1}, "load"),
    ],
)
async def test_a_wrong_heartbeat_names_its_field(edge: Edge, sent: dict[str, Any], field: str) -> None:
    await edge.post("/agents", {"id": A, "health": "heartbeat"})
    assert (await edge.post(f"/agents/{A}/heartbeat", sent)).refused(422)["errors"][0]["field"] == field


async def test_an_agent_is_paused_and_resumed_with_a_reason_in_its_history(edge: Edge) -> None:
    await add(edge)
    paused = (await edge.post(f"/agents/{A}/pause", {"reason": "new disk"})).ok()
    assert (paused["state"], paused["changed"]) == ("paused", True)
    assert (await edge.call("POST", f"/agents/{A}/pause")).ok()["changed"] is False
    assert (await edge.get("/agents?state=paused")).ok()["count"] == 1
    assert (await edge.call("POST", f"/agents/{A}/resume")).ok()["state"] == "unknown"
    history = (await edge.get(f"/agents/{A}/history")).ok()["data"]
    assert [(event["event"], event["from"], event["to"], event["reason"]) for event in history] == [
        ("resumed", "paused", "unknown", "resumed"),
        ("paused", "unknown", "paused", "new disk"),
        ("added", None, None, "added by hand"),
    ]
    assert all(event["actor"].startswith("key:") for event in history)
    refused = (await edge.post(f"/agents/{A}/pause", {"why": "x"})).refused(422)
    assert refused["errors"][0]["field"] == "why"


async def test_only_who_may_change_an_agent_pauses_it(edge: Edge) -> None:
    await edge.new_key("one", "operator", tenant="one")
    await edge.new_key("two", "operator", tenant="two")
    await edge.new_key("narrow", "operator", B)
    (await edge.post("/agents", {"id": C, "url": "http://127.0.0.1:1"}, key="one")).ok(201)
    for key in ("two", "narrow"):
        for verb in ("pause", "resume"):
            assert (await edge.post(f"/agents/{C}/{verb}", {}, key=key)).refused(404)["code"] == "agent_not_found"
        for part in ("history", "manifests", "manifests/x"):
            assert (await edge.get(f"/agents/{C}/{part}", key=key)).refused(404)["code"] == "agent_not_found"
    assert (await edge.post(f"/agents/{C}/pause", {}, key="one")).ok()["state"] == "paused"


async def test_a_change_that_names_no_tenant_keeps_the_one_there_is(edge: Edge) -> None:
    assert (await add(edge, tenant="one")).ok(201)["tenant"] == "one"
    assert (await add(edge, url="http://127.0.0.1:2")).ok(200)["tenant"] == "one"
    assert (await add(edge, tenant="two")).ok(200)["tenant"] == "two"
    assert (await add(edge, B)).ok(201)["tenant"] == "default"


async def test_what_was_kept_of_an_agent_stays_with_the_tenant_that_it_had(edge: Edge) -> None:
    for tenant in ("one", "two"):
        await edge.new_key(tenant, "operator", tenant=tenant)

    async def happens(number: int) -> None:
        edge.clock.us += SECOND_US
        manifest = RecordManifest(C, edge.clock.us, f"digest{number}", b'{"n": %d}' % number, "unsigned", *[None] * 4)
        assert not isinstance(await edge.database.submit(manifest), Refusal)
        await probe(edge, C, up=True, ago_s=(T0 - edge.clock.us) // SECOND_US)
        for verb in ("pause", "resume"):
            (await edge.post(f"/agents/{C}/{verb}", {"reason": f"secret{number}"})).ok()
        edge.clock.us += SECOND_US

    async def seen(key: str) -> tuple[int, int, list[str]]:
        health = (await edge.get(f"/agents/{C}/health", key=key)).ok()
        found = (await edge.get(f"/agents/{C}/manifests", key=key)).ok()["data"]
        return health["count"], len(health["transitions"]), [one["digest"] for one in found]

    sent = {"id": C, "url": "http://127.0.0.1:1"}
    (await edge.post("/agents", {**sent, "url": "http://127.0.0.1:1/secret"}, key="one")).ok(201)
    await happens(1)
    assert await seen("one") == (1, 2, ["digest1"])
    (await edge.post("/agents", {**sent, "tenant": "two"})).ok()
    assert await seen("two") == (0, 0, [])
    row = (await edge.get(f"/agents/{C}", key="two")).ok()
    assert (row["manifest"], row["last_probe"], row["sla_error"]) == (None, None, None)
    history = (await edge.get(f"/agents/{C}/history", key="two")).ok()["data"]
    assert [event["event"] for event in history] == ["added"]
    assert "secret" not in str(history)
    newest = (await edge.get(f"/agents/{C}/history")).ok()["data"][:2]
    assert [event["event"] for event in newest] == ["added", "removed"]
    (await edge.get(f"/agents/{C}/manifests/digest1", key="two")).refused(404)
    await happens(2)
    assert await seen("two") == (1, 2, ["digest2"])
    assert await seen("admin") == (2, 4, ["digest2", "digest1"])
    # Gone and come back to the first: what the second had is not shown either.
    (await edge.delete(f"/agents/{C}", key="two")).ok()
    (await edge.post("/agents", {**sent, "tenant": "one"})).ok(201)
    assert (await seen("one"))[::2] == (0, [])


async def test_the_history_is_paged_and_outlives_the_agent(edge: Edge) -> None:
    await add(edge)
    await add(edge, url="http://127.0.0.1:2")
    await edge.delete(f"/agents/{A}")
    first = (await edge.get(f"/agents/{A}/history?limit=2")).ok()
    assert [event["event"] for event in first["data"]] == ["removed", "changed"]
    assert first["data"][1]["details"] == {"url": ["http://127.0.0.1:1", "http://127.0.0.1:2"]}
    rest = (await edge.get(f"/agents/{A}/history?cursor={first['next_cursor']}")).ok()
    assert ([event["event"] for event in rest["data"]], rest["next_cursor"]) == (["added"], None)
    assert (await edge.get("/agents/urn:asap:agent:never/history")).refused(404)["code"] == "agent_not_found"


async def test_every_version_of_a_manifest_can_be_read_by_its_digest(edge: Edge) -> None:
    await add(edge)
    for number in range(3):
        body = b'{"id": "%s", "version": "%d"}' % (A.encode(), number)
        unit = RecordManifest(A, T0 + number, f"digest{number}", body, "unsigned", None, "sla: bad", None, None)
        assert not isinstance(await edge.database.submit(unit), Refusal)
    first = (await edge.get(f"/agents/{A}/manifests?limit=2")).ok()
    assert [one["digest"] for one in first["data"]] == ["digest2", "digest1"]
    assert first["data"][0]["sla_error"] == "sla: bad"
    rest = (await edge.get(f"/agents/{A}/manifests?limit=2&cursor={first['next_cursor']}")).ok()
    assert [one["digest"] for one in rest["data"]] == ["digest0"]
    one = (await edge.get(f"/agents/{A}/manifests/digest1")).ok()
    assert (one["digest"], one["document"]) == ("digest1", {"id": A, "version": "1"})
    assert (await edge.get(f"/agents/{A}/manifests/other")).refused(404)["code"] == "manifest_not_found"


async def test_why_a_manifest_was_not_taken_is_in_the_row(edge: Edge) -> None:
    await add(edge)
    edge.services.without_manifest.note(A, "not_taken", "it is the manifest of somebody else", T0)
    assert (await edge.get(f"/agents/{A}")).ok()["manifest_problem"] == {
        "reason": "not_taken",
        "detail": "it is the manifest of somebody else",
        "since": "2027-01-15T08:00:00.000000Z",
    }


async def test_health_says_how_much_of_the_time_is_known(edge: Edge) -> None:
    await add(edge)
    await probe(edge, A, up=True, ago_s=20)
    await probe(edge, A, up=False, ago_s=5)
    edge.committed.notify()
    await wait_all_tasks_blocked()
    uptime = (await edge.get(f"/agents/{A}/health?window=1h")).ok()["uptime"]
    assert (uptime["up_seconds"], uptime["down_seconds"], uptime["percent"]) == (15, 5, 75)
    assert uptime["unknown_seconds"] > 3500
